"""What hooks are given: the model's facts, the run, the step, and an adapter that was saved."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import Refusal

if TYPE_CHECKING:
    import torch

AdapterType = Literal["lora", "lokr"]


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without running it.

    Attributes:
        name: name of the model's folder, ``""`` when unknown. Never a path.
        config: the live values. For a loaded model its ``config`` object, which also holds its class's defaults.
        written: what the folder's ``config.json`` says itself, or None when there is no such file. The config class
            of ACE-Step defaults ``model_version`` to "turbo" for every model, so only what is written is evidence.
    """

    name: str
    config: Mapping[str, Any]
    written: Mapping[str, Any] | None

    @classmethod
    def from_folder(cls, folder: Path) -> ModelFacts:
        """Facts of a model that is not loaded. Raises Refusal when config.json is missing or is not a JSON object."""
        written = read_config(folder / "config.json")
        # Not resolved: a link named acestep-v15-base into a download cache says more than what it points to.
        return cls(name=folder.absolute().name, config=written, written=written)

    @classmethod
    def from_model(cls, model: Any) -> ModelFacts:
        """Facts of a loaded model: its config object, and the file that it was loaded from if that is still there.

        Raises Refusal when that file is there and is not a JSON object.
        """
        config = model.config
        live: dict[str, Any] = dict(config.to_dict() if hasattr(config, "to_dict") else vars(config))
        origin = str(getattr(config, "_name_or_path", "") or "")
        file = Path(origin) / "config.json"
        written = read_config(file) if origin and file.is_file() else None
        # A path of the other operating system may be in there, so both separators count.
        parts = [part for part in re.split(r"[\\/]", origin) if part not in ("", ".", "..")]
        return cls(name=parts[-1] if parts else "", config=live, written=written)


def read_config(file: Path) -> dict[str, Any]:
    """Read a model's config.json. Raises Refusal when it is missing, unreadable, or not a JSON object in UTF-8."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"No config.json in {file.parent}. Expected the folder of an ACE-Step 1.5 model.") from None
    except OSError as error:
        raise Refusal(f"Cannot read {file}: {error.strerror or error}. Make it readable, or copy it again.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, absurdly long or nested
        raise Refusal(f"{file} is not JSON ({error}). Copy it again from the model's download page.") from None
    if not isinstance(config, dict):
        raise Refusal(f"{file} holds a {type(config).__name__}, expected a JSON object. Copy it again.")
    return config


@dataclass(eq=False)
class Run:
    """One training, from start to saved adapter.

    Attributes:
        adapter_type: "lora" or "lokr".
        adapter_config: upstream's LoRAConfig or LoKRConfig.
        training_config: upstream's TrainingConfig.
        options: the plugins' options by name, as given or at their defaults.
        tensor_dir: the folder of preprocessed songs, None when a step was run without upstream's trainer.
        sampled_by: name of the plugin that is asked for timesteps, None when none is.
        state: room for plugins to keep what they decided; by convention under the plugin's own name.
        steps: training steps begun so far, validation not counted; of a resumed run those before it, too.
        resumed_at: training steps that earlier runs had done; 0 for a run from the start.
        epoch_losses: asked for :attr:`loss_by_epoch`; the host's own.
    """

    adapter_type: AdapterType
    adapter_config: Any
    training_config: Any
    options: Mapping[str, Any]
    tensor_dir: Path | None
    # Weak, so that a run remembered for a model never keeps gigabytes alive after upstream dropped them.
    model_ref: weakref.ref[Any]
    module_ref: weakref.ref[Any] | None = None
    sampled_by: str | None = None
    state: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    resumed_at: int = 0
    epoch_losses: Callable[[], Mapping[int, float]] = dict

    @property
    def first_step(self) -> bool:
        """Whether this run has not got beyond its first step, in which looking at values is worth waiting for."""
        return self.steps - self.resumed_at <= 1

    @property
    def loss_by_epoch(self) -> Mapping[int, float]:
        """Mean loss of every whole epoch so far, of a resumed run those before it, too; {} where nobody keeps it."""
        return self.epoch_losses()

    @property
    def model(self) -> Any:
        """The whole model (AceStepConditionGenerationModel), not only its decoder."""
        model = self.model_ref()
        if model is None:
            raise Refusal("The model of this run was freed while the run went on. Start it again.")
        return model


@dataclass(eq=False, slots=True)
class Step:
    """One ``training_step``: training or validation.

    Attributes:
        run: the run that it belongs to.
        module: upstream's PreprocessedLoRAModule or PreprocessedLoKRModule.
        training: False in validation (no gradients, or upstream was told not to record the loss).
        device: where the step computes.
        dtype: floating type that the step computes in.
        t: the timesteps that were used, shape [B], once they are sampled; None where upstream has no sampler.
        sampled_by: name of the plugin that sampled them, None when upstream did by itself.
        loss: what upstream's step returned, a scalar tensor on `device`; None until it has.
    """

    run: Run
    module: Any
    training: bool
    device: torch.device
    dtype: torch.dtype
    t: torch.Tensor | None = None
    sampled_by: str | None = None
    loss: torch.Tensor | None = None
    sampler_called: bool = False


@dataclass(frozen=True)
class ResumePoint:
    """A place in a training, and everything that the rest of it depends on.

    Attributes:
        epochs: whole passes through the songs.
        steps: training steps of the pass after them; 0 between two passes.
        steps_per_epoch: training steps of a whole pass; None when they were not recorded.
        losses: the loss of every training step so far, shape [N]; None when they were not recorded.
        validation: the loss of every validation step so far, shape [M]; None when they were not recorded.
        random: states of the random generators here; None when they were not recorded.
        epoch_random: the same at the start of the pass that has begun, which shuffles the songs; None between two.
        gradients: of each trained tensor what waits for the next optimizer step, None when nothing does.
        optimizer, scheduler: their ``state_dict()``; None to begin with new ones.
        optimizer_class: name of the optimizer's class, "" when unknown.
        weights: the adapter's tensors under the names that they are saved with; empty when they lie in a file.
        parameters: the trained tensors themselves, where the file's are computed from them (LyCORIS multiplies its
            scalar into them); None where they are the same.
        songs: fingerprint of the songs that it was trained on, "" when unknown.
        save_number: counts the saves in an output folder, from 1: the newest checkpoint is the one with the highest; 0
            when it was not recorded.
        lines: what the user should know about going on from here.
    """

    epochs: int
    steps: int
    steps_per_epoch: int | None = None
    losses: torch.Tensor | None = None
    validation: torch.Tensor | None = None
    random: Mapping[str, Any] | None = None
    epoch_random: Mapping[str, Any] | None = None
    gradients: list[torch.Tensor | None] | None = None
    optimizer: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    optimizer_class: str = ""
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parameters: list[torch.Tensor] | None = None
    songs: str = ""
    save_number: int = 0
    lines: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The place in words."""
        return f"in epoch {self.epochs + 1}" if self.steps else f"after epoch {self.epochs}"

    @property
    def steps_done(self) -> int | None:
        """Training steps so far, None when an epoch's number of them is not known."""
        if self.losses is not None:
            return len(self.losses)
        return None if self.steps_per_epoch is None else self.epochs * self.steps_per_epoch + self.steps


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that upstream has just written.

    Attributes:
        weights: the weights file, in a folder that is moved to its place once every plugin was asked: what is written
            beside it appears together with it, or not at all.
        destination: where the weights file will be then.
        folder: the folder that upstream was told to save into, where it is now; the weights are in it or below it.
        adapter_type: "lora" or "lokr".
        epoch: epochs done, when upstream's save was told.
        global_step: optimizer steps done, when upstream's save was told.
        resume_point: what going on from here would need; None for a finished adapter, and where it cannot be had.
    """

    weights: Path
    destination: Path
    folder: Path
    adapter_type: AdapterType
    epoch: int | None
    global_step: int | None
    resume_point: ResumePoint | None = None
