"""Upstream's names, and whether what stands there has the shape that we expect.

It reads the trainer's own code instead of a list of versions: a sampler that is defined but never called is not
compatible.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, Final, Literal

from ..adapters.kinds import KINDS
from ..run import AdapterType

SAMPLER = "sample_discrete_timestep"

MODULE_CLASS: Final[dict[AdapterType, str]] = {kind.name: kind.module_class for kind in KINDS}
TRAINER_CLASS: Final[dict[AdapterType, str]] = {kind.name: kind.trainer_class for kind in KINDS}
CONFIG_CLASS: Final[dict[AdapterType, str]] = {kind.name: kind.config_class for kind in KINDS}
SAVE_FUNCTIONS: Final[dict[AdapterType, tuple[str, ...]]] = {kind.name: kind.save_functions for kind in KINDS}
WEIGHT_FILES: Final[dict[AdapterType, tuple[str, ...]]] = {kind.name: kind.weight_files for kind in KINDS}
"""Where upstream's save functions put the weights, in the folder that they are told."""

FINAL: Final = "final"
"""Folder below the output folder into which upstream saves the finished adapter."""

INTERRUPTED: Final = "interrupted"
"""Folder below it for the checkpoint of a training that was stopped or failed."""

_DROPOUT: Final = re.compile(r"\w*(null_cond|cfg_drop|cond_drop|condition_drop|drop_cond|cfg_ratio)\w*", re.IGNORECASE)
"""Names that a training step has only when it replaces conditions by itself."""


def adapter_types(trainer: Any) -> list[AdapterType]:
    """The kinds of adapter that this trainer trains."""
    return [kind for kind in MODULE_CLASS if hasattr(trainer, MODULE_CLASS[kind])]


def sampler_style(function: Callable[..., Any]) -> Literal["timesteps_tensor", "device and dtype"] | None:
    """How a ``sample_discrete_timestep`` learns device and dtype, by its parameters; None for an unknown signature."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    names = [parameter.name for parameter in parameters]
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if names[1:3] == ["device", "dtype"] and required == names[:3]:
        return "device and dtype"
    if len(names) >= 2 and names[1] == "timesteps_tensor" and required == names[:2]:
        return "timesteps_tensor"
    return None


def sampler_problem(trainer: Any, module_class: str) -> str | None:
    """Why replacing the sampler would not work for one training module, or None when it would."""
    sampler = getattr(trainer, SAMPLER)
    owner, step = _step_of(trainer, module_class)
    if sampler_style(sampler) is None:
        signature = _signature_text(sampler)
        return f"it takes {signature}, expected (bsz, timesteps_tensor) or (bsz, device, dtype)"
    if step is None:
        return f"{module_class} has no training_step that could call it"
    if not _reaches(step, SAMPLER, trainer, owner):
        return f"{module_class}.training_step never calls it, so the plugin's timesteps would have no effect"
    for call in _calls_in(step, SAMPLER):
        try:
            inspect.signature(sampler).bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg})
        except TypeError:
            return (
                f"{module_class}.training_step calls it as {ast.unparse(call)}, but it takes "
                f"{_signature_text(sampler)}: an error of ACE-Step's own: training fails without the plugin too"
            )
    return None


def _step_of(trainer: Any, module_class: str) -> tuple[Any, Any]:
    """A training module's class and its step; None where there is none."""
    owner = getattr(trainer, module_class, None)
    return owner, inspect.getattr_static(owner, "training_step", None) if owner else None


def save_problem(trainer: Any, trainer_class: str, name: str) -> str | None:
    owner = getattr(trainer, trainer_class)
    methods = [method for _, method in inspect.getmembers(owner, inspect.isfunction)]
    if not any(_reaches(method, name, trainer, owner) for method in methods):
        return f"{trainer_class} never calls it, so saved adapters would not be described"
    return lacks_parameter(trainer, name, "output_dir")


def lacks_parameter(trainer: Any, name: str, parameter: str) -> str | None:
    function = resolve(trainer, name)
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return "it cannot be called"
    if parameter in known:
        return None
    return f"it takes {_signature_text(function)}, expected a parameter {parameter}"


def resolve(trainer: Any, dotted: str) -> Any:
    """What a dotted name of the trainer's module stands for, "" for the module itself; None where there is nothing."""
    value = trainer
    for part in dotted.split(".") if dotted else ():
        value = getattr(value, part, None)
    return value


def _signature_text(function: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):
        return "an unreadable signature"


def _reaches(function: Callable[..., Any], name: str, trainer: Any, owner: Any) -> bool:
    """Whether a function's code names something, directly or through functions and methods of the trainer's module."""
    return any(name in code.co_names for code in _codes(function, trainer, owner))


def _codes(function: Callable[..., Any], trainer: Any, owner: Any) -> Iterator[CodeType]:
    """The code of a function, and of the functions and methods of the trainer's module that it names."""
    seen: set[CodeType] = set()
    stack = [getattr(inspect.unwrap(function), "__code__", None)]
    while stack:
        code = stack.pop()
        if code is None or code in seen:
            continue
        seen.add(code)
        yield code
        stack += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        for called in code.co_names:
            for place in (trainer, owner):
                target = getattr(place, called, None)
                if inspect.isfunction(target) and target.__module__ == getattr(trainer, "__name__", None):
                    stack.append(getattr(inspect.unwrap(target), "__code__", None))


def own_dropout(trainer: Any, module_class: str) -> str | None:
    """The name by which a training step drops conditions itself, as some forks do; None when it names none.

    One step cannot show it, because a row keeps its condition in 85 % of the steps. So the code is searched for names,
    and for strings such as the arguments of ``getattr``.
    """
    owner, step = _step_of(trainer, module_class)
    for code in _codes(step, trainer, owner) if step is not None else ():
        texts = [constant for constant in code.co_consts if isinstance(constant, str)]
        for name in (*code.co_names, *code.co_varnames, *texts):
            if _DROPOUT.fullmatch(name):
                return name
    return None


def _calls_in(function: Callable[..., Any], name: str) -> list[ast.Call]:
    """Calls of a global by name in a function's source; none when the source cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return []
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == name
        and not any(isinstance(argument, ast.Starred) for argument in node.args)
        and all(keyword.arg for keyword in node.keywords)
    ]
