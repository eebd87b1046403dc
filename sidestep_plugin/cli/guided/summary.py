"""What will be done, said before it is done: the model's treatment, steps, sizes and places."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from sidestep_plugin.adapters.kinds import BY_NAME
from sidestep_plugin.text import counted

from .answers import Answers
from .checks import in_bytes, model_folder

_LORA_TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
_BYTES: Final = 4  # adapters are trained and saved in fp32
_STATES: Final = 2  # AdamW keeps two numbers for each that is trained


def summary(answers: Answers) -> list[str]:
    """The lines above "Start?"."""
    return [*_decided(answers), *_amounts(answers), *_in_words(answers)]


def _decided(answers: Answers) -> list[str]:
    """What the plugins say they will do."""
    from sidestep_plugin.engine.rehearsal import rehearse
    from sidestep_plugin.registry import Registry

    request = answers.request
    if not request.plugins:
        return ["No plugin: exactly as ACE-Step trains, with turbo's timesteps for every model"]
    registry = Registry.load(request.plugins, request.wins)
    options = registry.resolve_options(request.options)
    return list(rehearse(registry, model_folder(answers), options, request.adapter_type).lines)


def _amounts(answers: Answers) -> list[str]:
    """Songs, steps, and room on the disk."""
    settings = answers.request.settings
    epochs, batch_size = settings["epochs"], settings.get("batch_size") or 1
    batches = math.ceil(answers.songs / batch_size)
    accumulation = settings.get("gradient_accumulation") or 4
    lines = []
    if answers.dataset is not None:
        lines.append(
            f"Songs: {answers.songs}{_held_out(answers)}, {answers.dataset.minutes:.1f} minutes; "
            f"{counted(epochs * batches, 'training step')}, "
            f"{counted(epochs * batches // accumulation, 'optimizer step')}"
        )
        if told := _time(answers, epochs):
            lines.append(f"Time: {told}")
    size = adapter_size(
        model_folder(answers),
        answers.request.adapter_type,
        int(settings.get("rank") or BY_NAME[answers.request.adapter_type].default_rank),
        settings.get("target_modules") or _LORA_TARGETS,
    )
    checkpoints = epochs // (settings.get("save_every") or 10)
    if size:
        each = size * (1 + _STATES)
        lines.append(
            f"On disk: about {in_bytes(size + checkpoints * each)} (the finished adapter {in_bytes(size)}, "
            f"{counted(checkpoints, 'checkpoint')} of {in_bytes(each)})"
        )
    return lines


def _held_out(answers: Answers) -> str:
    assert answers.dataset is not None
    held_out = answers.dataset.songs - answers.songs
    return f" and {held_out} held out" if held_out else ""


def _time(answers: Answers, epochs: int) -> str:
    """How long it takes on the nearest card that was measured; "" if none was, or no model of about this size."""
    from sidestep_plugin.measured.reading import ALONE, PLUGIN, card_here, measurements, training_time
    from sidestep_plugin.memory.sizes import DecoderSize
    from sidestep_plugin.run import ModelFacts

    request, dataset = answers.request, answers.dataset
    if dataset is None or not dataset.songs or not measurements():
        return ""
    size = DecoderSize.from_config(ModelFacts.from_folder(model_folder(answers)).config)
    if size is None:
        return ""
    seconds = 60 * dataset.minutes / dataset.songs
    return training_time(
        epochs * dataset.songs,
        parameters=size.parameters,
        song_seconds=min(seconds, request.options.get("crop_seconds") or seconds),
        adapter=request.adapter_type,
        way=PLUGIN if request.plugins else ALONE,
        card=card_here(),
    )


def _in_words(answers: Answers) -> list[str]:
    request = answers.request
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in request.settings.items() if value is not None
    )
    how = "" if request.resume_from is None else f"resumes from {answers.checkpoint}"
    how = how or ("replaces what is there" if request.overwrite else "new")
    more = [
        f"{name.replace('_', ' ')} {request.options[name]:g}"
        for name in ("validate", "preview_every")
        if request.options.get(name)
    ]
    more += [f"{name} {request.options[name]}" for name in ("export", "title") if request.options.get(name)]
    also = [f"Also: {', '.join(more)}"] if more else []
    return [f"Train: {request.adapter_type}, {settings}", *also, f"Save to: {request.output_dir} ({how})"]


def adapter_size(model: Path, kind: str, rank: int, targets: Collection[str]) -> int:
    """Bytes that an adapter for a model takes, from the headers of the model's files; 0 if they cannot be read.

    LyCORIS makes a LoKr for every linear layer, PEFT a LoRA for those that are named.
    """
    known = BY_NAME[kind]
    layers = [
        shape
        for name, shape in _linear_layers(model)
        if known.saves_untargeted() or any(known.matches(name, target) for target in targets)
    ]
    return _BYTES * sum(known.parameters(shape, rank) for shape in layers)


def _linear_layers(model: Path) -> Iterable[tuple[str, tuple[int, int]]]:
    """Names and shapes of the decoder's layers with a matrix."""
    from sidestep_plugin.adapters.weights_file import read_weights_file
    from sidestep_plugin.errors import Refusal

    for file in sorted(model.glob("*.safetensors")):
        try:
            tensors = read_weights_file(file).tensors
        except (Refusal, OSError):
            continue
        for name, tensor in tensors.items():
            if name.startswith("decoder.") and name.endswith(".weight") and len(tensor.shape) == 2:
                yield name.removesuffix(".weight"), (tensor.shape[0], tensor.shape[1])
