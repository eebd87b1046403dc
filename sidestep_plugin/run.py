"""What hooks receive: the model's facts, the run, the step, a place to resume from, a saved adapter."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .clock import Clock
from .errors import Refusal
from .files import not_a_file, stand_in
from .ranks import Ranks

if TYPE_CHECKING:
    import torch

AdapterType = str
"""Name of a kind of adapter, such as "lora": one of ``sidestep_plugin.adapters.kinds.NAMES``."""

ROWS_WITHOUT_CONDITION: Final = "sidestep.rows_without_condition"
"""Key of ``Run.state`` under which condition dropout keeps which rows it dropped, a bool tensor [B] a step, until the
training's report takes them."""

NEXT_COMMANDS: Final = "sidestep.next_commands"
"""Key of ``Run.state`` under which the command line keeps a function that returns what to type next: it takes the
training's state ("training", "finished", "stopped" or "failed") and returns pairs of a purpose and a command."""

FRAMES: Final = ("target_latents", "attention_mask", "context_latents")
"""Entries of a batch with one row per frame of latents, [B,T,...]. A plugin may shorten T in all of them at once."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known about a model without running it.

    Attributes:
        name: name of the model's folder, ``""`` if unknown. Never a path.
        config: the values in use. For a loaded model these come from its ``config`` object, which also holds the
            defaults of its class.
        written: the contents of the folder's ``config.json``, or None if there is no such file. ACE-Step's config
            class sets ``model_version`` to "turbo" for every model, so only what is written in the file is evidence.
    """

    name: str
    config: Mapping[str, Any]
    written: Mapping[str, Any] | None

    @classmethod
    def from_folder(cls, folder: Path) -> ModelFacts:
        """Facts about a model that is not loaded. Raises Refusal if config.json is missing or not a JSON object."""
        written = read_config(folder / "config.json")
        # Not resolved: a link named acestep-v15-base says more than the download cache that it points to.
        return cls(name=folder.absolute().name, config=written, written=written)

    @classmethod
    def from_model(cls, model: Any) -> ModelFacts:
        """Facts about a loaded model: its config object, and the file it was loaded from if that still exists.

        Raises Refusal if that file exists and is not a JSON object.
        """
        config = model.config
        live: dict[str, Any] = dict(config.to_dict() if hasattr(config, "to_dict") else vars(config))
        origin = str(getattr(config, "_name_or_path", "") or "")
        file = Path(origin) / "config.json"
        written = read_config(file) if origin and file.is_file() else None
        # The path may come from another operating system, so both separators count.
        parts = [part for part in re.split(r"[\\/]", origin) if part not in ("", ".", "..")]
        return cls(name=parts[-1] if parts else "", config=live, written=written)


def read_config(file: Path) -> dict[str, Any]:
    """Read a model's config.json. Raises Refusal if it is missing, unreadable, or not a JSON object in UTF-8."""
    problem = not_a_file(file)
    if problem and file.exists():  # a named pipe would be waited for
        raise Refusal(f"Cannot read {file}: it {problem}. Copy the model folder again.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"No config.json in {file.parent}. Expected the folder of an ACE-Step 1.5 model.") from None
    except OSError as error:
        raise Refusal(f"Cannot read {file}: {error.strerror or error}. Make it readable, or copy it again.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, far too long or too deeply nested
        if what := stand_in(file):
            raise Refusal(f"{file} is not JSON: it {what}. Complete the model's folder, or copy it again.") from None
        raise Refusal(f"{file} is not JSON ({error}). Copy it again from the model's download page.") from None
    if not isinstance(config, dict):
        raise Refusal(f"{file} holds a {type(config).__name__}, expected a JSON object. Copy it again.")
    return config


def _no_vae() -> Any:
    """Default for ``Run.loaded_vae``: no VAE is loaded."""
    return None


@dataclass(eq=False)
class Run:
    """One training, from its start to the saved adapter.

    Attributes:
        adapter_type: name of the kind of adapter, such as "lora".
        adapter_config: upstream's LoRAConfig or LoKRConfig.
        training_config: upstream's TrainingConfig.
        options: the values of all plugin options by name, as given or at their defaults.
        tensor_dir: the folder of preprocessed songs; None if a step was run without upstream's trainer.
        sampled_by: name of the plugin that samples the timesteps; None if upstream does.
        state: a dictionary in which plugins keep what they need during the run, by convention under their own name.
        held_out: the songs of the folder that are not trained on, decided before the run starts.
        steps: training steps started so far, without validation. A resumed run also counts the steps before it.
        resumed_at: training steps that earlier runs had finished; 0 for a run from the start.
        best_epoch: the epoch with the lowest validation loss so far, by the plugin that validates; None without one.
        facts: functions that return facts about the adapter when it is saved; a plugin that changes what is trained
            adds one when the run starts.
        describe: call it for all facts about the run as they are now, {} if no plugin describes adapters.
        loaded_vae: call it for the VAE that the app has loaded, None on the command line. Never move that VAE.
        with_lightning: whether upstream trains with Lightning; without it, :func:`engine_plan_memory` is never called.
        ranks: the place of this process among those of the training; process 0 of 1 on a single GPU.
        before_run_ended: functions that are called in every process before :func:`acestep_run_ended` is called in the
            first one, which is where a plugin exchanges what its processes have noted since the last epoch.
        paused: seconds since the first step that were spent between epochs on something else than training.
        clock: the time that the training takes (private; see ``clock.py``).
        engine: what the engine does for the rooms of this package (private; see ``engine/services.py``).
        reports: functions that return entries for the training's report (private).
        keeps: by name, functions that return what a checkpoint keeps for a part of the plugin (private).
        variants: by name, functions that return other tensors for the adapter, one for each that is trained and in
            their order, or None while there are none; they are saved in a folder of that name beside it (private).
        resuming: whether this run resumes from a checkpoint (private).
        kept: what that checkpoint kept (private).
        saves: number of the newest checkpoint in the output folder (private).
    """

    adapter_type: AdapterType
    adapter_config: Any
    training_config: Any
    options: Mapping[str, Any]
    tensor_dir: Path | None
    # Weak, so that remembering a run never keeps a model in memory after upstream has dropped it.
    model_ref: weakref.ref[Any]
    module_ref: weakref.ref[Any] | None = None
    sampled_by: str | None = None
    state: dict[Hashable, Any] = field(default_factory=dict)
    held_out: tuple[Path, ...] = ()
    steps: int = 0
    resumed_at: int = 0
    best_epoch: int | None = None
    with_lightning: bool = True
    epoch_losses: Callable[[], Mapping[int, float]] = dict  # set by the host, for loss_by_epoch
    loaded_vae: Callable[[], Any] = _no_vae
    ranks: Ranks = Ranks()  # noqa: RUF009 - immutable
    before_run_ended: list[Callable[[], object]] = field(default_factory=list)
    facts: list[Callable[[], Mapping[str, Any]]] = field(default_factory=list)
    describe: Callable[[], Mapping[str, Any]] = dict
    paused: float = 0.0
    clock: Clock = field(default_factory=Clock)
    engine: Any = None
    reports: list[Callable[[], Mapping[str, Any]]] = field(default_factory=list)
    keeps: dict[str, Callable[[], Any]] = field(default_factory=dict)
    variants: dict[str, Callable[[], Sequence[torch.Tensor] | None]] = field(default_factory=dict)
    resuming: bool = False
    kept: Mapping[str, Any] = field(default_factory=dict)
    saves: int = 0
    exchange: Callable[[Any], list[Any]] | None = None  # set by the host, for gather

    @property
    def first_step(self) -> bool:
        """Whether this run is still in its first step, in which reading values is worth waiting for the GPU."""
        return self.steps - self.resumed_at <= 1

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; ``[value]`` on a single GPU.

        Every process has to call it equally often: in ``acestep_epoch_finished`` or from :attr:`before_run_ended`.
        Values are pickled, so tensors should be on the CPU.
        """
        return [value] if self.exchange is None else self.exchange(value)

    @property
    def loss_by_epoch(self) -> Mapping[int, float]:
        """Mean loss of every complete epoch so far, by number from 1, also those before resuming; {} if unknown."""
        return self.epoch_losses()

    @property
    def model(self) -> Any:
        """The whole model (AceStepConditionGenerationModel), not just its decoder."""
        model = self.model_ref()
        if model is None:
            raise Refusal("The model was freed while this run was still going. Start the run again.")
        return model


@dataclass(eq=False, frozen=True, slots=True)
class Step:
    """One call of upstream's ``training_step``, in training or in validation. Read only.

    Attributes:
        run: the run that the step belongs to.
        module: upstream's PreprocessedLoRAModule or PreprocessedLoKRModule.
        training: False in validation (no gradients, or upstream was told not to record the loss).
        device: the device on which the step computes.
        dtype: the floating-point type in which the step computes.
        t: the timesteps of the step, shape [B], once they are sampled; None if upstream has no sampler.
        sampled_by: name of the plugin that sampled them; None if upstream did.
        loss: a copy of the loss that upstream's step returned, a scalar tensor on `device`; None before that.
        sampler_called: whether upstream has called its sampler in this step.
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


def note(step: Step, **values: Any) -> None:
    """Write attributes of a step, which only the host does: for plugins it is read only."""
    for name, value in values.items():
        object.__setattr__(step, name, value)


@dataclass(frozen=True)
class ResumePoint:
    """A place in a training to resume from, with everything that the rest of the training depends on."""

    epochs: int  # complete passes through the songs
    steps: int  # training steps of the pass that has begun; 0 between two passes
    steps_per_epoch: int | None = None  # training steps in a complete pass; None if they were not recorded
    losses: torch.Tensor | None = None  # of every training step so far, shape [N]; None if they were not recorded
    validation: torch.Tensor | None = None  # of every validation step so far, shape [M]; None if not recorded
    random: Mapping[str, Any] | None = None  # states of the random generators at this place; None if not recorded
    # Their states at the start of the pass that has begun, which decide the order of its songs; None between two.
    epoch_random: Mapping[str, Any] | None = None
    gradients: list[torch.Tensor | None] | None = None  # of each trained tensor, if they wait for the optimizer
    optimizer: Mapping[str, Any] | None = None  # its ``state_dict()``; None to start with a new one
    scheduler: Mapping[str, Any] | None = None  # the same
    optimizer_class: str = ""  # name of the optimizer's class, "" if unknown
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)  # by their saved names; {} if they are in a file
    # The trained tensors themselves, if the saved ones are computed from them: LyCORIS multiplies its scalar into them.
    parameters: list[torch.Tensor] | None = None
    songs: str = ""  # fingerprint of the songs, "" if unknown
    kept: Mapping[str, Any] = field(default_factory=dict)  # by name, what parts of the plugin keep, in plain types
    save_number: int = 0  # counts the saves in an output folder from 1: the newest has the highest; 0 if not recorded
    ranks: Sequence[Mapping[str, Any]] = ()  # `random` and `epoch_random` of each of several processes, by rank
    lines: tuple[str, ...] = ()  # what the user should know before resuming from here
    finished: str = ""  # why there is nothing to resume; "" to train on

    @property
    def where(self) -> str:
        """The place in words, such as "after epoch 3"."""
        return f"in epoch {self.epochs + 1}" if self.steps else f"after epoch {self.epochs}"

    @property
    def steps_done(self) -> int | None:
        """Training steps so far; None if the number of steps in an epoch is unknown."""
        if self.losses is not None:
            return len(self.losses)
        return None if self.steps_per_epoch is None else self.epochs * self.steps_per_epoch + self.steps


@dataclass(frozen=True)
class Clip:
    """A piece of sound.

    Attributes:
        samples: shape [C,N], fp32 in [-1, 1], on the CPU.
        rate: samples per second.
    """

    samples: torch.Tensor
    rate: int


@dataclass(frozen=True)
class EpochNews:
    """What a plugin tells between two epochs.

    Attributes:
        lines: lines for the user.
        logged: numbers and clips by name, for upstream's log, which TensorBoard shows.
    """

    lines: tuple[str, ...] = ()
    logged: Mapping[str, float | Clip] = field(default_factory=dict)


@dataclass(frozen=True)
class ProcessPlan:
    """In how many processes a training runs, one for each GPU."""

    devices: int = 1  # processes on this machine
    machines: int = 1  # number of machines
    machine: int = 0  # number of this machine, from 0
    rendezvous: str = ""  # ``host:port`` on the first machine, where the processes meet; "" on a single machine
    own: frozenset[str] = frozenset()  # names of options that may differ between the machines
    # called in the first process when the songs are divided, with the run, the number of songs and the training steps
    # that each process has per epoch; returns lines to announce
    outcome: Callable[[Run, int, int], Sequence[str]] | None = None

    @property
    def processes(self) -> int:
        """Number of processes on all machines."""
        return self.devices * self.machines


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that upstream has just written: a checkpoint, the best one or the finished one.

    Attributes:
        weights: the weights file, in a temporary folder. After all plugins were asked, that folder is moved to its
            place as a whole: whatever a plugin writes beside the weights appears together with them, or not at all.
        destination: the path that the weights file will have then.
        folder: the temporary folder that upstream saved into; the weights are in it or in a folder below it.
        adapter_type: name of the kind of adapter, such as "lora".
        epoch: number of finished epochs; None within an epoch if upstream's save function was not told, and where
            nothing follows the training.
        global_step: number of optimizer steps, if upstream's save function was told.
        resume_point: what resuming from here needs; None for a finished adapter, and if it is not available.
        copy_of: the folder of the saved weights that these were read back from, when patience has ended a training and
            the best adapter is the finished one. It was perhaps trained with other settings than the run's.
    """

    weights: Path
    destination: Path
    folder: Path
    adapter_type: AdapterType
    epoch: int | None
    global_step: int | None
    resume_point: ResumePoint | None = None
    copy_of: Path | None = None
