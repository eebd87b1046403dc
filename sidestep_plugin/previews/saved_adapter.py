"""Puts a saved adapter onto a decoder, for generating."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from ..errors import Refusal


def put_on(model: Any, weights: Path, kind: str) -> Any:
    """Put an adapter onto a model's decoder | returns the LyCORIS network of a LoKr, None for a LoRA.

    Args:
        model: a model without adapter; its ``decoder`` is replaced by PEFT's for a LoRA.
        weights: the weights file; a LoRA's ``adapter_config.json`` has to be beside it.
        kind: "lora" or "lokr".

    Raises:
        Refusal: the adapter is of another kind, or belongs to another model.
    """
    if kind == "lora":
        return _put_lora(model, weights)
    if kind == "lokr":
        return _put_lokr(model.decoder, weights)
    raise Refusal(f"{weights} is a {kind}, expected a LoRA or a LoKr.")


def _put_lora(model: Any, weights: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    if not (weights.parent / "adapter_config.json").is_file():
        raise Refusal(
            f"No adapter_config.json beside {weights}, which says its alpha. Name the adapter as it was saved."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing keys are counted below
            model.decoder = PeftModel.from_pretrained(model.decoder, str(weights.parent))
    except Exception as error:  # PEFT raises many types for an adapter that does not fit
        raise _does_not_fit(weights, f"{type(error).__name__}: {error}") from error
    there = {name.replace(".default.", ".") for name, _ in model.decoder.named_parameters() if "lora_" in name}
    if foreign := sorted(load_file(weights).keys() - there):
        raise _does_not_fit(weights, f"{foreign[0]} belongs to no layer")
    model.decoder.eval()


def _put_lokr(decoder: Any, weights: Path) -> Any:
    try:
        from lycoris import create_lycoris_from_weights
    except ImportError:
        raise Refusal("A LoKr needs LyCORIS, which is not installed here: pip install lycoris-lora") from None
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    try:
        network, tensors = create_lycoris_from_weights(1.0, str(weights), decoder)
    except Exception as error:  # a layer of another width, or tensors that make no layer
        raise _does_not_fit(weights, f"{type(error).__name__}: {error}") from error
    found = {lora.lora_name for lora in network.loras}
    if foreign := sorted({name.split(".")[0] for name in tensors if "." in name} - found):
        raise _does_not_fit(weights, f"{foreign[0]} belongs to no layer")
    weight = next(decoder.parameters())
    network.to(weight.device, weight.dtype).eval()
    network.apply_to()
    return network


def _does_not_fit(weights: Path, reason: str) -> Refusal:
    reason = " ".join(reason.split())
    return Refusal(
        f"{weights} does not fit this model ({reason[:300]}). Name the model that it was trained for with --model."
    )
