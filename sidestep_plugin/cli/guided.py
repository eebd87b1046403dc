"""The questions of a training that was begun without saying what to train: answered, checked, and gone back over."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sidestep_plugin.errors import Refusal

if TYPE_CHECKING:
    from sidestep_plugin.songs.dataset import Dataset
    from sidestep_plugin.trainer.launch import Request

BACK: Final = "b"

EPOCHS_FEW_SONGS: Final = 800
EPOCHS_MANY_SONGS: Final = 500
FEW_SONGS: Final = 20
"""ACE-Step's LoRA tutorial: 800 epochs for 10 to 20 songs, 500 for about 100; for a LoKr 500."""

LEARNING_RATE: Final = {"lora": 1e-4, "lokr": 0.03}
RANK: Final = 64
"""What people's adapters usually have, with an alpha of twice as much."""


class GoBack(Exception):
    """Somebody wants the question before."""


@dataclass
class Answers:
    """What is known so far.

    Attributes:
        request: the training as it would be.
        asked: names of what was not on the command line.
        models: model folders that were found, as they are numbered.
        dataset: the songs, once their folder is known.
        used: an output folder that was answered and holds another training's adapters.
    """

    request: Request
    asked: set[str]
    models: list[str] = field(default_factory=list)
    dataset: Dataset | None = None
    used: Path | None = None

    def set(self, **values: Any) -> None:
        self.request = replace(self.request, **values)

    def setting(self, name: str, value: Any) -> None:
        self.set(settings={**self.request.settings, name: value})

    def option(self, name: str, value: Any) -> None:
        self.set(options={**self.request.options, name: value})


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        name: what is asked for; left out when it was said on the command line.
        title: what is printed above, from the answers so far.
        prompt: what stands before the answer.
        default: what Enter means; None when there has to be an answer.
        take: puts an answer into the answers, and returns lines about it. Raises Refusal for one that cannot be used.
        wanted: whether the question is asked at all.
    """

    name: str
    title: Callable[[Answers], Sequence[str]]
    prompt: str
    default: Callable[[Answers], str | None]
    take: Callable[[Answers, str], Sequence[str]]
    wanted: Callable[[Answers], bool] = lambda _: True


def ask(request: Request, missing: set[str]) -> Request:
    """Ask for what is missing, show what was decided, and return the complete request.

    Raises:
        click.Abort: Ctrl-C, or nobody there to answer.
        SystemExit: somebody does not want to start.
    """
    answers = Answers(request, missing)
    click.echo(f"A few questions. Enter takes what is in brackets, {BACK} goes back, Ctrl-C leaves.")
    questions = [question for question in QUESTIONS if question.name in missing]
    number, checked = 0, False
    before: list[tuple[int, Answers]] = []
    while True:
        if number == len(questions):
            try:
                _confirm(answers)
            except GoBack:
                number, answers = before.pop()
                continue
            return answers.request
        question = questions[number]
        if not question.wanted(answers):
            number += 1
            continue
        if not checked and question.name != "acestep_root":
            checked = True
            _check_said(answers)
        kept = replace(answers)
        try:
            _put(question, answers)
        except GoBack:
            if before:
                number, answers = before.pop()
            continue
        before.append((number, kept))
        number += 1


def _put(question: Question, answers: Answers) -> None:
    click.echo()
    for line in question.title(answers):
        click.echo(line)
    while True:
        text = str(click.prompt(question.prompt, default=question.default(answers), type=str)).strip()
        if text == BACK:
            raise GoBack
        # A folder that was dragged into the terminal comes in quotes.
        text = text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
        try:
            lines = question.take(answers, text)
        except Refusal as refusal:
            click.echo(f"  {refusal}")
            continue
        except OSError as error:  # a name that is too long, a folder that may not be looked into
            click.echo(f"  {text[:80]}: {error.strerror or error}. Type another.")
            continue
        for line in lines:
            click.echo(f"  {line}")
        return


def _check_said(answers: Answers) -> None:
    """Look at what was said on the command line before anything is asked. Raises Refusal."""
    from sidestep_plugin.trainer.launch import check_unused

    request = answers.request
    if "model" not in answers.asked:
        _model(answers, request.model)
        if "dataset_dir" not in answers.asked:
            _songs(answers, str(request.dataset_dir))
    if "output_dir" not in answers.asked and request.resume_from is not None:
        _go_on(answers)
    elif "output_dir" not in answers.asked and not request.overwrite:
        check_unused(request.output_dir.absolute(), None)


def _place(text: str) -> Path:
    """A folder or file as it was typed. Raises Refusal."""
    if not text:
        raise Refusal("Nothing was typed. Expected the name of a folder.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise Refusal(f"There is no home folder for {text.split('/')[0]}. Type the whole path.") from None


def _confirm(answers: Answers) -> None:
    request = answers.request
    click.echo("\nThis is what will be done:")
    for line in [*_decided(answers), *_in_words(answers)]:
        click.echo(f"  {line}")
    click.echo("\nThe same without questions:")
    click.echo(f"  {command_line(request)}\n")
    while True:
        text = str(click.prompt(f"Start? [Y/n/{BACK}]", default="y", show_default=False)).strip().lower()
        if text in ("y", "yes"):
            return
        if text in ("n", "no"):
            click.echo("Nothing was started, nothing was written.")
            raise SystemExit(0)
        if text == BACK:
            raise GoBack
        click.echo(f"  Expected y, n or {BACK}.")


def command_line(request: Request) -> str:
    """The command that trains the same without a question, for this system's shell."""
    from sidestep_plugin.registry import Registry

    words = ["acestep-train"]
    for name in request.plugins:
        words += ["--plugin", name]
    words += ["--wins", request.wins] if request.wins else []
    for option, value in (
        ("--acestep-root", request.acestep_root),
        ("--checkpoint-dir", request.checkpoint_dir),
        ("--model", request.model),
        ("--dataset-dir", request.dataset_dir),
        ("--output-dir", request.output_dir),
        ("--resume-from", request.resume_from),
        ("--device", None if request.device == "auto" else request.device),
        ("--adapter-type", request.adapter_type),
    ):
        words += [option, str(value)] if value is not None else []
    declared = Registry.load(request.plugins, request.wins).declared_options()
    defaults = {str(option.name): option.default for option in declared}
    for name, value in {**request.settings, **request.options}.items():
        if value is not None and value is not False and value != defaults.get(name):
            text = ",".join(value) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    words += ["--overwrite"] if request.overwrite else []
    words += ["--allow-duplicates"] if request.allow_duplicates else []
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


# -- the questions ---------------------------------------------------------------------------------------------------


def _root(answers: Answers, text: str) -> list[str]:
    from sidestep_plugin.trainer.checkout import find_root

    answers.set(acestep_root=find_root(_place(text)))
    return []


def _lacks_root(answers: Answers) -> bool:
    from sidestep_plugin.trainer.checkout import find_root

    try:
        find_root(answers.request.acestep_root)
    except Refusal:
        return True
    return False


def _checkpoints(answers: Answers) -> Path:
    from sidestep_plugin.trainer.checkout import find_root
    from sidestep_plugin.trainer.models import checkpoint_folder

    return checkpoint_folder(answers.request.checkpoint_dir, find_root(answers.request.acestep_root))


def _list_models(answers: Answers) -> list[str]:
    from sidestep_plugin.trainer.compatibility import examine_model
    from sidestep_plugin.trainer.models import models_in

    folder = _checkpoints(answers)
    answers.models = models_in(folder)
    if not answers.models:
        return [f"Model: there is none in {folder}. Type the path of one, or stop and say --checkpoint-dir."]
    lines = [f"Model: which one do you train for? (in {folder})"]
    width = max(map(len, answers.models))
    for number, name in enumerate(answers.models, start=1):
        found = examine_model(folder / name)
        size = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) / 2**20
        shown = f"{size / 1024:.1f} GB" if size >= 1024 else f"{size:.1f} MB"
        lines.append(f"  {number}  {name:<{width}}  {found.variant or 'variant not known':<8}  {shown}")
    return lines


def _model(answers: Answers, text: str) -> list[str]:
    from sidestep_plugin.run import ModelFacts
    from sidestep_plugin.trainer.models import check_weights, find_model

    if text.isascii() and text.isdecimal() and text not in answers.models:
        if not 1 <= int(text) <= len(answers.models):
            raise Refusal(f"There is no number {text}: expected 1 to {len(answers.models)}, a name, or a path.")
        text = answers.models[int(text) - 1]
    text = str(_place(text)) if text.startswith("~") else text
    folder = find_model(text, _checkpoints(answers))
    check_weights(folder, ModelFacts.from_folder(folder))
    answers.set(model=text)
    return []


def _variant_is_unclear(answers: Answers) -> bool:
    """Whether a plugin has the option, nobody said it, and it cannot be told without."""
    from sidestep_plugin.run import ModelFacts
    from sidestep_plugin.timesteps.treatment import decide_variant
    from sidestep_plugin.trainer.models import find_model

    if answers.request.options.get("variant") != "auto":
        return False
    folder = find_model(answers.request.model, _checkpoints(answers))
    try:
        decide_variant(ModelFacts.from_folder(folder))
    except Refusal:
        return True
    return False


def _variant(answers: Answers, text: str) -> list[str]:
    from sidestep_plugin.variants import VARIANTS

    if text not in VARIANTS:
        raise Refusal(f"Expected {', '.join(VARIANTS)}.")
    answers.option("variant", text)
    return []


def _songs(answers: Answers, text: str) -> list[str]:
    from sidestep_plugin.run import ModelFacts
    from sidestep_plugin.songs.dataset import inspect_dataset
    from sidestep_plugin.songs.fit import check_songs
    from sidestep_plugin.trainer.models import find_model

    folder = _place(text)
    dataset = inspect_dataset(folder.absolute(), allow_duplicates=answers.request.allow_duplicates)
    check_songs(dataset, ModelFacts.from_folder(find_model(answers.request.model, _checkpoints(answers))))
    answers.dataset = dataset
    answers.set(dataset_dir=folder)
    return [f"{dataset.songs} {'song' if dataset.songs == 1 else 'songs'}, {dataset.minutes:.1f} minutes"]


def _default_output(answers: Answers) -> str:
    songs = answers.request.dataset_dir.name or "songs"
    model = Path(answers.request.model).name.removeprefix("acestep-v15-")
    return str(Path("adapters") / f"{songs}-{model}")


def _output(answers: Answers, text: str) -> list[str]:
    from sidestep_plugin.trainer.launch import check_unused, check_writable

    if text in ("resume", "overwrite") and answers.used is not None:
        answers.set(output_dir=answers.used)
        if text == "resume":
            return _go_on(answers)
        answers.set(overwrite=True)
        return []
    folder = _place(text)
    check_writable(folder.absolute())
    answers.set(output_dir=folder)
    if "resume_from" not in answers.asked:
        return _go_on(answers)
    if "overwrite" not in answers.asked:
        return []
    answers.set(overwrite=False, resume_from=None)
    try:
        check_unused(folder.absolute(), None)
    except Refusal:
        answers.used = folder
        raise Refusal(
            f"{folder} holds adapters of another training. Type another folder; resume to go on with that training; "
            "or overwrite to replace it."
        ) from None
    return []


def _go_on(answers: Answers) -> list[str]:
    """Take a checkpoint, the newest when none was said, and the settings that it was made with. Raises Refusal."""
    from sidestep_plugin.resuming.checkpoints import newest_checkpoint, read_checkpoint
    from sidestep_plugin.trainer.configs import ADAPTER_FIELDS, TRAINING_FIELDS
    from sidestep_plugin.trainer.launch import LATEST

    said, notes = answers.request.resume_from, list[str]()
    if said is None or said == LATEST:
        said = LATEST
        folder, notes = newest_checkpoint(answers.request.output_dir.absolute())
    else:
        folder = said.absolute()
    checkpoint = read_checkpoint(folder)
    facts = checkpoint.facts or {}
    kind = facts.get("adapter_type", answers.request.adapter_type)
    answers.set(resume_from=said, adapter_type="lokr" if kind == "lokr" else "lora")
    named = {name: name for name in ADAPTER_FIELDS[answers.request.adapter_type]} | TRAINING_FIELDS
    for name, fact in named.items():
        if name in answers.asked and facts.get(fact) is not None:
            answers.setting(name, facts[fact])
    return [*notes, f"{folder.name} ({checkpoint.point.where}), with the settings that it was made with"]


def _begins_anew(answers: Answers) -> bool:
    return answers.request.resume_from is None


def _kind(answers: Answers, text: str) -> list[str]:
    import importlib.util

    if text not in ("lora", "lokr"):
        raise Refusal("Expected lora or lokr.")
    if text == "lokr" and importlib.util.find_spec("lycoris") is None:
        raise Refusal("A LoKr needs LyCORIS, which is not installed here: pip install lycoris-lora")
    answers.set(adapter_type=text)
    return []


def _default_epochs(answers: Answers) -> str:
    if not _begins_anew(answers) and answers.request.settings.get("epochs"):
        return str(answers.request.settings["epochs"])
    few = answers.dataset is not None and answers.dataset.songs <= FEW_SONGS and answers.request.adapter_type == "lora"
    return str(EPOCHS_FEW_SONGS if few else EPOCHS_MANY_SONGS)


def _epochs(answers: Answers, text: str) -> list[str]:
    epochs = _whole(text, "epochs")
    answers.setting("epochs", epochs)
    if not _begins_anew(answers):
        return []
    songs = answers.dataset.songs if answers.dataset is not None else 1
    steps = -(-songs // (answers.request.settings.get("batch_size") or 1))
    defaults = {
        "save_every": max(1, epochs // 10),
        "batch_size": 1,
        "gradient_accumulation": next(each for each in (4, 3, 2, 1) if steps % each == 0),
        "learning_rate": LEARNING_RATE[answers.request.adapter_type],
    }
    for name, value in defaults.items():
        if name in answers.asked:
            answers.setting(name, value)
    return []


def _rank(answers: Answers, text: str) -> list[str]:
    rank = _whole(text, "a rank")
    answers.setting("rank", rank)
    if "alpha" in answers.asked:
        answers.setting("alpha", 2 * rank)
    return []


def _whole(text: str, what: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**6:
        raise Refusal(f"{text!r} is not {what}. Expected a whole number from 1.")
    return int(text)


QUESTIONS: Final = (
    Question(
        "acestep_root",
        lambda _: ["ACE-Step: the folder of your ACE-Step 1.5 checkout, which holds the folder acestep"],
        "Folder",
        lambda _: None,
        _root,
        _lacks_root,
    ),
    Question("model", _list_models, "Model", lambda answers: "1" if answers.models else None, _model),
    Question(
        "variant",
        lambda _: ["Variant: neither config.json nor the folder's name tells what this model is."],
        "turbo, base or sft",
        lambda _: None,
        _variant,
        _variant_is_unclear,
    ),
    Question(
        "dataset_dir",
        lambda _: ["Songs: the folder of .pt files that ACE-Step's preprocessing wrote"],
        "Folder",
        lambda _: None,
        _songs,
    ),
    Question("output_dir", lambda _: ["Where to save"], "Folder", _default_output, _output),
    Question(
        "adapter_type",
        lambda _: ["Adapter: lora is the usual one; lokr trains faster, and fewer programs play it"],
        "lora or lokr",
        lambda _: "lora",
        _kind,
        _begins_anew,
    ),
    Question(
        "epochs",
        lambda _: ["Epochs: how often every song is seen (the numbers of ACE-Step's own tutorial)"],
        "Epochs",
        _default_epochs,
        _epochs,
    ),
    Question(
        "rank",
        lambda _: ["Rank: higher learns more and makes larger files; alpha is twice as much"],
        "Rank",
        lambda _: str(RANK),
        _rank,
        _begins_anew,
    ),
)


# -- what was decided ------------------------------------------------------------------------------------------------


def _decided(answers: Answers) -> list[str]:
    """What the plugins say they will do."""
    from sidestep_plugin.registry import Registry
    from sidestep_plugin.trainer.models import find_model
    from sidestep_plugin.trainer.rehearsal import rehearse

    request = answers.request
    if not request.plugins:
        return ["No plugin: exactly as ACE-Step trains, with turbo's timesteps for every model"]
    registry = Registry.load(request.plugins, request.wins)
    options = registry.resolve_options(request.options)
    folder = find_model(request.model, _checkpoints(answers))
    return list(rehearse(registry, folder, options, request.adapter_type).lines)


def _in_words(answers: Answers) -> list[str]:
    request = answers.request
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in request.settings.items() if value is not None
    )
    how = "" if request.resume_from is None else f"goes on from the checkpoint {request.resume_from}"
    how = how or ("replaces what is there" if request.overwrite else "new")
    return [f"Train: {request.adapter_type}, {settings}", f"Save to: {request.output_dir} ({how})"]
