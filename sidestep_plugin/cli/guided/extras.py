"""What can be added to a training in the last question: validation, previews, a copy for ComfyUI, a title."""

from __future__ import annotations

from sidestep_plugin.errors import Refusal

from ..commands import OURS
from .answers import Answers
from .checks import epochs

_SHARE = 10  # one song in ten is held out
_FEWEST = 3  # songs, of which one can be held out


def offered(answers: Answers) -> dict[str, str]:
    """What is not there yet and can be added, each with what it does; {} where nothing can."""
    request = answers.request
    if OURS not in request.plugins or not answers.begins_anew:
        return {}
    options, found = request.options, dict[str, str]()
    if not options.get("validate") and options.get("validation_dir") is None and answers.songs >= _FEWEST:
        found["validate"] = f"hold {_held_out(answers)} of the songs out, and find the best epoch with them"
    if not options.get("preview_every"):
        found["previews"] = f"clips to listen to, every {_every(answers)} epochs".replace(
            "every 1 epochs", "after every epoch"
        )
    if options.get("export") is None:
        found["comfyui"] = "a copy of every adapter for ComfyUI"
    if options.get("title") is None:
        found["title NAME"] = "what the adapter is called"
    return found


def add(answers: Answers, text: str) -> None:
    """Add what was typed: names of :func:`offered` with commas between them. Raises Refusal."""
    from sidestep_plugin.registry import Registry

    names = {name.partition(" ")[0]: name for name in offered(answers)}
    values: dict[str, object] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        word, _, rest = part.partition(" ")
        found = [name for name in names if name.startswith(word.lower())]
        if len(found) != 1:
            raise Refusal(f"Expected y, n or b. To add something: {', '.join(names.values())}." if names else _PLAIN)
        match found[0]:
            case "validate":
                values["validate"] = float(_held_out(answers))
            case "previews":
                values["preview_every"] = _every(answers)
            case "comfyui":
                values["export"] = "comfyui"
            case _:
                values["title"] = rest.strip().strip("'\"")
    request = answers.request
    Registry.load(request.plugins, request.wins).resolve_options({**request.options, **values})
    answers.set(options={**request.options, **values})
    epochs(answers, str(answers.request.settings["epochs"]))  # what is recommended for fewer songs


_PLAIN = "Expected y, n or b."


def _held_out(answers: Answers) -> int:
    return max(1, answers.songs // _SHARE)


def _every(answers: Answers) -> int:
    return int(answers.request.settings.get("save_every") or _SHARE)
