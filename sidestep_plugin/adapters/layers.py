"""The layers of an adapter, with their ranks and strengths, whichever program wrote it.

Layers have the names of ACE-Step's own decoder, such as ``layers.0.self_attn.q_proj``. No tensor is loaded, and a
pickle is never opened.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from ..errors import Refusal
from ..text import shown
from .finding import find_weights
from .kinds import BY_NAME, KINDS
from .layer_names import in_diffusers, is_block_layer, is_outer_layer, layer_name, name_in_file, some
from .peft_config import DIFFUSERS_SOURCE, Patterns, alpha_patterns, by_pattern, find_configuration, positive
from .weights_file import Tensor, WeightsFile, read_weights_file

if TYPE_CHECKING:
    import torch

# What follows a layer's name in a file.
# Its kind of adapter, the expression, and the tensor's name in `Layer.parts`; None: as the expression's group "part".
_PARTS: Final = (
    *((kind.name, pattern, part) for kind in KINDS for pattern, part in kind.tensors),
    ("", r"\.lora_magnitude_vector(\.default)?(\.weight)?|\.dora_scale", "magnitude"),
    ("", r"\.alpha", "alpha"),
    ("loha", r"\.(?P<part>hada_\w+)", None),
    ("oft", r"\.(?P<part>oft_\w+)", None),
    ("", r"\.scalar", "scalar"),
)
_PART: Final = [(kind, re.compile(f"(?P<layer>.+?)(?:{pattern})"), part) for kind, pattern, part in _PARTS]

# Each of them is multiplied by the others. Alpha is not among them: it is never zero in a file that was trained.
_FACTORS: Final = (
    *("A", "B", "scalar"),
    *("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
)
# Bytes of one number of the floating types, little-endian; the sign is the highest bit of the last byte.
_FLOATS: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 4}
_INTEGERS: Final = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
_FIRST: Final = 4096  # bytes; nearly every trained tensor shows in these that it is not zero
_BUFFER: Final = 2**20


@dataclass
class Layer:
    """One adapted layer."""

    name: str  # its name in ACE-Step's decoder
    # Names of its tensors: "A" and "B" of a LoRA, "magnitude" of a DoRA, "alpha"; a LoKr's under their own names.
    parts: dict[str, str] = field(default_factory=dict)
    peft_name: str = ""  # its name in the model that PEFT's patterns are written for
    rank: int | None = None  # of a LoRA, or of a LoKr's decomposed factor. None if there is none.
    alpha: float | None = None  # the effective one, so that strength = alpha / rank. None if unknown.


@dataclass(frozen=True)
class Adapter:
    """An adapter's weights file and the configuration beside it."""

    file: WeightsFile  # the weights
    kind: str  # name of its kind: one of ``kinds.NAMES``, or "loha" or "oft"
    layers: Mapping[str, Layer]  # the adapted layers by name
    unknown: tuple[str, ...]  # names of tensors that do not belong to any known kind of adapter
    # PEFT's configuration (adapter_config.json, else the one in the header). Empty if there is none.
    config: Mapping[str, Any]
    config_source: str | None  # where it was found. None if there is none.
    problems: tuple[str, ...]  # what is wrong with the files beside the weights

    @property
    def ranks(self) -> Counter[int]:
        """Number of layers by rank."""
        return Counter(layer.rank for layer in self.layers.values() if layer.rank is not None)

    @property
    def strengths(self) -> Counter[float]:
        """Number of trained layers by strength. Unknown ones are left out. Raises OSError."""
        kind = BY_NAME.get(self.kind)
        found = [] if kind is None else map(kind.strength, self.trained)
        return Counter(strength for strength in found if strength is not None)

    @property
    def is_dora(self) -> bool:
        """Whether it has magnitudes, as a DoRA does."""
        return any("magnitude" in layer.parts for layer in self.layers.values())

    @property
    def targets(self) -> list[str]:
        """Last parts of the trained layers' names, such as q_proj, sorted. Raises OSError."""
        return sorted({layer.name.rpartition(".")[2] for layer in self.trained})

    def load(self, layer: Layer) -> dict[str, torch.Tensor]:
        """A layer's tensors by the names in its parts, as they are in the file, on the CPU. Raises OSError."""
        from safetensors import safe_open

        with safe_open(self.file.path, framework="pt") as weights:
            return {part: weights.get_tensor(key) for part, key in layer.parts.items()}

    @cached_property
    def untrained(self) -> frozenset[str]:
        """Names of the layers in which one of the factors is still zero, so that they add nothing. Raises OSError.

        LyCORIS wraps and saves every layer; in those that upstream does not train, a factor keeps the zeros that it
        starts with. A LoRA starts with zeros in lora_B. It is read on first use, a few kilobytes of a trained layer.
        """
        with self.file.path.open("rb") as stream:
            return frozenset(
                name
                for name, layer in self.layers.items()
                if any(
                    _is_zero(stream, self.file.data_start, self.file.tensors[layer.parts[part]])
                    for part in _FACTORS
                    if part in layer.parts
                )
            )

    @property
    def trained(self) -> list[Layer]:
        """The layers that were trained; all if none was. Raises OSError."""
        return [layer for layer in self.layers.values() if layer.name not in self.untrained] or [*self.layers.values()]

    @property
    def idle(self) -> frozenset[str]:
        """Names of the layers that certainly change nothing: untrained ones without a magnitude. Raises OSError.

        A magnitude (DoRA) scales the model's own weight, which is not in the file. LyCORIS begins with the one that the
        weight has, and trains it together with the factors.
        """
        return frozenset(name for name in self.untrained if "magnitude" not in self.layers[name].parts)

    def check_changes_something(self) -> None:
        """Refuse to copy an adapter of zeros. Raises Refusal."""
        if len(self.untrained) == len(self.layers):
            raise Refusal(
                f"{self.file.path} holds only zeros and changes nothing, so there is nothing to copy. Use a later "
                "checkpoint."
            )

    def unknown_alpha(self) -> Refusal:
        """The refusal to apply an adapter whose alpha nothing says."""
        return Refusal(
            f"The alpha of {self.file.path} is unknown, and so is its strength. Put its adapter_config.json beside it."
        )


def read_adapter(path: Path) -> Adapter:
    """Read an adapter's layers, ranks and strengths without loading a tensor. Raises Refusal."""
    return understand(read_weights_file(find_weights(path)))


def understand(file: WeightsFile) -> Adapter:
    """The layers, ranks and strengths in a weights file. Raises Refusal if it is not an adapter for ACE-Step 1.5."""
    layers: dict[str, Layer] = {}
    kinds: Counter[str] = Counter()
    unknown = []
    for key in file.tensors:
        for kind, pattern, named in _PART:
            if match := pattern.fullmatch(key):
                name = layer_name(match["layer"])
                layer = layers.setdefault(name, Layer(name, peft_name=name_in_file(match["layer"])))
                part = named or match["part"]
                if kind:
                    kinds[kind] += 1
                if part in layer.parts:
                    raise Refusal(
                        f"{file.path} is damaged: it has {shown(name)} twice, as {shown(layer.parts[part])} and "
                        f"{shown(key)}. Copy or download it again."
                    )
                layer.parts[part] = key
                break
        else:
            unknown.append(key)
    if not kinds:
        raise Refusal(
            f"{file.path} is not an adapter: none of its {len(file.tensors)} tensors is named as in a LoRA or LoKr "
            f"({some(file.tensors)}). Expected an adapter for ACE-Step 1.5."
        )
    if not any(is_block_layer(name) for name in layers) and not all(is_outer_layer(name) for name in layers):
        base = file.metadata.get("ss_base_model_version") or file.metadata.get("modelspec.architecture")
        header = f" Its header names {shown(base)}." if base else ""
        raise Refusal(
            f"{file.path} is an adapter for another model than ACE-Step 1.5: it adapts layers such as "
            f"{some(layers)}.{header}"
        )
    config, source, problems = find_configuration(file)
    adapter = Adapter(file, kinds.most_common(1)[0][0], layers, tuple(unknown), config, source, tuple(problems))
    patterns = alpha_patterns(config)
    for layer in layers.values():
        _measure(adapter, layer, patterns)
    return adapter


def _measure(adapter: Adapter, layer: Layer, patterns: Patterns | None) -> None:
    """Fill in a layer's rank and alpha from its tensors and the configuration."""
    tensors = adapter.file.tensors
    kind = BY_NAME.get(adapter.kind)
    for part in ("hada_w1_b",) if kind is None else kind.rank_parts:
        if layer.rank is None and part in layer.parts and tensors[layer.parts[part]].shape:
            layer.rank = tensors[layer.parts[part]].shape[0]
    if "alpha" in layer.parts:
        layer.alpha = _number(adapter.file, tensors[layer.parts["alpha"]])
    elif kind is not None and kind.alpha_in_config and layer.rank:
        layer.alpha = _alpha_by_config(adapter, layer, patterns)


def _alpha_by_config(adapter: Adapter, layer: Layer, patterns: Patterns | None) -> float | None:
    """The effective alpha by PEFT's rules: ``alpha_pattern``, else ``lora_alpha``. rsLoRA divides by sqrt(r)."""
    config, rank = adapter.config, layer.rank
    if not config:
        said = adapter.file.metadata.get("ss_network_alpha") or adapter.file.metadata.get("sidestep.alpha")
        return positive(said)
    if patterns is None:
        return None
    # Our header and diffusers' has the names of diffusers, whatever the tensors beside it are called.
    name = in_diffusers(layer.name) if adapter.config_source == DIFFUSERS_SOURCE else layer.peft_name
    alpha = by_pattern(patterns, name, positive(config.get("lora_alpha")))
    if alpha is not None and rank and config.get("use_rslora"):
        return alpha * math.sqrt(rank)
    return alpha


def _number(file: WeightsFile, tensor: Tensor) -> float | None:
    """The value of a tensor that holds one number."""
    raw = file.read(tensor) if tensor.end - tensor.start <= 8 else b""
    code = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "BF16": "<f"}.get(tensor.dtype)
    if tensor.dtype == "BF16":
        raw = b"\0\0" + raw  # the upper half of a float
    if code is None or len(raw) != struct.calcsize(code):
        return None
    return positive(struct.unpack(code, raw)[0])


def _is_zero(stream: BinaryIO, data_start: int, tensor: Tensor) -> bool:
    """Whether a tensor holds values, all of them zero. Negative zeros count: LyCORIS multiplies by a scalar of zero."""
    if tensor.dtype not in _FLOATS and tensor.dtype not in _INTEGERS:
        return False
    stream.seek(data_start + tensor.start)
    left, size = tensor.end - tensor.start, _FIRST
    if left == 0:
        return False
    while left:
        piece = stream.read(min(left, size))
        if not piece or not _all_zero(piece, _FLOATS.get(tensor.dtype)):
            return False
        left, size = left - len(piece), _BUFFER
    return True


def _all_zero(piece: bytes, width: int | None) -> bool:
    if not piece.strip(b"\0"):
        return True
    if width is None:
        return False
    signs = piece[width - 1 :: width]
    others = (piece[position::width] for position in range(width - 1))
    return not signs.translate(None, b"\0\x80") and not any(part.strip(b"\0") for part in others)
