"""The tables of docs/readers.md are what the programs' rules give; ``tests/tools/readers_table.py`` writes them."""

import pytest

pytest.importorskip("peft")
pytest.importorskip("lycoris")

from readers_table import LOKRS, LORAS, PAGE, lines_of, page

AGAIN = "run python tests/tools/readers_table.py"


@pytest.mark.parametrize("title", ["LoRA, rank 4, alpha 2 × rank", "LoKr, weight decomposition"])
def test_a_line_of_the_tables(title):
    text = PAGE.read_text(encoding="utf-8")
    for form, line in lines_of(title).items():
        assert f"{line}\n" in text.partition(f"### {form[0].upper()}{form[1:]}\n")[2].partition("\n### ")[0], AGAIN


@pytest.mark.slow
def test_the_page_has_the_tables_as_they_are():
    assert PAGE.read_text(encoding="utf-8") == page(), AGAIN


def test_every_copy_of_a_lora_is_right_where_it_is_made_for():
    """What the page is there to show: a 1 in each of these cells."""
    text = PAGE.read_text(encoding="utf-8")
    universal = text.partition("### Universal copy\n")[2]
    copies = text.partition("### ComfyUI copy\n")[2].partition("\n### ")[0]
    for title in LORAS:
        assert f"| {title} | {' | '.join(['1'] * 6)} |\n" in universal
    for title in LORAS | LOKRS:
        assert f"| {title} | – | 1 |" in copies
