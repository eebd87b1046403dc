"""The learning-rate scheduler: handed to the journal, because it references the optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

from ..current import running_training


def wrap_scheduler(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        scheduler = original(*args, **kwargs)
        if (training := running_training.get()) is not None:
            if training.journal is not None:
                training.journal.scheduler = scheduler
            training.run.module_ref = training.run.module_ref or weakref.ref(training.trainer.module)
        return scheduler

    return make
