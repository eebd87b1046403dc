"""Names of the layers in ACE-Step 1.5's decoder, and the names that other programs give them.

Our names are the decoder's own, such as ``layers.0.self_attn.q_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from ..text import shown

# PEFT, ComfyUI and diffusers; then kohya-style and LyCORIS names, which have underscores instead of dots.
_DOTTED: Final = re.compile(r"(?:base_model\.model\.|diffusion_model\.decoder\.|transformer\.|decoder\.)?(.+)")
_FLAT: Final = re.compile(r"(?:lora_unet_|lycoris_)(?:decoder_)?(.+)")
_FLAT_LAYER: Final = re.compile(r"layers_(\d+)_(self_attn|cross_attn|mlp)_(.+)")
_LAYER: Final = re.compile(r"layers\.\d+\.((self_attn|cross_attn)\.[qkvo]_proj|mlp\..+)")
_OUTER: Final = re.compile(r"condition_embedder|proj_(in|out)(\.\d)?|time_embed(_r)?\.\w+")
_FLAT_OUTER: Final = re.compile(r"(proj_in|proj_out|time_embed_r|time_embed)_(\w+)")
_DIFFUSERS_NAMES: Final = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}


def is_block_layer(name: str) -> bool:
    """Whether a layer of one of the decoder's transformer blocks has this name."""
    return _LAYER.fullmatch(name) is not None


def is_outer_layer(name: str) -> bool:
    """Whether a layer of the decoder outside its transformer blocks has this name."""
    return _OUTER.fullmatch(name) is not None


def layer_name(prefixed: str) -> str:
    """A layer's name in ACE-Step's decoder, from the name that some program saved it with."""
    if flat := _FLAT.fullmatch(prefixed):
        if parts := _FLAT_LAYER.fullmatch(flat[1]):
            return f"layers.{parts[1]}.{parts[2]}.{parts[3]}"
        outer = _FLAT_OUTER.fullmatch(flat[1])
        return f"{outer[1]}.{outer[2]}" if outer else flat[1]
    match = _DOTTED.fullmatch(prefixed)
    name = match[1] if match else prefixed
    for ours, theirs in _DIFFUSERS_NAMES.items():
        name = name.removesuffix(f".{theirs}") + f".{ours}" if name.endswith(f".{theirs}") else name
    return name


def name_in_file(prefixed: str) -> str:
    """A layer's name as the model calls it that a program saved it from, without that program's prefix.

    PEFT's patterns are matched against this name. Kohya-style names have lost the dots, so for them it is the name in
    ACE-Step's decoder.
    """
    match = None if _FLAT.fullmatch(prefixed) else _DOTTED.fullmatch(prefixed)
    return match[1] if match else layer_name(prefixed)


def in_diffusers(name: str) -> str:
    """A layer's full name in diffusers."""
    before, _, last = name.rpartition(".")
    return f"{before}.{_DIFFUSERS_NAMES[last]}" if last in _DIFFUSERS_NAMES else name


def target_in_diffusers(name: str) -> str:
    """The entry for a layer in diffusers' list of target modules."""
    last = name.rpartition(".")[2]
    return _DIFFUSERS_NAMES.get(last, name if last.isdigit() else last)


def some(names: Iterable[str], longest: int = 3) -> str:
    """The first few names from a file, sorted and safe to print."""
    listed = sorted(names)
    return ", ".join(shown(name, 80) for name in listed[:longest]) + (", ..." if len(listed) > longest else "")
