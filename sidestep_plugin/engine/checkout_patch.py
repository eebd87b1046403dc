"""The minimal diff in a checkout: five lines at the top of ``acestep/training/__init__.py``, added and removed.

The lines are those of ``patches/sidestep-plugin.patch``; git and patch apply the same file. Here it also works without
either, in a checkout with Windows line ends, and as often as one likes.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

from ..errors import Refusal
from ..files import replacing, special_kind

TARGET: Final = Path("acestep") / "training" / "__init__.py"
PATCH_NAME: Final = "sidestep-plugin.patch"

Status = Literal["applied", "not applied"]

_TRACE: Final = b"sidestep_plugin"
_BOM: Final = b"\xef\xbb\xbf"


def patch_text() -> str:
    """The patch as git and patch take it: one hunk that only adds."""
    return files("sidestep_plugin.patches").joinpath(PATCH_NAME).read_text(encoding="utf-8")


def status(root: Path) -> Status:
    """Whether a checkout has the lines.

    Raises:
        Refusal: there is no such file, or the lines in it were changed.
    """
    content = _read(root)
    if any(content.startswith(lines) for lines in _variants(content)):
        return "applied"
    if _TRACE in content:
        raise Refusal(
            f"{root / TARGET} contains other lines about sidestep_plugin than this version adds. Remove them by hand, "
            "then apply the patch again."
        )
    return "not applied"


def apply(root: Path) -> bool:
    """Add the lines | returns whether anything was changed | raises Refusal or OSError and then changes nothing."""
    if status(root) == "applied":
        return False
    content = _read(root)
    windows = content.partition(b"\n")[0].endswith(b"\r")
    start = _BOM if content.startswith(_BOM) else b""
    patched = start + _lines(b"\r\n" if windows else b"\n") + content[len(start) :]
    try:
        # Not only parsed: a __future__ import has to stay first, which the compiler knows.
        compile(content, str(TARGET), "exec", dont_inherit=True)
        compile(patched, str(TARGET), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise Refusal(
            f"{root / TARGET} cannot take lines at its top ({error}). Use acestep-train run instead."
        ) from None
    _write(root, patched)
    return True


def revert(root: Path) -> bool:
    """Remove the lines, restoring the file byte for byte | returns whether anything was changed | raises like apply."""
    if status(root) == "not applied":
        return False
    content = _read(root)
    lines = next(lines for lines in _variants(content) if content.startswith(lines))
    start = _BOM if lines.startswith(_BOM) else b""
    _write(root, start + content[len(lines) :])
    return True


def _lines(end: bytes) -> bytes:
    added = [line[1:] for line in patch_text().splitlines() if line.startswith("+") and not line.startswith("+++")]
    return b"".join(line.encode() + end for line in added)


def _variants(content: bytes) -> list[bytes]:
    """The lines with either line end, behind a byte order mark if the file has one; git adds them before it."""
    plain = [_lines(b"\n"), _lines(b"\r\n")]
    return [_BOM + lines for lines in plain] + plain if content.startswith(_BOM) else plain


def _read(root: Path) -> bytes:
    try:
        # Opening a named pipe would wait for somebody to write into it. A directory fails by itself.
        if (kind := special_kind(root / TARGET)) not in (None, "directory"):
            raise Refusal(f"{root / TARGET} is a {kind}, expected a Python file. Put ACE-Step's own file there.")
        return (root / TARGET).read_bytes()
    except OSError as error:
        raise Refusal(
            f"Cannot read {root / TARGET}: {error.strerror or error}. Give your ACE-Step 1.5 "
            "folder with --acestep-root DIR."
        ) from None


def _write(root: Path, content: bytes) -> None:
    with replacing(root / TARGET) as stream:
        stream.write(content)
