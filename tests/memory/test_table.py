"""The table of docs/memory.md is what the estimate computes: ``python tests/tools/memory_table.py`` writes it."""

from memory_table import PAGE, page


def test_the_page_has_the_table_that_is_computed_now():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/tools/memory_table.py"
