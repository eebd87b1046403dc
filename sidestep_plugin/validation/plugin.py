"""Validates on songs that are held out: always the same songs, noise and timesteps, so that numbers can be compared.

They are evaluated before the first step, without the adapter, and after the epochs. What differs between two
validations is the adapter alone. Nothing of it reaches the training, bit for bit.

The mean is the loss that the training minimizes, on songs that it has not seen: over timesteps that stand for equal
shares of the training's own, with and without the condition in the proportion of condition dropout. It is read relative
to the model without adapter, never alone: overfitting shows at high t first.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ..adapters.facts import BEST
from ..adapters.staging import published, staged
from ..errors import Refusal
from ..files import room
from ..hookspecs import hookimpl
from ..options import Place, SongsOrShare, WholeNumber, option
from ..run import ModelFacts, ResumePoint, Run
from ..songs.dataset import check_songs, inspect_dataset, songs_in
from ..songs.values import check_values, hash_of
from ..text import counted, sentence
from ..timesteps.treatment import treatment_of, validation_grid
from ..variants import guidance
from .held_out import check_apart, choose, number_of
from .history import History, Validation, usual_interval

if TYPE_CHECKING:
    import torch

_KEY: Final = "sidestep.validation"  # where a run keeps its validation
_KEPT: Final = "held_out"  # name under which a checkpoint keeps the validations


@hookimpl
def acestep_options() -> list[click.Option]:
    return [
        option("--validate", "Songs to hold out and validate on, or a share: 0.1.  [default: 0]", SongsOrShare(), "N"),
        option(
            "--validation-dir",
            "Validate on the preprocessed songs of this folder instead.",
            Place(path_type=Path),
            "DIR",
        ),
        option(
            "--validate-every",
            "Epochs between validations.  [default: so that it takes a tenth of the time]",
            WholeNumber(1, 10**9),
            "N",
        ),
        option(
            "--patience",
            "Stop after this many validations without a better one.  [default: never]",
            WholeNumber(1, 10**9),
            "N",
        ),
    ]


# -- which songs -----------------------------------------------------------------------------------------------------


@hookimpl
def acestep_model_chosen(facts: ModelFacts, options: Mapping[str, Any]) -> None:
    """Look at the songs of ``--validation-dir`` before the model is loaded, as at those that are trained on."""
    folder = options["validation_dir"]
    _check_settings(options, None)
    if folder is not None:
        _check_folder(folder, facts, mask_nan=bool(options["mask_nan"]))


@hookimpl
def engine_hold_out(songs: Sequence[Path], options: Mapping[str, Any], training_config: Any) -> Sequence[Path] | None:
    """Choose the songs that are not trained on, and refuse settings and songs that do not go together."""
    _check_settings(options, training_config)
    held_out = choose(songs, number_of(options["validate"], len(songs))) if options["validate"] else ()
    validated = held_out or _songs_of(options["validation_dir"])
    if validated:
        check_apart([song for song in songs if song not in held_out], validated)
    return held_out or None


@hookimpl
def acestep_run_started(run: Run) -> None:
    """Refuse a validation that cannot be done. On the command line this has been checked already."""
    _check_settings(run.options, run.training_config)
    if run.options["validation_dir"] is not None and run.tensor_dir is not None:
        facts = ModelFacts.from_model(run.model)
        _check_folder(run.options["validation_dir"], facts, mask_nan=bool(run.options["mask_nan"]))


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
    if wanted and getattr(training_config, "val_split", None):
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
    """The songs that a run validates on; () for a run that does not."""
    return run.held_out or _songs_of(run.options["validation_dir"])


# -- what is measured ------------------------------------------------------------------------------------------------


@hookimpl
def engine_planned(run: Run) -> list[str] | None:
    lines = _resumed(run)
    songs = _validated_songs(run)
    if not songs or run.tensor_dir is None:
        return lines
    treatment = treatment_of(run)
    guided = guidance(treatment.variant) == "on" and getattr(run.model, "null_condition_emb", None) is not None
    timesteps = validation_grid(treatment)
    trained = len(songs_in(run.tensor_dir)) - len(run.held_out)
    epochs = int(getattr(run.training_config, "max_epochs", 1))
    forwards = len(songs) * len(timesteps) * (1 + guided) * (1 + len(run.variants))
    usual, cost = usual_interval(forwards, trained, epochs)
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
    lines.insert(0, _announcement(history, cost(every)))
    before = _kept(run)
    if before is not None and before.comparable(history):
        history.take_over(before)
    elif before is not None:
        lines.append(
            f"Note: the validations before the checkpoint are left out: they were made with "
            f"{history.differs_from(before)}."
        )
    validator = run.state[_KEY] = _Validator(run, songs, history)
    run.best_epoch = history.best
    run.facts.append(lambda: history.facts(run.engine.epochs_done, run.engine.variant))
    run.reports.append(lambda: {"validation": history.report(validator.best_in)} if history.losses else {})
    run.keeps[_KEPT] = history.as_state
    return lines


@hookimpl
def engine_songs_listed(run: Run, songs: Sequence[Path]) -> None:
    validator: _Validator | None = run.state.get(_KEY)
    validated = set() if validator is None else {song.resolve() for song in validator.songs}
    if both := [song.name for song in songs if song.resolve() in validated]:
        raise Refusal(
            f"ACE-Step lists other songs here than were found before ({', '.join(both[:5])}), so they "
            "would be validated on and trained on. Leave out links, and start again."
        )


@hookimpl
def engine_training_began(run: Run) -> list[str]:
    validator: _Validator | None = run.state.get(_KEY)
    if validator is None:
        return []
    lines = validator.look_for_best() if run.resuming else []
    if 0 not in validator.history.losses:
        lines += validator.measure(0)
    if run.resuming and validator.history.over:
        lines.append(validator.finish())
    return lines


@hookimpl
def engine_epoch_ended(run: Run, epoch: int) -> list[str]:
    validator: _Validator | None = run.state.get(_KEY)
    if validator is None:
        return []
    validator.save_again()
    if epoch % validator.history.every and not run.engine.ends_after(epoch):
        return []
    return validator.measure(epoch)


class _Validator:
    """The validation of one training."""

    def __init__(self, run: Run, songs: Sequence[Path], history: History) -> None:
        self._run, self.songs, self.history = run, songs, history
        self.best_in: str | None = None  # when the training has ended, where in its folder the best adapter is
        self._looked = False
        self._unsaved: ResumePoint | None = None  # the best adapter, while it could not be saved

    def measure(self, epoch: int) -> list[str]:
        """Evaluate the songs, save the best adapter, end the training when patience is over. Returns lines."""
        run, history, began = self._run, self.history, time.monotonic()
        changed = self._changed()
        variants: dict[str, torch.Tensor] = {}
        if not changed:
            grid = (self.songs, history.timesteps, history.conditions)
            losses = run.engine.evaluate(*grid, adapter=epoch > 0)
            variants = {name: run.engine.evaluate(*grid, variant=name) for name in run.engine.variants if epoch > 0}
            changed = self._changed()  # perhaps while they were being read
        if changed and epoch == 0:
            raise Refusal(f"{changed}. Put the song back, or start the training again.")
        if changed:
            return [
                f"Warning: no validation after epoch {epoch}: {changed}. The training goes on. To have the next epochs "
                "validated, put the song back."
            ]
        verdict = history.judge(Validation(epoch, losses, time.monotonic() - began, variants))
        run.engine.log(verdict.log, epoch)
        if verdict.best:
            run.best_epoch = epoch
            saved = run.engine.save_checkpoint(BEST) and self._holds(run.engine.folder / BEST, epoch)
            self._unsaved = None if run.gather(saved)[0] else run.engine.in_ram()
        lines = list(verdict.lines)
        if verdict.stop and not run.engine.ends_after(epoch):
            lines.append(self.finish())
        return lines

    def _changed(self) -> str:
        """The first song that is not the one that the training began with, as half a sentence; "" for none.

        All processes answer as the first one does.
        """
        found = ""
        for song, content in zip(self.songs, self.history.contents, strict=True):
            try:
                if hash_of(song) == content:
                    continue
                found = f"{song.name}, which is validated on, has changed since the training began"
            except OSError as error:
                found = f"{song.name}, which is validated on, cannot be read ({error.strerror or error})"
            break
        answer: str = self._run.gather(found)[0]
        return answer

    # -- the best adapter and its files ------------------------------------------------------------------------------

    def save_again(self) -> None:
        """Save the best adapter if it could not be saved when it was measured. In the first process."""
        kept, engine = self._unsaved, self._run.engine
        if kept is None or not self._run.ranks.first:
            return
        try:
            if engine.save_checkpoint(BEST, kept) and self._holds(engine.folder / BEST, kept.epochs):
                self._unsaved = None
                engine.announce(f"Validation: the best adapter so far, of epoch {kept.epochs}, is in {BEST} now")
        except Exception as error:  # the training goes on, or has ended in another way
            engine.announce(
                f"Warning: the best adapter, of epoch {kept.epochs}, could not be saved: {sentence(error)} "
                f"{room(engine.folder)}"
            )

    def look_for_best(self) -> list[str]:
        """See to it that ``checkpoints/best`` is the best adapter of the training that is resumed. Returns lines.

        The folder may hold that of another course of this training, or be another one than the checkpoint's. Epochs
        whose adapter is in no checkpoint any more cannot be the best.
        """
        history = self.history
        answer: tuple[set[int], list[str]] = (set(), [])
        self._looked = True
        if self._run.ranks.first:
            answer = self._look()
        lost, lines = self._run.gather(answer)[0]
        history.lost |= lost
        self._run.best_epoch = history.best
        return list(lines)

    def look_if_nothing_was_left(self) -> None:
        """Do the same for a resumed training without a step to compute, in the first process."""
        if self._run.resuming and not self._looked:
            _, lines = self._look()
            self._run.best_epoch = self.history.best
            for line in lines:
                self._run.engine.announce(line)

    def _look(self) -> tuple[set[int], list[str]]:
        history, lost = self.history, set[int]()
        first, target = history.best, self._run.engine.folder / BEST
        while (best := history.best) is not None and (found := self._place_of(best)) is None:
            lost.add(best)
            history.lost.add(best)
        if first is None or (best == first and found == target):
            return lost, []
        lines = []
        if lost:
            lines.append(
                f"Note: the adapter of epoch {first}, the best of this training so far, is in no checkpoint any more. "
                + ("The next epoch that is validated counts as the best." if best is None else f"Now epoch {best} is.")
            )
        if best is not None and found is not None and found != target:
            try:
                with staged(target) as stage:
                    shutil.copytree(found, stage, dirs_exist_ok=True)
                    with published(stage, target):
                        pass
                lines.append(f"Note: {BEST} is a copy of {found} now, the best adapter of this training so far.")
            except OSError as error:
                lines.append(f"Warning: {found} could not be copied to {target}: {error.strerror or error}.")
        return lost, lines

    def _place_of(self, epoch: int) -> Path | None:
        """The checkpoint with the adapter that was measured after an epoch of this training; None if there is none."""
        engine = self._run.engine
        places = [engine.folder / BEST]
        if (resumed := engine.resumed_from) is not None:
            resumed = resumed.parent if resumed.name == "adapter" else resumed
            places += [resumed, resumed.parent / places[0].name, *sorted(resumed.parent.glob(f"epoch_{epoch}*"))]
        places += sorted(places[0].parent.glob(f"epoch_{epoch}*"))
        return next((place for place in dict.fromkeys(places) if self._holds(place, epoch)), None)

    def _holds(self, place: Path, epoch: int) -> bool:
        """Whether a folder is the checkpoint with the adapter that was measured after an epoch of this training."""
        if not place.is_dir():
            return False
        try:
            point = self._run.engine.read(place)
            return (point.epochs, point.steps) == (epoch, 0) and self.history.is_of(
                History.from_state(point.kept[_KEPT]), epoch
            )
        except (Refusal, LookupError, TypeError):
            return False

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> str:
        """End the training, because patience is over. Returns a line."""
        self._run.engine.finish(self._finish, {"patience": self.history.waited})
        return self.history.why_over()

    def _finish(self) -> list[str]:
        """Save the finished adapter of a training that patience has ended: the best one, read back, or the newest."""
        run, history = self._run, self.history
        best, done, steps = history.best, run.engine.epochs_done, run.steps
        which = "the newest adapter" if done is None else f"the newest adapter, of epoch {done}"
        lines = []
        try:
            run.gather(None)  # the first process has saved it by then
            self.save_again()
            place = None if best is None or self._unsaved is not None else self._place_of(best)
            if (point := self._unsaved) is not None or place is not None:
                point = run.engine.read(place) if point is None else point
                run.engine.put(point, place)
                which = f"the best adapter, of epoch {point.epochs}"
                if history.best_variant:
                    which += f" (its {history.best_variant} in final/{history.best_variant})"
                run.steps = point.steps_done or steps
            else:
                lines.append(
                    f"Warning: the best adapter, of epoch {best}, is in no checkpoint any more, so final is the newest."
                )
            run.engine.save_weights("final")
        except Exception as error:  # the training is over in any case
            reason = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {sentence(error)}"
            return [*lines, f"❌ The finished adapter could not be saved: {reason} {room(run.engine.folder)}"]
        finally:
            run.steps = steps
        return [*lines, f"✅ Training complete: final is {which}. Saved to {run.engine.folder / 'final'}"]

    def summary(self) -> str:
        """The end of a training in a line; says where the best adapter is, if it is anywhere."""
        self.save_again()
        best = self.history.best
        place = None if best is None or self._unsaved is not None else self._place_of(best)
        folder = self._run.engine.folder
        shown = None if place is None else place.relative_to(folder) if place.is_relative_to(folder) else place
        if shown is not None and self.history.best_variant:
            shown = shown / self.history.best_variant
        self.best_in = shown.as_posix() if shown is not None and not shown.is_absolute() else None  # no local path
        return self.history.summary(None if shown is None else shown.as_posix())


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


def _kept(run: Run) -> History | None:
    """The validations of the checkpoint that a run resumes from; None for a run from the start, or without any."""
    return None if run.kept.get(_KEPT) is None else History.from_state(run.kept[_KEPT])


def _resumed(run: Run) -> list[str]:
    """Refuse to validate on other songs than before the checkpoint. Returns lines for the user.

    Raises Refusal if songs that were held out are missing, or are trained on now, or the other way round.
    """
    if not run.resuming:
        return []
    songs = {song.name for song in _validated_songs(run)}
    before = _kept(run)
    if before is None:
        if songs and run.options["validate"]:
            raise Refusal(
                f"The checkpoint was trained on all songs, so {', '.join(sorted(songs)[:5])} cannot be held out any "
                "more. Resume without --validate, or validate on other songs: --validation-dir DIR."
            )
        return []
    if before.from_folder and run.held_out:
        raise Refusal(
            f"The checkpoint was trained on all songs of the folder, and validated on others, so "
            f"{', '.join(sorted(songs)[:5])} cannot be held out any more. Resume with --validation-dir DIR."
        )
    names = set(before.songs)
    asked = "--validation-dir DIR" if before.from_folder else f"--validate {len(names)}"
    if not before.from_folder and names != (songs if run.options["validate"] else set()):
        there = {song.name for song in songs_in(run.tensor_dir)} if run.tensor_dir is not None else set()
        if missing := sorted(names - there):
            raise Refusal(
                f"Songs that the checkpoint held out for validation are missing in {run.tensor_dir}: "
                f"{', '.join(missing[:5])}. Put them back, and resume with {asked}."
            )
        now = ", ".join(sorted(songs)[:5]) if run.options["validate"] else "none"
        raise Refusal(
            f"The checkpoint was trained without the songs that it validates on ({', '.join(sorted(names)[:5])}); this "
            f"run would hold out others ({now}). Resume with {asked} and the same songs."
        )
    if before.from_folder and (missing := sorted(names - songs)) and run.options["validation_dir"] is not None:
        raise Refusal(
            f"Songs that the checkpoint validated on are missing in {run.options['validation_dir']}: "
            f"{', '.join(missing[:5])}. Put them back, or resume without --validation-dir."
        )
    return []


@hookimpl
def engine_final_saved(run: Run) -> None:
    validator: _Validator | None = run.state.get(_KEY)
    if validator is not None:
        validator.look_if_nothing_was_left()


@hookimpl
def acestep_run_ended(run: Run, ending: str, folder: Path) -> list[str] | None:
    validator: _Validator | None = run.state.get(_KEY)
    if validator is None or not validator.history.trained:
        return None
    if ending == "failed":
        validator.save_again()
        return None
    return [validator.summary()]
