"""A whole training: plugins decide about it first, its reports are followed, and it ends with everything saved."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import PluginError, Refusal
from ...resuming.checkpoints import finished_epochs, newest_save_number
from ...resuming.journal import Journal
from ...resuming.lock import OutputLock
from ...run import AdapterType, ProcessPlan, ResumePoint, Run
from ...songs.dataset import songs_in
from ...songs.lengths import longest
from ...text import counted
from ..answers import described
from ..between_epochs import between_epochs
from ..checkout import place_of
from ..checkpointing import is_checkpointed
from ..current import Training, command_line, running_training
from ..failures import advice
from ..processes import (
    SharedState,
    check_agreement,
    check_engine,
    check_started,
    gather,
    join,
    mean,
    plan_of,
    wait_for_all,
)
from ..seams import FINAL
from .ending import finished_early, saved_after, summed_up
from .loaders import epoch_finished
from .validation import planned

if TYPE_CHECKING:
    import torch

    from ..host import Host

_DETACHED: Final = (
    "The plugins were detached while this training was running, so it was stopped. Keep the whole training inside the "
    "with block of attach()."
)


def wrap_training(host: Host, original: Callable[..., Any], kind: AdapterType) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @wraps(original)
    def train_from_preprocessed(trainer: Any, *args: Any, **kwargs: Any) -> Generator[Any, Any, None]:
        host.refusal = host.interrupted = None
        if not host.attached:
            yield 0, 0.0, f"❌ {_DETACHED}"
            return
        model = trainer.dit_handler.model
        # Upstream's LoKr trainer has no such argument; here it does.
        ours = {} if "resume_from" in signature.parameters else {"resume_from": kwargs.pop("resume_from", None)}
        call = signature.bind(trainer, *args, **kwargs)
        resume_from = call.arguments.get("resume_from") or ours.get("resume_from")
        if model is None or (ours.get("resume_from") and not host.resumes):
            # upstream reports this itself: no model, or no such argument
            yield from original(trainer, *args, **kwargs, **{name: value for name, value in ours.items() if value})
            return
        with ExitStack() as ending:
            try:
                run = host.new_run(kind, trainer, model, tensor_dir=Path(call.arguments["tensor_dir"]))
                plan = plan_of(host.registry, host.options)
                check_started(plan)
                if run.ranks.several:
                    check_engine(host.trainer)
                    join(_device_of(trainer).type)
                    run.exchange = gather
                _lock_output(host, run, ending)
                host.start(run)
                point = _point(host, run, resume_from) if resume_from and host.resumes else None
                journal = _journal(host, run, trainer, point)
                validation = planned(host, run, journal)
                if run.ranks.several:
                    check_agreement(_same_everywhere(run, point, plan))
            except Refusal as refusal:
                host.refusal = refusal
                yield 0, 0.0, f"❌ {refusal}"
                return
            if point is not None:
                if (epochs := _finished(host, run)) is not None:
                    done = f"✅ This training is finished after {counted(epochs, 'epoch')}; nothing was changed."
                    yield 0, 0.0, f"{done} To train on, ask for more --epochs."
                    return
                call.arguments.pop("resume_from", None)
            training = Training(run, trainer, journal, validation, plan)
            state = call.arguments.get("training_state")
            if run.ranks.several:
                state = call.arguments["training_state"] = SharedState({} if state is None else state, host.announce)
            elif state is None and validation is not None and "training_state" in signature.parameters:
                state = call.arguments["training_state"] = {}  # with which patience stops it
            if validation is not None:
                validation.training, validation.state = training, state
            yield from _followed(host, training, original(*call.args, **call.kwargs), state)

    return train_from_preprocessed


def _same_everywhere(run: Run, point: ResumePoint | None, plan: ProcessPlan) -> dict[str, Any]:
    """What all processes of a training must have in common."""
    songs = [] if run.tensor_dir is None else [(song.name, song.stat().st_size) for song in songs_in(run.tensor_dir)]
    settings = dict(vars(run.training_config)) if hasattr(run.training_config, "__dict__") else {}
    settings.pop("output_dir", None)  # may be mounted elsewhere on another machine
    return {
        "number of songs": len(songs),
        "list of songs": hashlib.sha256(repr(songs).encode("utf-8", "surrogateescape")).hexdigest()[:12],
        "adapter type": run.adapter_type,
        "adapter's settings": repr(run.adapter_config),
        **{f"value of {name}": repr(value) for name, value in settings.items()},
        **{f"--{name.replace('_', '-')}": repr(value) for name, value in run.options.items() if name not in plan.own},
        "checkpoint": None if point is None else (point.epochs, point.steps, point.save_number),
    }


def _lock_output(host: Host, run: Run, ending: ExitStack) -> None:
    """Lock the output folder until the training ends; the command line has done so already. Raises Refusal."""
    if command_line.get() is not None or not host.registry.names or not run.ranks.first:
        return
    lock = ending.enter_context(OutputLock(_output_of(host, run)))
    lock.acquire()
    if lock.warning is not None:
        host.announce(lock.warning)


def _finished(host: Host, run: Run) -> int | None:
    """After how many epochs the training was finished whose newest checkpoint is asked for; None when it goes on."""
    line, output = command_line.get(), _output_of(host, run)
    if line is None or not line.latest or not any((output / FINAL).rglob("*.safetensors")):
        return None
    epochs, wanted = finished_epochs(output), getattr(run.training_config, "max_epochs", None)
    return epochs if epochs is not None and isinstance(wanted, int) and wanted <= epochs else None


def _journal(host: Host, run: Run, trainer: Any, point: ResumePoint | None) -> Journal | None:
    """The record of a run; None when no plugin needs one."""
    if not host.keeps_journal:
        return None
    each = getattr(run.training_config, "gradient_accumulation_steps", 0)
    saves = newest_save_number(_output_of(host, run)) if host.resumes else 0
    journal = Journal(_device_of(trainer), point, each if isinstance(each, int) else 0, saves)
    journal.epoch_finished = partial(epoch_finished, host, trainer)
    journal.begins = partial(between_epochs, host, trainer, epoch=0, loss=None)
    if host.listened_to:  # at once: upstream's next report may come many steps later
        journal.say = host.announce
    if run.ranks.several:
        journal.mean, journal.gather = mean, gather
    run.epoch_losses = journal.loss_by_epoch
    host.journals[run] = journal
    return journal


def _followed(
    host: Host, training: Training, running: Generator[Any, Any, None], state: Mapping[str, Any] | None
) -> Generator[Any, Any, None]:
    """Yield what upstream reports. A run that is stopped or fails is saved."""
    run, journal = training.run, training.journal
    step, loss = 0, 0.0
    try:
        # The generator may outlive the block of attach(); from then on it would be upstream's own training.
        while host.attached:
            token = running_training.set(training)
            try:
                report = next(running, None)
            finally:
                running_training.reset(token)
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
                for line in summed_up(host, training, "finished"):
                    yield step, loss, line
            if text.startswith("❌"):
                for line in [*summed_up(host, training, "failed"), *saved_after(host, training, failed=True)]:
                    yield step, loss, line
                yield step, loss, _with_advice(text, training)
            elif journal.unsaved and text.startswith("💾"):
                journal.unsaved = False  # upstream reports a checkpoint that could not be saved
            elif not journal.walking:
                yield report
        else:
            yield 0, 0.0, f"❌ {_DETACHED}"
            return
        if training.validation is not None and training.validation.stopped:
            for line in [*finished_early(host, training), *summed_up(host, training, "finished")]:
                yield step, loss, line
        elif _stopped(state):
            for line in [*summed_up(host, training, "stopped"), *saved_after(host, training)]:
                yield step, loss, line
            if run.ranks.several:
                wait_for_all()  # the first process saves, and must not be ended because another one has left
    except GeneratorExit:  # the caller stopped listening
        if _stopped(state) and host.attached and journal is not None and not run.ranks.several:
            for line in [*summed_up(host, training, "stopped"), *saved_after(host, training)]:
                host.announce(line)
        raise
    finally:
        running.close()
        while training.at_end:
            training.at_end.pop()()
        if isinstance(state, dict) and training.validation is not None and training.validation.stopped:
            state["should_stop"] = False  # in the app it says that somebody has pressed stop
        if journal is not None:
            journal.scheduler = None  # it references the optimizer and so every trained tensor


def _point(host: Host, run: Run, folder: str | Path) -> ResumePoint | None:
    """Ask the plugins where to resume; None leaves resuming to upstream. Raises Refusal."""
    guard = getattr(host.trainer, "safe_path", None)
    try:
        # The app may be public: no checkpoint is read from where upstream's guard forbids reading.
        folder = guard(str(folder)) if callable(guard) else folder
    except ValueError:
        raise Refusal(
            f"The checkpoint {folder} is outside the folders that ACE-Step may read. Copy it into the "
            "checkout's folder, or resume on the command line: acestep-train --resume-from."
        ) from None
    for plugin, point in host.registry.call("acestep_resume", run=run, folder=Path(folder)):
        if not isinstance(point, ResumePoint):
            raise PluginError(
                f"Plugin {plugin!r} returned {described(point)} from acestep_resume, expected a ResumePoint."
            )
        for line in point.lines:
            host.announce(line)
        return point
    return None


def _stopped(state: Mapping[str, Any] | None) -> bool:
    """Whether upstream's stop button was pressed; in several processes, whether all of them stopped for it."""
    if isinstance(state, SharedState):
        return state.agreed
    return bool(state and state.get("should_stop"))


def _output_of(host: Host, run: Run) -> Path:
    return place_of(host.trainer, str(run.training_config.output_dir))


def _device_of(trainer: Any) -> torch.device:
    import torch

    return torch.device(trainer.dit_handler.device)


def _with_advice(text: str, training: Training) -> str:
    """Upstream's report of a failure, with advice where the cause is known."""
    run = training.run
    output = Path(run.training_config.output_dir)
    frames, _ = longest(songs_in(run.tensor_dir)) if run.tensor_dir is not None else (0, 0)
    known = advice(
        text,
        run.training_config,
        run.adapter_config,
        output,
        options=run.options,
        checkpointed=is_checkpointed(run.model.decoder),
        frames=frames or None,
        on_gpu=_device_of(training.trainer).type in ("cuda", "xpu"),
    )
    return f"{text.rstrip('. ')}. {known}" if known else text
