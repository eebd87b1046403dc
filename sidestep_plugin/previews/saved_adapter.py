"""Puts a saved adapter onto a decoder, for generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.kinds import BY_NAME, KINDS
from ..errors import Refusal


def put_on(model: Any, weights: Path, kind: str) -> Any:
    """Put an adapter onto a model's decoder.

    Args:
        model: a model without adapter; its ``decoder`` is replaced by PEFT's for a LoRA.
        weights: the weights file; a LoRA's ``adapter_config.json`` has to be beside it.
        kind: name of its kind.

    Returns:
        The network beside the decoder; None if the adapter is in the decoder.

    Raises:
        Refusal: the adapter is of another kind, or belongs to another model.
    """
    if kind not in BY_NAME:
        raise Refusal(f"{weights} is a {kind}, expected a {' or a '.join(known.title for known in KINDS)}.")
    try:
        return BY_NAME[kind].put_on(model, weights)
    except Refusal:
        raise
    except Exception as error:  # the libraries raise many types for an adapter that does not fit
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise _does_not_fit(weights, told) from error


def _does_not_fit(weights: Path, reason: str) -> Refusal:
    reason = " ".join(reason.split())
    return Refusal(
        f"{weights} does not fit this model ({reason[:300]}). Name the model that it was trained for with --model."
    )
