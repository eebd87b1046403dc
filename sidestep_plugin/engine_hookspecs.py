"""What the engine asks the rooms of this package, beyond the public hooks. Private: these may change in any release.

The same registry calls them in the same order as the public hooks in :mod:`.hookspecs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .hookspecs import hookspec

if TYPE_CHECKING:
    import torch

    from .ranks import Ranks
    from .run import ProcessPlan, ResumePoint, Run

EXCLUSIVE: Final = frozenset(
    {"engine_plan_processes", "engine_resume", "engine_read_checkpoint", "engine_hold_out", "engine_read_song"}
)
"""Hooks with a single answer."""


@hookspec(firstresult=True)
def engine_hold_out(songs: Sequence[Path], options: Mapping[str, Any], training_config: Any) -> Sequence[Path] | None:
    """Return the songs that are not to be trained on, because they are validated on.

    When: once for each training: on the command line before the model is loaded, elsewhere before it begins. The
    answer is ``run.held_out`` from then on. In several processes, each is asked: choose by the songs' names, and draw
    no random number. None trains on all of them. Raises Refusal to stop: nothing has been written yet.
    """


@hookspec(firstresult=True)
def engine_plan_processes(options: Mapping[str, Any], ranks: Ranks) -> ProcessPlan | None:
    """Return in how many processes to train, one for each GPU.

    When: on the command line before anything is loaded, where the processes are started if there are to be several;
    and at the start of a training in each process, which is refused if it is one of several and no plan says so.

    With several processes, a step sees the songs of its own process. ``acestep_adapter_saved`` and
    ``acestep_run_ended`` are called in the first process only, all other hooks in every process, and lines are shown
    by the first one. Weights are equal everywhere. ``run.ranks`` tells the processes apart, and ``run.gather``
    exchanges values between them.

    `ranks` is the place of this process among those that were started; process 0 of 1 before that. None means a single
    process. Raises Refusal where the options contradict each other, or what was started.
    """


@hookspec
def engine_opening(run: Run) -> Sequence[str] | None:
    """Take what a training must hold until it ends, such as its output folder (``run.engine.at_end`` gives it back).

    When: first of all, before :func:`acestep_run_started`. Returns lines to announce. Raises Refusal.
    """


@hookspec(firstresult=True)
def engine_resume(run: Run, folder: Path) -> ResumePoint | None:
    """Read the checkpoint that a run resumes from, or refuse it.

    When: after :func:`acestep_run_started`, if upstream's trainer was given ``resume_from``, before the adapter is
    injected. The host then restores what is returned: weights, optimizer, learning rate and random states. Tensors
    whose names or shapes differ from the adapter's stop the run before its first step.

    If a plugin implements this hook, a training that is stopped or fails is saved in the folder ``interrupted`` inside
    its output folder, and :func:`acestep_adapter_saved` receives with every checkpoint what resuming it needs.

    `folder` is the checkpoint's, as the user named it. None leaves resuming to upstream. Raises Refusal where it holds
    no complete checkpoint, or one of another training.
    """


@hookspec(firstresult=True)
def engine_read_checkpoint(folder: Path) -> ResumePoint | None:
    """Read a checkpoint of this training. Raises Refusal where there is none."""


@hookspec
def engine_planned(run: Run) -> Sequence[str] | None:
    """Plan what depends on where the run begins: ``run.kept`` holds what the checkpoint kept, {} from the start.

    When: after :func:`acestep_run_started` and :func:`engine_resume`, before the adapter is injected. Returns lines to
    announce. Raises Refusal.
    """


@hookspec
def engine_songs_listed(run: Run, songs: Sequence[Path]) -> None:
    """Refuse the songs that upstream has listed to train on, without those that are held out."""


@hookspec(firstresult=True)
def engine_read_song(run: Run, file: str, read: Callable[[], Any]) -> Any:
    """Return a song in place of upstream's reading it, equal to what `read` returns; None to let upstream read it.

    When: for every song of every batch, in the process that trains. Not in worker processes (``num_workers``), and not
    in a version of upstream without a dataset of its own for songs.
    """


@hookspec
def engine_model_ready(
    run: Run, decoder: torch.nn.Module, network: Any, autocast: torch.dtype | None
) -> Sequence[str] | None:
    """Change how the decoder is stored or computed for this training; undo it with ``run.engine.at_end``.

    When: once per training with Lightning, after the adapter was injected, before upstream casts the decoder and moves
    it to the device. Never without Lightning.

    Args:
        network: the LyCORIS network of a LoKr, None for a LoRA.
        autocast: the type that autocast computes in, None without autocast.

    Returns lines to announce. What changes the adapter must be an option that the user has chosen. Raises Refusal to
    stop the run before its first step.
    """


@hookspec
def engine_types_final(run: Run) -> Sequence[str] | None:
    """Say what became of :func:`engine_model_ready`, now that upstream has cast the decoder.

    When: before the first backward pass, with Lightning. Returns lines to announce.
    """


@hookspec
def engine_training_began(run: Run) -> Sequence[str] | None:
    """Look at the model before the first step that this run computes. Returns lines to announce. Raises Refusal."""


@hookspec
def engine_epoch_ended(run: Run, epoch: int, loss: float) -> Sequence[str] | None:
    """Look at the adapter behind an epoch's last optimizer step, before it is saved; ``run.engine`` saves and ends.

    When: after :func:`acestep_epoch_finished` and before :func:`acestep_between_epochs`, in every process. Not for
    epochs that a resumed run skips. Returns lines to announce. Raises Refusal.
    """


@hookspec
def engine_waiting(run: Run, what: str, done: int, total: int) -> None:
    """Show how far something is for which the training waits. An error must not reach the training.

    Args:
        what: such as "Validation".
        done, total: how much of it is done; equal when it is over.
    """


@hookspec
def engine_final_saved(run: Run, epochs: int, limits: Mapping[str, float]) -> None:
    """Note that the finished adapter is in its place, in the first process. An error must not reach the training.

    Args:
        epochs: after how many epochs the training has ended.
        limits: if a plugin has ended it before its last epoch, the options that did, and up to which value each of
            them would have.
    """


@hookspec
def engine_advice(run: Run, failure: str) -> str | None:
    """Say what to do about a failure that upstream reports in these words, in a sentence or two."""
