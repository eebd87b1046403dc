"""Which layers of an adapter change anything.

LyCORIS wraps every layer and saves all of them. In those that upstream does not train, one factor keeps the zeros that
LyCORIS starts with. A LoRA starts with zeros in lora_B. A layer with such a factor adds nothing to the model's weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import BinaryIO, Final, Protocol

from .weights_file import Tensor, WeightsFile

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


class _Parts(Protocol):
    @property
    def parts(self) -> dict[str, str]: ...


def untrained_layers(file: WeightsFile, layers: Mapping[str, _Parts]) -> frozenset[str]:
    """Names of the layers that no optimizer step has changed. Reads a few kilobytes of a trained layer.

    They change nothing, unless they have a magnitude (DoRA): that scales the model's own weight, which is not in the
    file. LyCORIS begins with the magnitude that the weight has, and trains it together with the factors.

    Raises:
        OSError: the file cannot be read.
    """
    with file.path.open("rb") as stream:
        return frozenset(
            name for name, layer in layers.items() if _any_zero(stream, file, _factors_of(file, layer.parts))
        )


def _factors_of(file: WeightsFile, parts: Mapping[str, str]) -> list[Tensor]:
    return [file.tensors[parts[name]] for name in _FACTORS if name in parts]


def _any_zero(stream: BinaryIO, file: WeightsFile, factors: Iterable[Tensor]) -> bool:
    return any(_is_zero(stream, file.data_start, factor) for factor in factors)


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
