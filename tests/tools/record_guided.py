"""Records the guided start in a real terminal: ``python tests/tools/record_guided.py [ROOT SONGS]`` prints it.

Without arguments it uses the stand-in; that recording is in docs/guided.md. Otherwise it uses a checkout's folder and
a folder of songs below it. The learning rate is given, and high: four epochs of a tiny model are to show a loss that
falls.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, only its own folder is there
from terminal import in_a_terminal

TRAIN = [
    sys.executable,
    "-c",
    "from sidestep_plugin.cli import main; main()",
    "--learning-rate",
    "0.01",
    "--device",
    "cpu",
]
COMMAND = "acestep-train --learning-rate 0.01"


def record(root: Path, songs: str) -> str:
    """The session as text, with the checkout's folder called ~/ACE-Step-1.5."""
    typed = [
        (r"Model \[1\]: $", ""),
        (r"\.pt files(.|\n)*Folder: $", "tensors/jaz"),
        (r"Folder: $", songs),
        (r"Where to save\s+Folder \[.*\]: $", "b"),
        (r"Folder: $", songs),
        (r"Where to save\s+Folder \[.*\]: $", "adapters/jazz"),
        (r"lora or lokr \[lora\]: $", ""),
        (r"Epochs \[\d+\]: $", "4"),
        (r"Rank \[64\]: $", "8"),
        (r"Start\? .*: $", ""),
    ]
    seen = in_a_terminal(TRAIN, typed, cwd=root, width=100)
    if seen.code != 0:
        raise SystemExit(seen.text)
    text = seen.text.replace(str(root.resolve()), "~/ACE-Step-1.5").replace(str(root), "~/ACE-Step-1.5")
    return f"$ {COMMAND}\n{text.strip()}\n"


def on_the_stand_in() -> str:
    """The same on the embedded default."""
    from sidestep_plugin import miniature

    with tempfile.TemporaryDirectory() as work:
        built = miniature.build(Path(work), songs=12)
        songs = built.root / "tensors" / "jazz"
        songs.parent.mkdir()
        built.tensors.rename(songs)
        return record(built.root, "tensors/jazz")


if __name__ == "__main__":
    print(record(Path(sys.argv[1]).absolute(), sys.argv[2]) if len(sys.argv) > 2 else on_the_stand_in(), end="")
