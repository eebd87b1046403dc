"""What the engine does for the rooms of this package while a training runs: ``run.engine``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Refusal
from .checkout import place_of
from .ending import save_checkpoint, save_weights
from .evaluation import evaluate, without_adapter
from .loggers import log_entries
from .replay import put_parameters, trained_tensors
from .weights import put_weights

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
        self._training.at_end.append(undo)

    @property
    def ends_the_program(self) -> bool:
        """Whether the program ends with this training, as on the command line."""
        return self._training.from_command_line

    @property
    def trained(self) -> list[torch.Tensor]:
        """The tensors that the optimizer trains; [] before it exists."""
        journal = self._training.journal
        return [] if journal is None or journal.scheduler is None else trained_tensors(journal.scheduler)

    def evaluate(
        self,
        songs: Sequence[Path],
        timesteps: Sequence[float],
        conditions: Sequence[bool],
        *,
        adapter: bool = True,
    ) -> torch.Tensor:
        """Upstream's loss of each song at each timestep and condition, and nothing is different afterwards.

        Args:
            songs: files of preprocessed songs.
            timesteps: the t, from 0 to 1.
            conditions: with the song's condition (True), the model's null condition (False), or both.
            adapter: whether with the adapter.

        Returns:
            The losses, shape [songs, timesteps, conditions], float64 on the CPU; in several processes, those of the
            first one everywhere.
        """
        module, run = self._training.trainer.module, self._training.run
        with nullcontext() if adapter else without_adapter(module):
            losses = evaluate(module, songs, timesteps, conditions)
        shared: torch.Tensor = run.gather(losses)[0]
        return shared

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Write numbers to upstream's log, which TensorBoard shows."""
        log_entries(self._host, self._training, values, epoch)

    def save_checkpoint(self, name: str) -> bool:
        """Save the training as it is in a folder of the output folder, with upstream's own function.

        Returns:
            Whether it was saved: a full disk is announced, and the training goes on.

        Raises:
            Refusal: the adapter must not be saved.
        """
        return save_checkpoint(self._host, self._training, name)

    def save_weights(self, name: str) -> None:
        """Save the adapter alone in a folder of the output folder, as a finished one."""
        save_weights(self._host, self._training, name)

    def read(self, name: str) -> ResumePoint:
        """Read a checkpoint in a folder of the output folder. Raises Refusal."""
        for _, point in self._host.registry.call("engine_read_checkpoint", folder=self.folder / name):
            found: ResumePoint = point
            return found
        raise Refusal(f"No plugin reads the checkpoint {self.folder / name}. Use --plugin sidestep.")

    def put(self, point: ResumePoint) -> None:
        """Put the weights of a checkpoint into the adapter. Raises Refusal where they do not fit."""
        put_weights(self._training.run, point)
        put_parameters(self.trained, point)

    def finish(self, ending: Callable[[], Sequence[str]]) -> None:
        """End the training after this step as a finished one.

        Args:
            ending: called when upstream's loop has ended, to save the finished adapter; returns lines for the user.
        """
        self._training.finish(ending)
