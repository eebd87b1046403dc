"""The running mean of an adapter's trained tensors over its optimizer steps.

Step k of n counts as k to the power of :data:`POWER`, so the mean is about as old as the plain mean of the last third
of the training so far would be, wherever it ends: after 60 steps, after 6000, and where it is resumed with more epochs.
(Power-function averages: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
section 3.1.) The mean is that of each tensor, as of A and of B: it has the adapter's own rank and sizes. The mean of
what they do, B A, differs from it by how A and B vary together within that time, and would need a matrix of the
layer's size for each layer. docs/effect.md has measured both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import Refusal

if TYPE_CHECKING:
    import torch

POWER: Final = 4
"""Of the step's number in its weight: the mean age of a step is 1 / (POWER + 2) of the training."""


class RunningMean:
    """The mean of some tensors over optimizer steps, in fp32 where they are; no tensors before the first step.

    It is that of `steps` steps, from number `first` to number `last` of the training.
    """

    def __init__(self, steps: int = 0, first: int = 0, last: int = 0, tensors: Sequence[torch.Tensor] = ()) -> None:
        self.steps, self.first, self.last, self.tensors = steps, first, last, list(tensors)
        self._total = sum(step**POWER for step in range(1, steps + 1))

    def add(self, step: int, trained: Sequence[torch.Tensor]) -> None:
        """Add the tensors as they are after another optimizer step. Neither waits for a GPU nor draws a random number.

        Args:
            trained: the tensors, the same ones in each call. They are only read.
        """
        import torch

        self.steps += 1
        self._total += self.steps**POWER
        self.first, self.last = self.first or step, step
        with torch.no_grad():
            now = [tensor.detach().float() for tensor in trained]  # those that are fp32 already are not copied
            if not self.tensors:
                self.tensors = [tensor.clone() for tensor in now]
            else:
                torch._foreach_lerp_(self.tensors, now, self.steps**POWER / self._total)

    def as_state(self) -> dict[str, Any]:
        """For a checkpoint: copies on the CPU."""
        return {
            "power": POWER,
            "steps": self.steps,
            "first": self.first,
            "last": self.last,
            "tensors": [tensor.to("cpu", copy=True) for tensor in self.tensors],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RunningMean:
        """Read what :meth:`as_state` gave. Raises Refusal when it is not that."""
        import torch

        try:
            power, steps, first, last = (int(state[name]) for name in ("power", "steps", "first", "last"))
            tensors = list(state["tensors"])
        except (KeyError, TypeError, ValueError) as error:
            raise _unusable(repr(error)) from None
        right = all(isinstance(tensor, torch.Tensor) and tensor.is_floating_point() for tensor in tensors)
        if power != POWER or not right or bool(tensors) != (steps > 0):
            raise _unusable("it is of another kind")
        return cls(steps, first, last, tensors)

    def on(self, trained: Sequence[torch.Tensor]) -> None:
        """Move the mean to where the trained tensors are. Raises Refusal when it is not theirs."""
        if [tensor.shape for tensor in self.tensors] != [tensor.shape for tensor in trained]:
            raise _unusable("it is of other tensors than are trained here")
        self.tensors = [mean.to(tensor.device).float() for mean, tensor in zip(self.tensors, trained, strict=True)]


def _unusable(why: str) -> Refusal:
    return Refusal(
        f"The checkpoint's running mean of the adapter cannot be used: {why}. Resume without --average, or from "
        "another checkpoint."
    )
