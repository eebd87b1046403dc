"""A hook of mkdocs: a link to a file beside docs/ leads to the repository, or is words where none is known."""

from __future__ import annotations

import os
import re
from typing import Any

REPOSITORY = os.environ.get("REPOSITORY", "").rstrip("/")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with those links replaced."""

    def replaced(found: re.Match[str]) -> str:
        words, place = found.groups()
        return f"[{words}]({REPOSITORY}/blob/main/{place})" if REPOSITORY else words

    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]+)\)", replaced, markdown)
