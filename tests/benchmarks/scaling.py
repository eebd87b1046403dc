"""Songs per second of two CPU processes compared with one, one thread each: ``python tests/benchmarks/scaling.py``.

The stand-in's decoder is so small that talking to the other process weighs more than with a real one. Both ways take
turns, so that whatever else the machine does weighs on both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS, EPOCHS, SONGS = 3, 20, 12


def songs_per_second(miniature, output: Path, devices: int) -> float:
    words = ["--plugin", "sidestep", "--model", "base", "--device", "cpu", "--yes", "--devices", devices]
    words += ["--acestep-root", miniature.root, "--checkpoint-dir", miniature.checkpoints, "--save-every", 1000]
    words += ["--dataset-dir", miniature.tensors, "--output-dir", output, "--epochs", EPOCHS, "--batch-size", 2]
    done = subprocess.run(
        [sys.executable, "-m", "sidestep_plugin", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    report = json.loads((output / "training_report.json").read_text(encoding="utf-8"))
    return 2 * devices / report["seconds_per_step"]


def main() -> None:
    from sidestep_plugin import miniature

    with tempfile.TemporaryDirectory() as folder:
        built = miniature.build(Path(folder) / "miniature", models=["acestep-v15-base"], songs=SONGS)
        ratios = []
        for number in range(ROUNDS):
            one, two = (songs_per_second(built, Path(folder) / f"{number}-{count}", count) for count in (1, 2))
            ratios.append(two / one)
            print(f"{one:7.1f} songs/s with one process, {two:7.1f} with two: {two / one:.2f} times", flush=True)
    print(f"median: {statistics.median(ratios):.2f} times")


if __name__ == "__main__":
    main()
