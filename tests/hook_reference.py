"""Writes docs/hooks.md from the specs' docstrings and the examples: ``python tests/hook_reference.py``.

tests/test_hook_reference.py fails when the page is not what this writes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from sidestep_plugin import hookspecs

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "hooks.md"
EXAMPLES = ROOT / "tests" / "plugins" / "examples"
HOOKS = [name for name in vars(hookspecs) if name.startswith("acestep_")]

HEAD = """# Hooks

Made from `sidestep_plugin/hookspecs.py` by `python tests/hook_reference.py`. How to make a plugin of them:
[Write a plugin](write-a-plugin.md).

{intro}

In the order in which they are called:
"""


def main() -> None:
    PAGE.write_text(reference(), encoding="utf-8", newline="\n")


def reference() -> str:
    intro = inspect.getdoc(hookspecs) or ""
    parts = [HEAD.format(intro=_markdown(intro.partition("\n\n")[2]))]
    parts += [f"- [`{name}`](#{name})" for name in HOOKS]
    return "\n".join(parts) + "\n" + "".join(_section(name) for name in HOOKS)


def _section(name: str) -> str:
    spec = getattr(hookspecs, name)
    signature = re.sub(r"'", "", str(inspect.signature(spec)))
    only = "\nOnly one plugin may implement it; `--wins NAME` says which.\n" if name in hookspecs.EXCLUSIVE else ""
    example = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    doc = _markdown(inspect.getdoc(spec) or "")
    return f"\n## {name}\n\n```text\n{name}{signature}\n```\n\n{doc}\n{only}\nExample:\n\n```python\n{example}```\n"


def _markdown(doc: str) -> str:
    """A docstring as Markdown: its sections as lists, its code marks as they are there."""
    text = re.sub(r":\w+:`~?([\w.]+)`", r"``\1``", doc).replace("``", "`")
    lines: list[str] = []
    item = False
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises):", line):
            lines += [f"**{line.rstrip(':')}**", ""]
            item = False
        elif line.startswith("    "):
            begins = not line.startswith("        ") and re.match(r"[\w, ]+: ", line.strip()) is not None
            item = item or begins
            lines.append(("- " if begins else "  " if item else "") + line.strip())
        else:
            lines.append(re.sub(r"^(When|Random numbers):", r"**\1:**", line))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
