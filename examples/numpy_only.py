"""Linear regression without torch: every worker has a part of the rows, the servers have the weights.

python examples/numpy_only.py
"""

import numpy as np

import headwater as hw

TRUE = np.array([3.0, -2.0, 0.5], dtype=np.float32)


def train(worker: hw.Worker) -> float:
    """Fit y = x · w; returns the largest error of a weight."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 3), dtype=np.float32)
    y = x @ TRUE
    model = worker.model("line", {"w": np.zeros(3, dtype=np.float32)}, hw.SGD(lr=0.1))
    for rows, targets in worker.batches((x, y), batch_size=50, epochs=8, shuffle=True):
        w = model.pull()["w"]
        model.push({"w": 2 * rows.T @ (rows @ w - targets) / len(rows)})
        worker.step()
    return float(np.abs(model.pull()["w"] - TRUE).max())


if __name__ == "__main__":
    result = hw.run(train, workers=2)
    print("w =", np.round(result.parameters["line"]["w"], 3), "largest error", f"{max(result.values):.1e}")
