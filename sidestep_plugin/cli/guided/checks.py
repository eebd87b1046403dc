"""Whether an answer can be used, and what follows from it. Each check raises Refusal for one that cannot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.core import ParameterSource

from sidestep_plugin.adapters.kinds import DEFAULT, NAMES, check_installed
from sidestep_plugin.errors import Refusal
from sidestep_plugin.files import at_home
from sidestep_plugin.recommended import recommended
from sidestep_plugin.text import counted

from ..terminal import echo
from ..torch_here import require_torch
from .answers import Answers


def check_said(answers: Answers) -> None:
    """Check what the command line says before anything is asked."""
    from sidestep_plugin.launch.launch import check_unused

    request = answers.request
    if "model" not in answers.asked:
        model(answers, request.model)
        if "dataset_dir" not in answers.asked:
            songs(answers, str(request.dataset_dir))
    if "output_dir" not in answers.asked and request.resume_from is not None:
        resume(answers)
    elif "output_dir" not in answers.asked and not request.overwrite:
        check_unused(request.output_dir.absolute(), None)


def root(answers: Answers, text: str) -> list[str]:
    """The folder of a checkout."""
    from sidestep_plugin.engine.checkout import find_root

    answers.set(acestep_root=find_root(_place(text)))
    return []


def lacks_root(answers: Answers) -> bool:
    """Whether no checkout can be found without asking."""
    from sidestep_plugin.engine.checkout import find_root

    try:
        find_root(answers.request.acestep_root)
    except Refusal:
        return True
    return False


def checkpoints(answers: Answers) -> Path:
    """The folder of models."""
    from sidestep_plugin.engine.checkout import find_root
    from sidestep_plugin.engine.models import checkpoint_folder

    return checkpoint_folder(answers.request.checkpoint_dir, find_root(answers.request.acestep_root))


def model_folder(answers: Answers) -> Path:
    """The folder of the model that was chosen."""
    from sidestep_plugin.engine.models import find_model

    return find_model(answers.request.model, checkpoints(answers))


def model(answers: Answers, text: str) -> list[str]:
    """A number of the list, a name, or a path."""
    from sidestep_plugin.engine.models import check_weights, find_model
    from sidestep_plugin.run import ModelFacts

    if text.isascii() and text.isdecimal() and text not in answers.models:
        if not 1 <= int(text) <= len(answers.models):
            raise Refusal(f"There is no number {text}: expected 1 to {len(answers.models)}, a name, or a path.")
        text = answers.models[int(text) - 1]
    text = at_home(text)
    if (models := _models_below(Path(text))) and not (Path(text) / "config.json").is_file():
        answers.set(checkpoint_dir=Path(text))
        answers.models = models
        listed = "; ".join(f"{number} {name}" for number, name in enumerate(models, start=1))
        raise Refusal(f"{text} is a folder of models. Type the number or the name of one: {listed}.")
    folder = find_model(text, checkpoints(answers))
    _say_that_torch_is_imported()
    check_weights(folder, ModelFacts.from_folder(folder))
    answers.set(model=text)
    return []


def _models_below(folder: Path) -> list[str]:
    """The models in a folder; [] if it is none, or if it is not there."""
    from sidestep_plugin.engine.models import models_in

    try:
        return models_in(folder) if folder.is_dir() else []
    except OSError:
        return []


def variant_is_unclear(answers: Answers) -> bool:
    """Whether a plugin has the option, the command line does not, and nothing else says what the model is."""
    from sidestep_plugin.run import ModelFacts
    from sidestep_plugin.timesteps.treatment import decide_variant

    if answers.request.options.get("variant") != "auto":
        return False
    try:
        decide_variant(ModelFacts.from_folder(model_folder(answers)))
    except Refusal:
        return True
    return False


def variant(answers: Answers, text: str) -> list[str]:
    """One of the variants."""
    from sidestep_plugin.variants import VARIANTS

    if text not in VARIANTS:
        raise Refusal(f"Expected {', '.join(VARIANTS)}.")
    answers.option("variant", text)
    return []


def songs(answers: Answers, text: str) -> list[str]:
    """A folder of preprocessed songs that fit the model."""
    from sidestep_plugin.run import ModelFacts
    from sidestep_plugin.songs.dataset import check_songs, inspect_dataset

    folder = _place(text)
    _say_that_torch_is_imported()
    dataset = inspect_dataset(folder.absolute(), allow_duplicates=answers.request.allow_duplicates)
    check_songs(dataset, ModelFacts.from_folder(model_folder(answers)))
    answers.dataset = dataset
    answers.set(dataset_dir=folder)
    return [f"{counted(dataset.songs, 'song')}, {dataset.minutes:.1f} minutes"]


def output(answers: Answers, text: str) -> list[str]:
    """A folder to save into; resume or overwrite for one that is in use."""
    from sidestep_plugin.launch.launch import check_unused, check_writable

    if text in ("resume", "overwrite") and answers.used is not None:
        answers.set(output_dir=answers.used)
        if text == "resume":
            return resume(answers)
        answers.set(overwrite=True)
        return []
    folder = _place(text)
    check_writable(folder.absolute())
    answers.set(output_dir=folder)
    if "resume_from" not in answers.asked:
        return resume(answers)
    if "overwrite" not in answers.asked:
        return []
    answers.set(overwrite=False, resume_from=None)
    try:
        check_unused(folder.absolute(), None)
    except Refusal:
        answers.used = folder
        raise Refusal(
            f"{folder} holds the adapters of a training. Type another folder; resume to go on with that training; "
            "or overwrite to replace it."
        ) from None
    return []


def resume(answers: Answers) -> list[str]:
    """Take a checkpoint, the newest if none was named, and the settings that it was made with."""
    from sidestep_plugin.launch.launch import LATEST
    from sidestep_plugin.registry import Registry
    from sidestep_plugin.resuming.checkpoints import newest_checkpoint, read_checkpoint

    from ..resumed import plugins_of, settings_to_resume

    said, notes = answers.request.resume_from, list[str]()
    if said is None or said == LATEST:
        said = LATEST
        folder, notes = newest_checkpoint(answers.request.output_dir.absolute())
    else:
        folder = said.absolute()
    checkpoint = read_checkpoint(folder)
    facts = checkpoint.facts or {}
    its, chosen = facts.get("model_name"), model_folder(answers).name
    if its is not None and its != chosen:
        raise Refusal(
            f"{folder} was trained for {its}, and {chosen} is chosen. Choose that model (b goes back), or another "
            "folder."
        )
    kept = plugins_of(checkpoint.folder) if "plugin" in answers.asked else None
    if kept is not None and kept != answers.request.plugins:
        options = Registry.load(kept, answers.request.wins).resolve_options({})
        given = {name: value for name, value in answers.request.options.items() if name in options}
        answers.set(plugins=kept, options=options | given)
        notes.append(f"with the plugins of that training: {', '.join(kept) or 'none'}")
    kind_of_adapter = facts.get("adapter_type", answers.request.adapter_type)
    answers.set(resume_from=said, adapter_type=kind_of_adapter if kind_of_adapter in NAMES else DEFAULT.name)
    notes += _options_to_resume(answers, checkpoint.folder)
    for name, value in settings_to_resume(checkpoint.folder, answers.request.adapter_type).items():
        if name in answers.asked:
            answers.setting(name, value)
    answers.checkpoint = f"{folder.name} ({checkpoint.point.where})"
    return [*notes, f"{answers.checkpoint}, with the settings that it was made with"]


def _options_to_resume(answers: Answers, checkpoint: Path) -> Iterator[str]:
    """Take the plugins' options from a checkpoint, except for those that were typed. Returns lines."""
    from sidestep_plugin.registry import Registry

    from ..resumed import options_resumed_with, options_to_resume

    context = click.get_current_context()
    declared = Registry.load(answers.request.plugins, answers.request.wins).declared_options()
    kept = options_to_resume(str(checkpoint), None, declared).checked(declared, context)
    by_name = {str(option.name): option for option in declared}
    took = {name for name in kept if context.get_parameter_source(name) in (None, ParameterSource.DEFAULT)}
    for name in took:
        answers.option(name, by_name[name].type_cast_value(context, kept[name]))
    yield from options_resumed_with(declared, kept, took, answers.request.options)


def kind(answers: Answers, text: str) -> list[str]:
    """The kind of adapter."""
    if text not in NAMES:
        raise Refusal(f"Expected {' or '.join(NAMES)}.")
    check_installed(text)
    answers.set(adapter_type=text)
    return []


def epochs(answers: Answers, text: str) -> list[str]:
    """The number of epochs, and the recommended settings that depend on it."""
    number = _whole(text, "a number of epochs")
    answers.setting("epochs", number)
    if not answers.begins_anew:
        return []
    request = answers.request
    given = {name: value for name, value in request.settings.items() if name not in answers.asked or name == "epochs"}
    for name, setting in recommended(answers.songs, request.adapter_type, given).items():
        if name not in ("rank", "alpha"):  # asked for next
            answers.setting(name, setting.value)
    return []


def rank(answers: Answers, text: str) -> list[str]:
    """The rank, and an alpha of twice as much."""
    number = _whole(text, "a rank")
    answers.setting("rank", number)
    if "alpha" in answers.asked:
        answers.setting("alpha", 2 * number)
    return []


def in_bytes(size: int) -> str:
    """A size as people read it."""
    megabytes = size / 2**20
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.1f} MB"


def _place(text: str) -> Path:
    """A folder or file as it was typed."""
    if not text:
        raise Refusal("Nothing was typed. Expected the name of a folder.")
    return Path(at_home(text))


def _whole(text: str, what: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**6:
        raise Refusal(f"{text!r} is not {what}. Expected a whole number from 1.")
    return int(text)


def _say_that_torch_is_imported() -> None:
    if "torch" not in sys.modules:
        echo("  Importing torch ...")
    require_torch(told=True)
