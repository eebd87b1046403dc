"""Evaluates songs: upstream's own loss at given timesteps with given noise, and nothing is different afterwards.

The steps go through the wrappers of upstream's step and sampler, which see :data:`evaluating`: no journal records
them, and no plugin is told about them. Plugins that replace entries of a batch are asked as in any validation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import Refusal
from ..songs.one_song import SONG_TENSORS, load_song
from .current import during
from .decoders import undisturbed, without_ddp

if TYPE_CHECKING:
    import torch

    from ..run import Step


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    t: float
    noise: int  # seed of the noise
    condition: bool  # whether with the song's condition; else with the model's null condition
    check: bool  # whether to look at what the decoder receives, which waits for the GPU

    def seed_noise(self, device: torch.device) -> None:
        """Seed the generators that the next noise is drawn from: torch's, of the CPU and of this device."""
        import torch

        torch.default_generator.manual_seed(self.noise)
        if device.type in ("cuda", "xpu"):
            with getattr(torch, device.type).device(device):
                getattr(torch, device.type).manual_seed(self.noise)
        elif device.type == "mps":
            torch.mps.manual_seed(self.noise)


evaluating: Final[ContextVar[Point | None]] = ContextVar("acestep_evaluating", default=None)


def evaluate(
    module: Any,
    songs: Sequence[Path],
    timesteps: Sequence[float],
    conditions: Sequence[bool] = (True,),
    *,
    done: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Upstream's loss of each song at each timestep, with noise that depends on the song's name and the t's place only.

    Args:
        module: upstream's training module, whose ``training_step`` is wrapped.
        songs: files of preprocessed songs. One at a time is evaluated: a batch of several would need more memory than
            the training does.
        conditions: True for the song's condition, False for the model's null condition, with the same noise.
        done: called after each song with the number of songs so far.

    Returns:
        The losses, shape [songs, timesteps, conditions], float64 on the CPU.

    Raises:
        Refusal: a song cannot be read any more.

    Nothing is changed: random states, the mode (train or eval) of every submodule and upstream's list of losses are
    restored, and no gradient is computed.
    """
    import torch

    losses = torch.zeros(len(songs), len(timesteps), len(conditions), dtype=torch.float64)
    with _unrecorded(module):
        for row, song in enumerate(songs):
            batch = _batch_of(song)
            for column, t in enumerate(timesteps):
                for place, condition in enumerate(conditions):
                    point = Point(t, noise_seed(song, column), condition, check=row == column == 0)
                    with during(evaluating, point):
                        losses[row, column, place] = float(module.training_step(batch))
            if done is not None:
                done(row + 1)
    return losses


def noise_seed(song: Path, place: int) -> int:
    """Seed of the noise of a song at the t with this place in the grid: the same in every training and folder."""
    text = f"{song.name}:{place}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")


@contextmanager
def _unrecorded(module: Any) -> Iterator[None]:
    """Undisturbed, and nothing of it stays in upstream's list of losses."""
    import torch

    recorded = getattr(module, "training_losses", [])
    length = len(recorded)
    try:
        with undisturbed(module, torch.device(module.device)), without_ddp(module.model.decoder):
            yield
    finally:
        del recorded[length:]


def without_condition(step: Step, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The batch's conditions replaced by the model's null condition, where the step computes."""
    conditions = batch["encoder_hidden_states"]
    null = step.run.model.null_condition_emb.detach().to(step.device, dtype=step.dtype)
    return {"encoder_hidden_states": null.expand(*conditions.shape[:2], null.shape[-1]).contiguous()}


def _batch_of(file: Path) -> dict[str, Any]:
    try:
        song = load_song(file)
        return {**{name: song[name].unsqueeze(0) for name in SONG_TENSORS}, "metadata": [song.get("metadata", {})]}
    except Exception as error:
        raise Refusal(
            f"{file} is held out for validation and cannot be read any more ({type(error).__name__}). Put the song "
            "back, and resume the training."
        ) from None
