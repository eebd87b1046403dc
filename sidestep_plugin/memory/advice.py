"""Advice: what to change when a training fails because memory or disk ran out, or a gradient was NaN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ..files import room
from ..hookspecs import hookimpl
from ..run import Run
from ..songs.one_song import longest
from .gradient_checkpointing import is_checkpointed
from .of_training import settings_of
from .savings import advice_for

_NO_MEMORY = ("out of memory", "outofmemory", "cannot allocate memory", "alloc_cpu", "not enough memory")
_NO_ROOM = ("no space left", "disk full", "not enough space", "file write failed", "code: 28", "quota exceeded")
_NO_NUMBERS = ("division by zero", "not finite", "non-finite")

_NO_OPTIONS: Final[Mapping[str, Any]] = MappingProxyType({})


@hookimpl
def engine_advice(run: Run, failure: str) -> str | None:
    frames, _ = longest(run.engine.songs)
    device = next(run.model.decoder.parameters()).device
    found = advice(
        failure,
        run.training_config,
        run.adapter_config,
        run.engine.folder,
        options=run.options,
        checkpointed=is_checkpointed(run.model.decoder),
        frames=frames or None,
        on_gpu=device.type in ("cuda", "xpu"),
    )
    return found or None


def advice(
    failure: str,
    training_config: Any,
    adapter_config: Any,
    output: Path,
    *,
    options: Mapping[str, Any] = _NO_OPTIONS,
    checkpointed: bool = False,
    frames: int | None = None,
    on_gpu: bool = False,
) -> str:
    """What to do about a failure that upstream reports, in one or two sentences; "" for an unknown failure.

    Args:
        failure: upstream's own words.
        training_config, adapter_config: upstream's configurations; the advice names their values.
        options: the values of the plugins' options; only flags of these are named.
        frames: length of the longest song in frames of latents, if it is known.
        on_gpu: whether the training ran where autocast computes in bf16.
    """
    text = failure.lower()
    if any(words in text for words in _NO_MEMORY):
        now = settings_of(training_config, adapter_config, options, mixed=on_gpu).but(checkpointing=checkpointed)
        now = now if frames is None else now.but(frames=frames)
        steps = [*advice_for(now, options), "close other programs that use the device"]
        listed = steps[0] if len(steps) == 1 else f"{'; '.join(steps[:-1])}; or {steps[-1]}"
        return f"The device ran out of memory. {listed[0].upper()}{listed[1:]}."
    if any(words in text for words in _NO_ROOM):
        return f"{room(output)} Free some space, or choose an --output-dir on another disk."
    if any(words in text for words in _NO_NUMBERS):
        rate = getattr(training_config, "learning_rate", None)
        return (
            f"The gradients were NaN or infinite. Lower --learning-rate (now {rate}); if the same song causes "
            "it again, preprocess that song again."
        )
    return ""
