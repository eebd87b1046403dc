"""Songs in one batch do not see each other's padding (``--mask-padding``).

Songs have conditions of different lengths. In a batch the shorter ones are filled up with rows of zeros, and ACE-Step's
decoder attends to them: all its model files ignore the mask. Here these rows are masked in cross-attention, so that a
song is told the same in a batch as alone. A batch of one song, or of songs of equal length, is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.options import option
from sidestep_plugin.run import Run
from sidestep_plugin.songs.dataset import songs_in
from sidestep_plugin.songs.making import Making, making_of
from sidestep_plugin.songs.one_song import read_song

if TYPE_CHECKING:
    import torch


@hookimpl
def acestep_options() -> list[click.Option]:
    text = "Hide padding of prompts: auto (songs from prepare), on, off."
    return [option("--mask-padding", text, click.Choice(["auto", "on", "off"]), "WHEN", "auto")]


@hookimpl(trylast=True)
def acestep_run_started(run: Run) -> list[str]:
    """Decide whether padding is masked, and put the masks in place until the training is over."""
    said = run.options["mask_padding"]
    batch = int(getattr(run.training_config, "batch_size", 1) or 1)
    if said == "off" or run.tensor_dir is None or run.engine is None:
        return []
    read = (read_song(file) for file in songs_in(run.tensor_dir))
    songs = [making_of(song) for song, problem in read if not problem]
    if problem := _problem(songs):
        if said == "on":
            raise Refusal(f"--mask-padding on: {problem}. Prepare them with acestep-train prepare, or leave it out.")
        return []
    lengths = sorted({song.rows for song in songs})
    if batch < 2 or len(lengths) < 2:
        return []
    how_long = f"prompts of {lengths[0]} to {lengths[-1]} rows"
    decoder = run.model.decoder
    attention = str(getattr(getattr(decoder, "config", None), "_attn_implementation", "") or "")
    reason = ""
    if "flash" in attention:
        reason = "flash attention takes no such mask"
    elif run.options.get("compile"):
        reason = "with --compile the decoder's blocks are left as they are"
    elif not _cross_attentions(decoder):
        reason = "this decoder has no layers named cross_attn"
    if reason:
        return [
            f"Warning: in batches of {batch} the padding of shorter songs is attended to ({how_long}), as {reason}. "
            f"For songs as if alone: --batch-size 1 --gradient-accumulation {batch}"
        ]
    masking = Masking(decoder)
    run.engine.at_end(masking.remove)
    run.facts.append(lambda: {"mask_padding": True})
    return [f"Padding: masked in cross-attention, so that a song is told the same in a batch as alone ({how_long})"]


class Masking:
    """Masks rows of conditions in every cross-attention of a decoder, until it is removed.

    Rows are those that the decoder's own argument ``encoder_attention_mask`` [B,L] hides with zeros. Nothing here waits
    for a GPU or draws a random number. With one song, the decoder is left to itself.
    """

    def __init__(self, decoder: torch.nn.Module) -> None:
        self._shown: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._handles = [decoder.register_forward_pre_hook(self._look, with_kwargs=True)]
        self._handles += [
            layer.register_forward_pre_hook(self._mask, with_kwargs=True) for layer in _cross_attentions(decoder)
        ]

    def remove(self) -> None:
        """Leave the decoder as it was."""
        while self._handles:
            self._handles.pop().remove()
        self._shown = self._bias = None

    def _look(self, _: Any, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("encoder_attention_mask")
        self._shown = mask if mask is not None and len(mask) > 1 else None
        self._bias = None

    # Called again when a checkpointed layer is computed a second time: the mask is still that of its batch.
    def _mask(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        import torch

        states, conditions = kwargs.get("hidden_states"), kwargs.get("encoder_hidden_states")
        if self._shown is None or states is None or conditions is None or conditions.shape[:2] != self._shown.shape:
            return None
        before = kwargs.get("attention_mask")
        dtype = before.dtype if isinstance(before, torch.Tensor) and before.is_floating_point() else states.dtype
        if self._bias is None or self._bias.dtype != dtype or self._bias.shape[2] != states.shape[1]:
            hidden = (self._shown == 0)[:, None, None, :]
            bias = torch.zeros(hidden.shape, dtype=dtype, device=states.device)
            bias = bias.masked_fill(hidden.to(states.device), torch.finfo(dtype).min)
            self._bias = bias.expand(-1, -1, states.shape[1], -1)
        return args, {**kwargs, "attention_mask": self._bias}


def _cross_attentions(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for name, module in decoder.named_modules() if name.rpartition(".")[2] == "cross_attn"]


def _problem(songs: Sequence[Making]) -> str:
    """Why the masks of songs cannot be trusted, as the beginning of a sentence; "" when they can."""
    if not songs:
        return "there are no songs"
    others = sum(song.form != "generated" or not song.recorded for song in songs)
    if others:
        # In bf16 upstream counts the rows of a mask wrongly above 256, so it hides rows that belong to the song.
        return f"{others} of {len(songs)} songs are from ACE-Step's own preprocessing, whose masks can be wrong"
    return ""
