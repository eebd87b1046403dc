"""What the surrounding program left in the environment and this one cannot honour: a notebook, a cluster, a framework.

Variables are inherited by whatever is started. Some of them are meant for the program that set them, and end or divert
ours at an import, long before a training.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Final

_FRAMEWORKS: Final = ("USE_TF", "USE_TORCH", "USE_FLAX", "USE_JAX")
"""With these, transformers hides PyTorch in favour of another framework, and no model of ACE-Step's can be loaded."""


def settle(*, draws_only_files: bool) -> None:
    """Take out of the environment what this program cannot honour.

    Args:
        draws_only_files: whether pictures only go into files, as with all commands but those that start another
            program; no other backend of matplotlib is needed then.
    """
    # Jupyter and Colab name a backend of their own, and matplotlib cannot be imported where it is not installed.
    backend = os.environ.get("MPLBACKEND")
    if backend is not None and (draws_only_files or not _installed(backend)):
        os.environ["MPLBACKEND"] = "agg"
    for name in _FRAMEWORKS:
        os.environ.pop(name, None)
    # In a Slurm job with several tasks, Lightning refuses or waits for processes that srun would have started. With
    # this name of the job it leaves Slurm alone. Processes that are meant to train together have WORLD_SIZE as well.
    if "SLURM_NTASKS" in os.environ:
        os.environ["SLURM_JOB_NAME"] = "interactive"


def _installed(backend: str) -> bool:
    """Whether the module of a backend of matplotlib is here; True for matplotlib's own."""
    module = backend.removeprefix("module://") if backend.startswith("module://") else _MODULES.get(backend.lower())
    return module is None or importlib.util.find_spec(module.partition(".")[0]) is not None


_MODULES: Final = {"inline": "matplotlib_inline", "ipympl": "ipympl", "widget": "ipympl"}
"""Backends that other distributions bring, by their short names."""
