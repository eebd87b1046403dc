"""Starts jobs as several processes on this machine, as torchrun does, and looks at what they left."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

JOB = Path(__file__).with_name("job.py")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def variables(rank, size, port, local_size=None):
    local_size = local_size or size
    named = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % local_size, "LOCAL_WORLD_SIZE": local_size}
    named |= {"GROUP_RANK": rank // local_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in named.items()}


@contextlib.contextmanager
def started(folder, jobs, size):
    """The processes of some jobs; none outlives the block."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(jobs), encoding="utf-8")
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    processes = [
        subprocess.Popen(
            [sys.executable, str(JOB), str(folder)],
            env=environment | (variables(rank, size, port) if size > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for rank in range(size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def done(folder, jobs, size, *, seconds=120.0):
    """Run jobs to their end in `size` processes | returns for each job what each process saw."""
    import torch

    with started(folder, jobs, size) as processes:
        said = [process.communicate(timeout=seconds)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * size, "\n".join(said)
    names = [str(rank) for rank in range(size)] if size > 1 else ["alone"]
    return [
        [torch.load(folder / str(number) / f"seen-{name}.pt", weights_only=False) for name in names]
        for number in range(len(jobs))
    ]
