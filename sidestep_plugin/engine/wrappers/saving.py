"""The save functions: what upstream writes, and what plugins add, appears completely or not at all."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapters.foreign import check_holds_tensors
from ...adapters.kinds import BY_NAME
from ...adapters.staging import published, staged
from ...errors import Refusal, UpstreamMismatch
from ...files import move, room
from ...run import AdapterType, Run, SavedAdapter
from ...text import sentence
from ..checkout import place_of
from ..current import during, running_training, saving
from ..epochs import ended
from ..shapes import FINAL, WEIGHT_FILES
from ..weights import check_finite

if TYPE_CHECKING:
    from ..host import Host


def wrap_save(host: Host, original: Callable[..., Any], kind: AdapterType) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        run = host.run_of_save(next(iter(call.arguments.values())))
        if run is None or saving.get():
            return original(*args, **kwargs)
        said = call.arguments["output_dir"]
        folder = place_of(host.trainer, said)
        # The folder may be a link to one of another name.
        journal, final = host.journals.get(run), Path(said).name == FINAL
        if (training := running_training.get()) is not None and training.run is run:
            ended(host, training)
        if journal is not None and journal.catching_up:
            if not final:  # a checkpoint of a step that an earlier run has done
                return said
            journal.catch_up(run)
        try:
            if journal is not None:
                check_finite(run)
            point = None if journal is None or final else journal.holds or journal.here(run)
            if not run.ranks.first:  # of several processes one saves; the others only say where they are
                if journal is not None:
                    journal.finished = journal.finished or final
                return said
            with staged(folder) as stage:
                call.arguments["output_dir"] = str(stage)
                with during(saving, True):
                    result = original(*call.args, **call.kwargs)
                check_holds_tensors(stage)
                with published(stage, folder):
                    weights = _weights_in(stage, kind, original.__name__)
                    # Epochs done: as upstream's function was told, else as the journal knows.
                    epoch = call.arguments.get("epoch")
                    saved = SavedAdapter(
                        weights=weights,
                        destination=folder / weights.relative_to(stage),
                        folder=stage,
                        adapter_type=kind,
                        epoch=epoch if epoch is not None or journal is None else journal.epochs_done,
                        global_step=call.arguments.get("global_step"),
                        resume_point=point,
                        copy_of=None if journal is None else journal.copy_of,
                    )
                    host.ask_and_announce("acestep_adapter_saved", run=run, saved=saved)
                    if journal is not None and run.variants:
                        _save_variants(host, run, saved)
        except Refusal as refusal:
            host.refusal = host.refusal or refusal
            raise
        except Exception as error:
            if journal is None or journal.ending or final:
                raise
            # A full disk must not end hours of training: there is an earlier checkpoint, or there will be a later one.
            journal.unsaved = True
            host.announce(
                f"Warning: {folder} could not be saved: {sentence(error)} {room(folder)} The training goes on."
            )
            return said
        if journal is not None:
            journal.finished, journal.unsaved = journal.finished or final, False
            # Fewer epochs than were asked for, when a plugin has ended the training.
            by_plugin = training is not None and training.ending is not None
            whole = journal.whole_epochs
            epochs = whole if by_plugin else whole or getattr(run.training_config, "max_epochs", None)
            if final and isinstance(epochs, int):
                limits = training.limits if training is not None and by_plugin else {}
                host.registry.call("engine_final_saved", run=run, epochs=epochs, limits=limits)
        return result.replace(str(stage), str(folder)) if isinstance(result, str) else result

    return save


def _save_variants(host: Host, run: Run, saved: SavedAdapter) -> None:
    """Save the run's variants of an adapter, each in a folder of its name beside it. What cannot be saved is told.

    Raises:
        Refusal: a plugin refuses what was saved.
    """
    kind = BY_NAME[saved.adapter_type]
    module = run.module_ref() if run.module_ref else None
    for name in run.engine.variants if module is not None else ():
        folder = saved.folder / name
        place = saved.destination.parents[len(saved.weights.relative_to(saved.folder).parts) - 1] / name
        try:
            with during(saving, True), run.engine.in_its_place(name):
                written = kind.save(host.trainer, module, folder)
                check_holds_tensors(written)
                if written != folder:  # the adapter's folder is what the app calls it
                    for file in sorted(written.iterdir()):
                        move(file, folder / file.name)
                    written.rmdir()
                beside = None if saved.copy_of is None else _beside(saved.copy_of, name)
                adapter = dataclasses.replace(
                    saved,
                    weights=folder / kind.weight_name,
                    destination=place / kind.weight_name,
                    folder=folder,
                    resume_point=None,
                    copy_of=beside,
                )
                host.ask_and_announce("acestep_adapter_saved", run=run, saved=adapter)
        except Refusal:
            raise
        except Exception as error:  # the adapter itself is saved
            shutil.rmtree(folder, ignore_errors=True)
            host.announce(f"Warning: {place} could not be saved: {sentence(error)} {room(place.parent)}")


def _beside(weights: Path, name: str) -> Path | None:
    """The folder of a variant beside saved weights, which are in a folder below the checkpoint's or in it."""
    found = (place / name for place in (weights, weights.parent))
    return next((place for place in found if place.is_dir()), None)


def _weights_in(folder: Path, kind: AdapterType, function: str) -> Path:
    """The weights file that upstream has just written. Raises UpstreamMismatch when there is none."""
    for name in WEIGHT_FILES[kind]:
        if (folder / name).is_file():
            return folder / name
    raise UpstreamMismatch(f"{function} returned, but there are no adapter weights in {folder}.")
