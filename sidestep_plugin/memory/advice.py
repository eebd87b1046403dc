"""Advice: what to change when a training fails because memory or disk ran out, or a gradient was NaN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ..adapters.kinds import kind_of_config
from ..files import room
from ..hookspecs import hookimpl
from ..run import Run
from ..songs.dataset import songs_in
from ..songs.lengths import longest
from .checkpointing import is_checkpointed
from .estimate import Settings
from .savings import advice_for

_NO_MEMORY = ("out of memory", "outofmemory", "cannot allocate memory", "alloc_cpu", "not enough memory")
_NO_ROOM = ("no space left", "disk full", "not enough space", "file write failed", "code: 28", "quota exceeded")
_NO_NUMBERS = ("division by zero", "not finite", "non-finite")

_NO_OPTIONS: Final[Mapping[str, Any]] = MappingProxyType({})


@hookimpl
def engine_advice(run: Run, failure: str) -> str | None:
    frames, _ = longest(songs_in(run.tensor_dir)) if run.tensor_dir is not None else (0, 0)
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
        output: the output folder.
        options: the values of the plugins' options; only flags of these are named.
        checkpointed: whether gradient checkpointing was on.
        frames: length of the longest song in frames of latents, if it is known.
        on_gpu: whether the training ran where autocast computes in bf16.
    """
    text = failure.lower()
    if any(words in text for words in _NO_MEMORY):
        now = _settings(training_config, adapter_config, options, checkpointed, frames, on_gpu)
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


def _settings(
    training_config: Any,
    adapter_config: Any,
    options: Mapping[str, Any],
    checkpointed: bool,
    frames: int | None,
    on_gpu: bool,
) -> Settings:
    """The settings of a run that its memory depends on, as far as its flags change them."""

    def number(config: Any, *names: str) -> int:
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), 1)

    kind = kind_of_config(adapter_config)
    known = Settings(
        kind=kind.name,
        rank=number(adapter_config, kind.fields["rank"]),
        batch_size=number(training_config, "batch_size"),
        accumulation=number(training_config, "gradient_accumulation_steps"),
        mixed=on_gpu,
        checkpointing=checkpointed,
        crop_seconds=options.get("crop_seconds"),
    )
    if options.get("base_weights", "off") != "off":
        known = known.but(frozen="int8")
    elif options.get("frozen_weights") == "fp32":
        known = known.but(frozen="fp32")
    return known if frames is None else known.but(frames=frames)
