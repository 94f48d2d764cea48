"""Policy gradient (REINFORCE, Williams 1992) with one learner and rollout processes that follow it.

    python examples/rollouts.py --rollouts 2 --steps 150

The learner is a worker that trains a policy. Rollout processes pin one version of it, play some episodes of a
small game, and append them to files, each with the version that played it. The learner reads these files as a
stream, so a step carries which episodes are in the policy. It reports the reward and how stale the episodes
were: how many versions the policy had moved on by the time it learned from them.

The game: a walker on a line of cells starts in the middle and steps left or right. The last cell on the right
gives 1, the one on the left 0, and each step costs 0.02.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import headwater as hw

CELLS, LONGEST, COST = 7, 40, 0.02
DEFAULTS = {"folder": "", "steps": 150, "episodes": 16, "lr": 0.5}


def chance_of_right(policy: np.ndarray) -> np.ndarray:
    """Of each cell, from one logit a cell."""
    return 1 / (1 + np.exp(-policy))


def play(policy: np.ndarray, chance: np.random.Generator) -> tuple[list[int], list[int], float]:
    """One episode: the cells that it came to, what was done there (1: right), and the reward of all of it."""
    cell, cells, moves = CELLS // 2, [], []
    right = chance_of_right(policy)
    while 0 < cell < CELLS - 1 and len(cells) < LONGEST:
        cells.append(cell)
        moves.append(int(chance.random() < right[cell]))
        cell += 1 if moves[-1] else -1
    return cells, moves, float(cell == CELLS - 1) - COST * len(cells)


def roll_out(address: str, folder: Path, number: int, episodes: int) -> None:
    """Play with the newest version, again and again, until the training ends."""
    chance = np.random.default_rng(number)
    with (
        hw.follow(address, models="policy", tables=(), every=1) as follower,
        (folder / f"rollout-{number}.jsonl").open("a") as file,
    ):
        while follower.failure is None:
            with follower.pin() as view:
                policy = view.parameters("policy")["logits"]
                for _ in range(episodes):
                    cells, moves, reward = play(policy, chance)
                    played = {"cells": cells, "moves": moves, "reward": reward}
                    file.write(json.dumps({"version": view.version.number, "episode": played}) + "\n")
                version = view.version
            file.flush()
            try:
                follower.wait(hw.Version(version.generation, version.number + 1))
            except hw.errors.StalledError:
                return


def train(worker: hw.Worker) -> tuple[float, float, int]:
    """Learn from episodes as they come; returns the mean reward of the last tenth of steps, the mean and the
    largest staleness in versions."""
    options = {**DEFAULTS, **worker.settings}
    model = worker.model("policy", {"logits": np.zeros(CELLS, np.float32)}, hw.Adam(lr=0.1))
    rewards: list[float] = []
    stale: list[int] = []
    for batch in worker.batches(hw.data.Tail(options["folder"], "*.jsonl"), options["episodes"]):
        policy = model.pull()["logits"]
        played = batch["episode"]
        baseline = float(np.mean([one["reward"] for one in played]))
        gradient = np.zeros(CELLS, np.float32)
        for one in played:
            cells, moves = np.array(one["cells"]), np.array(one["moves"])
            slope = moves - chance_of_right(policy[cells])
            np.add.at(gradient, cells, -slope * (one["reward"] - baseline) / len(played))
        stale += (worker.version - batch["version"]).tolist()
        model.push({"logits": gradient})
        worker.step()
        rewards.append(baseline)
        worker.log(reward=baseline, stale=float(np.mean(stale[-len(played) :])))
        if len(rewards) == options["steps"]:
            break
    last = rewards[-max(1, len(rewards) // 10) :]
    return float(np.mean(last)), float(np.mean(stale)), int(max(stale))


def run(options: argparse.Namespace) -> tuple[float, float, int]:
    """Start the learner and rollout processes; what `train` returns."""
    rollouts: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:

        def started(address: str) -> None:
            for number in range(options.rollouts):
                playing = [
                    "--play",
                    address,
                    "--folder",
                    folder,
                    "--number",
                    str(number),
                    "--episodes",
                    str(options.episodes),
                ]
                rollouts.append(
                    subprocess.Popen(
                        [sys.executable, __file__, *playing], env={**os.environ, "OMP_NUM_THREADS": "1"}
                    )
                )

        settings = {"folder": folder, "steps": options.steps, "episodes": options.episodes}
        try:
            result = hw.run(train, workers=1, sync="async", settings=settings, started=started)
        finally:
            for process in rollouts:
                process.kill()
                process.wait()
    learned: tuple[float, float, int] = result.values[0]
    return learned


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, default=2, help="processes that play")
    parser.add_argument("--steps", type=int, default=DEFAULTS["steps"], help="of the learner")
    parser.add_argument("--episodes", type=int, default=DEFAULTS["episodes"], help="played at a time")
    parser.add_argument("--play", default="", metavar="ADDRESS", help="be a rollout process of that cluster")
    parser.add_argument("--folder", default="")
    parser.add_argument("--number", type=int, default=0)
    options = parser.parse_args()
    if options.play:
        roll_out(options.play, Path(options.folder), options.number, options.episodes)
        return
    reward, mean, most = run(options)
    print(f"reward {reward:.3f}, episodes were {mean:.1f} versions old on average, {most} at most")


if __name__ == "__main__":
    main()
