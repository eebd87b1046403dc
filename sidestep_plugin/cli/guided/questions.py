"""The questions in their order: what is printed above each, and what Enter means."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sidestep_plugin.adapters.kinds import DEFAULT, KINDS, NAMES
from sidestep_plugin.recommended import recommended

from . import checks
from .answers import Answers, Question

_FOR_WHAT: Final = {
    "turbo": "8 steps without guidance: 8 passes through the model for a clip, with the others 100",
    "base": "50 steps with guidance (CFG); the one that the others were made from",
    "sft": "50 steps with guidance (CFG); base, fine-tuned by ACE-Step",
    "xl": "the same three with more than twice the weights, which take more memory and time",
}
"""What each family of models is for, for somebody who has to choose."""


def _list_models(answers: Answers) -> list[str]:
    from sidestep_plugin.engine.compatibility import examine_model
    from sidestep_plugin.engine.models import models_in

    folder = checks.checkpoints(answers)
    answers.models = models_in(folder)
    if not answers.models:
        return [f"Model: there is none in {folder}. Type the path of one, or leave and use --checkpoint-dir."]
    lines = [f"Model: which one do you train for? (in {folder})"]
    width = max(map(len, answers.models))
    for number, name in enumerate(answers.models, start=1):
        found = examine_model(folder / name)
        size = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        lines.append(f"  {number}  {name:<{width}}  {found.variant or 'variant not known':<8}  {checks.in_bytes(size)}")
    lines += ["Choose the one that you will generate with:", *(f"  {name}: {what}" for name, what in _FOR_WHAT.items())]
    return lines


def _default_output(answers: Answers) -> str:
    songs = answers.request.dataset_dir.name or "songs"
    model = Path(answers.request.model).name.removeprefix("acestep-v15-")
    return str(Path("adapters") / f"{songs}-{model}")


def _default_epochs(answers: Answers) -> str:
    if not answers.begins_anew and answers.request.settings.get("epochs"):
        return str(answers.request.settings["epochs"])
    return _recommended(answers, "epochs")


def _recommended(answers: Answers, name: str) -> str:
    return str(recommended(answers.songs, answers.request.adapter_type)[name].value)


QUESTIONS: Final = (
    Question(
        "acestep_root",
        lambda _: ["ACE-Step: the folder of your ACE-Step 1.5 checkout, the one that contains the folder acestep"],
        "Folder",
        lambda _: None,
        checks.root,
        checks.lacks_root,
    ),
    Question("model", _list_models, "Model", lambda answers: "1" if answers.models else None, checks.model),
    Question(
        "variant",
        lambda _: ["Variant: neither config.json nor the folder's name says what kind of model this is."],
        "turbo, base or sft",
        lambda _: None,
        checks.variant,
        checks.variant_is_unclear,
    ),
    Question(
        "dataset_dir",
        lambda _: ["Songs: the folder of .pt files that acestep-train prepare, or ACE-Step's preprocessing, has made"],
        "Folder",
        lambda _: None,
        checks.songs,
    ),
    Question("output_dir", lambda _: ["Where to save"], "Folder", _default_output, checks.output),
    Question(
        "adapter_type",
        lambda _: [f"Kind of adapter: {'; '.join(f'{kind.name} {kind.remark}' for kind in KINDS)}"],
        " or ".join(NAMES),
        lambda _: DEFAULT.name,
        checks.kind,
        lambda answers: answers.begins_anew,
    ),
    Question(
        "epochs",
        lambda _: ["Epochs: passes over all songs (acestep-train recommended says where the number comes from)"],
        "Epochs",
        _default_epochs,
        checks.epochs,
    ),
    Question(
        "rank",
        lambda _: ["Rank: a higher one learns more and makes larger files; alpha will be twice the rank"],
        "Rank",
        lambda answers: _recommended(answers, "rank"),
        checks.rank,
        lambda answers: answers.begins_anew,
    ),
)
