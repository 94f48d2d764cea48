"""examples/lbfgs.py: the optimum that scikit-learn finds, a differential equation, and wrong files."""

import numpy as np
import pytest
from test_examples import data_folder, module, program

import headwater as hw


def objective(x, y, c, w, b):
    scores = x @ w + b
    return c * np.sum(np.logaddexp(0, scores) - y * scores) + 0.5 * w @ w


def assert_optimal(file, c, workers, servers):
    """The regression's weights and objective are those of scikit-learn's optimum."""
    from sklearn.linear_model import LogisticRegression

    example = module("lbfgs")
    settings = {"file": str(file), "c": c}
    found = hw.run(example.logistic, workers=workers, servers=servers, engine="inline", settings=settings)
    x, y = example.read(str(file))
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x, y)
    w, b, report_loss = found.values[0]
    best = objective(x, y, c, theirs.coef_[0], theirs.intercept_[0])
    assert w == pytest.approx(theirs.coef_[0], abs=1e-3)
    assert b == pytest.approx(theirs.intercept_[0], abs=1e-3)
    assert objective(x, y, c, w.astype(np.float64), b) == pytest.approx(best, rel=1e-6)
    assert report_loss == pytest.approx(best, rel=1e-6)


@pytest.mark.long
def test_logistic_regression_on_a9a_reaches_the_optimum_of_scikit_learn():
    file = data_folder() / "a9a.libsvm.gz"
    if not file.exists():
        pytest.skip(f"no file {file}: HEADWATER_DATA names the folder of data files")
    assert_optimal(file, 1.0, workers=2, servers=2)


def test_logistic_regression_on_generated_rows_reaches_the_optimum_of_scikit_learn(tmp_path):
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 6)).round(3)
    y = x @ np.arange(6) + random.standard_normal(200) > 0
    lines = (
        " ".join([str(int(label)), *(f"{i}:{value}" for i, value in enumerate(row))])
        for row, label in zip(x, y, strict=True)
    )
    file = tmp_path / "rows.libsvm"
    file.write_text("\n".join(lines) + "\n")
    assert_optimal(file, 0.5, workers=3, servers=2)


@pytest.mark.long
def test_the_differential_equation_is_solved():
    output = program("lbfgs.py", "--pinn", "--workers", 2)
    assert float(output.rsplit("largest error ", 1)[1]) < 1e-3
    assert "stopped: " in output


@pytest.mark.parametrize(
    ("lines", "what"),
    [("1 3:x\n", "line 1: expected LABEL INDEX:VALUE"), ("1 1:1\nspam 1:2\n", "line 2"), ("", "no rows")],
)
def test_a_file_in_another_format_is_named_with_its_line(tmp_path, lines, what):
    file = tmp_path / "rows.libsvm"
    file.write_text(lines)
    with pytest.raises(ValueError, match=what):
        module("lbfgs").read(str(file))
