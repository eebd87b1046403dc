"""Measures one thing in this process: a training by upstream's own loop, or what a validation, clips or hooks cost."""

from __future__ import annotations

import inspect
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch

from .. import attach
from ..adapters.kinds import BY_NAME
from ..engine import shapes
from ..engine.checkout import import_trainer
from ..engine.models import Handler
from ..errors import Refusal
from ..memory.estimate import FRAMES_A_SECOND, USUAL_TOKENS, Settings, needs
from ..memory.gradient_checkpointing import is_checkpointed
from ..memory.sizes import DecoderSize
from ..run import ModelFacts
from .jobs import WAYS, Job
from .models import random_model, write_songs

_TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
_HELD_OUT: Final = 2
_ROUNDS, _STEPS = 12, 10


def measure(job: Job) -> dict[str, Any]:
    """Measure a job. Returns what was found, ready for JSON, with the card that it was found on. Raises Refusal."""
    if job.device == "cuda" and not torch.cuda.is_available():
        raise Refusal(
            "torch sees no CUDA GPU here. Use a machine with one, or try it on the CPU: --size tiny --device cpu"
        )
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="gpu-report-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary).resolve()
        os.chdir(folder)  # upstream's path guard accepts what lies below the directory that it is imported in
        try:
            found = _measure(job, folder)
        finally:
            os.chdir(before)
    return found | {"card": _card(job), "versions": _versions()}


def _measure(job: Job, folder: Path) -> dict[str, Any]:
    from ..miniature import write_checkout

    trainer = import_trainer(Path(job.root) if job.root else write_checkout(folder / "checkout"))
    handler = random_model(trainer, job, folder / "checkpoints")
    songs = write_songs(folder / "songs", job, int(handler.model.null_condition_emb.shape[-1]))
    if job.kind == "hooks":
        return _hooks(trainer, handler, job)
    return _training(trainer, handler, songs, folder / "output", job)


def _card(job: Job) -> dict[str, Any]:
    if job.device != "cuda":
        return {"name": "CPU (dry run)", "memory_bytes": 0, "compute_capability": [0, 0]}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory_bytes": int(found.total_memory),
        "compute_capability": [int(found.major), int(found.minor)],
    }


def _versions() -> dict[str, str | None]:

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    packages = ("sidestep-plugin", "peft", "lightning", "lycoris-lora", "transformers", "bitsandbytes", "triton")
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in packages},
    }


# -- trainings -------------------------------------------------------------------------------------------------------


class _Watch:
    """Notes when steps begin, and other forward passes, and how the decoder is kept in the second step."""

    def __init__(self, decoder: torch.nn.Module, device: str) -> None:
        self.decoder, self.wait = decoder, _waiting(device)
        self.starts: list[float] = []
        self.looks: list[float] = []
        self.frozen = self.trained = 0
        self.in_bf16 = self.checkpointed = False
        decoder.register_forward_pre_hook(self._begins)

    def _begins(self, *_: Any) -> None:
        self.wait()
        if not torch.is_grad_enabled():  # validation, clips, and a look at quantized weights
            self.looks.append(time.perf_counter())
            return
        self.starts.append(time.perf_counter())
        if len(self.starts) == 2:
            self._look()

    def _look(self) -> None:
        for weight in self.decoder.parameters():
            if weight.requires_grad:
                self.trained += weight.numel()
            else:
                self.frozen += weight.numel() * weight.element_size()
                self.in_bf16 |= weight.dtype is torch.bfloat16
        self.frozen += sum(buffer.numel() * buffer.element_size() for buffer in self.decoder.buffers())
        self.checkpointed = is_checkpointed(self.decoder)


def _waiting(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _training(trainer: Any, handler: Handler, songs: Path, output: Path, job: Job) -> dict[str, Any]:
    """Train two epochs and measure the second one."""
    options = WAYS[job.way]
    if job.kind != "training":
        looks = {"validation": {"validate": _HELD_OUT, "validate_every": 1}, "previews": {"preview_every": 1}}
        options = looks[job.kind]
    watch = _Watch(handler.model.decoder, job.device)
    adapter = _adapter_config(trainer, job)
    config = _known(
        trainer.TrainingConfig,
        output_dir=str(output),
        batch_size=1,
        gradient_accumulation_steps=1,
        max_epochs=2,
        save_every_n_epochs=9,
        num_workers=0,
        pin_memory=job.device == "cuda",
        seed=1,
    )
    lines: list[str] = []
    attached = nullcontext() if options is None else attach(trainer, options=options, announce=lines.append)
    if job.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses, messages = [], []
    with attached:
        made = getattr(trainer, shapes.TRAINER_CLASS[job.adapter])(handler, adapter, config)
        for _, loss, text in made.train_from_preprocessed(str(songs), {"should_stop": False}):
            messages.append(str(text))
            losses += [float(loss)] if loss else []
    steps = [after - before for before, after in pairwise(watch.starts)]
    if len(steps) < 3 or any(text.startswith("❌") for text in messages):
        raise Refusal(" / ".join(messages[-2:]))
    found = _costs(steps[len(steps) // 2 :], watch, handler, job)
    found |= {"first_loss": losses[0] if losses else None, "said": [line for line in lines if line][:30]}
    return found if job.kind == "training" else _of_a_look(watch, found, job)


def _adapter_config(trainer: Any, job: Job) -> Any:
    made = getattr(trainer, shapes.CONFIG_CLASS[job.adapter], None)
    if made is None:
        raise Refusal(f"This version of ACE-Step trains no {job.adapter}. Use a newer one.")
    fields = BY_NAME[job.adapter].fields
    return _known(made, **{fields["rank"]: job.rank, fields["alpha"]: 2 * job.rank})


def _known(config_class: Any, **values: Any) -> Any:
    """An upstream configuration with those of the values that this version has a field for."""
    fields = inspect.signature(config_class).parameters
    return config_class(**{name: value for name, value in values.items() if name in fields})


def _costs(steps: list[float], watch: _Watch, handler: Handler, job: Job) -> dict[str, Any]:
    """Time of the steps, memory at the peak, and what the plugin estimates for a decoder that is kept like this."""
    on_gpu = job.device == "cuda"
    size = DecoderSize.from_config(ModelFacts.from_model(handler.model).config)
    return {
        "size": job.size,
        "decoder_parameters": 0 if size is None else size.parameters,
        "song_seconds": job.song_seconds,
        "rank": job.rank,
        "adapter": job.adapter,
        "way": job.way,
        "steps": len(steps),
        "seconds_per_step": statistics.median(steps),
        "fastest_step": min(steps),
        "slowest_step": max(steps),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "gradient_checkpointing": watch.checkpointed,
        "trained_parameters": watch.trained,
        "frozen_bytes": watch.frozen,
        "estimate_bytes": None if size is None or job.way == "compile" else _estimate(size, watch, job),
    }


def _estimate(size: DecoderSize, watch: _Watch, job: Job) -> int:
    """Bytes by the plugin's estimate. `torch.compile` is not in it."""
    import importlib.util

    on_gpu = job.device == "cuda"
    frozen = "int8" if job.way == "int8" else "bf16" if watch.in_bf16 else "fp32"
    settings = Settings(
        kind=job.adapter,
        rank=job.rank,
        targets=_TARGETS,
        frames=int(FRAMES_A_SECOND * job.song_seconds),
        tokens=USUAL_TOKENS,
        mixed=on_gpu,
        frozen=frozen,
        checkpointing=watch.checkpointed,
        optimizer_bytes=2 if on_gpu and importlib.util.find_spec("bitsandbytes") else 8,
    )
    return needs(size, settings, weights=watch.frozen, trained=watch.trained).total


def _of_a_look(watch: _Watch, found: dict[str, Any], job: Job) -> dict[str, Any]:
    """What the last validation, or the last clips, took: the forward passes after the last step, all warm."""
    from ..previews.conditions import SECONDS, SONGS

    passes = [begins for begins in watch.looks if begins > watch.starts[-1]]
    if len(passes) < 2:
        raise Refusal("Nothing was computed after the last step: " + " / ".join(found["said"][-2:]))
    seconds = (passes[-1] - passes[0]) * len(passes) / (len(passes) - 1)
    names = ("size", "decoder_parameters", "song_seconds", "peak_allocated_bytes", "peak_reserved_bytes")
    about = {"what": job.kind, **{name: found[name] for name in names}}
    if job.kind == "validation":  # one forward pass for each song, timestep and condition
        step = found["seconds_per_step"]
        losses = {"seconds": seconds, "songs": _HELD_OUT, "losses": len(passes)}
        return about | losses | {"seconds_per_step": step, "in_steps": seconds / step}
    return about | {
        "clips": int(SONGS),  # of the adapter alone: those of the base model were made before
        "clip_seconds": min(SECONDS, job.song_seconds),
        "forward_passes": len(passes),
        "seconds": seconds,
        "clips_per_minute": 60 * int(SONGS) / seconds,
        "decoded": False,
        "settings": next((line for line in found["said"] if line.startswith("Previews: ")), ""),
    }


# -- hooks -----------------------------------------------------------------------------------------------------------


def _hooks(trainer: Any, handler: Handler, job: Job) -> dict[str, Any]:
    """Time that the plugin adds to a step of a tiny model: forward passes alone, with and without it, in turns.

    What the hooks do does not depend on the size of the model, except for the conditions that they replace.
    """
    adapter = _adapter_config(trainer, job)
    config = _known(trainer.TrainingConfig, seed=1)
    made = getattr(trainer, shapes.MODULE_CLASS[job.adapter])
    module = made(handler.model, adapter, config, handler.device, handler.dtype)
    width = int(handler.model.null_condition_emb.shape[-1])
    noise = {
        "target_latents": torch.randn(1, 50, 64),
        "attention_mask": torch.ones(1, 50),
        "encoder_hidden_states": torch.randn(1, USUAL_TOKENS, width),
        "encoder_attention_mask": torch.ones(1, USUAL_TOKENS),
        "context_latents": torch.randn(1, 50, 128),
    }
    batch: dict[str, Any] = {name: value.to(handler.device, handler.dtype) for name, value in noise.items()}
    batch["metadata"] = [{}]
    wait, times = _waiting(job.device), {False: list[float](), True: list[float]()}
    for _ in range(_ROUNDS):
        for on in (False, True):
            with attach(trainer, announce=lambda _: None) if on else nullcontext():
                module.training_step(batch)  # deciding on the model is once a training, not once a step
                wait()
                began = time.perf_counter()
                for _ in range(_STEPS):
                    module.training_step(batch)
                wait()
                times[on].append((time.perf_counter() - began) / _STEPS)
    without, with_plugin = (statistics.median(times[on][1:]) for on in (False, True))
    return {
        "what": "hooks",
        "size": job.size,
        "microseconds_without": 1e6 * without,
        "microseconds_added": 1e6 * (with_plugin - without),
    }
