"""Reads and writes safetensors files byte by byte. Tensors are copied and never loaded, so torch is not needed.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes with the header's length N as an
unsigned little-endian integer; N bytes of JSON in UTF-8 with the dtype, shape and position of each tensor, and strings
under ``__metadata__``; then the tensors' bytes without gaps.

Memory is needed for the header and one buffer, however large the tensors are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import Refusal
from ..files import replacing, special_kind, stand_in

MAX_HEADER: Final = 4 * 2**20
"""Size limit in bytes for a header. An adapter's has some hundred kilobytes. Parsing takes many times that."""

HASH_KEY: Final = "modelspec.hash_sha256"

_BUFFER: Final = 2**20
_BITS: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_DIMENSIONS: Final = 32
_LONGEST: Final = 200  # characters of what is wrong
_PLACEHOLDER: Final = "0x" + "0" * 64


@dataclass(frozen=True)
class Tensor:
    """A tensor's type, such as "BF16", its shape, and the position of its bytes, counted from the first tensor byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file whose header has been read and checked against the file's length.

    `metadata` are the strings in its header, `data_start` the number of bytes before the first tensor.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    data_start: int

    def read(self, tensor: Tensor) -> bytes:
        """The bytes of a tensor. Only for small tensors: all bytes are in memory at once."""
        with self.path.open("rb") as stream:
            stream.seek(self.data_start + tensor.start)
            return stream.read(tensor.end - tensor.start)

    def data_hash(self) -> str:
        """SHA-256 of all tensor bytes, as ModelSpec writes it: "0x" and 64 lower-case digits."""
        with self.path.open("rb") as stream:
            stream.seek(self.data_start)
            return "0x" + hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write into a file: its bytes, or the tensor of the source file whose bytes are copied."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes | Tensor


def read_weights_file(path: Path) -> WeightsFile:
    """Read a safetensors file's header and check it against the file's length. Tensors are not read.

    Raises Refusal if the file is missing, a pickle, truncated, or not a safetensors file.
    """
    if path.suffix.lower() in _PICKLES and path.is_file():
        raise _pickle(path)
    try:
        # Opening a named pipe would wait for somebody to write into it. A directory fails by itself.
        if (kind := special_kind(path)) not in (None, "directory"):
            raise _no_weights(path, f"it is a {kind}, not a regular file")
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8 or length > MAX_HEADER:
                # Only then: a header of 640, 896, 1152 or 1408 bytes begins like a pickle.
                if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
                    raise _pickle(path)
                raise _no_weights(path, _length_problem(size, start, length))
            raw = stream.read(length)
    except OSError as error:
        raise Refusal(f"Cannot read {path}: {error.strerror or error}.") from None
    try:
        header = json.loads(raw.decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError(f"it holds a {type(header).__name__}, expected an object")
        metadata = _texts(header.pop("__metadata__", {}))
        tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply, wrong types
        told = str(error) if len(str(error)) <= _LONGEST else f"{str(error)[:_LONGEST]}..."
        raise _no_weights(path, f"its header cannot be read: {told}") from None
    _check_places(path, tensors, size - 8 - length)
    return WeightsFile(path, tensors, metadata, 8 + length)


def write_metadata(source: WeightsFile, metadata: Mapping[str, str]) -> None:
    """Replace the strings in a file's header, as :func:`write_copy` writes them. The tensors' bytes do not change."""
    tensors = {name: NewTensor(entry.dtype, entry.shape, entry) for name, entry in source.tensors.items()}
    write_copy(source, source.path, tensors, metadata)


def write_copy(
    source: WeightsFile, target: Path, tensors: Mapping[str, NewTensor], metadata: Mapping[str, str]
) -> None:
    """Write a file of tensors whose bytes are given or copied from another file.

    If `metadata` has :data:`HASH_KEY`, its value becomes the hash of the new tensors. Raises OSError; an existing file
    is not changed then.
    """
    # Copied tensors keep their order, so if only the header changes, the tensors' bytes stay the same.
    ordered = sorted(tensors.items(), key=lambda item: getattr(item[1].content, "start", -1))
    texts = dict(metadata)
    if HASH_KEY in texts:
        texts[HASH_KEY] = _PLACEHOLDER
    header: dict[str, Any] = {"__metadata__": texts}
    position = 0
    for name, tensor in ordered:
        content = tensor.content
        end = position + (len(content) if isinstance(content, bytes) else content.end - content.start)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()
    with replacing(target) as stream:
        stream.write(len(raw).to_bytes(8, "little"))
        stream.write(raw)
        for piece in _pieces(source, (tensor.content for _, tensor in ordered)):
            digest.update(piece)
            stream.write(piece)
        if HASH_KEY in texts:
            # The hash is only known now. It has the same length as its placeholder.
            place = raw.index(json.dumps(HASH_KEY).encode() + b":" + json.dumps(_PLACEHOLDER).encode())
            stream.seek(8 + place + len(json.dumps(HASH_KEY)) + 1)
            stream.write(json.dumps("0x" + digest.hexdigest()).encode())
            stream.seek(0, os.SEEK_END)


def _pieces(source: WeightsFile, contents: Iterable[bytes | Tensor]) -> Iterator[bytes]:
    with source.path.open("rb") as stream:
        for content in contents:
            if isinstance(content, bytes):
                yield content
                continue
            stream.seek(source.data_start + content.start)
            left = content.end - content.start
            while left:
                piece = stream.read(min(left, _BUFFER))
                if not piece:
                    raise OSError(f"{source.path} was truncated while it was read")
                left -= len(piece)
                yield piece


# -- checks ----------------------------------------------------------------------------------------------------------


def _texts(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its __metadata__ is not an object of strings")
    for text in (*value, *value.values()):
        text.encode("utf-8")  # JSON can have half a character, which UTF-8 cannot
    return value


def _tensor(name: str, entry: Any) -> Tensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{name!r} is not a tensor entry") from None
    name.encode("utf-8")
    numbers = (*shape, start, end)
    sound = len(shape) <= _DIMENSIONS and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    if not sound or not isinstance(dtype, str) or not re.fullmatch(r"[A-Z0-9_]{1,20}", dtype):
        raise ValueError(f"{name!r} is not a tensor entry")
    bits = _BITS.get(dtype)
    if bits is not None and (end - start) * 8 != math.prod(shape) * bits:
        raise ValueError(f"{name!r} is {dtype} of shape {list(shape)}, which does not have {end - start} bytes")
    return Tensor(dtype, shape, start, end)


def _check_places(path: Path, tensors: Mapping[str, Tensor], found: int) -> None:
    position = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != position:
            raise _no_weights(path, "its tensors overlap or leave gaps")
        position = tensor.end
    if position != found:
        what = "truncated" if found < position else "too long"
        raise _no_weights(path, f"it is {what}: {position} bytes of tensors expected by its header, {found} found")


def _length_problem(size: int, start: bytes, length: int) -> str:
    if len(start) < 8:
        return f"it has {size} bytes"
    if length > MAX_HEADER and length <= size - 8:
        return f"its header has {length} bytes, but at most {MAX_HEADER} are read"
    return f"its header should have {length} bytes, but the whole file has {size}"


def _no_weights(path: Path, problem: str) -> Refusal:
    if what := stand_in(path):
        return Refusal(f"{path} {what}. Copy or download it again.")
    return Refusal(f"{path} is not a readable safetensors file: {problem}. Copy or download it again.")


def _pickle(path: Path) -> Refusal:
    return Refusal(
        f"{path} is a pickle file, which could run code, so it was not opened. Save the adapter as safetensors."
    )
