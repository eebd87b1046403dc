"""A whole training: plugins decide about it first, its reports are followed, and it ends with everything saved."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import Refusal, unusable_answer
from ...run import AdapterType, ProcessPlan, ResumePoint, Run
from ...songs.dataset import songs_in
from ..answers import described, held_out
from ..current import Training, command_line, during, running_training
from ..epochs import began, ended, saved_after, summed_up
from ..journal import Journal
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
from ..sameness import of_the_loaded_model, of_the_training
from ..services import Services

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
        host.told.clear()
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
        training = None
        try:
            try:
                run = host.new_run(kind, trainer, model, tensor_dir=Path(call.arguments["tensor_dir"]))
                training = Training(run, trainer, state=call.arguments.get("training_state"))
                training.from_command_line = command_line.get() is not None
                run.engine = Services(host, training)
                point = _prepare(host, training, resume_from)
            except Refusal as refusal:
                host.refusal = refusal
                yield 0, 0.0, f"❌ {refusal}"
                return
            if point is not None and point.finished:
                yield 0, 0.0, f"✅ {point.finished}"
                return
            if point is not None:  # our own resume has taken its place
                call.arguments.pop("resume_from", None)
            if "training_state" not in signature.parameters:
                training.state = None  # nobody would look at it, so nothing ends this training early
            elif training.state is not None:
                call.arguments["training_state"] = training.state
            yield from _followed(host, training, original(*call.args, **call.kwargs))
        finally:
            if training is not None:
                training.run.clock.stop()
                training.at_end.close()

    return train_from_preprocessed


def _prepare(host: Host, training: Training, resume_from: str | Path | None) -> ResumePoint | None:
    """Decide everything that is decided before upstream begins. Returns where to resume from. Raises Refusal."""
    run, trainer = training.run, training.trainer
    line = command_line.get()
    training.plan = plan_of(host.registry, host.options) if line is None else line.plan
    check_started(training.plan)
    if run.ranks.several:
        check_engine(host.trainer)
        join(_device_of(trainer).type, host.announce)
        run.exchange = gather
        training.state = SharedState({} if training.state is None else training.state, host.announce)
    elif training.state is None and host.keeps_journal:
        training.state = {}  # with which a plugin ends it
    host.ask_and_announce("engine_opening", run=run)
    if line is None:
        songs = [] if run.tensor_dir is None else songs_in(run.tensor_dir)
        run.held_out = held_out(host.registry, songs, host.options, run.training_config)
    else:  # decided there already
        run.held_out = line.held_out
    host.start(run)
    point = _point(host, training, resume_from) if resume_from and host.resumes else None
    training.journal = _journal(host, training, point)
    if point is not None:
        run.resuming, run.kept, run.saves = True, point.kept, max(run.saves, point.save_number)
    if point is None or not point.finished:
        host.ask_and_announce("engine_planned", run=run)
    if run.ranks.several:
        check_agreement(_same_everywhere(host, run, point, training.plan))
    return point


def _same_everywhere(host: Host, run: Run, point: ResumePoint | None, plan: ProcessPlan) -> dict[str, Any]:
    """What all processes of a training must have in common."""
    configs = (run.adapter_config, run.training_config)
    return {
        **of_the_training(
            host.trainer, host.registry, run.options, plan.own, run.adapter_type, *configs, run.tensor_dir
        ),
        **of_the_loaded_model(run.model),
        "list of held-out songs": sorted(song.name for song in run.held_out),
        "checkpoint": None if point is None else (point.epochs, point.steps, point.save_number),
    }


def _journal(host: Host, training: Training, point: ResumePoint | None) -> Journal | None:
    """The record of a run; None when no plugin needs one."""
    if not host.keeps_journal:
        return None
    run = training.run
    each = getattr(run.training_config, "gradient_accumulation_steps", 0)
    journal = Journal(_device_of(training.trainer), point, each if isinstance(each, int) else 0)
    journal.begins, journal.ends = partial(began, host, training), partial(ended, host, training)
    if host.listened_to:  # at once: upstream's next report may come many steps later
        journal.say = host.announce
    if run.ranks.several:
        journal.mean, journal.gather = mean, gather
    run.epoch_losses = journal.loss_by_epoch
    host.journals[run] = journal
    return journal


def _followed(host: Host, training: Training, running: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
    """Yield what upstream reports. A run that is stopped or fails is saved."""
    run, journal = training.run, training.journal
    step, loss = 0, 0.0

    def told(lines: Sequence[str]) -> Iterator[tuple[int, float, str]]:
        return ((step, loss, line) for line in _noted(host, training, lines))

    try:
        # The generator may outlive the block of attach(); from then on it would be upstream's own training.
        while host.attached:
            try:
                with during(running_training, training):
                    report = next(running, None)
                    if getattr(training.trainer, "fabric", None) is None:  # the engine tells by its log
                        ended(host, training)
            except Exception as error:  # upstream reports what is raised within its own loop
                failed = "" if isinstance(error, Refusal) else f"Training failed: {type(error).__name__}: "
                report = (step, loss, f"❌ {failed}{error}")
                running.close()
            if journal is None:
                if report is None:
                    return
                yield report
                continue
            while journal.lines:
                yield from told([journal.lines.pop(0)])
            if report is None:
                break
            step, loss, text = report
            if journal.finished:
                yield from told(summed_up(host, training, "finished"))
            if text.startswith("❌"):
                lines = [*summed_up(host, training, "failed"), *saved_after(host, training, failed=True)]
                yield from told([*lines, _with_advice(host, text, run)])
            elif journal.unsaved and text.startswith("💾"):
                journal.unsaved = False  # upstream reports a checkpoint that could not be saved
            elif not journal.walking:
                if text.startswith("⚠"):
                    _noted(host, training, [text])
                yield report
        else:
            yield 0, 0.0, f"❌ {_DETACHED}"
            return
        if training.ending is not None:
            with during(running_training, training):
                saved = training.ending()
            yield from told([*saved, *summed_up(host, training, "finished")])
        elif _stopped(training.state):
            yield from told([*summed_up(host, training, "stopped"), *saved_after(host, training)])
            if run.ranks.several:
                wait_for_all()  # the first process saves, and must not be ended because another one has left
    except GeneratorExit:  # the caller stopped listening
        if _stopped(training.state) and host.attached and journal is not None and not run.ranks.several:
            for line in [*summed_up(host, training, "stopped"), *saved_after(host, training)]:
                host.announce(line)
        raise
    finally:
        running.close()
        if training.state is not None and training.ending is not None:
            training.state["should_stop"] = False  # in the app it says that somebody has pressed stop
        if journal is not None:
            journal.scheduler = journal.holds = None  # they reference the optimizer and so every trained tensor


def _noted(host: Host, training: Training, lines: Sequence[str]) -> Sequence[str]:
    """Note lines that the user is told as reports, and the failure among them. Returns the lines."""
    host.told.extend(lines)
    for line in lines:
        if line.startswith("❌"):
            training.failure = training.failure or line.removeprefix("❌").strip()
    return lines


def _point(host: Host, training: Training, folder: str | Path) -> ResumePoint | None:
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
    training.resumed_from = Path(folder)
    for plugin, point in host.registry.call("engine_resume", run=training.run, folder=training.resumed_from):
        if not isinstance(point, ResumePoint):
            raise unusable_answer(plugin, "engine_resume", described(point), "a ResumePoint")
        for line in point.lines:
            host.announce(line)
        return point
    return None


def _stopped(state: Mapping[str, Any] | None) -> bool:
    """Whether upstream's stop button was pressed; in several processes, whether all of them stopped for it."""
    if isinstance(state, SharedState):
        return state.agreed
    return bool(state and state.get("should_stop"))


def _device_of(trainer: Any) -> torch.device:
    import torch

    return torch.device(trainer.dit_handler.device)


def _with_advice(host: Host, text: str, run: Run) -> str:
    """Upstream's report of a failure, with the plugins' advice."""
    told = [advice for _, advice in host.registry.call("engine_advice", run=run, failure=text)]
    return " ".join([f"{text.rstrip('. ')}.", *told]) if told else text
