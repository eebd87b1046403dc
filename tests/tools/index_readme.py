"""Lets the README's links lead to a repository: ``python tests/tools/index_readme.py https://HOST/OWNER/NAME TAG``.

A package index shows the README without the files around it. Run in a copy that is thrown away: it changes README.md.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def with_links(text: str, repository: str, tag: str) -> str:
    """The text with links and pictures that are relative leading to the files of a repository at a tag."""

    def absolute(found: re.Match[str]) -> str:
        picture, words, place = found.groups()
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/{tag}/{place})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)", absolute, text)


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(
        with_links(file.read_text(encoding="utf-8"), sys.argv[1].rstrip("/"), sys.argv[2]), encoding="utf-8"
    )
