"""The miniature's trainer: a stand-in, not ACE-Step's own.

It keeps the contract of ACE-Step 1.5's `acestep/training/trainer.py` as of May 2026 (names, signatures,
files, order of random draws, traps) in a text of its own that is short enough to read, so that whatever
attaches to the real trainer can be tried on any machine in seconds. Where the two differ, the real one rules
and this one is wrong.

What is left out: 8-bit Adam and torch.compile.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LinearLR, SequentialLR
from torch.utils.data import DataLoader

from acestep.training.configs import LoKRConfig, LoRAConfig, TrainingConfig
from acestep.training.data_module import TENSORS, PreprocessedDataModule
from acestep.training.log import logger
from acestep.training.lokr_utils import (
    check_lycoris_available,
    inject_lokr_into_dit,
    save_lokr_training_checkpoint,
    save_lokr_weights,
)
from acestep.training.lora_checkpoint import load_training_checkpoint, save_lora_weights, save_training_checkpoint
from acestep.training.lora_injection import inject_lora_into_dit, unwrap_fabric
from acestep.training.lora_utils import check_peft_available
from acestep.training.path_safety import safe_path

try:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger

    LIGHTNING_AVAILABLE = True
except ImportError:
    LIGHTNING_AVAILABLE = False

Progress = Generator[tuple[int, float, str], None, None]
TrainingState = dict[str, Any] | None

# The eight times that turbo visits at shift 3. Trap: used for every model, which is right for turbo alone.
TURBO_SHIFT3_TIMESTEPS = (1.0, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3)


def sample_discrete_timestep(bsz: int, timesteps_tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Pick one of the given times for each row of a batch; return it twice, as t and as r."""
    picked = torch.randint(len(timesteps_tensor), (bsz,), device=timesteps_tensor.device)
    t = timesteps_tensor[picked]
    return t, t


class _PreprocessedModule(nn.Module):
    """What both training modules have: a model with an adapter, and what a step needs."""

    model: Any

    def __init__(
        self, model: Any, adapter_config: Any, training_config: TrainingConfig, device: Any, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.training_config = training_config
        self.device = torch.device(device)
        self.device_type = self.device.type
        # Trap, kept from ACE-Step: the device decides about the dtype, not the caller.
        half = {"cuda": torch.bfloat16, "xpu": torch.bfloat16, "mps": torch.float16}
        self.dtype = half.get(self.device_type, torch.float32)
        self.timesteps_tensor = torch.tensor(TURBO_SHIFT3_TIMESTEPS, device=self.device, dtype=self.dtype)
        self.training_losses: list[float] = []
        self.force_input_grads_for_checkpointing = False
        self._inject(adapter_config)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        asynchronous = self.device_type in ("cuda", "xpu")
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "non_blocking": asynchronous}
        return {name: batch[name].to(**where) for name in TENSORS}

    def _flow_matching_loss(self, inputs: dict[str, Tensor], x1: Tensor, t: Tensor) -> Tensor:
        """Noise x1 is mixed with data x0 at times t; the decoder is to predict x1 - x0."""
        x0 = inputs["target_latents"]
        t_ = t[:, None, None]
        conditions = {name: value for name, value in inputs.items() if name != "target_latents"}
        x_t = t_ * x1 + (1.0 - t_) * x0
        if self.force_input_grads_for_checkpointing:
            x_t.requires_grad_()
        predicted = self.model.decoder(hidden_states=x_t, timestep=t, timestep_r=t, **conditions)[0]
        return F.mse_loss(predicted, x1 - x0)


class PreprocessedLoRAModule(_PreprocessedModule):
    """A model whose decoder has a LoRA, and its training step."""

    def _inject(self, lora_config: LoRAConfig) -> None:
        self.lora_config = lora_config
        if not check_peft_available():
            logger.warning("PEFT is not installed: training without LoRA")
            return
        for weight in self.model.parameters():
            if weight.is_inference():
                weight.data = weight.data.clone()
        self.model, self.lora_info = inject_lora_into_dit(self.model, lora_config)

    def training_step(self, batch: dict[str, Any], record_loss: bool = True) -> Tensor:
        """Return the loss of one batch; validation calls this too, without recording it."""
        with self._autocast():
            inputs = self._on_device(batch)
            noise = torch.randn_like(inputs["target_latents"])
            t, _ = sample_discrete_timestep(len(noise), self.timesteps_tensor)
            loss = self._flow_matching_loss(inputs, noise, t)
        loss = loss.float()
        if record_loss:
            self.training_losses.append(loss.item())
        return loss


class PreprocessedLoKRModule(_PreprocessedModule):
    """A model whose decoder has a LoKr, and its training step."""

    def _inject(self, lokr_config: LoKRConfig) -> None:
        self.lokr_config = lokr_config
        self.lycoris_net: Any = None
        if not check_lycoris_available():
            logger.warning("LyCORIS is not installed: training without LoKr")
            return
        self.model, self.lycoris_net, self.lokr_info = inject_lokr_into_dit(self.model, lokr_config)

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of one batch."""
        with self._autocast():
            inputs = self._on_device(batch)
            noise = torch.randn_like(inputs["target_latents"])
            t, _ = sample_discrete_timestep(len(noise), self.timesteps_tensor)
            loss = self._flow_matching_loss(inputs, noise, t)
        loss = loss.float()
        self.training_losses.append(loss.item())
        return loss


@dataclass
class _Loop:
    """One run's moving parts, made by Fabric or by hand."""

    loader: Any
    parameters: list[Tensor]
    optimizer: Any
    scheduler: SequentialLR
    backward: Callable[[Tensor], Any]
    clip: Callable[[], Any]
    log: Callable[[str, float, int], Any] = lambda name, value, step: None
    refuse_nonfinite: bool = False
    announce_epochs: bool = True
    val_loader: DataLoader[Any] | None = None
    plots: TrainingState = None
    epoch: int = 0  # how far the run has come
    step: int = 0


class _Trainer:
    """What both trainers do alike.

    They differ in `_make_module`, `_train_with_fabric`, `_save_checkpoint` and `_save_final`.
    """

    kind = ""

    def __init__(self, dit_handler: Any, training_config: TrainingConfig) -> None:
        training_config.output_dir = safe_path(training_config.output_dir)
        self.dit_handler = dit_handler
        self.training_config = training_config
        self.module: Any = None
        self.fabric: Any = None
        self.run_metadata: dict[str, Any] = {}
        self.is_training = False

    def stop(self) -> None:
        """Only lowers a flag; a run is stopped by its `training_state`."""
        self.is_training = False

    def _missing(self) -> str:
        """What is not installed and has to be."""
        return ""

    def _train_basic(self, data_module: PreprocessedDataModule, training_state: TrainingState) -> Progress:
        yield 0, 0.0, "🚀 Starting training without Lightning"
        self.fabric = None
        yield from self._run(self._loop_by_hand(data_module), training_state)

    def _train(self, tensor_dir: str, training_state: TrainingState, *resume_from: str | None) -> Progress:
        """Check, seed, load, go. Trap, kept from ACE-Step: a failure is a message, never raised."""
        config = self.training_config
        self.is_training = True
        try:
            quantization = getattr(self.dit_handler, "quantization", None)
            if quantization is not None:
                yield 0, 0.0, f"❌ {self.kind} cannot be trained on a quantized model: {quantization}"
                return
            try:
                folder = safe_path(tensor_dir)
            except ValueError:
                yield 0, 0.0, f"❌ Rejected as unsafe, outside the safe root: {tensor_dir}"
                return
            if not os.path.isdir(folder):
                yield 0, 0.0, f"❌ There is no tensor directory {folder}"
                return
            if self._missing():
                yield 0, 0.0, f"❌ {self._missing()}"
                return
            _seed_everything(config.seed)
            self.module = self._make_module()
            checkpointing, _, _ = _configure_training_memory_features(self.module.model.decoder)
            self.module.force_input_grads_for_checkpointing = checkpointing
            data = PreprocessedDataModule(
                folder,
                batch_size=config.batch_size,
                num_workers=config.num_workers,
                pin_memory=config.pin_memory,
                prefetch_factor=config.prefetch_factor,
                persistent_workers=config.persistent_workers,
                pin_memory_device=config.pin_memory_device,
                val_split=config.val_split,
            )
            data.setup("fit")
            songs = data.count()
            if songs == 0:
                yield 0, 0.0, f"❌ There are no samples in {folder}"
                return
            self.run_metadata = {"tensor_dir": folder, "num_samples": songs}
            self.run_metadata["training_config"] = config.to_dict()
            yield 0, 0.0, f"📂 Loaded {songs} preprocessed samples"
            if checkpointing:
                yield 0, 0.0, "🧠 Gradient checkpointing enabled for decoder"
            if LIGHTNING_AVAILABLE:
                yield from self._train_with_fabric(data, training_state, *resume_from)
            else:
                yield from self._train_basic(data, training_state)
        except Exception as error:
            logger.exception(f"{self.kind} training failed")
            yield 0, 0.0, f"❌ Training failed: {error}"
        finally:
            self.is_training = False

    def _loop_with_fabric(self, data: PreprocessedDataModule) -> _Loop:
        config, kind = self.training_config, self.module.device_type
        tensorboard = []
        try:
            tensorboard.append(TensorBoardLogger(root_dir=config.output_dir, name="logs"))
        except ModuleNotFoundError as error:
            logger.warning(f"no TensorBoard log: {error}")
        settings: dict[str, Any] = {"precision": _precision(kind), "loggers": tensorboard}
        settings["accelerator"] = kind if kind in ("cpu", "cuda", "mps", "xpu") else "auto"
        self.fabric = Fabric(devices=1, **settings)
        self.fabric.launch()
        model = self.module.model
        model.decoder = model.decoder.to(dtype=torch.float32)  # lower precision comes from autocast
        loop = self._loop_by_hand(data)
        model.decoder, loop.optimizer = self.fabric.setup(model.decoder, loop.optimizer)
        loop.loader = self.fabric.setup_dataloaders(loop.loader)
        loop.backward = self.fabric.backward
        loop.clip = lambda: self.fabric.clip_gradients(
            model.decoder, loop.optimizer, max_norm=config.max_grad_norm, error_if_nonfinite=False
        )
        loop.log = lambda name, value, step: self.fabric.log(name, value, step=step)
        loop.refuse_nonfinite = True
        return loop

    def _loop_by_hand(self, data: PreprocessedDataModule) -> _Loop:
        config = self.training_config
        os.makedirs(config.output_dir, exist_ok=True)
        loader = data.train_dataloader()
        parameters = [weight for weight in self.module.model.parameters() if weight.requires_grad]
        if not parameters:
            raise RuntimeError("no parameter is trainable")
        optimizer = AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        return _Loop(
            loader=loader,
            parameters=parameters,
            optimizer=optimizer,
            scheduler=_schedule(optimizer, len(loader), config),
            backward=torch.autograd.backward,
            clip=lambda: nn.utils.clip_grad_norm_(parameters, config.max_grad_norm),
        )

    def _run(self, loop: _Loop, training_state: TrainingState) -> Progress:
        """All epochs, then the final save."""
        config, module = self.training_config, self.module
        epochs, best = config.max_epochs, math.inf
        module.model.decoder.train()
        loop.optimizer.zero_grad(set_to_none=True)
        while loop.epoch < epochs:
            started = time.monotonic()
            losses: list[float] = []  # of the optimizer steps of this epoch
            pending: list[float] = []  # of the batches since the last optimizer step
            for batch in loop.loader:
                if training_state and training_state.get("should_stop"):
                    yield loop.step, sum(pending) / max(1, len(pending)), "⏹️ Training stopped by user"
                    return  # trap, kept from ACE-Step: nothing is saved
                loss = module.training_step(batch) / config.gradient_accumulation_steps
                loop.backward(loss)
                pending.append(loss.item())
                if len(pending) == config.gradient_accumulation_steps:
                    yield from self._update(loop, pending, losses)
            if pending:  # trap, kept from ACE-Step: the loader has ended before the epoch's last update
                yield from self._update(loop, pending, losses)

            loop.epoch += 1
            average = sum(losses) / max(1, len(losses))
            loop.log("train/epoch_loss", average, loop.epoch)
            if loop.plots is not None and loop.plots["plot_steps"][-1:] != [loop.step]:
                _plot(loop.plots, loop.step, average)
            if loop.announce_epochs:
                seconds = time.monotonic() - started
                yield loop.step, average, f"✅ Epoch {loop.epoch}/{epochs} took {seconds:.1f}s"
            if loop.val_loader is not None:
                validation = self._validate(loop.val_loader)
                if loop.plots is not None:
                    loop.plots["plot_val_steps"].append(loop.step)
                    loop.plots["plot_val_loss"].append(validation)
                if validation < best:
                    best = validation
                    if loop.plots is not None:
                        loop.plots["plot_best_step"] = loop.step
                    self._save_checkpoint(loop, self._output("checkpoints", "best"))
            if loop.epoch % config.save_every_n_epochs == 0:
                name = f"epoch_{loop.epoch}_loss_{average:.4f}"
                self._save_checkpoint(loop, self._output("checkpoints", name))
                yield loop.step, average, f"💾 Checkpoint saved at epoch {loop.epoch}"

        final = self._output("final")
        self._save_final(final)
        last = module.training_losses[-1] if module.training_losses else 0.0
        yield loop.step, last, f"✅ Training complete! {self.kind} saved to {final}"

    def _update(self, loop: _Loop, pending: list[float], losses: list[float]) -> Progress:
        """One step of the optimizer, for the batches since the last one."""
        config = self.training_config
        average = sum(pending) / len(pending)
        pending.clear()
        bad = _count_nonfinite(loop.parameters) if loop.refuse_nonfinite else 0
        if bad:
            loop.optimizer.zero_grad(set_to_none=True)
            yield loop.step, math.nan, f"⚠️ Non-finite gradients in {bad} tensors; step skipped"
            return
        loop.clip()
        loop.optimizer.step()
        loop.scheduler.step()
        loop.optimizer.zero_grad(set_to_none=True)
        loop.step += 1
        losses.append(average)
        if loop.step % config.log_every_n_steps == 0:
            loop.log("train/loss", average, loop.step)
            loop.log("train/lr", float(loop.scheduler.get_last_lr()[0]), loop.step)
            _plot(loop.plots, loop.step, average)
            where = f"Epoch {loop.epoch + 1}/{config.max_epochs}, Step {loop.step}"
            yield loop.step, average, f"{where}, Loss: {average:.4f}"

    def _validate(self, loader: DataLoader[Any]) -> float:
        """The same step on the held-out songs, with new noise and new times each time."""
        module = self.module
        module.model.decoder.eval()
        with torch.no_grad():
            losses = [float(module.training_step(batch, record_loss=False)) for batch in loader]
        module.model.decoder.train()
        return sum(losses) / max(1, len(losses))

    def _output(self, *parts: str) -> str:
        return os.path.join(self.training_config.output_dir, *parts)

    def _starting(self) -> tuple[int, float, str]:
        kind = self.module.device_type
        return 0, 0.0, f"🚀 Starting training on {kind}, precision {_precision(kind)}"


class LoRATrainer(_Trainer):
    """Trains a LoRA into `adapter/` of `final`, `checkpoints/epoch_N_loss_X` and `checkpoints/best`."""

    kind = "LoRA"

    def __init__(self, dit_handler: Any, lora_config: LoRAConfig, training_config: TrainingConfig) -> None:
        super().__init__(dit_handler, training_config)
        self.lora_config = lora_config

    def train_from_preprocessed(
        self, tensor_dir: str, training_state: TrainingState = None, resume_from: str | None = None
    ) -> Progress:
        """Train; yield (step, loss, message). Without Lightning `resume_from` is ignored, as in ACE-Step."""
        yield from self._train(tensor_dir, training_state, resume_from)

    def _train_with_fabric(
        self, data_module: PreprocessedDataModule, training_state: TrainingState, resume_from: str | None = None
    ) -> Progress:
        yield self._starting()
        loop = self._loop_with_fabric(data_module)
        loop.announce_epochs = False
        loop.val_loader = data_module.val_dataloader()
        if training_state is not None:
            for series in ("steps", "loss", "ema", "val_steps", "val_loss"):
                training_state[f"plot_{series}"] = []
            training_state["plot_best_step"] = None
            loop.plots = training_state
        yield 0, 0.0, f"🎯 Training {sum(weight.numel() for weight in loop.parameters):,} parameters"
        if resume_from:
            yield 0, 0.0, self._resume(loop, resume_from)
        yield from self._run(loop, training_state)

    def _resume(self, loop: _Loop, resume_from: str) -> str:
        """Continue a run; return what to tell.

        Trap, kept from ACE-Step: the saved keys lack the adapter's name that the live ones have, so that no
        weight is restored, and the message says that all went well.
        """
        from safetensors.torch import load_file

        try:
            folder = safe_path(resume_from)
        except ValueError:
            return f"⚠️ Rejected unsafe checkpoint path: {resume_from}; starting fresh"
        if not os.path.exists(folder):
            return f"⚠️ There is no checkpoint {folder}; starting fresh"
        try:
            device = self.module.device
            found = load_training_checkpoint(folder, loop.optimizer, loop.scheduler, device=device)
            adapter = found["adapter_path"]
            weights = os.path.join(adapter or folder, "adapter_model.safetensors")
            if not os.path.exists(weights):
                return f"⚠️ There is no adapter in {adapter or folder}"
            unwrap_fabric(self.module.model.decoder).load_state_dict(load_file(weights), strict=False)
        except Exception as error:
            logger.exception("resuming failed")
            return f"⚠️ The checkpoint could not be loaded: {error}; starting fresh"
        loop.epoch, loop.step = found["epoch"], found["global_step"]
        parts = [f"✅ Resumed from epoch {loop.epoch}, step {loop.step}"]
        parts += [f"{name} ✓" for name in ("optimizer", "scheduler") if found[f"loaded_{name}"]]
        return ", ".join(parts)

    def _make_module(self) -> PreprocessedLoRAModule:
        handler = self.dit_handler
        return PreprocessedLoRAModule(
            handler.model, self.lora_config, self.training_config, handler.device, handler.dtype
        )

    def _save_checkpoint(self, loop: _Loop, folder: str) -> None:
        model = self.module.model
        if self.fabric is None:
            save_lora_weights(model, folder)
        else:
            save_training_checkpoint(model, loop.optimizer, loop.scheduler, loop.epoch, loop.step, folder)

    def _save_final(self, folder: str) -> None:
        save_lora_weights(self.module.model, folder)


class LoKRTrainer(_Trainer):
    """Trains a LoKr into `lokr_weights.safetensors` of the same folders; it neither resumes nor validates."""

    kind = "LoKr"

    def __init__(self, dit_handler: Any, lokr_config: LoKRConfig, training_config: TrainingConfig) -> None:
        super().__init__(dit_handler, training_config)
        self.lokr_config = lokr_config

    def train_from_preprocessed(self, tensor_dir: str, training_state: TrainingState = None) -> Progress:
        """Train; yield (step, loss, message)."""
        try:
            yield from self._train(tensor_dir, training_state)
        finally:
            if self.dit_handler.model is not None:
                self.dit_handler.model.decoder = unwrap_fabric(self.dit_handler.model.decoder)

    def _train_with_fabric(self, data_module: PreprocessedDataModule, training_state: TrainingState) -> Progress:
        yield self._starting()
        loop = self._loop_with_fabric(data_module)
        loop.refuse_nonfinite = not _precision(self.module.device_type).endswith("-mixed")
        yield 0, 0.0, f"🎯 Training {sum(weight.numel() for weight in loop.parameters):,} parameters"
        yield from self._run(loop, training_state)

    def _missing(self) -> str:
        return "" if check_lycoris_available() else "LoKr needs LyCORIS: pip install lycoris-lora"

    def _make_module(self) -> PreprocessedLoKRModule:
        handler = self.dit_handler
        handler.model.decoder = unwrap_fabric(handler.model.decoder)
        return PreprocessedLoKRModule(
            handler.model, self.lokr_config, self.training_config, handler.device, handler.dtype
        )

    def _save_checkpoint(self, loop: _Loop, folder: str) -> None:
        save_lokr_training_checkpoint(
            self.module.lycoris_net,
            loop.optimizer,
            loop.scheduler,
            loop.epoch,
            loop.step,
            folder,
            lokr_config=self.lokr_config,
            run_metadata=self.run_metadata,
        )

    def _save_final(self, folder: str) -> None:
        about = {"lokr_config": self.lokr_config.to_dict(), "run_metadata": self.run_metadata}
        save_lokr_weights(self.module.lycoris_net, folder, metadata=about)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)  # every device's generator too
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed)


def _configure_training_memory_features(decoder: Any) -> tuple[bool, bool, bool]:
    """Turn gradient checkpointing on; return whether it is, and two more answers that nothing depends on here.

    Trap, kept from ACE-Step: it does not ask `TrainingConfig.gradient_checkpointing`. This kind needs an input with a
    gradient, which the training step therefore marks.
    """
    base = decoder.get_base_model() if hasattr(decoder, "get_base_model") else decoder
    # transformers renames it; both names take the same argument.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    return True, False, False


def _precision(device_type: str) -> str:
    return {"cuda": "bf16-mixed", "xpu": "bf16-mixed", "mps": "16-mixed"}.get(device_type, "32-true")


def _schedule(optimizer: Optimizer, batches: int, config: TrainingConfig) -> SequentialLR:
    """Warm up over at most a tenth of the run, then follow half a cosine down to a hundredth."""
    steps = config.max_epochs * max(1, math.ceil(batches / config.gradient_accumulation_steps))
    warmup = min(config.warmup_steps, max(1, steps // 10))
    rise = LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
    fall = CosineAnnealingWarmRestarts(optimizer, max(1, steps - warmup), eta_min=0.01 * config.learning_rate)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def _count_nonfinite(parameters: list[Tensor]) -> int:
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    return sum(not bool(gradient.isfinite().all()) for gradient in gradients)


def _plot(plots: TrainingState, step: int, loss: float) -> None:
    """Add a point to the curves that the app draws: the loss and its moving average."""
    if plots is None:
        return
    smooth = plots["plot_ema"]
    smooth.append(0.1 * loss + 0.9 * smooth[-1] if smooth else loss)
    plots["plot_steps"].append(step)
    plots["plot_loss"].append(loss)
