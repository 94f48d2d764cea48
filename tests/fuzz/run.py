"""Fuzz one target: `python tests/fuzz/run.py TARGET [libFuzzer options]`, after `pip install atheris`.

    python tests/fuzz/run.py frames -max_total_time=3600

Ends with the input that broke it, as a file `crash-…`, or with the time. Inputs that reach new code are
kept in tests/fuzz/corpus/TARGET, which no commit holds.
"""

import sys
from pathlib import Path

import atheris

LOCAL = Path(__file__).parent


def main() -> None:
    """Run until something breaks."""
    with atheris.instrument_imports(include=["headwater"]):
        from targets import SEEDS, TARGETS

    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"got {name!r}, expected one of {', '.join(TARGETS)}")
    corpus = LOCAL / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
