"""What the program says: each error tells what to do, and the page of messages has words that are really printed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import messages
import pytest
from conftest import COMMAND

# Parts of a sentence that another message ends.
FRAGMENTS = re.compile(
    r"^(ended without calling|gave its decoder|there are no adapter weights|\{.*\} (is not what was saved|is missing)"
    r"|\{.*\} (cannot be read \(|holds a .*, expected a dictionary$)|what was saved of the training"
    r"|.* has no version that is a number$|its conditions hold NaN|Process \{rank\} on \{host\}: \{text\}$)"
)
TO_DO = re.compile(
    r"\b([Ee]xpected|Choose|Say|Name|Put|Copy|Download|Use|[Ii]nstall|Installed|Uninstall|Delete|Leave|Preprocess"
    r"|Resume|Train|Start|Lower|Correct|Take|Make|Call|Undo|Mend|Return|Type|Complete|Save|Did you mean"
    r"|Give|Remove|[Rr]estore|Keep|return new|Initialize|Wait|Write|Prepare|Check|Hold|See|Move|Read|Rename"
    r"|Known hooks|ACE-Step's own error|Lower|name it|Mark|Stopped|a newer version|Try)\b"
)
# What the system or somebody else's code says is put into these, and says enough.
SPEAKS_FOR_ITSELF = re.compile(
    r"^(Cannot read \{|Cannot write|Plugin \{.*failed in|\{.*\} was not exported: |ACE-Step (refuses|cannot read)"
    r"|\{.*\} is not a (finite|whole) number\.$|\{.*\} holds characters that cannot be shown\.$|No loaded plugin has"
    r"|Option \{name\}: |Plugin \{\w+\} returned \{found\}|\{path\} is a \{adapter.kind\}"
    r"|The file's or folder's name is empty\.$|Cannot be|\{.*\} is no Python file|A plugin declares"
    r"|\{file.path\} is an adapter for another model|\{path\} holds tensors that ComfyUI|\{.*\} returned, but there are"
    r"|Not songs to train on|\{path\} is a LoKr with weight)"
)
RAISED = [message for message in messages.messages() if message.kind == "raised" and not FRAGMENTS.match(message.text)]


def test_the_list_is_not_empty():
    assert len(RAISED) > 100 and len(messages.messages()) > 200


@pytest.mark.parametrize("message", RAISED, ids=lambda message: message.place)
def test_an_error_says_what_to_do(message):
    assert TO_DO.search(message.text) or SPEAKS_FOR_ITSELF.match(message.text), message.text
    assert len(message.text) < 420, "too long to be read"
    assert "  " not in message.text.strip() and not message.text.startswith(("Error", "error"))


def test_the_page_of_messages_has_words_that_are_printed():
    page = (messages.ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    told = re.findall(r"^### `(.*)`$", page, flags=re.MULTILINE)
    assert len(told) >= 12
    texts = [message.text for message in messages.messages()]
    for words in told:
        pattern = re.compile(re.escape(words).replace(r"\.\.\.", ".*"))
        assert any(pattern.search(text) for text in texts), f"nothing prints {words!r}"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", pytest.param("cp437", marks=pytest.mark.slow)])
def test_a_console_that_cannot_show_more_gets_plain_text(tmp_path, encoding):
    line = [*COMMAND, "demo", "--dir", str(tmp_path / "demo")]
    done = subprocess.run(line, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    # A console of plain ASCII is one that click takes for misconfigured, and writes UTF-8 to.
    assert text.isascii() and "?" not in text and "OK Training complete!" in text, text


def test_one_place_colours_lines():
    """It asks NO_COLOR first: tests/cli/test_progress.py."""
    command = Path(messages.ROOT / "sidestep_plugin" / "cli")
    coloured = [file.name for file in command.rglob("*.py") if re.search(r"\b(style|secho)\(", file.read_text("utf-8"))]
    assert coloured == ["terminal.py"]
