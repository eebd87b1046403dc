"""States of the random generators that a training may draw from: read, stored as plain values, restored."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def random_states(device: torch.device) -> dict[str, Any]:
    """States of the random generators that a training may draw from: torch's (CPU and device), Python's, numpy's."""
    import torch

    version, keys, gauss = random.getstate()
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(keys), gauss]}
    if device.type in ("cuda", "xpu", "mps"):
        states[device.type] = _of_device(device, "get_rng_state")
    if (numpy := sys.modules.get("numpy")) is not None:
        name, numbers, *rest = numpy.random.get_state()
        states["numpy"] = [name, [int(number) for number in numbers], *rest]
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore what :func:`random_states` returned; the state of another device is left out."""
    import torch

    torch.set_rng_state(states["torch"].cpu())
    if "python" in states:
        version, keys, gauss = states["python"]
        random.setstate((version, tuple(keys), gauss))
    if device.type in states:
        _of_device(device, "set_rng_state", states[device.type].cpu())
    if "numpy" in states and (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = states["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))


def are_random_states(states: Mapping[str, Any]) -> bool:
    """Whether values that were read from a file have the form of :func:`random_states`."""
    import torch

    def is_list(value: Any, length: int) -> bool:
        return isinstance(value, list | tuple) and len(value) >= length

    version, keys, _ = random.getstate()
    ours: Any = states.get("torch")
    pythons: Any = states.get("python")
    numpys: Any = states.get("numpy")
    now = torch.get_rng_state()
    return (
        isinstance(ours, torch.Tensor)
        and (ours.shape, ours.dtype) == (now.shape, now.dtype)
        and (
            "python" not in states or (is_list(pythons, 3) and pythons[0] == version and is_list(pythons[1], len(keys)))
        )
        and ("numpy" not in states or (is_list(numpys, 2) and is_list(numpys[1], 1)))
    )


def _of_device(device: torch.device, function: str, *state: torch.Tensor) -> Any:
    import torch

    ask = getattr(getattr(torch, device.type), function)
    # MPS has one generator, CUDA and XPU one for each device.
    return ask(*state) if device.type == "mps" else ask(*state, device)
