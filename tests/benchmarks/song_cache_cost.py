"""What a song costs that is in RAM, as a ratio to reading its file: ``python tests/benchmarks/song_cache_cost.py``.

Writes songs to a temporary folder and reads all of them in turn as upstream does, with and without a cache that holds
them, alternating. The files have just been written, so they come from the system's own cache: from a disk or a network
drive, reading takes longer by what that needs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from song_check_cost import write_song

from sidestep_plugin.memory.song_cache import SongCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--songs", type=int, default=50)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--rounds", type=int, default=5)
    said = parser.parse_args()
    times: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / f"{number}.pt" for number in range(said.songs)]
        for file in files:
            write_song(file, said.seconds, torch.bfloat16)
        cache = SongCache(2**40)

        def read(file: Path, kept: bool) -> object:
            def from_disk() -> object:
                return torch.load(file, map_location="cpu", weights_only=True)

            return cache.read(str(file), from_disk) if kept else from_disk()

        for file in files:
            read(file, True)
        for _ in range(said.rounds):
            for kept, found in times.items():
                start = time.perf_counter()
                for file in files:
                    read(file, kept)
                found.append(time.perf_counter() - start)
    read_anew, from_ram = (1000 * statistics.median(times[kept]) / said.songs for kept in (False, True))
    print(f"{said.songs} songs of {said.seconds} s: {read_anew:.2f} ms to read one, {from_ram:.3f} ms from RAM,")
    print(f"a ratio of {from_ram / read_anew:.3f}")


if __name__ == "__main__":
    main()
