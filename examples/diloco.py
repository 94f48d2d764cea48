"""A small language model trained far apart: how much four ways of training talk, and what comes of it.

    python examples/diloco.py text8.gz --method diloco --workers 4 --servers 2 --steps 480
    headwater run examples/diloco.py --set text=text8.gz --set method=decoupled \\
        --sync sync:quorum=2,grace=slack,late=carry

The text is plain or .gz; the model a transformer over its characters. Methods:

- ddp: synchronous gradients, AdamW on the servers.
- diloco: AdamW on each worker, and every `every` steps Nesterov momentum on the servers (arXiv 2311.08105).
- decoupled: as before, but by a quorum, in four fragments, while training goes on, weighted by tokens, four
  bits an element, and what misses its round counts in the next one (arXiv 2604.21428).
- async: as diloco, but each worker's change is applied as it comes.

`--outer-lr` 0 is 0.7, `--fragments` 0 is what the method has. Prints the loss on the last twentieth of the
text, which nobody trains on, and what was sent. `--slow RANK` makes a worker three times as slow; where
nobody waits for it, it makes a third of the steps of each other one, and all together as many as before.
`--kill RANK` ends a worker's process in the middle; another takes its place.
"""

import argparse
import gzip
import os
import signal
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import headwater as hw

SYNC = {
    "ddp": "sync",
    "diloco": "sync",
    "decoupled": "sync:quorum=2,grace=slack,late=carry",
    "async": "async",
}
DEFAULTS = {
    "text": "", "method": "diloco", "steps": 480, "every": 24, "fragments": 0, "overlap": 2, "batch": 8,
    "context": 64, "dim": 160, "layers": 4, "lr": 2e-3, "outer_lr": 0.0, "slow": -1, "kill": -1, "seed": 0,
}  # fmt: skip


def read(path: str) -> tuple[np.ndarray, int]:
    """The text as numbers of its characters, and how many different ones there are.

    Raises:
        OSError: the file cannot be read.
    """
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        kinds, numbers = np.unique(np.frombuffer(file.read(), np.uint8), return_inverse=True)
    return numbers.astype(np.int64), len(kinds)


class Block(nn.Module):
    """Attention to what came before, then two layers (Vaswani et al. 2017, norms first)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = max(dim // 32, 1)
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        seen = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(seen.transpose(-2, -3).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class LanguageModel(nn.Module):
    def __init__(self, characters: int, context: int, dim: int, layers: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, dim), nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*[Block(dim) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, characters)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.characters(ids) + self.places.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, text: np.ndarray, starts: np.ndarray, context: int) -> torch.Tensor:
        """Of predicting each next character of the pieces that begin at `starts`."""
        ids = torch.from_numpy(text[starts[:, None] + np.arange(context + 1)])
        return functional.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(worker: hw.Worker) -> dict[str, float]:
    """Train on pieces of the text that rank and step say; what it came to."""
    chosen = {**DEFAULTS, **worker.settings}
    torch.set_num_threads(1)
    text, characters = read(chosen["text"])
    cut, context, method = len(text) * 19 // 20, chosen["context"], chosen["method"]
    torch.manual_seed(chosen["seed"])  # the lowest rank's values count
    net = LanguageModel(characters, context, chosen["dim"], chosen["layers"])
    step, finish = optimizer(worker, net, chosen)
    first, began, steps = worker.kept.get("made", 0), time.monotonic(), share(worker, chosen)
    correlations: list[float] = []
    for made in range(first, steps):
        at = time.monotonic()
        numbers = np.random.default_rng([chosen["seed"], worker.rank, made])
        loss = net.loss(text, numbers.integers(0, cut - context - 1, chosen["batch"]), context)
        loss.backward()
        if worker.rank == chosen["slow"]:
            time.sleep(2 * (time.monotonic() - at))
        if worker.rank == chosen["kill"] and not worker.restarted and 2 * made >= steps:
            os.kill(os.getpid(), signal.SIGKILL)
        if method != "ddp" or not made % 24:
            worker.keep(made=made + 1)
        correlations += step(chosen["batch"] * context)
        worker.log(loss=loss.item())
    seconds = time.monotonic() - began
    own = worker.statistics()
    finish()
    total = worker.sum(
        tokens=(steps - first) * chosen["batch"] * context,
        bytes=own.gradient_bytes,
        rate=(steps - first) * chosen["batch"] * context / seconds,
    )
    starts = np.arange(cut, len(text) - context - 1, max((len(text) - cut) // 400, context))
    with torch.no_grad():
        held_out = np.mean([net.loss(text, part, context).item() for part in np.array_split(starts, 8)])
    return {
        "loss": float(held_out),
        "tokens/s": total["rate"],
        "bytes/token": total["bytes"] / total["tokens"],
        "correlation": float(np.mean(correlations[len(correlations) // 2 :]))
        if correlations
        else float("nan"),
    }


def share(worker: hw.Worker, chosen: dict) -> int:
    """Steps of a worker, of `steps` for each: by how fast it is, where rounds do not wait for everybody."""
    if chosen["slow"] < 0 or chosen["method"] in ("ddp", "diloco"):
        return chosen["steps"]
    slow = round(chosen["steps"] * worker.workers / (3 * worker.workers - 2))
    return slow if worker.rank == chosen["slow"] else 3 * slow


def optimizer(worker: hw.Worker, net: LanguageModel, chosen: dict):
    """What makes a step that was computed from so many tokens, and tells correlations; and the end."""
    method = chosen["method"]
    if method == "ddp":
        opt = hw.torch.DistributedOptimizer(worker, net, hw.AdamW(chosen["lr"], weight_decay=0.1))

        def together(tokens: int) -> list[float]:
            opt.step()
            opt.zero_grad()
            return []

        return together, worker.barrier
    decoupled = method == "decoupled"
    inner = torch.optim.AdamW(net.parameters(), chosen["lr"], weight_decay=0.1)
    alone = method == "async"
    rate = chosen["outer_lr"] or (0.7 / worker.workers if alone else 0.7)
    outer = hw.torch.OuterOptimizer(
        worker,
        net,
        inner,
        hw.SGD(rate) if alone else hw.SGD(rate, 0.9, nesterov=True),
        every=chosen["every"],
        fragments=chosen["fragments"] or (4 if decoupled else 1),
        overlap=chosen["overlap"] if decoupled else 0,
        weight="tokens",
        codec="q4" if decoupled else None,
    )
    results: list = [None]

    def locally(tokens: int) -> list[float]:
        inner.step()
        inner.zero_grad()
        outer.step(tokens)
        if outer.result is results[0]:
            return []
        results[0] = outer.result
        return list(outer.result.correlations.values())

    def finish() -> None:
        outer.flush()
        worker.barrier()
        outer.pull_parameters()

    return locally, finish


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", help="a file of text, plain or .gz")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--sync", help="by default what the method is defined with")
    for name, value in DEFAULTS.items():
        if name != "text":
            choices = list(SYNC) if name == "method" else None
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=type(value), default=value, choices=choices
            )
    options = vars(parser.parse_args())
    workers, servers, sync = options.pop("workers"), options.pop("servers"), options.pop("sync")
    result = hw.run(
        train,
        workers=workers,
        servers=servers,
        sync=sync or SYNC[options["method"]],
        settings=options,
        restarts=1,
    )
    first = result.values[0]
    print(f"{options['method']}: " + ", ".join(f"{name} {value:.4g}" for name, value in first.items()))


if __name__ == "__main__":
    main()
