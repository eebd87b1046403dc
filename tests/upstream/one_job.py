"""One training with one version of upstream's trainer, and a record of what really happened in it.

    one_job.py REPORT plugin ARGUMENTS...   acestep-train ARGUMENTS with a recorder watching
    one_job.py REPORT alone JSON            the same training by upstream itself, without any code of this project

The record is taken where it counts: at the decoder, which sees the timesteps and conditions that are trained.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

WEIGHTS = ("*.safetensors", "*.bin")
# Tensors that only training fills, in the layers trained by default (upstream saves LoKr's other layers too).
STARTS_AT_ZERO = re.compile(r"[qkvo]_proj\.(lora_B\.weight|lokr_w2|lokr_w2_b)$")


class Recorder:
    """Plugin that changes nothing and writes down what upstream's steps computed with."""

    def __init__(self, tensors: Path) -> None:
        from sidestep_plugin import hookimpl
        from sidestep_plugin.timesteps.schedule import inference_timesteps

        self.steps: list[dict[str, Any]] = []
        songs = [torch.load(file, weights_only=True) for file in sorted(tensors.glob("*.pt"))]
        self._conditions = [song["encoder_hidden_states"] for song in songs]
        self._turbo = torch.tensor(inference_timesteps(3.0, 8))
        self._null = torch.empty(0)
        self._latents = torch.empty(0)
        self._calls: list[tuple[Mapping[str, Any], Any]] = []

        @hookimpl
        def acestep_prepare_batch(batch: Mapping[str, Any]) -> None:
            self._latents = batch["target_latents"].clone()
            self._calls.clear()

        @hookimpl
        def acestep_step_finished(step: Any) -> None:
            self.steps.append(self._look_at(step))

        self.acestep_prepare_batch = acestep_prepare_batch
        self.acestep_step_finished = acestep_step_finished

    def watch(self, model: Any) -> None:
        self._null = model.null_condition_emb.detach().clone()[0]

        def called(_: Any, __: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            self._calls.append((kwargs, output))

        model.decoder.register_forward_hook(called, with_kwargs=True)

    def _look_at(self, step: Any) -> dict[str, Any]:
        if len(self._calls) != 1:
            return {"decoder_calls": len(self._calls)}
        ((seen, output),) = self._calls
        t = seen["timestep"].detach().float()
        sampled = t if step.t is None else step.t.detach()
        rows = seen["encoder_hidden_states"].detach()
        # x_t = t·noise + (1−t)·data, so the flow that the loss must have been taken against is (x_t − data) / t.
        flow = (seen["hidden_states"].detach().float() - self._latents.float()) / sampled.float().view(-1, 1, 1)
        expected = torch.nn.functional.mse_loss(output[0].detach().float(), flow)
        turbo = torch.cat([self._turbo.to(dtype).to(sampled.dtype) for dtype in (sampled.dtype, torch.bfloat16)])
        null = [torch.equal(row, self._null.to(row.dtype).expand_as(row)) for row in rows]
        return {
            "decoder_calls": 1,
            "t": sampled.tolist(),
            "resolution": torch.finfo(sampled.dtype).eps,
            "from_plugin": step.sampled_by is not None,
            "turbo_rows": int(torch.isin(sampled, turbo).sum()),
            # Some versions force bf16, also on a CPU: the decoder then sees what was sampled, rounded.
            "decoder_sees_t": any(torch.equal(t, sampled.to(dtype).float()) for dtype in (t.dtype, torch.bfloat16)),
            "r_is_t": torch.equal(t, seen["timestep_r"].detach().float()),
            "null_rows": sum(null),
            "strange_rows": sum(not dropped and not self._known(row) for row, dropped in zip(rows, null, strict=True)),
            "loss_off_by": abs(float(step.loss.detach()) / float(expected) - 1.0),
        }

    def _known(self, row: torch.Tensor) -> bool:
        return any(torch.equal(row[: len(song)], song.to(row.dtype)) for song in self._conditions)


def train_with_plugin(arguments: list[str]) -> dict[str, Any]:
    """Run the real command line; the recorder joins it as one more plugin."""
    from sidestep_plugin import cli
    from sidestep_plugin.launch import launch

    recorder = Recorder(Path(arguments[arguments.index("--dataset-dir") + 1]))
    prepare, load_model = launch.prepare, launch.load_model

    def prepare_recorded(request: Any, *, extra_plugins: Callable[[], Mapping[str, object]], **others: Any) -> Any:
        return prepare(request, extra_plugins=lambda: {**extra_plugins(), "recorder": recorder}, **others)

    def load_watched(*args: Any) -> Any:
        handler = load_model(*args)
        recorder.watch(handler.model)
        return handler

    launch.prepare, launch.load_model = prepare_recorded, load_watched
    sys.argv = ["acestep-train", *arguments]
    code: Any = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    return {"exit": code or 0, "steps": recorder.steps}


def train_alone(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run upstream's own trainer on the same songs with the same settings and the same random numbers."""
    from transformers import AutoModel

    error: str | None = None
    try:
        trainer = importlib.import_module("acestep.training.trainer")
        trainer_class, config_class = (
            (trainer.LoRATrainer, trainer.LoRAConfig)
            if job["adapter_type"] == "lora"
            else (trainer.LoKRTrainer, trainer.LoKRConfig)
        )
        known = trainer.TrainingConfig.__dataclass_fields__
        training = trainer.TrainingConfig(**{name: job["training"][name] for name in job["training"] if name in known})
        model = AutoModel.from_pretrained(job["model"], trust_remote_code=True, local_files_only=True)
        handler = type("Handler", (), {"model": model, "device": "cpu", "dtype": torch.float32, "quantization": None})()
        torch.manual_seed(training.seed)
        messages = trainer_class(handler, config_class(**job["adapter"]), training).train_from_preprocessed(
            job["tensors"], {"should_stop": False}
        )
        for _, _, message in messages:
            if message.startswith("❌"):
                error = error or message.removeprefix("❌").strip()
    except Exception as failure:  # whatever upstream raises is the finding
        error = f"{type(failure).__name__}: {failure}"
    return {"error": error, "same_as_plugin": error is None and _same_tensors(job["compare"], job["output"])}


def look_at_adapters(output: Path) -> list[dict[str, Any]]:
    """What every saved weights file holds, and what stands beside it."""
    adapters = []
    for file in sorted(file for pattern in WEIGHTS for file in output.rglob(pattern)):
        facts = file.parent / "training_config.json"
        learned = [tensor for key, tensor in _load(file).items() if STARTS_AT_ZERO.search(key)]
        adapters.append(
            {
                "file": file.relative_to(output).as_posix(),
                "config": json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else None,
                "learned": sum(bool(tensor.abs().sum() > 0) and bool(tensor.isfinite().all()) for tensor in learned),
                "tensors": len(learned),
            }
        )
    return adapters


def _load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def _same_tensors(one: str, other: str) -> bool:
    """Whether the finished adapters of two trainings are equal, bit for bit."""
    files = [sorted(f for p in WEIGHTS for f in (Path(folder) / "final").rglob(p)) for folder in (one, other)]
    if [len(found) for found in files] != [1, 1]:
        return False
    a, b = _load(files[0][0]), _load(files[1][0])
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def main() -> None:
    report, mode, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    found: dict[str, Any]
    if mode == "alone":
        found = train_alone(json.loads(rest[0]))
    else:
        found = train_with_plugin(rest)
        output = Path(rest[rest.index("--output-dir") + 1])
        found["wrote"] = any(path.is_file() for path in output.rglob("*"))
        found["adapters"] = look_at_adapters(output)
    with contextlib.suppress(ValueError):
        sys.stdout.flush()
    Path(report).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
