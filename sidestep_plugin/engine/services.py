"""What the engine does for the rooms of this package while a training runs: ``run.engine``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Refusal
from ..songs.dataset import songs_in
from .checkout import place_of
from .decoders import plain_decoder, undisturbed, without_adapter
from .ending import in_its_place, in_ram, put, save_checkpoint, save_weights
from .evaluation import evaluate
from .loggers import log_entries
from .processes import INTERRUPTED, STOP, SharedState
from .replay import trained_tensors
from .weights import live_weights, put_weights

if TYPE_CHECKING:
    import torch

    from ..run import ResumePoint
    from .current import Training
    from .host import Host


class Services:
    """The services of one training.

    Args:
        host: the plugins.
        training: the training.

    Attributes:
        folder: the output folder.
    """

    def __init__(self, host: Host, training: Training) -> None:
        self._host, self._training = host, training
        self.folder: Path = place_of(host.trainer, str(training.run.training_config.output_dir))

    def announce(self, line: str) -> None:
        """Tell the user a line."""
        self._host.announce(line)

    def at_end(self, undo: Callable[[], object]) -> None:
        """Call this when the training is over, however it ends; the last one first."""
        self._training.at_end.callback(undo)

    @property
    def ends_the_program(self) -> bool:
        """Whether the program ends with this training, as on the command line."""
        return self._training.from_command_line

    @property
    def resumed_from(self) -> Path | None:
        """The folder of the checkpoint that the training was resumed from; None for one from the start."""
        return self._training.resumed_from

    @property
    def told(self) -> Sequence[str]:
        """What the user was told since the training began: lines that were announced, upstream's warnings, the end."""
        return tuple(self._host.told)

    @property
    def failure(self) -> str:
        """Why the training failed; "" while it has not."""
        return self._training.failure

    @property
    def interrupted(self) -> Path | None:
        """Where a training that was stopped or failed was saved; None if it was not, or not yet."""
        return self._host.interrupted

    @property
    def epochs_done(self) -> int | None:
        """After how many epochs the adapter is what it is now; None within an epoch."""
        journal = self._training.journal
        return None if journal is None else journal.epochs_done

    def ends_after(self, epoch: int) -> bool:
        """Whether no epoch follows this one: it is the last one, or a plugin has ended the training."""
        last = epoch == getattr(self._training.run.training_config, "max_epochs", None)
        return last or self._training.ending is not None

    @property
    def trained(self) -> list[torch.Tensor]:
        """The tensors that the optimizer trains; [] before it exists."""
        journal = self._training.journal
        return [] if journal is None or journal.scheduler is None else trained_tensors(journal.scheduler)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps so far, by upstream's scheduler of the learning rate; 0 before it exists."""
        journal = self._training.journal
        return 0 if journal is None or journal.scheduler is None else int(journal.scheduler.last_epoch)

    @property
    def variants(self) -> list[str]:
        """Names of those of ``run.variants`` that there are by now."""
        return [name for name, tensors in self._training.run.variants.items() if tensors() is not None]

    @property
    def variant(self) -> str:
        """Which of ``run.variants`` is in the adapter's place now; "" for what is trained."""
        return self._training.variant

    @property
    def held(self) -> ResumePoint | None:
        """The checkpoint that is in the adapter's place while it is saved; None for what is trained."""
        journal = self._training.journal
        return None if journal is None else journal.holds

    @property
    def epochs_before(self) -> int:
        """Epochs that were complete before the one that upstream's loop is in; 0 before the first one."""
        journal = self._training.journal
        return 0 if journal is None else max(0, journal.epochs_begun - 1)

    @property
    def steps_before(self) -> int:
        """Training steps before those that this run computes; 0 for a training from the start."""
        journal, run = self._training.journal, self._training.run
        known = 0 if journal is None else journal.steps_before
        return run.resumed_at if known is None else known

    @property
    def songs(self) -> tuple[Path, ...]:
        """The files of the songs that are trained on, without those that are held out."""
        run = self._training.run
        out = {song.resolve() for song in run.held_out}
        songs = () if run.tensor_dir is None else songs_in(run.tensor_dir)
        return tuple(song for song in songs if song.resolve() not in out)

    @property
    def decoder(self) -> Any:
        """The decoder with the adapter, without the wrappers of the training."""
        return plain_decoder(self._training.run.model)

    def undisturbed(self) -> AbstractContextManager[None]:
        """A block without gradients and dropout in which nothing is compiled; afterwards everything is as it was."""
        import torch

        module = self._training.trainer.module
        return undisturbed(module, torch.device(module.device))

    def without_adapter(self) -> AbstractContextManager[None]:
        """A block in which the model is the base model."""
        return without_adapter(self._training.trainer.module)

    def in_its_place(self, variant: str) -> AbstractContextManager[None]:
        """A block in which one of :attr:`variants` is in the adapter's place; it is put back bit for bit."""
        tensors = self._training.run.variants[variant]()
        assert tensors is not None
        return in_its_place(self._training, variant, tensors)

    def evaluate(
        self,
        songs: Sequence[Path],
        timesteps: Sequence[float],
        conditions: Sequence[bool],
        *,
        adapter: bool = True,
        variant: str = "",
    ) -> torch.Tensor:
        """Upstream's loss of each song at each timestep and condition, and nothing is different afterwards.

        Args:
            songs: files of preprocessed songs.
            timesteps: the t, from 0 to 1.
            conditions: with the song's condition (True), the model's null condition (False), or both.
            adapter: whether with the adapter.
            variant: one of :attr:`variants` in place of it.

        Returns:
            The losses, shape [songs, timesteps, conditions], float64 on the CPU; in several processes, those of the
            first one everywhere.
        """
        module, run = self._training.trainer.module, self._training.run

        def done(number: int) -> None:
            self.waiting("Validation", number, len(songs))

        block: AbstractContextManager[None] = nullcontext() if adapter else self.without_adapter()
        if variant:
            block = self.in_its_place(variant)
        with block:
            done(0)
            losses = evaluate(module, songs, timesteps, conditions, done=done)
        shared: torch.Tensor = run.gather(losses)[0]
        return shared

    def waiting(self, what: str, done: int, total: int) -> None:
        """Show how far something is for which the training waits, where somebody looks."""
        self._host.registry.call("engine_waiting", run=self._training.run, what=what, done=done, total=total)

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of the next optimizer step; None before the optimizer exists."""
        journal = self._training.journal
        rates = [] if journal is None or journal.scheduler is None else journal.scheduler.get_last_lr()
        return float(rates[0]) if rates else None

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Write numbers to upstream's log, which TensorBoard shows."""
        log_entries(self._host, self._training, values, epoch)

    def save_checkpoint(self, name: str, kept: ResumePoint | None = None) -> bool:
        """Save a checkpoint in a folder of the output folder, with upstream's own function, in the first process.

        Args:
            kept: an earlier place of the training, from :meth:`in_ram`; None for the training as it is.

        Returns:
            Whether it was saved: a full disk is announced, and the training goes on. True in the other processes.

        Raises:
            Refusal: the adapter must not be saved.
        """
        return save_checkpoint(self._host, self._training, name, kept)

    def in_ram(self) -> ResumePoint:
        """The training as it is, copied to RAM, to be saved later. Every process has to ask."""
        return in_ram(self._training)

    def save_weights(self, name: str) -> None:
        """Save the adapter alone in a folder of the output folder, as a finished one."""
        save_weights(self._host, self._training, name)

    def read(self, name: str | Path) -> ResumePoint:
        """Read a checkpoint in a folder of the output folder, or in any other one. Raises Refusal."""
        for _, point in self._host.registry.call("engine_read_checkpoint", folder=self.folder / name):
            found: ResumePoint = point
            return found
        raise Refusal(f"No plugin reads the checkpoint {self.folder / name}. Use --plugin sidestep.")

    def put(self, point: ResumePoint, folder: Path | None) -> None:
        """Put the weights of a checkpoint into the adapter, to be saved as the finished one. Raises Refusal.

        Args:
            point: the checkpoint.
            folder: where it was read from; None for one that was kept in RAM.
        """
        put(self._training, point, folder)

    @property
    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors as they are now, under the names that they are saved with. Raises Refusal."""
        return live_weights(self._training.run)

    def put_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put tensors into the adapter that is trained, by the names that they are saved with. Raises Refusal."""
        put_weights(self._training.run, weights)

    @property
    def place_in_epoch(self) -> tuple[int, int | None]:
        """Training steps of the epoch that have begun, and how many it has; None if that is not known."""
        journal = self._training.journal
        return (0, None) if journal is None else journal.place_in_epoch

    @property
    def stopping(self) -> bool:
        """Whether this process was told to stop the training after this step."""
        state = self._training.state
        return state.pressed if isinstance(state, SharedState) else bool(state and state.get(STOP))

    def stop(self, line: str) -> None:
        """Stop the training after this step and save it, as the stop button does, and tell the user a line."""
        if (state := self._training.state) is not None:
            state[STOP] = state[INTERRUPTED] = True
            self.announce(line)

    def finish(self, ending: Callable[[], Sequence[str]], limits: Mapping[str, float]) -> None:
        """End the training after this step as a finished one.

        Args:
            ending: called when upstream's loop has ended, to save the finished adapter; returns lines for the user.
            limits: which options end it, and up to which value: while they are no higher, nothing is left to train.
        """
        self._training.finish(ending, limits)
