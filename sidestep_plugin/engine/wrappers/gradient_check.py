"""The check for gradients that are not finite: one look at all of them instead of one wait for the GPU per tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any


def wrap_gradient_check(original: Callable[..., Any]) -> Callable[..., Any]:
    """Answer (0, number of gradients) at once when their largest entry is finite; else upstream counts itself."""

    @wraps(original)
    def count(params: Sequence[Any]) -> Any:
        import torch

        gradients = [parameter.grad for parameter in params if parameter.grad is not None]
        filled = [gradient for gradient in gradients if gradient.numel()]
        # The largest entry is NaN or infinite exactly when some entry is.
        if not filled or bool(torch.isfinite(torch.nn.utils.get_total_norm(filled, norm_type=float("inf")))):
            return 0, len(gradients)
        return original(params)

    return count
