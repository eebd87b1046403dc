"""The table of seams: every name of upstream's that is replaced while plugins are attached, who needs it, and how.

Attaching is a loop over this table, and so is the compatibility check. What the wrappers do is in ``wrappers``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from ..adapters.kinds import KINDS
from ..errors import UpstreamMismatch
from ..run import AdapterType
from .checkout import TRAINER
from .host import NEED_A_JOURNAL
from .shapes import (
    MODULE_CLASS,
    SAMPLER,
    SAVE_FUNCTIONS,
    TRAINER_CLASS,
    adapter_types,
    lacks_parameter,
    own_dropout,
    resolve,
    sampler_problem,
    save_problem,
)
from .wrappers.engine import wrap_engine
from .wrappers.loaders import wrap_loader
from .wrappers.optimizing import wrap_gradient_check, wrap_scheduler
from .wrappers.preprocessing import builder_of, wrap_preprocessing
from .wrappers.sampler import wrap_sampler
from .wrappers.saving import wrap_save
from .wrappers.songs import wrap_setup, wrap_song_list, wrap_song_reading
from .wrappers.step import wrap_step
from .wrappers.training import wrap_training

if TYPE_CHECKING:
    from .host import Host

EVALUATE: Final = "evaluate"
"""Stands among the hooks of a seam for an attachment that evaluates songs."""

FOLDERS: Final = "folders"
"""Stands among them for an attachment that is allowed folders by name, as every one from the command line."""

Status = Literal["found", "missing", "wrong shape"]


@dataclass(frozen=True)
class Seam:
    """One name of upstream's that is replaced."""

    name: str  # the name, dotted, as in the trainer's module
    wrap: Callable[[Host, Any], Any]  # makes what stands in its place, from the attachment's host and what stands there
    kind: AdapterType | None = None  # the kind of adapter whose training needs it; None for all
    hooks: tuple[str, ...] = ()  # the hooks that need it; empty if every training does
    also: tuple[str, ...] = ()  # hooks that use it where it is there, and do without it elsewhere
    optional: bool = False  # whether a version of ACE-Step without it can train
    without: str = ""  # what such a version cannot do, a phrase; "" if nothing is lost
    # why what stands there does not fit, for a trainer and a kind of adapter; None where it does
    problem: Callable[[Any, AdapterType], str | None] = lambda _trainer, _kind: None
    # finds the object that has the name, None in a version without it. By default the name's own path.
    owner: Callable[[Any], Any] | None = None

    @property
    def attribute(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    def owner_in(self, trainer: Any) -> Any:
        """The object that has the name in a version of the trainer; None where there is none."""
        owner = resolve(trainer, self.name.rpartition(".")[0]) if self.owner is None else self.owner(trainer)
        return owner if callable(getattr(owner, self.attribute, None)) else None

    def needed(self, uses: Callable[[str], bool]) -> bool:
        """Whether an attachment that uses these hooks replaces it, where it is there."""
        return not self.hooks or any(map(uses, (*self.hooks, *self.also)))


def _of_kind(kind: AdapterType) -> Iterator[Seam]:
    """The seams of one kind of adapter."""
    module, trainer = MODULE_CLASS[kind], TRAINER_CLASS[kind]
    step, train = f"{module}.training_step", f"{trainer}.train_from_preprocessed"
    weights, checkpoint = SAVE_FUNCTIONS[kind]
    yield Seam(step, partial(wrap_step, kind=kind), kind, problem=_parameter(step, "batch"))
    yield Seam(train, partial(wrap_training, kind=kind), kind, problem=_parameter(train, "tensor_dir"))
    yield Seam(
        weights,
        partial(wrap_save, kind=kind),
        kind,
        hooks=("acestep_adapter_saved",),
        also=NEED_A_JOURNAL,
        problem=lambda there, _: save_problem(there, trainer, weights),
    )
    yield Seam(
        checkpoint,
        partial(wrap_save, kind=kind),
        kind,
        hooks=("acestep_adapter_saved",),
        also=NEED_A_JOURNAL,
        optional=True,  # the first versions save checkpoints with the function above
        problem=_parameter(checkpoint, "output_dir"),
    )


def _parameter(name: str, parameter: str) -> Callable[[Any, AdapterType], str | None]:
    return lambda trainer, _: lacks_parameter(trainer, name, parameter)


def _song_list(trainer: Any) -> Any:
    """Upstream's dataset of preprocessed songs, None in a version that has none beside its data module."""
    module = sys.modules.get(getattr(getattr(trainer, "PreprocessedDataModule", None), "__module__", ""))
    return getattr(module, "PreprocessedTensorDataset", None)


SEAMS: Final[tuple[Seam, ...]] = (
    Seam(
        SAMPLER,
        wrap_sampler,
        hooks=("acestep_sample_timesteps", EVALUATE),
        also=("acestep_step_finished",),  # plugins that look at finished steps receive the timesteps
        problem=lambda trainer, kind: sampler_problem(trainer, MODULE_CLASS[kind]),
    ),
    *(seam for kind in KINDS for seam in _of_kind(kind.name)),
    Seam(
        "Fabric",
        wrap_engine,
        hooks=(
            "engine_model_ready",
            "engine_types_final",
            "engine_epoch_ended",
            "engine_plan_processes",
            "acestep_epoch_finished",
            "acestep_between_epochs",
        ),
        optional=True,
        without="several GPUs, memory savings",
        problem=lambda trainer, _: None if isinstance(trainer.Fabric, type) else "it is no class",
    ),
    Seam(
        "_count_nonfinite_grads",
        lambda _, original: wrap_gradient_check(original),
        hooks=("engine_model_ready",),
        optional=True,
    ),
    Seam(
        "PreprocessedDataModule.setup",
        wrap_setup,
        hooks=("engine_hold_out",),
        optional=True,
        without="holding songs out",
    ),
    Seam(
        "SequentialLR",
        lambda _, original: wrap_scheduler(original),
        hooks=NEED_A_JOURNAL,
        optional=True,
        without="resuming, saving a training that is stopped",
    ),
    Seam(
        "PreprocessedDataModule.train_dataloader",
        partial(wrap_loader, trains=True),
        hooks=NEED_A_JOURNAL,
        optional=True,
        without="resuming, reports by epoch, validation, previews",
    ),
    Seam(
        "PreprocessedDataModule.val_dataloader",
        partial(wrap_loader, trains=False),
        hooks=NEED_A_JOURNAL,
        optional=True,
    ),
    Seam(
        "PreprocessedTensorDataset.__init__",
        lambda _, original: wrap_song_list(original),
        hooks=(FOLDERS, *NEED_A_JOURNAL),
        optional=True,
        without="leaving out macOS's companion files (._song.pt)",
        owner=_song_list,
    ),
    Seam(
        "PreprocessedTensorDataset.__getitem__",
        wrap_song_reading,
        hooks=("engine_read_song",),
        optional=True,
        without="keeping songs in RAM",
        owner=_song_list,
    ),
    Seam(
        "DatasetBuilder.preprocess_to_tensors",
        wrap_preprocessing,
        hooks=("acestep_run_started",),  # whoever has a plugin
        optional=True,
        without="conditions as generated in ACE-Step's own preprocessing",
        owner=builder_of,
    ),
)
"""Every seam, in the order in which it is replaced. The path guard is no row: it is in every module that uses it."""


@dataclass(frozen=True)
class Found:
    """One seam in one version of the trainer."""

    name: str  # the name as it stands in the trainer's module
    adapter_type: AdapterType  # the kind of adapter whose training was looked at
    status: Status  # found, missing, or wrong shape
    reason: str = ""  # why it does not fit; "" when found
    for_hook: str | None = None  # the first hook that cannot work without it; None when every attachment needs it
    optional: bool = False  # whether the version can train without it
    without: str = ""  # what it cannot do then, a phrase; "" if nothing is lost


def examine(trainer: Any, adapter_type: AdapterType) -> list[Found]:
    """Look at every seam that one kind of adapter needs, without changing anything."""
    found = [_look(trainer, seam, adapter_type) for seam in SEAMS if seam.kind in (None, adapter_type)]
    step = f"{MODULE_CLASS[adapter_type]}.training_step"
    if (own := own_dropout(trainer, MODULE_CLASS[adapter_type])) is not None:
        reason = f"it drops conditions by itself ({own}), so they would be dropped twice"
        found.append(Found(step, adapter_type, "wrong shape", reason, for_hook="acestep_prepare_batch"))
    return found


def _look(trainer: Any, seam: Seam, kind: AdapterType) -> Found:
    hook = next((hook for hook in seam.hooks if hook not in (EVALUATE, FOLDERS)), None)
    status: Status = "found"
    reason = ""
    if seam.owner_in(trainer) is None:
        status, reason = "missing", f"{TRAINER} has no {seam.name}"
    elif reason := seam.problem(trainer, kind) or "":
        status = "wrong shape"
    return Found(seam.name, kind, status, reason, hook, seam.optional, seam.without)


def require(trainer: Any, adapter_type: AdapterType, uses: Callable[[str], bool]) -> list[str]:
    """Check the seams of one kind of adapter.

    Args:
        uses: tells whether a hook is in use; a seam that serves only other hooks may be missing.

    Returns:
        What this version cannot do, a phrase for each seam that is missing and not needed to train.

    Raises:
        UpstreamMismatch: the first seam that does not fit and without which no adapter can be trained.
    """
    if not hasattr(trainer, MODULE_CLASS[adapter_type]):
        others = " and ".join(f"--adapter-type {kind}" for kind in adapter_types(trainer))
        raise UpstreamMismatch(
            f"This version of ACE-Step cannot train --adapter-type {adapter_type}: its trainer has no "
            f"{MODULE_CLASS[adapter_type]}. It can train {others or 'nothing that is known here'}. Use a newer version."
        )
    lost = []
    for seam in examine(trainer, adapter_type):
        if seam.status == "found" or not (seam.for_hook is None or uses(seam.for_hook)):
            continue
        if seam.optional:
            lost += [seam.without] if seam.without else []
            continue
        raise UpstreamMismatch(
            f"This version of ACE-Step is not compatible ({seam.name}): {seam.reason}. Nothing was changed. "
            "Use ACE-Step's main version; acestep-train check shows whether a version is compatible."
        )
    return lost


def in_use(trainer: Any, kinds: Iterable[AdapterType], uses: Callable[[str], bool]) -> Iterator[tuple[Any, Seam]]:
    """The seams that an attachment replaces, each with the object that has the name."""
    wanted = tuple(kinds)
    for seam in SEAMS:
        if (seam.kind is None or seam.kind in wanted) and seam.needed(uses):
            owner = seam.owner_in(trainer)
            # A sampler of an unknown shape is left alone where it is only looked at.
            if owner is not None and not (seam.optional and any(seam.problem(trainer, kind) for kind in wanted)):
                yield owner, seam


def cannot_do(module: Any, lost: Iterable[str]) -> str:
    """What a trainer cannot do, as a sentence without its full stop, and what to do where a package is missing."""
    if getattr(module, "LIGHTNING_AVAILABLE", True):
        return f"This version of ACE-Step cannot do: {', '.join(lost)}"
    return f"Without the package lightning, ACE-Step cannot do: {', '.join(lost)} (pip install lightning)"
