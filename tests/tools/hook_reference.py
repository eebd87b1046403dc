"""Writes docs/hooks.md from the specs' docstrings and the examples: ``python tests/tools/hook_reference.py``.

tests/test_hook_reference.py fails when the page is not what this writes.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from reference import markdown, signature_of

from sidestep_plugin import hookspecs

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "hooks.md"
EXAMPLES = ROOT / "tests" / "plugins" / "examples"
HOOKS = [name for name in vars(hookspecs) if name.startswith("acestep_")]

HEAD = """# Hooks

Made from `sidestep_plugin/hookspecs.py` by `python tests/tools/hook_reference.py`.
[Write a plugin](write-a-plugin.md) shows how to use them, and [API](api.md) describes the types.

{intro}

In the order in which they are called (`acestep_between_epochs` once more before the first step, with epoch 0):
"""


def main() -> None:
    PAGE.write_text(reference(), encoding="utf-8", newline="\n")


def reference() -> str:
    intro = inspect.getdoc(hookspecs) or ""
    parts = [HEAD.format(intro=markdown(intro.partition("\n\n")[2]))]
    parts += [f"- [`{name}`](#{name})" for name in HOOKS]
    return "\n".join(parts) + "\n" + "".join(_section(name) for name in HOOKS)


def _section(name: str) -> str:
    spec = getattr(hookspecs, name)
    signature = signature_of(spec)
    only = (
        "\nOnly one of the loaded plugins may implement this hook; `--wins NAME` chooses one of several.\n"
        if name in hookspecs.EXCLUSIVE
        else ""
    )
    example = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    doc = markdown(inspect.getdoc(spec) or "")
    return f"\n## {name}\n\n```text\n{name}{signature}\n```\n\n{doc}\n{only}\nExample:\n\n```python\n{example}```\n"


if __name__ == "__main__":
    main()
