"""What reading every value of every song costs, beside what merely opening the songs costs, as ratios.

    python tests/benchmarks/song_check_cost.py [--songs 1000] [--seconds 180] [--dtype bfloat16] [--rounds 3]

Writes songs of that length to a temporary folder and times, in turn: mapping them and checking their shapes, looking
for values that are not finite, and hashing the files (both happen once in a training). Prints medians. The files have
just been written, so they come from memory: on a cold disk, its reading speed is added to the second row.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sidestep_plugin.songs import values
from sidestep_plugin.songs.dataset import FRAMES_A_SECOND
from sidestep_plugin.songs.one_song import read_song

TOKENS, WIDTH = 512, 2048  # conditions of a song with lyrics


def write_song(file: Path, seconds: int, dtype: torch.dtype) -> None:
    frames = seconds * FRAMES_A_SECOND
    song = {
        "target_latents": torch.randn(frames, 64),
        "attention_mask": torch.ones(frames),
        "encoder_hidden_states": torch.randn(TOKENS, WIDTH),
        "encoder_attention_mask": torch.ones(TOKENS),
        "context_latents": torch.randn(frames, 128),
    }
    torch.save({name: tensor.to(dtype) for name, tensor in song.items()}, file)


def timed(action: Callable[[Path], object], files: list[Path]) -> float:
    values._hashes.clear()
    values._not_finite.clear()
    start = time.perf_counter()
    for file in files:
        action(file)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--songs", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    said = parser.parse_args()
    actions: dict[str, Callable[[Path], object]] = {
        "opened and mapped": read_song,
        "values looked at": values.not_finite_in,
        "files hashed": values.hash_of,
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / f"{number}.pt" for number in range(said.songs)]
        for file in files:
            write_song(file, said.seconds, getattr(torch, said.dtype))
        size = sum(file.stat().st_size for file in files)
        for _ in range(said.rounds):
            for name, action in actions.items():
                times[name].append(timed(action, files))
    medians = {name: statistics.median(found) for name, found in times.items()}
    opened = medians["opened and mapped"]
    print(
        f"{said.songs} songs of {said.seconds} s, {said.dtype}, {size / said.songs / 1e6:.1f} MB each, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name, seconds in medians.items():
        each = 1000 * seconds / said.songs
        print(f"    {name:<18}{seconds:8.2f} s   {seconds / opened:6.1f} of opening   {each:6.1f} s for 1,000 songs")


if __name__ == "__main__":
    main()
