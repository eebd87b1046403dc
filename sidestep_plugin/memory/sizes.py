"""Sizes of a decoder, read from a model's config.json, and how many parameters follow from them.

The counts are those of ACE-Step 1.5's own decoder class (AceStepDiTModel); tests/upstream compares them with the class
built on torch's meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..adapters.kinds import BY_NAME
from ..run import AdapterType

_TIME_CHANNELS: Final = 256
"""Width of the sinusoidal embedding of a timestep."""


@dataclass(frozen=True)
class DecoderSize:
    """What a decoder's memory depends on. Widths are numbers of channels."""

    width: int  # of the hidden states
    condition_width: int  # of the conditions (``encoder_hidden_states``)
    feed_forward: int  # of the MLP
    layers: int  # number of layers
    heads: int  # of the queries' attention
    key_value_heads: int
    head_dim: int
    channels: int = 192  # of latents and context together
    audio: int = 64  # of the latents
    patch: int = 2  # frames of latents in one position of the sequence

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderSize | None:
        """Read them from a config; None if it lacks one without which nothing can be computed."""

        def number(name: str, default: int | None = None) -> int:
            value = config.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(name)
            return value

        try:
            width, heads = number("hidden_size"), number("num_attention_heads")
            return cls(
                width=width,
                condition_width=number("encoder_hidden_size", width),
                feed_forward=number("intermediate_size"),
                layers=number("num_hidden_layers"),
                heads=heads,
                key_value_heads=number("num_key_value_heads", heads),
                head_dim=number("head_dim", max(1, width // heads)),
                channels=number("in_channels", 192),
                audio=number("audio_acoustic_hidden_dim", 64),
                patch=number("patch_size", 2),
            )
        except ValueError:
            return None

    @property
    def queries(self) -> int:
        """Width of all heads of the queries together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all heads of the keys together, and of the values."""
        return self.key_value_heads * self.head_dim

    @property
    def layer_linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one layer by name: (outputs, inputs). None has a bias."""
        attention = {
            "q_proj": (self.queries, self.width),
            "k_proj": (self.keys, self.width),
            "v_proj": (self.keys, self.width),
            "o_proj": (self.width, self.queries),
        }
        feed_forward = {
            "gate_proj": (self.feed_forward, self.width),
            "up_proj": (self.feed_forward, self.width),
            "down_proj": (self.width, self.feed_forward),
        }
        return {
            **{f"self_attn.{name}": shape for name, shape in attention.items()},
            **{f"cross_attn.{name}": shape for name, shape in attention.items()},
            **{f"mlp.{name}": shape for name, shape in feed_forward.items()},
        }

    def targets(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Those of the linear layers of one layer whose names end with one of the names."""
        wanted = tuple(names)
        return {
            name: shape
            for name, shape in self.layer_linears.items()
            if any(name == end or name.endswith(f".{end}") for end in wanted)
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of the linear layers of one layer."""
        return sum(outputs * inputs for outputs, inputs in self.layer_linears.values())

    @property
    def outer_parameters(self) -> int:
        """Parameters of the linear and convolution layers outside of the layers, with their biases."""
        time = _TIME_CHANNELS * self.width + 7 * self.width * self.width + 8 * self.width
        proj_in = (self.channels * self.patch + 1) * self.width
        proj_out = (self.width * self.patch + 1) * self.audio
        return 2 * time + proj_in + proj_out + (self.condition_width + 1) * self.width

    @property
    def cast_parameters(self) -> int:
        """Parameters of all linear and convolution layers, which autocast casts to bf16."""
        return self.layers * self.layer_parameters + self.outer_parameters

    @property
    def other_parameters(self) -> int:
        """Parameters of the norms and of the scale-and-shift tables."""
        layer = 3 * self.width + 4 * self.head_dim + 6 * self.width
        return self.layers * layer + self.width + 2 * self.width

    @property
    def parameters(self) -> int:
        """All parameters of the decoder."""
        return self.cast_parameters + self.other_parameters


def adapter_parameters(size: DecoderSize, kind: AdapterType, rank: int, targets: Iterable[str]) -> int:
    """Trained parameters of an adapter | rank: of a LoRA, or the dimension of a LoKr."""
    shapes = size.targets(targets).values()
    return size.layers * sum(BY_NAME[kind].parameters(shape, rank) for shape in shapes)
