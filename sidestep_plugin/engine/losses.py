"""A long list of losses, kept on the device where they were computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_TOGETHER: Final = 4096  # losses that are kept one by one before they become one tensor


class Losses:
    """Numbers that stay on their device: reading them one by one would wait for the GPU each time."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._newest: list[torch.Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, loss: torch.Tensor) -> None:
        self._newest.append(loss.reshape(()))
        self._count += 1
        if len(self._newest) == _TOGETHER:
            self._join()

    def replace_newest(self, losses: torch.Tensor) -> None:
        """Put other losses, shape [N], in place of the newest N."""
        import torch

        self._parts = [torch.cat([self.all()[: -len(losses)], losses.cpu()])]

    def mean_of_newest(self, count: int) -> float:
        """Mean of the newest losses. Waits for the GPU."""
        import torch

        if count <= len(self._newest):
            return float(torch.stack([loss.float() for loss in self._newest[-count:]]).mean())
        return float(self.all()[-count:].float().mean())

    def all(self) -> torch.Tensor:
        """All losses, on the CPU."""
        import torch

        self._join()
        return torch.cat([part.cpu() for part in self._parts]) if self._parts else torch.empty(0)

    def _join(self) -> None:
        import torch

        if self._newest:
            self._parts.append(torch.stack([loss.to(self._newest[-1].device) for loss in self._newest]))
            self._newest.clear()
