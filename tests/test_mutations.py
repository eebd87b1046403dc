"""Every mutation of mutations.py can still be made, and the tests that should catch it exist. It runs none of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.mistake)
def test_a_mutation_can_be_made_and_its_tests_exist(mutation):
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.found) == 1, f"{mutation.file} holds {text.count(mutation.found)} times the text"
    assert mutation.becomes != mutation.found
    compile(text.replace(mutation.found, mutation.becomes), mutation.file, "exec")  # else any test would "catch" it
    for test in mutation.tests.split():
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), file
        if name:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), test


def test_the_documentation_says_how_many_there_are():
    page = (ROOT / "docs" / "how-it-is-tested.md").read_text(encoding="utf-8")
    assert f"{len(MUTATIONS)} deliberate mistakes" in page
