"""Every message that the program can print, from its code: ``python tests/tools/messages.py``.

Errors first (what is raised for the user), then what is printed or announced. Values that are filled in stand in
braces.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    file
    for folder in ("sidestep_plugin", "hooks")
    for file in (ROOT / folder).rglob("*.py")
    if "miniature" not in file.parts
)
RAISED = {"Refusal", "PluginError", "UpstreamMismatch", "DetachError", "Unusable", "UsageError", "BadParameter"}
RAISED |= {"_incomplete", "_unused", "_pickle", "fail"}
PRINTED = {"echo", "say", "_announce", "append", "warning", "error", "info"}


@dataclass(frozen=True)
class Message:
    """A text of the program, and where it stands."""

    kind: str
    place: str
    text: str


def messages() -> list[Message]:
    """All of them, in the order of the code."""
    found = []
    for file in SOURCES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        where = file.relative_to(ROOT).as_posix()
        constants = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
            and target.id.isupper()
            and isinstance(node.value, ast.Constant | ast.JoinedStr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                kind = "raised" if name in RAISED else "printed" if name in PRINTED else ""
                texts = [text for argument in node.args for text in texts_of(argument, constants)] if kind else []
            elif isinstance(node, ast.Return) and node.value is not None:
                # Hooks and helpers return lines and sentences.
                kind, texts = "returned", [text for text in texts_of(node.value, constants) if " " in text]
            else:
                continue
            found += [Message(kind, f"{where}:{node.lineno}", text) for text in texts if len(text.split()) > 3]
    return list(dict.fromkeys(found))


def texts_of(node: ast.expr, constants: dict[str, ast.expr]) -> Iterator[str]:
    """Texts that an expression can be; values in braces."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str | int):
            yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            str(part.value) if isinstance(part, ast.Constant) else filled(part, constants) for part in node.values
        )
    elif isinstance(node, ast.IfExp):
        yield from texts_of(node.body, constants)
        yield from texts_of(node.orelse, constants)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for left in texts_of(node.left, constants):
            for right in texts_of(node.right, constants):
                yield left + right
    elif isinstance(node, ast.List | ast.Tuple):
        for entry in node.elts:
            yield from texts_of(entry, constants)
    elif isinstance(node, ast.Starred):
        yield from texts_of(node.value, constants)
    elif isinstance(node, ast.Name) and node.id in constants:
        yield from texts_of(constants[node.id], constants)


def filled(part: ast.expr, constants: dict[str, ast.expr]) -> str:
    """A value in braces; the text of a constant of the module."""
    assert isinstance(part, ast.FormattedValue)
    if isinstance(part.value, ast.Name) and isinstance(constants.get(part.value.id), ast.Constant):
        return next(texts_of(constants[part.value.id], constants), "")
    return "{" + ast.unparse(part.value) + "}"


if __name__ == "__main__":
    for kind in ("raised", "printed", "returned"):
        print(f"\n== {kind}")
        for message in messages():
            if message.kind == kind:
                print(f"{message.place}\n    {message.text}")
