"""Validates on songs that are held out: always the same songs, noise and timesteps, so that numbers can be compared.

A training loss is drawn anew in every step and says little about songs that are not trained on. Here each song that is
held out is evaluated at the same timesteps with the same noise: before the first step, without the adapter, and after
the epochs. What differs between two validations is the adapter alone. Nothing of it reaches the training, bit for bit.

The mean is the loss that the training minimizes, on songs that it has not seen: over timesteps that stand for equal
shares of the training's own, with and without the condition in the proportion of condition dropout. It is read relative
to the model without adapter, never alone: overfitting shows at high t first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.options import Place, SongsOrShare, WholeNumber
from sidestep_plugin.run import ModelFacts, Run, Validation, ValidationPlan, Verdict
from sidestep_plugin.songs.dataset import inspect_dataset, songs_in
from sidestep_plugin.songs.fit import check_songs
from sidestep_plugin.songs.held_out import check_apart, choose, number_of
from sidestep_plugin.songs.values import check_values, hash_of
from sidestep_plugin.text import counted
from sidestep_plugin.timesteps.grid import validation_grid
from sidestep_plugin.timesteps.shares import save_picture
from sidestep_plugin.variants import guidance

from .model_treatment import treatment_of
from .validation_history import History, usual_interval

_KEY: Final = "sidestep.validation"
"""Where a run keeps its history of validations."""

_RESUMED: Final = "sidestep.validation.resumed"
"""Where a resumed run keeps the history of its checkpoint until it has a plan."""


def options() -> list[click.Option]:
    return [
        click.Option(
            ["--validate"],
            type=SongsOrShare(),
            metavar="N",
            help="Songs to hold out and validate on, or a share: 0.1.  [default: 0]",
        ),
        click.Option(
            ["--validation-dir"],
            type=Place(path_type=Path),
            metavar="DIR",
            help="Validate on the preprocessed songs of this folder instead.",
        ),
        click.Option(
            ["--validate-every"],
            type=WholeNumber(1, 10**9),
            metavar="N",
            help="Epochs between validations.  [default: so that it takes a tenth of the time]",
        ),
        click.Option(
            ["--patience"],
            type=WholeNumber(1, 10**9),
            metavar="N",
            help="Stop after this many validations without a better one.  [default: never]",
        ),
    ]


# -- which songs -----------------------------------------------------------------------------------------------------


@hookimpl(specname="acestep_model_chosen")
def check_validation_folder(facts: ModelFacts, options: Mapping[str, Any]) -> None:
    """Look at the songs of ``--validation-dir`` before the model is loaded, as at those that are trained on."""
    folder = options["validation_dir"]
    _check_settings(options, None)
    if folder is not None:
        _check_folder(folder, facts, mask_nan=bool(options["mask_nan"]))


@hookimpl
def acestep_hold_out(songs: Sequence[Path], options: Mapping[str, Any], training_config: Any) -> Sequence[Path] | None:
    """Choose the songs that are not trained on, and refuse settings and songs that do not go together."""
    _check_settings(options, training_config)
    held_out = choose(songs, number_of(options["validate"], len(songs))) if options["validate"] else ()
    validated = held_out or _songs_of(options["validation_dir"])
    if validated:
        check_apart([song for song in songs if song not in held_out], validated)
    return held_out or None


@hookimpl(specname="acestep_run_started")
def check_validation(run: Run) -> None:
    """Refuse a validation that cannot be done. On the command line this has been checked already."""
    _check_settings(run.options, run.training_config)
    if _wanted(run.options) and run.tensor_dir is not None:
        if run.options["validation_dir"] is not None:
            facts = ModelFacts.from_model(run.model)
            _check_folder(run.options["validation_dir"], facts, mask_nan=bool(run.options["mask_nan"]))
        _validated_songs(run)


def _check_settings(options: Mapping[str, Any], training_config: Any) -> None:
    wanted = _wanted(options)
    for name in ("validate_every", "patience"):
        if options[name] is not None and not wanted:
            raise Refusal(
                f"--{name.replace('_', '-')} says how to validate, and nothing is validated. Leave it out, or "
                "name what to validate on: --validate N or --validation-dir DIR."
            )
    if options["validate"] and options["validation_dir"] is not None:
        raise Refusal(
            "--validate holds songs of the dataset out, --validation-dir validates on songs of another folder. Leave "
            "one of them out."
        )
    if wanted and getattr(training_config, "val_split", 0.0):
        raise Refusal(
            "--val-split is ACE-Step's own validation: with new noise and new timesteps each time, for LoRA only, and "
            "it changes the training. --validate and --validation-dir use the same songs, noise and timesteps every "
            "time and change nothing. Both save checkpoints/best. Leave one of them out."
        )


def _wanted(options: Mapping[str, Any]) -> bool:
    return bool(options["validate"]) or options["validation_dir"] is not None


def _check_folder(folder: Path, facts: ModelFacts, *, mask_nan: bool) -> None:
    dataset = inspect_dataset(folder.absolute(), allow_duplicates=None)
    check_songs(dataset, facts)
    check_values(dataset.files, mask_nan=mask_nan)


def _songs_of(folder: Path | None) -> tuple[Path, ...]:
    return () if folder is None else tuple(dict.fromkeys(songs_in(folder.absolute())))


def _validated_songs(run: Run) -> tuple[Path, ...]:
    """The songs that a run validates on; () for a run that does not. Raises Refusal."""
    if run.tensor_dir is None or not _wanted(run.options):
        return ()
    held_out = acestep_hold_out(songs_in(run.tensor_dir), run.options, run.training_config)
    return tuple(held_out or _songs_of(run.options["validation_dir"]))


# -- what is measured ------------------------------------------------------------------------------------------------


@hookimpl
def acestep_plan_validation(run: Run) -> ValidationPlan | None:
    songs = _validated_songs(run)
    if not songs or run.tensor_dir is None:
        return None
    treatment = treatment_of(run)
    guided = guidance(treatment.variant) == "on" and getattr(run.model, "null_condition_emb", None) is not None
    timesteps = validation_grid(treatment)
    trained = len(songs_in(run.tensor_dir)) - (0 if run.options["validation_dir"] is not None else len(songs))
    epochs = int(getattr(run.training_config, "max_epochs", 1))
    usual, cost = usual_interval(len(songs) * len(timesteps) * (1 + guided), trained, epochs)
    every = run.options["validate_every"] or usual
    history = History(
        songs=[song.name for song in songs],
        contents=[hash_of(song) for song in songs],
        from_folder=run.options["validation_dir"] is not None,
        timesteps=timesteps,
        null_share=treatment.cfg_ratio if guided else 0.0,
        conditions=(True, False) if guided else (True,),
        every=every,
        patience=run.options["patience"],
    )
    lines = [_announcement(history, cost(every))]
    before: History | None = run.state.pop(_RESUMED, None)
    if before is not None and before.comparable(history):
        history.take_over(before)
    elif before is not None:
        lines.append("Note: the validations before the checkpoint used other songs or timesteps, and are left out.")
    run.state[_KEY] = history
    return ValidationPlan(
        songs=songs,
        timesteps=timesteps,
        conditions=history.conditions,
        every=every,
        baseline=0 not in history.losses,
        patient=history.patience is not None,
        best_epoch=history.best,
        lines=tuple(lines),
    )


def _announcement(history: History, cost: float) -> str:
    names = ", ".join(history.songs[:3]) + (f" and {len(history.songs) - 3} more" if len(history.songs) > 3 else "")
    songs = counted(len(history.songs), "song")
    where = "of another folder" if history.from_folder else "held out"
    conditions = ", with and without the condition" if len(history.conditions) > 1 else ""
    every = "every epoch" if history.every == 1 else f"every {history.every} epochs and after the last one"
    return (
        f"Validation: {songs} {where} ({names}), at {len(history.timesteps)} timesteps{conditions}, {every}: about "
        f"{max(1, round(100 * cost))} % more time"
    )


@hookimpl
def acestep_validated(run: Run, validation: Validation) -> Verdict | None:
    history: History | None = run.state.get(_KEY)
    if history is None:
        return None
    return history.judge(validation, run.steps)


# -- what is kept and told -------------------------------------------------------------------------------------------


def to_keep(run: Run) -> dict[str, Any] | None:
    """What a checkpoint keeps of the validations; None without any."""
    history: History | None = None if run.tensor_dir is None else run.state.get(_KEY)
    return None if history is None else history.as_state()


def resume_validation(run: Run, checkpoint: Path, kept: Mapping[str, Any] | None) -> list[str]:
    """Take over the validations of a checkpoint | returns lines for the user.

    Raises:
        Refusal: songs that were held out are missing, or are trained on now, or the other way round.
    """
    songs = {song.name for song in _validated_songs(run)}
    before = None if kept is None else History.from_state(kept, checkpoint)
    if before is None:
        if songs and run.options["validate"]:
            raise Refusal(
                f"{checkpoint} was trained on all songs, so {', '.join(sorted(songs)[:5])} cannot be held out any "
                "more. Resume without --validate, or validate on other songs: --validation-dir DIR."
            )
        return []
    names = set(before.songs)
    asked = "--validation-dir DIR" if before.from_folder else f"--validate {len(names)}"
    if not before.from_folder and names != (songs if run.options["validate"] else set()):
        there = {song.name for song in songs_in(run.tensor_dir)} if run.tensor_dir is not None else set()
        if missing := sorted(names - there):
            raise Refusal(
                f"Songs that {checkpoint} held out for validation are missing in {run.tensor_dir}: "
                f"{', '.join(missing[:5])}. Put them back, and resume with {asked}."
            )
        now = ", ".join(sorted(songs)[:5]) if run.options["validate"] else "none"
        raise Refusal(
            f"{checkpoint} was trained without the songs that it validates on ({', '.join(sorted(names)[:5])}); this "
            f"run would hold out others ({now}). Resume with {asked} and the same songs."
        )
    if before.from_folder and (missing := sorted(names - songs)) and run.options["validation_dir"] is not None:
        raise Refusal(
            f"Songs that {checkpoint} validated on are missing in {run.options['validation_dir']}: "
            f"{', '.join(missing[:5])}. Put them back, or resume without --validation-dir."
        )
    run.state[_RESUMED] = before
    return []


def facts_of(run: Run) -> dict[str, Any]:
    """What the newest validation has measured, for the adapter's facts; {} without validation."""
    history: History | None = run.state.get(_KEY)
    return {} if history is None else history.facts(run.steps)


def report_of(run: Run) -> dict[str, Any] | None:
    """All validations, for the training's report; None without any."""
    history: History | None = run.state.get(_KEY)
    return None if history is None or not history.losses else history.report()


def seconds_between(run: Run, began: float, ended: float) -> float:
    """How long validations took between two times of the monotonic clock."""
    history: History | None = run.state.get(_KEY)
    return 0.0 if history is None else history.seconds_between(began, ended)


@hookimpl(specname="acestep_run_ended")
def sum_up_validation(run: Run, ending: str, folder: Path) -> list[str] | None:
    history: History | None = run.state.get(_KEY)
    if history is None or not history.trained:
        return None
    lines = [history.summary()] if ending != "failed" else []
    if importlib.util.find_spec("matplotlib") is not None:
        from .validation_picture import PICTURE_NAME, picture

        try:
            save_picture(picture(history), folder / PICTURE_NAME)
        except OSError as error:
            return [*lines, f"Warning: no picture could be written to {folder}: {error.strerror or error}."]
        lines = [f"{line}. Picture: {folder / PICTURE_NAME}" for line in lines]
    return lines or None
