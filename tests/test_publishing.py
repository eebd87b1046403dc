"""What is published beside the code: the version, the README on a package index, the site, the files for a host."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import index_readme
import pytest
import site_links

import sidestep_plugin

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_version_stands_in_one_place():
    assert "version" not in PYPROJECT["project"] and PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sidestep_plugin.__version__"}
    assert importlib.metadata.version("sidestep-plugin") == sidestep_plugin.__version__
    said = [file for file in HOUSE if f'"{sidestep_plugin.__version__}"' in file.read_text(encoding="utf-8")]
    assert said == [ROOT / "sidestep_plugin" / "__init__.py"]


HOUSE = [ROOT / "pyproject.toml", *(ROOT / "sidestep_plugin").rglob("*.py")]


def test_no_address_is_invented():
    """Until the project has a home, it names none: a link that leads nowhere is worse than none."""
    assert "urls" not in PYPROJECT["project"]


def test_on_a_package_index_every_link_of_the_readme_leads_to_the_repository():
    shown = index_readme.with_links(README, "https://host/owner/name", "v1")
    assert "](https://host/owner/name/blob/v1/docs/settings.md)" in shown
    assert "](https://host/owner/name/raw/v1/docs/timesteps.png)" in shown
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", shown) == []
    assert index_readme.with_links("[a](#b) [c](https://d)", "https://x", "v1") == "[a](#b) [c](https://d)"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", README))))
def test_links_of_the_readme_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_every_page_is_on_the_site_once():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r": ([\w-]+\.md)$", nav, flags=re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_links_out_of_the_pages_lead_to_the_repository_or_are_words(monkeypatch):
    page = "See [the house](../ARCHITECTURE.md) and [more](page.md)."
    assert site_links.on_page_markdown(page) == "See the house and [more](page.md)."
    monkeypatch.setattr(site_links, "REPOSITORY", "https://host/owner/name")
    assert "[the house](https://host/owner/name/blob/main/ARCHITECTURE.md)" in site_links.on_page_markdown(page)


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda file: file.stem)
def test_a_workflow_that_was_never_run_says_so(workflow):
    assert workflow.read_text(encoding="utf-8").startswith("# Not run yet: ")
