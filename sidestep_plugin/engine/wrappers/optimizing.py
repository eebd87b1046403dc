"""What the optimizer is given: gradients, checked for NaN, and its learning rate."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from ..current import running_training


def wrap_gradient_check(original: Callable[..., Any]) -> Callable[..., Any]:
    """Answer (0, number of gradients) at once when their largest entry is finite; else upstream counts itself.

    That is one look at all of them instead of one wait for the GPU per tensor.
    """

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


def wrap_scheduler(original: Callable[..., Any]) -> Callable[..., Any]:
    """The learning-rate scheduler is handed to the journal, because it references the optimizer."""

    @wraps(original, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        scheduler = original(*args, **kwargs)
        if (training := running_training.get()) is not None:
            if training.journal is not None:
                training.journal.scheduler = scheduler
            training.run.module_ref = training.run.module_ref or weakref.ref(training.trainer.module)
        return scheduler

    return make
