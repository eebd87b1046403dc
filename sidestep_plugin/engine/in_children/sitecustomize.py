"""Imported by every Python process that a program under ``acestep-train run`` starts: plugins are attached there too.

Python imports the first module of this name at its start. The machine's own one, if there is one, is run as well.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib would slow down every Python

_elsewhere = [place for place in sys.path if os.path.abspath(place) != _here]  # noqa: PTH100
_spec = PathFinder.find_spec("sitecustomize", _elsewhere)
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(module_from_spec(_spec))

try:
    from sidestep_plugin.engine.autoload import load_carried_over
except ModuleNotFoundError:
    pass  # a Python of another environment, in which the package is not installed
else:
    load_carried_over()
