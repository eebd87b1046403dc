"""The only module that changes upstream: :func:`attach` puts hooks around its trainer, ``detach`` puts all back.

What is replaced, each in the namespace in which the trainer looks it up: the sampler, the ``training_step`` of the
LoRA and LoKr modules, the ``train_from_preprocessed`` of their trainers, the save functions; for resuming, what makes
the learning-rate schedule and the loaders of songs; and (only when folders are allowed by name) the path guard.
Everything is checked before anything is touched.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from itertools import product
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from . import upstream
from .errors import DetachError, PluginError, Refusal, UpstreamMismatch
from .failures import advice, room
from .resume import Journal, ResumePoint, check_finite, watch
from .run import AdapterType, Run, SavedAdapter, Step
from .staging import published, staged

if TYPE_CHECKING:
    import torch

    from .autoload import Wanted
    from .registry import Registry

_running: ContextVar[Step | None] = ContextVar("acestep_running_step", default=None)
_saving: ContextVar[bool] = ContextVar("acestep_saving", default=False)
_training: ContextVar[tuple[Run, Any] | None] = ContextVar("acestep_training", default=None)
_attached: list[Attachment] = []

_INHERITED: Final = object()
"""Stands for "not in this class's own namespace": undone by deleting, not by setting."""

WEIGHT_FILES: Final[dict[AdapterType, tuple[str, ...]]] = {
    "lora": (
        "adapter/adapter_model.safetensors",
        "adapter/adapter_model.bin",
        "adapter_model.safetensors",
        "lora_weights.pt",
        "model.pt",
    ),
    "lokr": ("lokr_weights.safetensors",),
}
"""Where upstream's save functions put the weights, in the folder that they are told."""

FINAL: Final = "final"
"""Folder below the output folder into which upstream saves the finished adapter."""
INTERRUPTED: Final = "interrupted"
"""The same for a training that was stopped or failed."""

_DETACHED: Final = (
    "The plugins were detached while this training was running, so it was stopped. Keep all of the training inside the "
    "with block of attach()."
)


def attach(
    trainer: Any = None,
    *,
    plugins: Iterable[str] = ("sidestep",),
    options: Mapping[str, Any] | None = None,
    extra_plugins: Mapping[str, object] | None = None,
    allowed_folders: Iterable[Path] = (),
    announce: Callable[[str], None] | None = None,
    wins: str | None = None,
) -> Attachment:
    """Attach plugins to upstream's trainer, until the returned handle is detached.

    Plugins that a patched checkout attached by itself make room until then.

    Args:
        trainer: the module ``acestep.training.trainer``; imported when None.
        plugins: names of installed plugins, in the order in which they are asked.
        options: values of the plugins' options by name (``cfg_ratio``), others at their defaults.
        extra_plugins: plugin objects that are not installed, by name; asked after the named ones.
        allowed_folders: folders that upstream's path guard is to accept besides its own root, and nothing else.
        announce: takes each line that the plugins have to say; upstream's log when None.
        wins: of two plugins that want what only one can do (sampling timesteps), the one that does it.

    Returns:
        A handle with ``detach()``, also a context manager. A second call with the same plugins and options returns
        the same handle and changes nothing; leaving its ``with`` block leaves the first one attached.

    Raises:
        UpstreamMismatch: no trainer, or one that does not fit. Nothing was changed.
        PluginError: a plugin is missing or broken. Nothing was changed.
        Refusal: an option is unknown or unusable, or other plugins are attached already. Nothing was changed.
    """
    from .registry import Registry

    trainer = upstream.import_trainer() if trainer is None else trainer
    registry = Registry.load([plugins] if isinstance(plugins, str) else plugins, wins, later=extra_plugins or ())
    for name, plugin in (extra_plugins or {}).items():
        registry.register(plugin, name)
    resolved = registry.resolve_options(options or {})
    allowed = tuple(Path(folder).resolve() for folder in allowed_folders)

    automatic = None
    for attached in [attached for attached in _attached if attached.trainer is trainer]:
        if attached.automatic:
            automatic = attached
            continue
        if (attached.registry.names, attached.registry.wins, attached.options, attached.allowed_folders) != (
            registry.names,
            wins,
            resolved,
            allowed,
        ):
            raise Refusal(
                f"Already attached with {_listed(attached.registry.names)} and other options or folders. "
                "Call detach() on that handle first."
            )
        attached._calls += 1
        return attached
    if automatic is not None:
        automatic.detach()
    attachment = Attachment(trainer, registry, resolved, allowed, announce)
    try:
        attachment._apply()
    except BaseException:
        if automatic is not None:
            automatic._apply()
        raise
    attachment._making_room = automatic
    return attachment


def attach_automatically(trainer: Any, wanted: Wanted) -> None:
    """Attach what a patched checkout or ``acestep-train run`` wants, when the trainer has just been imported.

    Never raises: the app shall start and generate. What goes wrong is an error in upstream's log, and every training
    ends at once with the same message.
    """
    from .registry import Registry

    for stale in [attached for attached in _attached if attached.trainer is trainer]:
        _attached.remove(stale)  # the module was loaded again, and its names are new ones
        stale._replacements.clear()
    log = _logger(trainer)
    registry, options = Registry(), dict(wanted.options or {})
    try:
        registry = Registry.load(wanted.plugins, wanted.wins)
        if wanted.options is None:
            options, unknown = registry.options_in(os.environ)
            for name in unknown:
                log.warning(f"{name} is set, but no loaded plugin has such an option; it is not used.")
        attachment = Attachment(trainer, registry, registry.resolve_options(options))
        attachment.automatic = True
        attachment._apply()
    except Exception as error:
        told = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
        message = f"Plugins {_listed(list(wanted.plugins))} could not be attached, so nothing is trained: {told}"
        log.error(message)
        attachment = Attachment(trainer, Registry(), {})
        attachment.automatic = True
        attachment._message = message
        attachment._apply()
        return
    log.info(f"Plugins attached to the trainer: {_listed(registry.names)}")


@dataclass(frozen=True)
class _Replacement:
    """One name of upstream's, what stood there and what stands there while attached."""

    owner: Any
    name: str
    original: Any
    ours: Any

    @property
    def label(self) -> str:
        return f"{getattr(self.owner, '__qualname__', None) or getattr(self.owner, '__name__', self.owner)}.{self.name}"

    def put(self) -> None:
        setattr(self.owner, self.name, self.ours)

    def still_there(self) -> bool:
        return vars(self.owner).get(self.name) is self.ours

    def undo(self) -> None:
        if self.original is _INHERITED:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)


class Attachment:
    """What :func:`attach` returns: the handle of one set of plugins on one trainer.

    Attributes:
        trainer: the module that it is attached to.
        registry: the loaded plugins.
        options: the plugins' options.
        allowed_folders: folders that the path guard accepts besides its own root.
        automatic: whether a patched checkout attached it by itself; such a one makes room for any other.
        refusal: the refusal that stopped the newest run, or None. Upstream reports every failure as a message; this
            keeps the exception for callers that need to tell a refused run from a failed one.
        interrupted: where the newest run was saved when it was stopped or failed, else None.
    """

    def __init__(
        self,
        trainer: Any,
        registry: Registry,
        options: Mapping[str, Any],
        allowed_folders: tuple[Path, ...] = (),
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self.trainer = trainer
        self.registry = registry
        self.options = dict(options)
        self.allowed_folders = allowed_folders
        self.refusal: Refusal | None = None
        self.interrupted: Path | None = None
        self._announce = announce or _upstream_log(trainer)
        self._runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()
        self._replacements: list[_Replacement] = []
        self._calls = 1  # of attach() that were given this handle
        self._blocks = 0  # with blocks that are open
        self._held_outside = False
        self.automatic = False
        self._making_room: Attachment | None = None
        self._message: str | None = None  # with which every training ends at once

    def __enter__(self) -> Attachment:
        if self._blocks == 0:  # somebody attached before without a block, and expects to stay so after this one
            self._held_outside = self._calls > 1
        self._blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._blocks -= 1
        if self._blocks == 0 and not self._held_outside:
            self.detach()

    @property
    def attached(self) -> bool:
        return bool(self._replacements)

    def detach(self) -> None:
        """Put every name back, newest first. Does nothing when already detached.

        Raises:
            DetachError: somebody replaced one of the names after us; nothing was put back.
        """
        foreign = [replacement.label for replacement in self._replacements if not replacement.still_there()]
        if foreign:
            raise DetachError(
                f"{', '.join(foreign)} was replaced by somebody else after the plugins were attached. "
                "Undo that first: detaching now would remove their wrapper. Nothing was changed."
            )
        while self._replacements:
            self._replacements.pop().undo()
        if self in _attached:
            _attached.remove(self)
        made_room, self._making_room = self._making_room, None
        if made_room is not None:
            made_room._apply()

    # -- attaching ---------------------------------------------------------------------------------------------------

    def _apply(self) -> None:
        planned = self._plan() if self._message is None else self._blocking(self._message)
        try:
            for replacement in planned:
                replacement.put()
                self._replacements.append(replacement)
        except BaseException:
            while self._replacements:
                self._replacements.pop().undo()
            raise
        _attached.append(self)

    def _blocking(self, message: str) -> list[_Replacement]:
        name, ours = "train_from_preprocessed", _ending_with(message)
        classes = [getattr(self.trainer, name, None) for name in upstream.TRAINER_CLASS.values()]
        return [
            _Replacement(owner, name, vars(owner).get(name, _INHERITED), ours)
            for owner in classes
            if hasattr(owner, name)
        ]

    def _plan(self) -> list[_Replacement]:
        """Decide on every replacement without making one. Raises UpstreamMismatch."""
        trainer, planned = self.trainer, list[_Replacement]()

        def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
            current = getattr(owner, name)
            original = vars(owner).get(name, _INHERITED)
            planned.append(_Replacement(owner, name, original, make(current)))

        misfits: dict[AdapterType, UpstreamMismatch] = {}
        kinds = upstream.adapter_types(trainer)
        for kind in kinds:
            try:
                upstream.require(trainer, kind, self.registry.implements)
            except UpstreamMismatch as misfit:
                misfits[kind] = misfit
        if len(misfits) == len(kinds):
            raise next(iter(misfits.values())) if misfits else _no_module(trainer)

        # Also where nobody replaces it: whoever looks at finished steps is told the timesteps.
        looked_at = self.registry.implements("acestep_step_finished") and callable(
            getattr(trainer, upstream.SAMPLER, None)
        )
        if self.registry.implements("acestep_sample_timesteps") or looked_at:
            replace(trainer, upstream.SAMPLER, self._wrap_sampler)
        watches_saves = self.registry.implements("acestep_adapter_saved")
        for kind in kinds:
            module_class = getattr(trainer, upstream.MODULE_CLASS[kind])
            if kind in misfits:
                # The other kind of adapter fits and may train; this one must fail before its first step.
                replace(module_class, "training_step", partial(_refuser, misfit=misfits[kind]))
                continue
            trainer_class = getattr(trainer, upstream.TRAINER_CLASS[kind])
            replace(module_class, "training_step", partial(self._wrap_step, kind=kind))
            replace(trainer_class, "train_from_preprocessed", partial(self._wrap_train, kind=kind))
            for name in upstream.SAVE_FUNCTIONS[kind]:
                if hasattr(trainer, name) and (watches_saves or self._keeps_journal):
                    replace(trainer, name, partial(self._wrap_save, kind=kind))
        if self._keeps_journal:
            for owner, name, make in self._journal_seams():
                replace(owner, name, make)
        if self.allowed_folders:
            for module in _guarded_modules(trainer):
                replace(module, "safe_path", partial(_allowing, folders=self.allowed_folders))
        return planned

    @property
    def _resumes(self) -> bool:
        """Whether a plugin reads checkpoints, so that runs can be resumed and are worth saving when they stop."""
        return self.registry.implements("acestep_resume")

    @property
    def _keeps_journal(self) -> bool:
        """Whether any plugin needs what a run's journal knows."""
        return any(map(self.registry.implements, ("acestep_resume", "acestep_epoch_finished", "acestep_run_ended")))

    @property
    def _sampler(self) -> str | None:
        return next((name for name, _ in self.registry.callers("acestep_sample_timesteps")), None)

    # -- runs --------------------------------------------------------------------------------------------------------

    def _start(self, run: Run) -> None:
        """Let the plugins decide on a run, and remember it once they have. Raises Refusal."""
        self._runs.pop(run.model, None)
        self._ask_and_say("acestep_run_started", run=run)
        self._runs[run.model] = run

    def _run_of_step(self, module: Any, kind: AdapterType) -> Run:
        """The run that a training module steps for; a module used without upstream's trainer starts its own."""
        run = self._runs.get(module.model)
        if run is not None and run.module_ref is None and run.adapter_type == kind:
            run.module_ref = weakref.ref(module)
        if run is None or run.module_ref is None or run.module_ref() is not module:
            run = Run(
                adapter_type=kind,
                adapter_config=getattr(module, f"{kind}_config", None),
                training_config=getattr(module, "training_config", None),
                options=self.options,
                sampled_by=self._sampler,
                tensor_dir=None,
                model_ref=weakref.ref(module.model),
                module_ref=weakref.ref(module),
            )
            self._start(run)
        return run

    def _run_of_save(self, saved: Any) -> Run | None:
        """The run that a model or a LyCORIS network belongs to; None for one that was not trained under us."""
        for run in list(self._runs.values()):
            module = run.module_ref() if run.module_ref else None
            if saved is run.model_ref() or (module is not None and saved is getattr(module, "lycoris_net", None)):
                return run
        return None

    # -- wrappers ----------------------------------------------------------------------------------------------------

    def _wrap_train(self, original: Callable[..., Any], kind: AdapterType) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @wraps(original)
        def train_from_preprocessed(trainer: Any, *args: Any, **kwargs: Any) -> Generator[Any, Any, None]:
            self.refusal = self.interrupted = None
            if not self.attached:
                yield 0, 0.0, f"❌ {_DETACHED}"
                return
            model = trainer.dit_handler.model
            # A LoKr's trainer has no such argument; with us it has.
            ours = {} if "resume_from" in signature.parameters else {"resume_from": kwargs.pop("resume_from", None)}
            call = signature.bind(trainer, *args, **kwargs)
            resume_from = call.arguments.get("resume_from") or ours.get("resume_from")
            if model is None or (ours.get("resume_from") and not self._resumes):
                # upstream says so itself: no model, or no such argument
                yield from original(trainer, *args, **kwargs, **{name: value for name, value in ours.items() if value})
                return
            run = Run(
                adapter_type=kind,
                adapter_config=getattr(trainer, f"{kind}_config", None),
                training_config=getattr(trainer, "training_config", None),
                options=self.options,
                sampled_by=self._sampler,
                tensor_dir=Path(call.arguments["tensor_dir"]),
                model_ref=weakref.ref(model),
            )
            try:
                self._start(run)
                point = self._point(run, resume_from) if resume_from and self._resumes else None
            except Refusal as refusal:
                self.refusal = refusal
                yield 0, 0.0, f"❌ {refusal}"
                return
            if point is not None:
                call.arguments.pop("resume_from", None)
            if self._keeps_journal:
                each = getattr(run.training_config, "gradient_accumulation_steps", 0)
                run.journal = Journal(_device_of(trainer), point, each if isinstance(each, int) else 0)
                run.journal.epoch_finished = partial(self._epoch_finished, trainer)
            state = call.arguments.get("training_state")
            yield from self._followed(run, trainer, original(*call.args, **call.kwargs), state)

        return train_from_preprocessed

    def _followed(
        self, run: Run, trainer: Any, running: Generator[Any, Any, None], state: Mapping[str, Any] | None
    ) -> Generator[Any, Any, None]:
        """What upstream's training reports, and what becomes of it: a run that stops or fails is saved."""
        journal = run.journal
        step, loss = 0, 0.0
        try:
            # A generator may be run on after the block that attached us was left; the rest would be upstream's own.
            while self.attached:
                token = _training.set((run, trainer))
                try:
                    report = next(running, None)
                finally:
                    _training.reset(token)
                if journal is None:
                    if report is None:
                        return
                    yield report
                    continue
                while journal.lines:
                    yield step, loss, journal.lines.pop(0)
                if report is None:
                    break
                step, loss, text = report
                if journal.finished:
                    for line in self._summed_up(run, "finished"):
                        yield step, loss, line
                if text.startswith("❌"):
                    for line in [*self._summed_up(run, "failed"), *self._saved_after(run, trainer, failed=True)]:
                        yield step, loss, line
                    yield step, loss, _with_advice(text, run)
                elif journal.unsaved and text.startswith("💾"):
                    journal.unsaved = False  # upstream says that it saved a checkpoint, which it could not
                elif not journal.walking:
                    yield report
            else:
                yield 0, 0.0, f"❌ {_DETACHED}"
                return
            if _stopped(state):
                for line in [*self._summed_up(run, "stopped"), *self._saved_after(run, trainer)]:
                    yield step, loss, line
        except GeneratorExit:  # whoever listens has stopped it, and listens no more
            if _stopped(state) and self.attached and journal is not None:
                for line in [*self._summed_up(run, "stopped"), *self._saved_after(run, trainer)]:
                    self._announce(line)
            raise
        finally:
            running.close()
            if journal is not None:
                journal.scheduler = None  # it holds the optimizer, and that all that was trained

    def _point(self, run: Run, folder: str | Path) -> ResumePoint | None:
        """Where the plugin that resumes says that a run goes on; None leaves that to upstream. Raises Refusal."""
        guard = getattr(self.trainer, "safe_path", None)
        try:
            # The app may be open to strangers: what they may not read, a checkpoint is not looked for in either.
            folder = guard(str(folder)) if callable(guard) else folder
        except ValueError:
            raise Refusal(
                f"The checkpoint {folder} lies outside of the folders that ACE-Step may read. Copy it into the "
                "checkout's folder, or resume on the command line: acestep-train --resume-from."
            ) from None
        for plugin, point in self.registry.call("acestep_resume", run=run, folder=Path(folder)):
            if not isinstance(point, ResumePoint):
                raise PluginError(
                    f"Plugin {plugin!r} returned {_described(point)} from acestep_resume, expected a ResumePoint."
                )
            for line in point.lines:
                self._announce(line)
            return point
        return None

    def _saved_after(self, run: Run, trainer: Any, *, failed: bool = False) -> list[str]:
        """Save a run that ends before its end, so that it can be resumed | returns lines for the user."""
        journal = run.journal
        if journal is None or not self._resumes or journal.finished or journal.catching_up or not journal.computed:
            return []
        module, save, checkpoint = trainer.module, *upstream.SAVE_FUNCTIONS[run.adapter_type]
        point = journal.here(run, failed=failed)
        folder = Path(run.training_config.output_dir) / INTERRUPTED
        config = getattr(module, "lokr_config", None)
        known = {
            "model": module.model,
            "lycoris_net": getattr(module, "lycoris_net", None),
            "epoch": 0 if point is None else point.epochs,
            "global_step": 0 if point is None else int(journal.scheduler.last_epoch),
            "output_dir": str(folder),
            "lokr_config": config,
            "run_metadata": getattr(trainer, "run_metadata", None),
            "metadata": {"lokr_config": config.to_dict()} if config is not None else None,
        }
        if point is not None:
            known |= {"optimizer": journal.scheduler.optimizer, "scheduler": journal.scheduler}
        function = getattr(self.trainer, checkpoint, None) if point is not None else None
        function = function or getattr(self.trainer, save)
        journal.ending = True
        try:
            function(**{name: known[name] for name in inspect.signature(function).parameters if name in known})
        except Exception as error:  # a disk that is full, most likely; the training is over in any case
            reason = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}. {room(folder)}"
            return [f"⚠️ What was trained since the newest checkpoint could not be saved: {reason}"]
        self.interrupted = upstream.place_of(self.trainer, str(folder))
        return [f"💾 Saved as it was after {journal.steps} training steps: {self.interrupted}"]

    def _summed_up(self, run: Run, ending: str) -> list[str]:
        """What plugins have to say of a run that has ended, once."""
        journal = run.journal
        if journal is None or journal.summed_up or journal.computed == 0 or (ending != "finished" and journal.finished):
            return []
        journal.summed_up = True
        folder = upstream.place_of(self.trainer, run.training_config.output_dir)
        told: list[str] = []
        try:
            for plugin, lines in self.registry.call("acestep_run_ended", run=run, ending=ending, folder=folder):
                told += _checked_lines(plugin, "acestep_run_ended", lines)
        except Refusal as refusal:  # the adapter is saved, or is about to be: a summary is not worth losing it
            told.append(f"⚠️ {refusal}")
        return told

    def _epoch_finished(self, trainer: Any, run: Run, epoch: int, loss: float) -> None:
        """Put what plugins return of an epoch into upstream's log. Raises Refusal."""
        loggers = getattr(getattr(trainer, "fabric", None), "loggers", ())
        for plugin, entries in self.registry.call("acestep_epoch_finished", run=run, epoch=epoch, loss=loss):
            if not isinstance(entries, Mapping):
                raise PluginError(
                    f"Plugin {plugin!r} returned {_described(entries)} from acestep_epoch_finished, expected numbers "
                    "and tensors by name."
                )
            for logger, (name, value) in product(loggers, entries.items()):
                if isinstance(value, int | float):
                    logger.log_metrics({name: value}, epoch)
                elif hasattr(logger.experiment, "add_histogram"):
                    logger.experiment.add_histogram(name, value, epoch)

    def _journal_seams(self) -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
        """Where a run's journal looks in. A version without them trains all the same, and cannot be resumed."""

        def noting_scheduler(original: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(original, updated=())
            def make(*args: Any, **kwargs: Any) -> Any:
                scheduler = original(*args, **kwargs)
                if (running := _training.get()) is not None:
                    run, trainer = running
                    if run.journal is not None:
                        run.journal.scheduler = scheduler
                    run.module_ref = run.module_ref or weakref.ref(trainer.module)
                return scheduler

            return make

        def watching(original: Callable[..., Any], passes: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(original)
            def loader(*args: Any, **kwargs: Any) -> Any:
                made, running = original(*args, **kwargs), _training.get()
                if made is None or running is None or (journal := running[0].journal) is None:
                    return made
                return watch(made, partial(passes, journal, running[0]))

            return loader

        songs = getattr(self.trainer, "PreprocessedDataModule", None)
        if callable(getattr(self.trainer, "SequentialLR", None)):
            yield self.trainer, "SequentialLR", noting_scheduler
        if hasattr(songs, "train_dataloader"):
            yield songs, "train_dataloader", partial(watching, passes=Journal.epoch)
        if hasattr(songs, "val_dataloader"):
            yield songs, "val_dataloader", partial(watching, passes=Journal.validation)

    def _wrap_step(self, original: Callable[..., Any], kind: AdapterType) -> Callable[..., Any]:
        import torch

        signature = inspect.signature(original)
        prepares, finishes, samples = (
            self.registry.implements(hook)
            for hook in ("acestep_prepare_batch", "acestep_step_finished", "acestep_sample_timesteps")
        )

        @wraps(original)
        def training_step(module: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                run = self._run_of_step(module, kind)
                recorded = not (args or kwargs) or (
                    signature.bind(module, batch, *args, **kwargs).arguments.get("record_loss", True)
                )
                training = bool(recorded) and torch.is_grad_enabled()
                journal = run.journal
                if journal is not None and (loss := journal.recorded(run, training)) is not None:
                    return loss
                step = Step(run, module, training, torch.device(module.device), module.dtype)
                if prepares:
                    batch = self._prepare(step, batch)
                run.steps += training
                token = _running.set(step)
                try:
                    # Reading values waits for a GPU, so what the decoder was given is looked at in the first step only.
                    look: AbstractContextManager[list[torch.Tensor]]
                    look = _watched(module) if samples and run.first_step else nullcontext([])
                    with look as given:
                        step.loss = original(module, batch, *args, **kwargs)
                finally:
                    _running.reset(token)
                if samples and not step.sampler_called:
                    raise _unused(module, f"ended without calling {upstream.SAMPLER}")
                if samples and step.t is not None and any(not _same_times(step.t, t) for t in given):
                    raise _unused(module, f"gave its decoder other timesteps than {upstream.SAMPLER} returned")
                if journal is not None:
                    journal.record(step.loss, training)
                if finishes:
                    self.registry.call("acestep_step_finished", step=step)
            except Refusal as refusal:
                self.refusal = refusal
                raise
            return step.loss

        return training_step

    def _prepare(self, step: Step, batch: Mapping[str, Any]) -> dict[str, Any]:
        prepared = dict(batch)
        written = _writes(batch)
        for name, caller in self.registry.callers("acestep_prepare_batch"):
            asked = {"step": step, "batch": MappingProxyType(prepared)}
            answers = self.registry.ask(name, caller, "acestep_prepare_batch", asked)
            if written != _writes(batch):
                raise PluginError(
                    f"Plugin {name!r} wrote into the batch's tensors in acestep_prepare_batch, which belong to "
                    "upstream. Return new ones."
                )
            for replaced in answers:
                if not isinstance(replaced, Mapping):
                    raise PluginError(
                        f"Plugin {name!r} returned {_described(replaced)}, expected a mapping of batch entries, from "
                        "acestep_prepare_batch."
                    )
                for key, tensor in replaced.items():
                    _check_replaced(name, prepared, key, tensor, step.device)
                prepared = {**prepared, **replaced}
        return prepared

    def _wrap_sampler(self, original: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        takes_table = upstream.sampler_style(original) == "timesteps_tensor"
        signature = inspect.signature(original)
        asked_plugins = self.registry.callers("acestep_sample_timesteps")  # one, or none

        @wraps(original)
        def sample_discrete_timestep(*args: Any, **kwargs: Any) -> Any:
            step = _running.get()
            if step is None:  # called from outside a training step: none of our business
                return original(*args, **kwargs)
            step.sampler_called = True
            if not asked_plugins:
                return _noted(step, original(*args, **kwargs))
            ((plugin, caller),) = asked_plugins
            values = list(signature.bind(*args, **kwargs).arguments.values()) if kwargs else args
            batch_size = int(values[0])
            if takes_table:
                device, dtype = values[1].device, values[1].dtype
            else:
                device, dtype = torch.device(values[1]), values[2]
            asked = {"step": step, "batch_size": batch_size, "device": device, "dtype": dtype}
            for t in self.registry.ask(plugin, caller, "acestep_sample_timesteps", asked):
                _check_timesteps(plugin, t, batch_size, device, dtype, first=step.run.first_step)
                step.t, step.sampled_by = t, plugin
                return t, t
            return _noted(step, original(*args, **kwargs))

        return sample_discrete_timestep

    def _wrap_save(self, original: Callable[..., Any], kind: AdapterType) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @wraps(original)
        def save(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            run = self._run_of_save(next(iter(call.arguments.values())))
            if run is None or _saving.get():
                return original(*args, **kwargs)
            said = call.arguments["output_dir"]
            folder = upstream.place_of(self.trainer, said)
            # The folder may be a link to one of another name.
            journal, final = run.journal, Path(said).name == FINAL
            if journal is not None and journal.catching_up:
                if not final:  # a checkpoint of a step that an earlier run has done
                    return said
                journal.catch_up(run)
            try:
                if journal is not None:
                    check_finite(run)
                point = None if journal is None or final else journal.here(run)
                with staged(folder) as stage:
                    call.arguments["output_dir"] = str(stage)
                    token = _saving.set(True)
                    try:
                        result = original(*call.args, **call.kwargs)
                    finally:
                        _saving.reset(token)
                    with published(stage, folder):
                        weights = _weights_in(stage, kind, original.__name__)
                        saved = SavedAdapter(
                            weights=weights,
                            destination=folder / weights.relative_to(stage),
                            folder=stage,
                            adapter_type=kind,
                            epoch=call.arguments.get("epoch"),
                            global_step=call.arguments.get("global_step"),
                            resume_point=point,
                        )
                        self._ask_and_say("acestep_adapter_saved", run=run, saved=saved)
            except Refusal as refusal:
                self.refusal = self.refusal or refusal
                raise
            except Exception as error:
                if journal is None or journal.ending or final:
                    raise
                # Hours of training do not end because a disk is full: an earlier checkpoint is there, or a later one.
                journal.unsaved = True
                self._announce(f"Warning: {folder} could not be saved: {error}. {room(folder)} The training goes on.")
                return said
            if journal is not None:
                journal.finished, journal.unsaved = journal.finished or final, False
            return result.replace(str(stage), str(folder)) if isinstance(result, str) else result

        return save

    def _ask_and_say(self, hook: str, **arguments: Any) -> None:
        """Ask every plugin, and announce the lines that they return. Raises Refusal."""
        for plugin, lines in self.registry.call(hook, **arguments):
            for line in _checked_lines(plugin, hook, lines):
                self._announce(line)


def _checked_lines(plugin: str, hook: str, lines: Any) -> Sequence[str]:
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
        raise PluginError(f"Plugin {plugin!r} returned {lines!r} from {hook}, expected a list of lines.")
    return lines


def _noted(step: Step, sampled: Any) -> Any:
    """What upstream's own sampler returned, which the step is told."""
    t = sampled[0] if isinstance(sampled, tuple) and sampled else sampled
    step.t = t if hasattr(t, "shape") else None
    return sampled


def _stopped(state: Mapping[str, Any] | None) -> bool:
    """Whether upstream's stop button was pressed."""
    return bool(state and state.get("should_stop"))


def _device_of(trainer: Any) -> torch.device:
    import torch

    return torch.device(trainer.dit_handler.device)


def _with_advice(text: str, run: Run) -> str:
    """Upstream's report of a failure, and what to do about it when that is known."""
    known = advice(text, run.training_config, run.adapter_config, Path(run.training_config.output_dir))
    return f"{text.rstrip('. ')}. {known}" if known else text


def _ending_with(message: str) -> Callable[..., Generator[Any, Any, None]]:
    def train_from_preprocessed(*_: Any, **__: Any) -> Generator[Any, Any, None]:
        yield 0, 0.0, f"❌ {message}"

    return train_from_preprocessed


def _refuser(original: Callable[..., Any], misfit: UpstreamMismatch) -> Callable[..., Any]:
    @wraps(original)
    def training_step(*_: Any, **__: Any) -> Any:
        raise misfit

    return training_step


@contextmanager
def _watched(module: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the timesteps that a step gives its decoder; none when the decoder is not called by keyword."""
    import torch

    given: list[torch.Tensor] = []

    def note(_: Any, __: Any, arguments: Mapping[str, Any]) -> None:
        if isinstance(arguments.get("timestep"), torch.Tensor):
            given.append(arguments["timestep"].detach())

    decoder = getattr(module.model, "decoder", None)
    if not isinstance(decoder, torch.nn.Module):
        yield given
        return
    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield given
    finally:
        hook.remove()


def _same_times(sampled: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether these are the same timesteps, up to the rounding to bf16 that some versions of upstream make."""
    return sampled.shape == given.shape and bool(((sampled.float() - given.float()).abs() <= 2**-8).all())


def _unused(module: Any, what: str) -> UpstreamMismatch:
    return UpstreamMismatch(
        f"{type(module).__name__}.training_step {what}: the plugin's timesteps were not used. Stopped before the "
        "optimizer changed anything. Use upstream's main version of ACE-Step."
    )


def _no_module(trainer: Any) -> UpstreamMismatch:
    name = getattr(trainer, "__name__", trainer)
    return UpstreamMismatch(
        f"{name} has neither {' nor '.join(upstream.MODULE_CLASS.values())}: this is not ACE-Step 1.5's trainer. "
        "Say where your checkout is: --acestep-root DIR."
    )


def _writes(batch: Mapping[str, Any]) -> list[int]:
    """How often each tensor of a batch was written to; torch counts that without a look at the values."""
    return [value._version for value in batch.values() if hasattr(value, "_version") and not value.is_inference()]


def _check_replaced(plugin: str, batch: Mapping[str, Any], key: str, tensor: Any, device: torch.device) -> None:
    if key not in batch:
        found = f"an entry {key!r}, which the batch does not have ({', '.join(batch)})"
    elif getattr(tensor, "shape", None) != batch[key].shape:
        found = f"{key!r} as {_described(tensor)}, expected a tensor of shape {list(batch[key].shape)}"
    elif tensor.is_floating_point() != batch[key].is_floating_point():
        kind = "floating" if batch[key].is_floating_point() else "whole"
        found = f"{key!r} as {_described(tensor)}, expected {kind} numbers"
    elif tensor.device.type not in ("cpu", device.type, batch[key].device.type):
        found = f"{key!r} as {_described(tensor)}, expected it on {device}"
    else:
        return
    raise PluginError(f"Plugin {plugin!r} returned {found} from acestep_prepare_batch.")


def _check_timesteps(plugin: str, t: Any, batch_size: int, device: Any, dtype: torch.dtype, *, first: bool) -> None:
    import torch

    wanted = torch.device(device)
    if not isinstance(t, torch.Tensor):
        fits = False
    else:
        # "cuda" and "cuda:0" name the same place when there is no index to disagree on.
        same_index = wanted.index is None or t.device.index is None or wanted.index == t.device.index
        fits = t.shape == (batch_size,) and t.dtype == dtype and t.device.type == wanted.type and same_index
    # Looking at the values waits for the GPU, so it is done where a mistake would show: in the first step.
    if fits and (not first or bool(((t >= 0) & (t <= 1)).all())):
        return
    found = f"timesteps outside [0, 1] ({t.tolist()})" if fits else _described(t)
    raise PluginError(
        f"Plugin {plugin!r} returned {found} from acestep_sample_timesteps, expected {batch_size} values in [0, 1], "
        f"shape [{batch_size}], {dtype} on {wanted}."
    )


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is None:
        kind = type(value).__name__
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    return f"a tensor of shape {list(shape)}, {getattr(value, 'dtype', '?')} on {getattr(value, 'device', '?')}"


def _weights_in(folder: Path, kind: AdapterType, function: str) -> Path:
    """The weights file that upstream's save has just written. Raises UpstreamMismatch when there is none."""
    for name in WEIGHT_FILES[kind]:
        if (folder / name).is_file():
            return folder / name
    raise UpstreamMismatch(f"{function} returned, but there are no adapter weights in {folder}.")


def _guarded_modules(trainer: Any) -> Iterator[Any]:
    """Upstream's modules that look up its path guard by name; none in versions without one."""
    package = str(getattr(trainer, "__name__", "")).rpartition(".")[0]
    guard = getattr(sys.modules.get(f"{package}.path_safety"), "safe_path", None)
    if guard is None:
        return
    for name, module in sorted(sys.modules.items()):
        if (name == package or name.startswith(f"{package}.")) and vars(module).get("safe_path") is guard:
            yield module


def _allowing(guard: Callable[..., str], folders: tuple[Path, ...]) -> Callable[..., str]:
    """Upstream's guard, which also lets through absolute paths inside the folders that the user named."""

    @wraps(guard)
    def safe_path(user_path: str, **kwargs: Any) -> str:
        try:
            return guard(user_path, **kwargs)
        except ValueError:
            path = Path(user_path)
            if kwargs.get("base") is None and path.is_absolute():
                resolved = path.resolve()
                if any(resolved.is_relative_to(folder) for folder in folders):
                    return str(resolved)
            raise

    return safe_path


def _upstream_log(trainer: Any) -> Callable[[str], None]:
    log: Callable[[str], None] = _logger(trainer).info
    return log


def _logger(trainer: Any) -> Any:
    import logging

    return getattr(trainer, "logger", None) or logging.getLogger("sidestep_plugin")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no plugins"
