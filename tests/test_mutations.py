"""Every mutation of tools/mutations.py can still be made, and the tests that should catch it exist. None is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parent.parent
MEND = """
A mutation breaks the code on purpose, to show that a test notices. Its lines are no longer in the code, which is
nothing bad: find the lines that do the same now and put them into tests/tools/mutations.py. If what it broke is gone,
delete it.
"""


@pytest.mark.slow  # a change that moves a line need not mend it at once
def test_every_mutation_can_be_made_and_its_tests_exist():
    stale = [f"{mutation.mistake}: {problem}" for mutation in MUTATIONS for problem in problems_of(mutation)]
    assert not stale, "\n".join(["", *stale, MEND])


def problems_of(mutation: Mutation) -> Iterator[str]:
    file = ROOT / mutation.file
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text.count(mutation.found) != 1:
        yield f"{mutation.file} holds {text.count(mutation.found)} times {mutation.found.strip()!r}"
    else:  # else any test would "catch" it
        assert mutation.becomes != mutation.found
        compile(text.replace(mutation.found, mutation.becomes), mutation.file, "exec")
    for test in mutation.tests.split():
        file, _, name = (ROOT / test.partition("::")[0], *test.partition("::")[1:])
        if not file.exists():
            yield f"there is no {test}"
        elif name and not re.search(rf"^def {name}\(", file.read_text(encoding="utf-8"), re.MULTILINE):
            yield f"there is no test {name} in {file.relative_to(ROOT)}"
