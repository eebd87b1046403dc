"""``acestep-train``: parse, print, call the modules above. Nothing here imports torch before a training begins."""

from __future__ import annotations

import codecs
import sys

import click

from sidestep_plugin import __version__

from .check import check
from .commands import DefaultGroup
from .demo import demo
from .export import export
from .inspect import inspect
from .patch import patch
from .plugins import plugins
from .run import run
from .schedule import schedule
from .timesteps import timesteps
from .train import train


@click.group(
    cls=DefaultGroup,
    default="train",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="acestep-train")
def cli() -> None:
    """Train ACE-Step 1.5 adapters with ACE-Step's own trainer, each model the way it was trained.

    \b
    See the whole job on a stand-in, on a CPU, in seconds:
        acestep-train demo
    Train on your own preprocessed songs, from your ACE-Step folder:
        acestep-train --plugin sidestep --model base --dataset-dir DIR --output-dir DIR
    All training options:
        acestep-train --plugin sidestep --help
    Train in ACE-Step's own app, with the plugin attached:
        acestep-train run --plugin sidestep -- acestep
    Ask whether your ACE-Step fits:
        acestep-train check
    See at which timesteps a model would be trained:
        acestep-train timesteps --model base
    Ask an adapter what it is and how to use it:
        acestep-train inspect PATH

    "train" is the default command and may be left out. Without --plugin it trains exactly as ACE-Step does.
    """


cli.add_command(train)
cli.add_command(check)
cli.add_command(inspect)
cli.add_command(export)
cli.add_command(run)
cli.add_command(timesteps)
cli.add_command(schedule)
cli.add_command(patch)
cli.add_command(demo)
cli.add_command(plugins)


_PLAIN = {
    "✅": "OK",
    "❌": "Failed:",
    "⚠": "Warning:",
    "💾": "Saved:",
    "📂": "-",
    "🚀": "-",
    "🎯": "-",
    "🧠": "-",
    "ℹ": "Note:",
}
_PLAIN |= {"⏹": "-", "🔄": "-", "\ufe0f": "", "–": "-", "—": "-", "×": "x", "’": "'", "…": "..."}
"""What stands for a character that the console cannot show, most of them ACE-Step's."""


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Error handler for encoding: plain words for the signs that are known, a question mark for others."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def main() -> None:
    """Entry point of the console script."""
    # A console that cannot show a character should show another, not end the training.
    codecs.register_error("acestep-plain", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="acestep-plain")
    cli(prog_name="acestep-train")
