"""What the engine does for the rooms of this package while a training runs: ``run.engine``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.kinds import network_of
from ..errors import Refusal
from ..songs.dataset import songs_in
from .checkout import place_of
from .decoders import plain_decoder, undisturbed, without_adapter
from .evaluation import evaluate
from .loggers import log_entries
from .processes import INTERRUPTED, STOP, SharedState
from .replay import put_parameters, trained_tensors
from .shapes import SAVE_FUNCTIONS, WEIGHT_FILES
from .weights import live_weights, put_weights

if TYPE_CHECKING:
    import torch

    from ..run import ResumePoint
    from .current import Training
    from .host import Host
    from .journal import Journal


class Services:
    """The services of one training.

    Attributes:
        folder: the output folder.
    """

    def __init__(self, host: Host, training: Training) -> None:
        self._host, self._training, self._run = host, training, training.run
        self.folder: Path = place_of(host.trainer, str(training.run.training_config.output_dir))

    @property
    def _journal(self) -> Journal:
        journal = self._training.journal
        assert journal is not None  # the rooms that ask implement a hook that needs one
        return journal

    @property
    def _scheduler(self) -> Any:
        """Upstream's scheduler of the learning rate; None before it exists."""
        return None if self._training.journal is None else self._training.journal.scheduler

    # -- the course of the training ----------------------------------------------------------------------------------

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

    @property
    def epochs_before(self) -> int:
        """Epochs that were complete before the one that upstream's loop is in; 0 before the first one."""
        journal = self._training.journal
        return 0 if journal is None else max(0, journal.epochs_begun - 1)

    @property
    def steps_before(self) -> int:
        """Training steps before those that this run computes; 0 for a training from the start."""
        journal = self._training.journal
        known = 0 if journal is None else journal.steps_before
        return self._run.resumed_at if known is None else known

    @property
    def place_in_epoch(self) -> tuple[int, int | None]:
        """Training steps of the epoch that have begun, and how many it has; None if that is not known."""
        journal = self._training.journal
        return (0, None) if journal is None else journal.place_in_epoch

    def ends_after(self, epoch: int) -> bool:
        """Whether no epoch follows this one: it is the last one, or a plugin has ended the training."""
        last = epoch == getattr(self._run.training_config, "max_epochs", None)
        return last or self._training.ending is not None

    @property
    def trained(self) -> list[torch.Tensor]:
        """The tensors that the optimizer trains; [] before it exists."""
        return [] if self._scheduler is None else trained_tensors(self._scheduler)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps so far, by upstream's scheduler of the learning rate; 0 before it exists."""
        return 0 if self._scheduler is None else int(self._scheduler.last_epoch)

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of the next optimizer step; None before the optimizer exists."""
        rates = [] if self._scheduler is None else self._scheduler.get_last_lr()
        return float(rates[0]) if rates else None

    @property
    def songs(self) -> tuple[Path, ...]:
        """The files of the songs that are trained on, without those that are held out."""
        out = {song.resolve() for song in self._run.held_out}
        songs = () if self._run.tensor_dir is None else songs_in(self._run.tensor_dir)
        return tuple(song for song in songs if song.resolve() not in out)

    def waiting(self, what: str, done: int, total: int) -> None:
        """Show how far something is for which the training waits, where somebody looks."""
        self._host.registry.call("engine_waiting", run=self._run, what=what, done=done, total=total)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Write numbers to upstream's log, which TensorBoard shows."""
        log_entries(self._host, self._training, values, epoch)

    @property
    def stopping(self) -> bool:
        """Whether this process was told to stop the training after this step; one that a plugin finishes is not."""
        if self._training.ending is not None:
            return False
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
        training = self._training
        if training.state is not None:
            training.ending, training.limits = ending, limits
            training.state[STOP] = True

    # -- looking at the adapter --------------------------------------------------------------------------------------

    @property
    def decoder(self) -> Any:
        """The decoder with the adapter, without the wrappers of the training."""
        return plain_decoder(self._run.model)

    @property
    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors as they are now, under the names that they are saved with. Raises Refusal."""
        return live_weights(self._run)

    def undisturbed(self) -> AbstractContextManager[None]:
        """A block without gradients and dropout in which nothing is compiled; afterwards everything is as it was."""
        import torch

        module = self._training.trainer.module
        return undisturbed(module, torch.device(module.device))

    def without_adapter(self) -> AbstractContextManager[None]:
        """A block in which the model is the base model."""
        return without_adapter(self._training.trainer.module)

    @property
    def variants(self) -> list[str]:
        """Names of those of ``run.variants`` that there are by now."""
        return [name for name, tensors in self._run.variants.items() if tensors() is not None]

    @property
    def variant(self) -> str:
        """Which of ``run.variants`` is in the adapter's place now; "" for what is trained."""
        return self._training.variant

    @property
    def held(self) -> ResumePoint | None:
        """The checkpoint that is in the adapter's place while it is saved; None for what is trained."""
        return self._journal.holds

    @contextmanager
    def in_its_place(self, variant: str) -> Iterator[None]:
        """A block in which one of :attr:`variants` is in the adapter's place; it is put back bit for bit."""
        import torch

        tensors = self._run.variants[variant]()
        assert tensors is not None
        with torch.no_grad():
            now = [weight.detach().clone() for weight in self.trained]
            try:
                self._training.variant = variant
                for weight, value in zip(self.trained, tensors, strict=True):
                    weight.copy_(value)
                yield
            finally:
                self._training.variant = ""
                for weight, value in zip(self.trained, now, strict=True):
                    weight.copy_(value)

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
            timesteps: the t, from 0 to 1.
            conditions: with the song's condition (True), the model's null condition (False), or both.
            variant: one of :attr:`variants` in place of it.

        Returns:
            The losses, shape [songs, timesteps, conditions], float64 on the CPU; in several processes, those of the
            first one everywhere.
        """

        def done(number: int) -> None:
            self.waiting("Validation", number, len(songs))

        block: AbstractContextManager[None] = nullcontext() if adapter else self.without_adapter()
        if variant:
            block = self.in_its_place(variant)
        with block:
            done(0)
            losses = evaluate(self._training.trainer.module, songs, timesteps, conditions, done=done)
        shared: torch.Tensor = self._run.gather(losses)[0]
        return shared

    # -- saving and reading ------------------------------------------------------------------------------------------

    def save_checkpoint(self, name: str, kept: ResumePoint | None = None) -> bool:
        """Save a checkpoint in a folder of the output folder, with upstream's own function, in the first process.

        Args:
            kept: an earlier place of the training, from :meth:`in_ram`; None for the training as it is.

        Returns:
            Whether it was saved: a full disk is announced, and the training goes on. True in the other processes.

        Raises:
            Refusal: the adapter must not be saved.
        """
        journal = self._journal
        before = journal.unsaved  # that is about the checkpoint that upstream saves
        journal.unsaved = False
        if kept is None:
            self.save(name, journal.here(self._run))
        else:
            with self._in_the_adapter(kept):
                self.save(name, kept)
        saved, journal.unsaved = not journal.unsaved, before
        return saved

    def save(self, name: str, point: ResumePoint | None) -> None:
        """Call upstream's save function: for a checkpoint with a point, else for the weights alone."""
        module, journal = self._training.trainer.module, self._journal
        save, checkpoint = SAVE_FUNCTIONS[self._run.adapter_type]
        config = getattr(module, "lokr_config", None)
        known = {
            "model": module.model,
            "lycoris_net": network_of(module),
            "epoch": 0,
            "global_step": 0,
            "output_dir": str(Path(self._run.training_config.output_dir) / name),
            "lokr_config": config,
            "run_metadata": getattr(self._training.trainer, "run_metadata", None),
            "metadata": {"lokr_config": config.to_dict()} if config is not None else None,
        }
        function = None
        if point is not None:
            optimizer, scheduler = journal.scheduler.optimizer, journal.scheduler
            if journal.holds is not None:
                optimizer, scheduler = _State(point.optimizer), _State(point.scheduler)
            known |= {"optimizer": optimizer, "scheduler": scheduler}
            known |= {"epoch": point.epochs, "global_step": int(scheduler.state_dict()["last_epoch"])}
            function = getattr(self._host.trainer, checkpoint, None)
        function = function or getattr(self._host.trainer, save)
        function(**{name: known[name] for name in inspect.signature(function).parameters if name in known})

    def save_weights(self, name: str) -> None:
        """Save the adapter alone in a folder of the output folder, as a finished one."""
        self.save(name, None)

    def in_ram(self) -> ResumePoint:
        """The training as it is, weights included, copied to RAM, to be saved later. Every process has to ask."""
        point = self._journal.here(self._run)
        assert point is not None
        fields = {field.name: _copied(getattr(point, field.name)) for field in dataclasses.fields(point)}
        fields["weights"] = _copied(live_weights(self._run))
        fields["kept"] = {name: tell() for name, tell in self._run.keeps.items()}
        return dataclasses.replace(point, **fields)

    def read(self, name: str | Path) -> ResumePoint:
        """Read a checkpoint in a folder of the output folder, or in any other one. Raises Refusal."""
        for _, point in self._host.registry.call("engine_read_checkpoint", folder=self.folder / name):
            found: ResumePoint = point
            return found
        raise Refusal(f"No plugin reads the checkpoint {self.folder / name}. Use --plugin sidestep.")

    def put(self, point: ResumePoint, folder: Path | None = None) -> None:
        """Put the weights of a checkpoint into the adapter, to be saved as the finished one. Raises Refusal.

        Args:
            folder: where it was read from; None for one that was kept in RAM.
        """
        run, journal = self._run, self._journal
        if journal.catching_up:  # what comes then would replace them
            journal.catch_up(run)
        put_weights(run, point.weights)
        put_parameters(self.trained, point)
        journal.holds = point
        places = [] if folder is None else [folder / name for name in WEIGHT_FILES[run.adapter_type]]
        journal.copy_of = next((place.parent for place in places if place.is_file()), None)

    @contextmanager
    def _in_the_adapter(self, point: ResumePoint) -> Iterator[None]:
        """The adapter as it was at another place of the training; afterwards it is what it is now, bit for bit."""
        run, journal = self._run, self._journal
        weights, parameters = _copied(live_weights(run)), _copied(self.trained)
        before = dataclasses.replace(point, weights=weights, parameters=parameters)
        steps, holds, copy_of = run.steps, journal.holds, journal.copy_of
        try:
            self.put(point)
            run.steps = point.steps_done or steps
            yield
        finally:
            self.put(before)
            run.steps, journal.holds, journal.copy_of = steps, holds, copy_of

    def put_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put tensors into the adapter that is trained, by the names that they are saved with. Raises Refusal."""
        put_weights(self._run, weights)


class _State:
    """Stands for an optimizer or a scheduler whose state is known, where it is saved."""

    def __init__(self, state: Mapping[str, Any] | None) -> None:
        self._state = dict(state or {})

    def state_dict(self) -> dict[str, Any]:
        return self._state


def _copied(value: Any) -> Any:
    """A value whose tensors are copies on the CPU."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value
