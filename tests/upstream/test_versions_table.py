"""The recorded table of upstream's versions (versions.json, made by history.py): complete, and nothing silent in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

TABLE: list[dict[str, Any]] = json.loads(Path(__file__).with_name("versions.json").read_text(encoding="utf-8"))
CELLS = [(row, kind) for row in TABLE for kind in ("lora", "lokr")]
VERDICTS = {"lora": {"trains right", "refused", "upstream fails"}}
VERDICTS["lokr"] = VERDICTS["lora"] | {"no LoKr"}
# What a refusal has to name: a seam of the trainer, or the trainer itself when it cannot be imported.
SEAM = re.compile(
    r"its trainer has no PreprocessedLoKRModule|"
    r"acestep\.training\.trainer|sample_discrete_timestep|training_step|train_from_preprocessed|save_\w+|\w+Trainer"
)

each_cell = pytest.mark.parametrize(("row", "kind"), CELLS, ids=[f"{row['version']}-{kind}" for row, kind in CELLS])


def test_at_least_fifty_versions_once_each_oldest_first() -> None:
    versions = [row["version"] for row in TABLE]
    assert len(versions) == len(set(versions)) >= 50
    ordered = sorted(TABLE, key=lambda row: (row["date"], row["version"]))
    assert ordered == TABLE
    assert TABLE[0]["date"] >= "2026-01-01"


@pytest.mark.parametrize("row", TABLE, ids=[row["version"] for row in TABLE])
def test_a_version_says_what_it_is(row: dict[str, Any]) -> None:
    assert list(row) == ["version", "date", "repo", "commit", "lines", "sampler", "lora", "lokr"]
    assert re.fullmatch(r"[0-9a-f]{10}", row["version"])
    assert re.fullmatch(r"[0-9a-f]{10}", row["commit"])
    assert re.fullmatch(r"2026-\d\d-\d\d", row["date"])
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", row["repo"])
    assert row["lines"] > 0
    assert re.fullmatch(r"\(bsz, .+\)|not defined", row["sampler"])


@each_cell
def test_every_version_trains_right_or_says_why_not(row: dict[str, Any], kind: str) -> None:
    cell = row[kind]
    assert cell["verdict"] in VERDICTS[kind]
    assert cell["reason"]
    if cell["verdict"] in ("refused", "no LoKr"):
        assert SEAM.search(cell["reason"]), "a refusal names the seam"
    if cell["verdict"] == "refused":
        assert cell["upstream_alone"], "a refusal is held against what upstream does alone"


@each_cell
def test_no_machine_is_named(row: dict[str, Any], kind: str) -> None:
    assert not re.search(r"(?:^|[\s(])/\w+/|[A-Z]:\\", " ".join(row[kind].values()))


def test_most_versions_train_right() -> None:
    assert sum(row["lora"]["verdict"] == "trains right" for row in TABLE) >= 40
    assert any(row["lokr"]["verdict"] == "trains right" for row in TABLE)


def test_the_patch_was_applied_attached_and_reverted_on_every_version() -> None:
    """patches.json, made by patch_history.py."""
    patched = json.loads(Path(__file__).with_name("patches.json").read_text(encoding="utf-8"))
    assert [row["version"] for row in patched] == [row["version"] for row in TABLE]
    for row, version in zip(patched, TABLE, strict=True):
        # A trainer that upstream alone cannot import either is the only reason not to be attached.
        cannot = "cannot be imported" in version["lora"]["reason"]
        assert row["verdict"] == ("no import" if cannot else "attached"), row
        assert not re.search(r"(?:^|[\s(])/\w+/|[A-Z]:\\", row.get("reason", ""))
