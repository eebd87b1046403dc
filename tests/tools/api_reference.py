"""Writes docs/api.md from the docstrings of what plugin authors use: ``python tests/tools/api_reference.py``.

tests/test_api_reference.py fails when the page is not what this writes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from reference import markdown, signature_of

import sidestep_plugin
from sidestep_plugin import run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"

RECEIVED = {
    name: getattr(run, name)
    for name in (
        "Run",
        "Step",
        "SavedAdapter",
        "ModelFacts",
        "Ranks",
        "EpochNews",
        "Clip",
    )
}
"""What hooks receive or return."""

EXPORTED = {
    name: getattr(sidestep_plugin, name)
    for name in ("attach", "Attachment", "Refusal", "PluginError", "UpstreamMismatch", "DetachError")
}
"""What ``sidestep_plugin`` exports; ``hookimpl`` is the mark of a hook and has no docstring of its own."""

INTERNAL = {
    *("model_ref", "module_ref", "epoch_losses", "exchange", "sampler_called", "automatic", "evaluates", "registry"),
    *("engine", "reports", "keeps", "kept", "resuming", "saves", "resume_point"),
}
"""Attributes that are the host's own: not public, and not on the page."""

HEAD = """# API

Made from the docstrings by `python tests/tools/api_reference.py`. The hooks themselves are in [Hooks](hooks.md);
[Write a plugin](write-a-plugin.md) shows how to use them.

## What is public, and how it will change

These are public: the names on this page, the hooks with their arguments, the entry-point group `acestep.plugins`, and
the options and exit codes of `acestep-train`. Everything else may change in any release.

- Any release may add hooks, attributes and optional arguments. Plugins that do not know them keep working.
- Until version 1.0, a release that raises the second number (0.1 to 0.2) may rename or remove something public. The
  [changelog](../CHANGELOG.md) says so. State which versions you tested: `dependencies = ["sidestep-plugin>=0.1,<0.2"]`.
  With any other version your plugin is refused, with a message that says why.
- From version 1.0 on, only a release that raises the first number may do that.
- Upstream's own objects (`run.training_config`, `step.module`, ...) differ from one version of ACE-Step to another.

Mark hooks with `from sidestep_plugin import hookimpl`. Import the types from `sidestep_plugin.run`.

{contents}
"""


def main() -> None:
    PAGE.write_text(reference(), encoding="utf-8", newline="\n")


def reference() -> str:
    contents = [f"- [`{name}`](#{name.lower()})" for name in (*RECEIVED, *EXPORTED)]
    parts = [HEAD.format(contents="\n".join(contents))]
    for name, thing in {**RECEIVED, **EXPORTED}.items():
        parts.append(_class(name, thing) if inspect.isclass(thing) else _function(name, thing))
    return "\n".join(parts)


def _function(name: str, function: Any) -> str:
    return f"## {name}\n\n```text\n{name}{signature_of(function)}\n```\n\n{_documented(function)}\n"


def _class(name: str, cls: type) -> str:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    head = f"## {name}\n\n" + (f"An exception, kind of `{bases}`. " if issubclass(cls, Exception) else "")
    return head + f"{_documented(cls)}\n{''.join(_member(cls, member) for member in public_members(cls))}"


def public_members(cls: type) -> list[str]:
    """Properties and methods that a class defines itself, in the order of the code."""
    return [
        name
        for name, value in vars(cls).items()
        if not name.startswith("_") and (isinstance(value, property | classmethod) or inspect.isfunction(value))
    ]


def _member(cls: type, name: str) -> str:
    value = inspect.getattr_static(cls, name)
    if isinstance(value, property):
        return f"\n**`{name}`**: {_documented(value.fget)}\n" if inspect.getdoc(value.fget) else ""
    return f"\n**`{name}{signature_of(getattr(cls, name))}`**: {_documented(getattr(cls, name))}\n"


def _documented(thing: Any) -> str:
    """The docstring as Markdown, without what is the host's own."""
    text = markdown(inspect.getdoc(thing) or "")
    for name in INTERNAL:
        text = re.sub(rf"^- {name}: .*\n?(?:^  .*\n?)*", "", text, flags=re.MULTILINE)
    return text.rstrip()


if __name__ == "__main__":
    main()
