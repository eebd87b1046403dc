"""docs/api.md holds every public name, every attribute is described, and the page is what the docstrings say."""

from __future__ import annotations

import dataclasses
import inspect
import re

import api_reference
import pytest

import sidestep_plugin
from sidestep_plugin import hookspecs


def test_the_page_is_what_the_script_writes():
    written = api_reference.PAGE.read_text(encoding="utf-8")
    assert written == api_reference.reference(), "run: python tests/tools/api_reference.py"


def test_every_exported_name_is_on_the_page():
    assert {*api_reference.EXPORTED, "hookimpl", "__version__"} == set(sidestep_plugin.__all__)


def test_every_type_that_hooks_use_is_on_the_page():
    hooks = [getattr(hookspecs, name) for name in vars(hookspecs) if name.startswith("acestep_")]
    said = " ".join(str(annotation) for hook in hooks for annotation in inspect.get_annotations(hook).values())
    ours = set(re.findall(r"\b(?!Sequence|Mapping|Path|Any|None)[A-Z]\w+", said.replace("click.Option", "")))
    assert ours - {"Module", "Tensor"} <= set(api_reference.RECEIVED) and "Run" in ours


@pytest.mark.parametrize("name", api_reference.RECEIVED)
def test_every_attribute_is_described(name):
    cls = api_reference.RECEIVED[name]
    doc = inspect.getdoc(cls)
    described = {
        word.strip()
        for entry in re.findall(r"^    (\w[\w, ]*): ", doc.partition("Attributes:")[2], flags=re.MULTILINE)
        for word in entry.split(",")
    }
    fields = {field.name for field in dataclasses.fields(cls)}
    assert fields - described <= api_reference.INTERNAL
    assert described <= fields, "describes what is not there"
    assert all(inspect.getdoc(getattr(cls, member)) for member in api_reference.public_members(cls))
