"""Classes of a script in processes that a worker starts."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = textwrap.dedent("""
    import multiprocessing

    class Numbers:
        def __init__(self, n):
            self.n = n

        def total(self):
            return sum(range(self.n))

    def total(numbers, queue):
        queue.put((numbers.total(), type(numbers).__name__))

    def train(worker):
        context = multiprocessing.get_context(METHOD)
        queue = context.Queue()
        process = context.Process(target=total, args=(Numbers(4), queue))
        process.start()
        answer = queue.get(timeout=60)
        process.join(60)
        return answer, process.exitcode

    if __name__ == "__main__":
        import headwater as hw
        print(hw.run(train, workers=1).values)
""")

LOADER = textwrap.dedent("""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Squares(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.tensor(index * index)

    def train(worker):
        loader = DataLoader(Squares(), 2, num_workers=1, multiprocessing_context="spawn", timeout=100)
        return [batch.tolist() for batch in loader]
""")


def run(tmp_path, script, *command):
    path = tmp_path / "a script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, *command, str(path)], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


RUN = ("-m", "headwater", "run")


@pytest.mark.parametrize(
    ("method", "command"),
    [
        ("spawn", RUN),
        pytest.param("forkserver", RUN, marks=pytest.mark.long),
        pytest.param("spawn", (), marks=pytest.mark.long),
        pytest.param("forkserver", (), marks=pytest.mark.long),
    ],
)
def test_what_a_script_defines_goes_to_processes_that_are_spawned(tmp_path, method, command):
    out = run(tmp_path, SCRIPT.replace("METHOD", repr(method)), *command)
    assert "((6, 'Numbers'), 0)" in out


@pytest.mark.long
def test_a_data_set_of_a_script_goes_to_spawned_processes_of_a_data_loader(tmp_path):
    assert "[[0, 1], [4, 9]]" in run(tmp_path, LOADER, *RUN)
