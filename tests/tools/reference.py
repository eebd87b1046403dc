"""Turns signatures and docstrings into Markdown, for the pages that are made from the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

SECTIONS = r"(Args|Returns|Raises|Attributes):"
LONG = 160


class _AsWritten(str):
    """An annotation that shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def signature_of(function: Callable[..., Any]) -> str:
    """The signature as the source writes it, over several lines when it is long; without ``self`` or ``cls``."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=_AsWritten(parameter.annotation))
        if isinstance(parameter.annotation, str)
        else parameter
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    returns = signature.return_annotation
    text = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    if len(text) > LONG:
        text = "(\n" + "".join(f"    {part},\n" for part in _parts(text[1:-1])) + ")"
    return text if returns is signature.empty else f"{text} -> {returns}"


def _parts(arguments: str) -> list[str]:
    """Arguments split at the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def markdown(doc: str) -> str:
    """A docstring as Markdown: its sections as lists, names in code marks."""
    text = re.sub(r":\w+:`~?([\w.]+)`", r"``\1``", doc).replace("``", "`")
    lines: list[str] = []
    item = False
    for line in text.splitlines():
        if re.fullmatch(SECTIONS, line):
            lines += [f"**{line.rstrip(':')}**", ""]
            item = False
        elif line.startswith("    "):
            begins = not line.startswith("        ") and re.match(r"[\w, ]+: ", line.strip()) is not None
            item = item or begins
            lines.append(("- " if begins else "  " if item else "") + line.strip())
        else:
            lines.append(re.sub(r"^(When|Random numbers):", r"**\1:**", line))
    return "\n".join(lines)
