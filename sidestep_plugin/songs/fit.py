"""Checks whether songs fit a model: by the widths of their tensors, how they were made, and for which model."""

from __future__ import annotations

from ..errors import Refusal
from ..run import ModelFacts
from ..variants import VARIANTS, words_of
from .dataset import Dataset, made_for
from .making import check_making, renew_command


def check_songs(dataset: Dataset, facts: ModelFacts) -> None:
    """Refuse songs that do not fit a model, as far as its config shows. Raises Refusal."""
    _check_widths(dataset, facts)
    # What the songs say of themselves comes first: it says more than a file beside them.
    if dataset.makings:
        check_making(dataset.folder, dataset.files, dataset.makings, facts.name)
    _check_made_for(dataset, facts)


def _check_widths(dataset: Dataset, facts: ModelFacts) -> None:
    channels = facts.config.get("in_channels")
    if isinstance(channels, int) and dataset.channels != channels:
        raise Refusal(
            f"The songs in {dataset.folder} have {dataset.channels} channels (latents and context), {facts.name} takes "
            f"{channels}: they were preprocessed for another model. Preprocess them again with this one."
        )
    width = facts.config.get("encoder_hidden_size") or facts.config.get("hidden_size")
    if isinstance(width, int):
        check_width(dataset, facts.name, width)


def check_width(dataset: Dataset, model: str, width: int) -> None:
    if dataset.condition_width != width:
        raise Refusal(
            f"The songs in {dataset.folder} have conditions of width {dataset.condition_width}, {model} "
            f"expects {width}: they were preprocessed for another model. Preprocess them again with this one, or give "
            f"them its conditions, without audio and in seconds: {renew_command(dataset.folder, model)}"
        )


def _check_made_for(dataset: Dataset, facts: ModelFacts) -> None:
    """Refuse songs whose conditions come from the encoder of another family, where a file says so."""
    said = made_for(dataset.folder)
    if said is None:
        return
    turbo = facts.config.get("is_turbo", "turbo" in words_of(facts.name))
    then, now = words_of(said), words_of(facts.name)
    if not set(VARIANTS) & set(then):
        return
    if ("turbo" in then) != turbo or ("xl" in then) != ("xl" in now):
        raise Refusal(
            f"The songs in {dataset.folder} were preprocessed for {said} (preprocess_meta.json), and {facts.name} has "
            "another condition encoder (if the file is wrong, delete it). Preprocess them again with this model, or "
            f"give them its conditions, without audio and in seconds: {renew_command(dataset.folder, facts.name)}"
        )
