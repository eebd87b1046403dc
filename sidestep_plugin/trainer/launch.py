"""One training from the command line: checks everything that can be checked, loads the model, lets upstream train.

The order is from cheap to dear, so that a mistake is reported before minutes of loading, and nothing is written before
every check has passed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..adapters.targets import check_targets
from ..errors import Refusal
from ..registry import Registry
from ..resuming.checkpoints import begin_anew, newest_checkpoint, read_checkpoint
from ..run import AdapterType, ModelFacts
from ..songs.dataset import Dataset, inspect_dataset
from ..songs.fit import check_songs, check_width
from . import seams
from .attachment import Attachment, attach
from .checkout import find_root, import_trainer
from .configs import build_configs
from .models import check_weights, checkpoint_folder, decoder_layers, find_model, load_model, pick_device, restrict_gpus
from .seams import FINAL, WEIGHT_FILES
from .wrappers.ending import INTERRUPTED

if TYPE_CHECKING:
    pass

LATEST: Final = Path("latest")


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        model: alias, folder name under the checkpoint folder, or path.
        settings: training and adapter settings by option name, only those that were given; upstream's own defaults
            hold for the rest.
        plugins: names of plugins, none for upstream's own training.
        wins: of two plugins that want what only one can do, the one that does it.
        options: the plugins' options, only those that were given.
        device: auto, cpu, cuda, cuda:N, mps or xpu.
        resume_from: folder of a checkpoint; :data:`LATEST` for the newest one below the output folder.
        overwrite: whether the adapters of an earlier training in the output folder may be replaced.
        allow_duplicates: whether a song may be in the dataset more than once.
    """

    model: str
    dataset_dir: Path
    output_dir: Path
    adapter_type: AdapterType = "lora"
    acestep_root: Path | None = None
    checkpoint_dir: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    wins: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    resume_from: Path | None = None
    overwrite: bool = False
    allow_duplicates: bool = False


@dataclass
class Launch:
    """A training that has passed every check and has not begun.

    Attributes:
        attachment: the attached plugins; detached when the training is over.
        trainer: upstream's LoRATrainer or LoKRTrainer.
        total_steps: training steps that upstream will run, validation not counted.
        steps_per_epoch: the same for one epoch.
        state: upstream's control: ``state["should_stop"] = True`` ends the training after the step that is running.
    """

    request: Request
    attachment: Attachment
    trainer: Any
    dataset: Dataset
    steps_per_epoch: int
    epochs: int
    state: dict[str, Any]

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def messages(self) -> Iterator[tuple[int, float, str]]:
        """Train, and yield what upstream reports: optimizer step, loss, text."""
        request = self.request
        arguments: dict[str, Any] = {"training_state": self.state}
        if request.overwrite and request.resume_from is None:
            begin_anew(request.output_dir.absolute())
        if request.resume_from is not None:
            arguments["resume_from"] = str(request.resume_from)
        yield from self.trainer.train_from_preprocessed(str(request.dataset_dir.absolute()), **arguments)

    @property
    def final_adapter(self) -> Path | None:
        """Folder of the finished adapter; None as long as upstream has not written it."""
        final = Path(os.path.normpath(self.request.output_dir.absolute())) / FINAL
        files = (final / name for name in WEIGHT_FILES[self.request.adapter_type])
        return next((file.parent for file in files if file.is_file()), None)

    def save_interrupted(self) -> Path | None:
        """Save the adapter as it is now with upstream's own function | returns its folder, None without an adapter."""
        module = self.trainer.module
        if module is None:
            return None
        folder = self.request.output_dir.absolute() / INTERRUPTED
        source = self.attachment.trainer
        if self.request.adapter_type == "lora":
            source.save_lora_weights(module.model, str(folder))
            return folder / "adapter" if (folder / "adapter").is_dir() else folder
        config = {"lokr_config": module.lokr_config.to_dict()}  # upstream reads it back when it loads the file
        source.save_lokr_weights(module.lycoris_net, str(folder), metadata=config)
        return folder


def prepare(
    request: Request,
    *,
    say: Callable[[str], None],
    extra_plugins: Callable[[], Mapping[str, object]] = dict,
) -> Launch:
    """Check a request from cheap to dear, load the model, attach the plugins.

    Args:
        request: what the user asked for.
        say: takes each line meant for the user.
        extra_plugins: makes plugin objects that are not installed, such as a progress display.

    Raises:
        Refusal: anything that would make the training fail or go wrong. Nothing has been written.
    """
    # Before any of them is imported: neither transformers nor PEFT may ask the network for a local model.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    registry = Registry.load(request.plugins, request.wins)
    options = registry.resolve_options(request.options)
    root = find_root(request.acestep_root)
    folder = find_model(request.model, checkpoint_folder(request.checkpoint_dir, root))
    facts = ModelFacts.from_folder(folder)
    check_weights(folder, facts)
    if (targets := request.settings.get("target_modules")) and (layers := decoder_layers(folder)):
        check_targets(layers, targets, request.adapter_type)
    registry.call("acestep_model_chosen", facts=facts, options=options)
    dataset_dir, output_dir = request.dataset_dir.absolute(), request.output_dir.absolute()
    check_writable(output_dir)
    if not registry.implements("acestep_adapter_saved") and any(output_dir.rglob("training_config.json")):
        raise Refusal(
            f"{output_dir} holds adapters that a plugin has described; training without it would put other weights "
            "beside those descriptions. Choose another --output-dir."
        )
    if request.adapter_type == "lokr" and importlib.util.find_spec("lycoris") is None:
        raise Refusal("A LoKr needs LyCORIS, which is not installed here: pip install lycoris-lora")
    resumed = _resume_folder(request, registry, say)
    request = dataclasses.replace(request, resume_from=resumed)
    if not request.overwrite:
        check_unused(output_dir, resumed)
    restrict_gpus(request.device)

    device = pick_device(request.device)
    dataset = inspect_dataset(dataset_dir, allow_duplicates=request.allow_duplicates)
    check_songs(dataset, facts)
    module = import_trainer(root)
    seams.require(module, request.adapter_type, registry.implements)
    configs = build_configs(module, request.adapter_type, request.settings, request.output_dir, device)
    if request.settings.get("val_split", 0.0) > 0.0 and (
        request.adapter_type == "lokr" or not getattr(module, "LIGHTNING_AVAILABLE", True)
    ):
        raise Refusal(
            "ACE-Step would hold songs back for --val-split and never validate on them: it validates LoRA trainings "
            "with Lightning only. Leave --val-split out."
        )
    arguments = inspect.signature(
        getattr(module, seams.TRAINER_CLASS[request.adapter_type]).train_from_preprocessed
    ).parameters
    resumes = registry.implements("acestep_resume")
    if resumed is not None and "resume_from" not in arguments and not resumes:
        raise Refusal(f"This ACE-Step cannot resume a {request.adapter_type} training. Start it without --resume-from.")

    if resumed is not None and not resumes:
        say("Warning: ACE-Step's own resume restores the optimizer and the epoch, but none of the adapter's weights.")
    say(f"ACE-Step: {root}")
    say(f"Loading {folder.name} on {device} ...")
    handler = load_model(folder, device)
    width = getattr(getattr(handler.model, "null_condition_emb", None), "shape", (dataset.condition_width,))[-1]
    check_width(dataset, facts.name, int(width))

    attachment = attach(
        module,
        plugins=request.plugins,
        options=request.options,
        extra_plugins=extra_plugins(),
        allowed_folders=[dataset_dir, output_dir, *([resumed] if resumed else [])],
        announce=say,
        wins=request.wins,
    )
    try:
        songs = _songs_upstream_sees(module, dataset)
        for name in dataset.missing:
            say(f"Note: manifest.json names {name}, which is not there; upstream leaves it out.")
        adapter_config, training_config = configs
        import torch

        # The first versions of upstream's trainer never seed, later ones seed again with the same number.
        torch.manual_seed(training_config.seed)
        trainer = getattr(module, seams.TRAINER_CLASS[request.adapter_type])(handler, adapter_config, training_config)
    except BaseException:
        attachment.detach()
        raise
    held_out = _held_out(songs, getattr(training_config, "val_split", 0.0))
    return Launch(
        request=request,
        attachment=attachment,
        trainer=trainer,
        dataset=dataset,
        steps_per_epoch=math.ceil((songs - held_out) / training_config.batch_size),
        epochs=training_config.max_epochs,
        state={"should_stop": False},
    )


# -- small checks ----------------------------------------------------------------------------------------------------


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, by trying it and leaving no trace. Raises Refusal."""
    made: list[Path] = []
    try:
        for place in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
            place.mkdir()
            made.append(place)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refusal(f"Cannot write to {folder}: {error.strerror or error}. Choose another folder.") from None
    finally:
        for place in reversed(made):
            place.rmdir()
    for place in (folder / FINAL, folder / "checkpoints", folder / INTERRUPTED):
        if place.exists() and not place.is_dir():  # it would fail only when the adapter is saved
            raise Refusal(f"{place} is not a folder, but adapters are saved there. Choose another folder.")


def _resume_folder(request: Request, registry: Registry, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, None for a training from the start. Raises Refusal."""
    if request.resume_from is None:
        return None
    if request.resume_from == LATEST:
        folder, notes = newest_checkpoint(request.output_dir.absolute())
        for note in notes:
            say(note)
        return folder
    if registry.implements("acestep_resume"):
        return read_checkpoint(request.resume_from.absolute()).folder
    if not request.resume_from.is_dir():
        raise Refusal(f"No checkpoint folder {request.resume_from}. Expected one under OUTPUT/checkpoints.")
    return request.resume_from.absolute()


def check_unused(output: Path, resumed: Path | None) -> None:
    """Refuse an output folder with the adapters of another training, which would be replaced or mixed up."""
    if resumed is not None and resumed.resolve().is_relative_to(output.resolve()):
        return
    found = [name for name in (FINAL, "checkpoints", INTERRUPTED) if any((output / name).rglob("*.safetensors"))]
    if found:
        raise Refusal(
            f"{output} holds adapters of another training already ({', '.join(found)}). Choose another --output-dir, "
            "go on with that training (--resume-from latest), or let it be replaced: --overwrite."
        )


def _songs_upstream_sees(module: Any, dataset: Dataset) -> int:
    """Count the songs as upstream's own dataset does. Raises Refusal when it would find none."""
    data_module = sys.modules[module.PreprocessedDataModule.__module__]
    try:
        found = len(data_module.PreprocessedTensorDataset(str(dataset.folder)))
    except Exception as error:  # upstream's own, such as its path guard's for a link that leads elsewhere
        raise Refusal(f"ACE-Step cannot read the songs in {dataset.folder}: {error}") from error
    if found not in (0, dataset.songs):
        raise Refusal(
            f"{dataset.folder} holds {dataset.songs} songs, but ACE-Step would train on {found}: it "
            "leaves out links and manifest entries that lead out of the folder. Put the songs themselves into it."
        )
    if found == 0:
        raise Refusal(
            f"{dataset.folder} holds {dataset.songs} songs, but this version of ACE-Step finds none: it reads the "
            "names in manifest.json from the current directory. Start from where they fit, or move manifest.json away."
        )
    return found


def _held_out(songs: int, val_split: float) -> int:
    """Songs that upstream sets aside for validation."""
    return max(1, int(songs * val_split)) if val_split > 0.0 and songs > 1 else 0
