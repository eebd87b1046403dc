"""Adaptive projected guidance (APG), the classifier-free guidance that ACE-Step 1.5 generates with.

Source: Sadat, Hilliges, Weber 2024, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion
Models", algorithm 1, with reverse momentum, a limit on the norm, and only the orthogonal part of the update. The
numbers are those that ACE-Step's model code passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

MOMENTUM: Final = -0.75
LARGEST_NORM: Final = 2.5
TIME: Final = 1
"""The dimension along which norms and projections are taken: the frames of [B,T,64]."""


class ProjectedGuidance:
    """The guidance of one generation. It remembers earlier updates, so every clip needs its own.

    Args:
        scale: guidance scale; 1.0 leaves the conditional velocity as it is.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._update: torch.Tensor | None = None

    def guided(self, conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        """The guided velocity | given both velocities, shape [B,T,64] | returns the same shape and type."""
        import torch

        update = conditional - unconditional
        if self._update is not None:
            update = update + MOMENTUM * self._update
        self._update = update
        norm = torch.linalg.vector_norm(update, dim=TIME, keepdim=True)
        update = update * (LARGEST_NORM / norm).clamp(max=1.0)
        # float64, where the device has it: the projection takes the difference of nearly equal numbers.
        wide = torch.float32 if update.device.type == "mps" else torch.float64
        direction = torch.nn.functional.normalize(conditional.to(wide), dim=TIME)
        along = (update.to(wide) * direction).sum(dim=TIME, keepdim=True) * direction
        orthogonal = (update.to(wide) - along).to(conditional.dtype)
        guided: torch.Tensor = conditional + (self._scale - 1.0) * orthogonal
        return guided
