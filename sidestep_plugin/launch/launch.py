"""One training from the command line: checks the request, loads the model, and lets upstream train.

Cheap checks come first, so that a mistake is reported before minutes of loading. Nothing is written before every check
has passed.
"""

from __future__ import annotations

import codecs
import dataclasses
import inspect
import locale
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.finding import find_weights
from ..adapters.kinds import BY_NAME, DEFAULT, check_installed
from ..adapters.targets import check_targets
from ..clock import last_step
from ..engine.answers import held_out
from ..engine.attachment import Attachment, attach_registry
from ..engine.checkout import find_root, import_trainer
from ..engine.compatibility import injection_problem
from ..engine.configs import ADAPTER_FIELDS, TRAINING_FIELDS, build_configs
from ..engine.current import CommandLine, command_line, during
from ..engine.models import (
    Handler,
    check_weights,
    checkpoint_folder,
    decoder_shapes,
    find_model,
    load_model,
    pick_device,
    restrict_gpus,
)
from ..engine.processes import (
    check_agreement,
    check_started,
    in_all,
    in_turns,
    join,
    plan_of,
    told_by_first,
    use_own_gpu,
)
from ..engine.sameness import of_the_model, of_the_training
from ..engine.seams import cannot_do, require
from ..engine.shapes import FINAL, INTERRUPTED, TRAINER_CLASS, WEIGHT_FILES
from ..engine.writable import check_writable
from ..errors import Refusal
from ..ranks import ranks
from ..recommended import SETTINGS, batches_for, recommended
from ..registry import Registry
from ..resuming.checkpoints import finished_epochs, limits_of
from ..resuming.lock import OutputLock
from ..resuming.overwriting import Overwriting
from ..resuming.starting import settings_to_start_from
from ..run import AdapterType, ModelFacts
from ..songs.dataset import Dataset, check_songs, check_width, inspect_dataset
from ..songs.values import check_values
from ..text import counted, sentence
from ..timesteps.treatment import decide_treatment
from ..variants import member_of
from .output_folder import LATEST, check_undescribed, check_unused, checkpoint_to_resume, settings_of_checkpoint

if TYPE_CHECKING:
    import torch

__all__ = ["LATEST", "Launch", "Request", "check_unused", "check_writable", "prepare"]


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    model: str  # alias, folder name under the checkpoint folder, or path
    dataset_dir: Path
    output_dir: Path
    adapter_type: AdapterType = DEFAULT.name
    acestep_root: Path | None = None
    checkpoint_dir: Path | None = None
    # training and adapter settings by option name, only those that were given. When a training is resumed, the rest are
    # those of its checkpoint.
    settings: Mapping[str, Any] = field(default_factory=dict)
    defaults: str = "upstream"  # of a new training: "recommended" for its number of songs, or "upstream"
    plugins: tuple[str, ...] = ()  # names of plugins; none: upstream's own training
    wins: str | None = None  # the plugin that samples the timesteps when two of them could
    options: Mapping[str, Any] = field(default_factory=dict)  # the plugins' options, only those that were given
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps or xpu
    resume_from: Path | None = None  # folder of a checkpoint; :data:`LATEST` for the newest one below the output folder
    overwrite: bool = False  # whether the adapters of an earlier training in the output folder may be replaced
    allow_duplicates: bool = False  # whether a song may be in the dataset more than once


@dataclass
class Launch:
    """A training that has passed every check and has not started."""

    request: Request
    attachment: Attachment  # detached when the training is over
    lock: OutputLock  # of the output folder; released by the caller of :func:`prepare`
    trainer: Any  # upstream's LoRATrainer or LoKRTrainer
    dataset: Dataset
    steps_per_epoch: int
    epochs: int
    state: dict[str, Any]  # upstream's: ``state["should_stop"] = True`` ends the training after the current step
    decided: CommandLine  # before the model was loaded, for the training that begins
    total_steps: int  # until it is finished, validation not counted

    def messages(self) -> Iterator[tuple[int, float, str]]:
        """Train, and yield what upstream reports: optimizer step, loss, text."""
        request = self.request
        arguments: dict[str, Any] = {"training_state": self.state}
        if request.resume_from is not None:
            arguments["resume_from"] = str(request.resume_from)
        overwriting = None
        if request.overwrite and request.resume_from is None and ranks().first:
            overwriting = Overwriting(request.output_dir.absolute())
            yield from _as_reports(overwriting.begin())
        running = self.trainer.train_from_preprocessed(str(request.dataset_dir.absolute()), **arguments)
        try:
            while True:
                with during(command_line, self.decided):
                    report = next(running, None)
                if report is None:
                    break
                yield report
                if overwriting is not None and report[2].startswith("💾"):
                    yield from _as_reports(overwriting.saved())
            if overwriting is not None:
                lines, overwriting = overwriting.end(), None
                yield from _as_reports(lines)
        finally:
            running.close()
            if overwriting is not None:  # the program is ended at once
                overwriting.end()

    @property
    def final_adapter(self) -> Path | None:
        """Folder of the finished adapter; None until upstream has written it."""
        final = Path(os.path.normpath(self.request.output_dir.absolute())) / FINAL
        files = (final / name for name in WEIGHT_FILES[self.request.adapter_type])
        return next((file.parent for file in files if file.is_file()), None)

    def save_interrupted(self) -> Path | None:
        """Save the current adapter with upstream's own function | returns its folder, None without an adapter."""
        module = self.trainer.module
        if module is None:
            return None
        folder = self.request.output_dir.absolute() / INTERRUPTED
        source = self.attachment.trainer
        return BY_NAME[self.request.adapter_type].save(source, module, folder)


def prepare(
    request: Request,
    *,
    say: Callable[[str], None],
    extra_plugins: Callable[[], Mapping[str, object]] = dict,
    kept: Callable[[Path, AdapterType], Mapping[str, Any]] = settings_of_checkpoint,
) -> Launch:
    """Check a request, cheap checks first, then load the model and attach the plugins.

    Args:
        say: takes each line meant for the user.
        extra_plugins: makes plugin objects that are not installed, such as a progress display.
        kept: reads the settings that a checkpoint was trained with.

    Raises:
        Refusal: anything that would make the training fail or go wrong. Nothing has been written.
    """
    # Keeps transformers and PEFT from asking the network for a local model. Before either of them is imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with ExitStack() as undo:
        lock = OutputLock(request.output_dir.absolute())
        undo.callback(lock.release)
        asked, latest = request, request.resume_from == LATEST
        registry = Registry.load(request.plugins, request.wins)
        options = registry.resolve_options(request.options)
        plan = plan_of(registry, options)
        check_started(plan)
        _meet(request, say)
        root, model = in_all(lambda: _check_model(request, registry, options))
        resumed = told_by_first(lambda: _check_output(request, lock, registry, say))
        request = dataclasses.replace(request, resume_from=resumed)
        if resumed is not None:
            of_checkpoint = told_by_first(lambda: {**kept(resumed, request.adapter_type), **_its_end(asked)})
            request = dataclasses.replace(request, settings={**of_checkpoint, **request.settings})
        elif (start := options.get("init_from")) is not None:
            settings = told_by_first(lambda: _settings_to_start_from(start, request, kept))
            request = dataclasses.replace(request, settings=settings)
        restrict_gpus(request.device)
        device = pick_device(request.device)
        dataset = in_all(lambda: _check_songs(request, model))
        upstream = in_all(lambda: _check_upstream(request, root, registry, device, say))
        if ranks().several:
            configs = (upstream.adapter_config, upstream.training_config)
            asked_of = (upstream.module, registry, options, plan.own, request.adapter_type)
            check_agreement(of_the_training(*asked_of, *configs, dataset.folder) | of_the_model(model.folder))
        out = held_out(registry, dataset.files, options, upstream.training_config)
        request, upstream = _with_settings(request, upstream, dataset, len(out), options.get("max_steps"), device, say)
        told_by_first(lambda: _check_values(dataset, upstream, options, say))
        _announce(request, registry, model, device, say)
        handler = in_turns(lambda: _load(model, device, dataset))
        for name, plugin in extra_plugins().items():
            registry.register(plugin, name)
        options = registry.resolve_options(request.options)  # with the defaults of those that came just now
        folders = [dataset.folder, request.output_dir.absolute(), *filter(None, [request.resume_from])]
        attachment = attach_registry(upstream.module, registry, options, folders, say)
        undo.callback(attachment.detach)
        # What was not asked for is in the configurations, and in the checkpoint that it is resumed from.
        asked = dataclasses.replace(asked, resume_from=request.resume_from)
        launch = _made(asked, lock, attachment, upstream, handler, dataset, say, CommandLine(latest, plan, out))
        undo.pop_all()
        return launch


# -- the stages of prepare -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """A model folder that can be trained for, not loaded yet."""

    folder: Path
    facts: ModelFacts


@dataclass(frozen=True)
class _Upstream:
    """Upstream's trainer module with the configurations made for it."""

    module: Any
    trainer_class: Any
    adapter_config: Any
    training_config: Any


def _its_end(request: Request) -> dict[str, int]:
    """The epochs of a finished training whose newest checkpoint is asked for: an older one may have meant more."""
    output = request.output_dir.absolute()
    if request.resume_from != LATEST or limits_of(output) or (epochs := finished_epochs(output)) is None:
        return {}
    return {"epochs": epochs}


def _settings_to_start_from(
    adapter: Path, request: Request, kept: Callable[[Path, AdapterType], Mapping[str, Any]]
) -> dict[str, Any]:
    """The settings of a training that starts from an adapter's weights, which decide about its size. Raises Refusal."""
    kind, given = request.adapter_type, request.settings
    known = kept(find_weights(adapter).parent, kind)
    return {**settings_to_start_from(adapter, kind, known, given), **given}


def _check_model(request: Request, registry: Registry, options: Mapping[str, Any]) -> tuple[Path, _Model]:
    """Find the checkout and the model, and read its config and the headers of its weights. Raises Refusal."""
    root = find_root(request.acestep_root)
    folder = find_model(request.model, checkpoint_folder(request.checkpoint_dir, root))
    facts = ModelFacts.from_folder(folder)
    rank, width = request.settings.get("rank"), facts.config.get("hidden_size")
    if isinstance(rank, int) and isinstance(width, int):
        # Each trained layer has the decoder's width on one of its two sides, so that no update of it can have a higher
        # rank: the rest of a LoRA only takes memory. A LoKr has no such bound: LyCORIS trains full matrices then.
        BY_NAME[request.adapter_type].check_rank(rank, width, facts.name)
    check_weights(folder, facts)
    if (targets := request.settings.get("target_modules")) and (layers := list(decoder_shapes(folder))):
        check_targets(layers, targets, request.adapter_type)
    registry.call("acestep_model_chosen", facts=facts, options=options)
    return root, _Model(folder, facts)


def _check_output(request: Request, lock: OutputLock, registry: Registry, say: Callable[[str], None]) -> Path | None:
    """Lock the output folder | returns the checkpoint to resume from. Raises Refusal."""
    output = request.output_dir.absolute()
    check_writable(output)
    lock.acquire()
    if lock.warning is not None:
        say(lock.warning)
    if not registry.implements("acestep_adapter_saved"):
        check_undescribed(output)
    check_installed(request.adapter_type)
    by_plugin = registry.implements("engine_resume")
    resumed = checkpoint_to_resume(request.resume_from, output, by_plugin=by_plugin, say=say)
    if not request.overwrite:
        check_unused(output, resumed)
    return resumed


def _meet(request: Request, say: Callable[[str], None]) -> None:
    """Take this process's GPU and meet the other processes, if there are several. Raises Refusal."""
    if not ranks().several:
        return
    if request.device.startswith("cuda:"):
        raise Refusal(
            f"--device {request.device} is one GPU, and each process needs its own. Use --device cuda; "
            "CUDA_VISIBLE_DEVICES chooses among the GPUs."
        )
    device = pick_device(request.device)
    use_own_gpu(device)
    join(device.type, say)


def _check_songs(request: Request, model: _Model) -> Dataset:
    """Look at every song, and whether it fits the model. Raises Refusal."""
    dataset = inspect_dataset(request.dataset_dir.absolute(), allow_duplicates=request.allow_duplicates)
    check_songs(dataset, model.facts)
    return dataset


def _check_upstream(
    request: Request, root: Path, registry: Registry, device: torch.device, say: Callable[[str], None]
) -> _Upstream:
    """Import upstream's trainer and make its configurations. Raises Refusal for what this version cannot do."""
    kind = request.adapter_type
    say(f"Importing ACE-Step's trainer from {root} ...")
    module = import_trainer(root)
    if lost := dict.fromkeys(require(module, kind, registry.implements)):
        say(f"Note: {cannot_do(module, lost)}.")
    if problem := injection_problem(kind):
        raise Refusal(f"Mend this Python environment, in which no {BY_NAME[kind].title} can be made: {problem}")
    adapter_config, training_config = build_configs(module, kind, request.settings, request.output_dir, device)
    if request.settings.get("val_split", 0.0) > 0.0 and (
        not BY_NAME[kind].validates or not getattr(module, "LIGHTNING_AVAILABLE", True)
    ):
        raise Refusal(
            "ACE-Step would hold songs back for --val-split and never validate on them: it validates LoRA trainings "
            "with Lightning only. Leave --val-split out."
        )
    trainer_class = getattr(module, TRAINER_CLASS[kind])
    arguments = inspect.signature(trainer_class.train_from_preprocessed).parameters
    if request.resume_from is not None and "resume_from" not in arguments and not registry.implements("engine_resume"):
        raise Refusal(f"This ACE-Step cannot resume a {kind} training. Start it without --resume-from.")
    return _Upstream(module, trainer_class, adapter_config, training_config)


def _with_settings(
    request: Request,
    upstream: _Upstream,
    dataset: Dataset,
    held: int,
    most: int | None,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Request, _Upstream]:
    """Decide about the settings that were left out, and say so.

    Args:
        held: number of songs that are held out.
        most: the most training steps; None without a limit.
    """
    missing = [name for name in SETTINGS if name not in request.settings]
    songs = dataset.songs - held - _upstreams(dataset.songs, request.settings.get("val_split", 0.0))
    kind, given = request.adapter_type, request.settings
    if most is not None and "epochs" not in given:  # the learning rate has run its course when that many are done
        batches = batches_for(songs, int(given.get("batch_size", 1)), ranks().world_size)
        given = {**given, "epochs": math.ceil(most / batches)}
    if missing and request.defaults == "recommended" and request.resume_from is None:
        usual = recommended(songs, kind, given, ranks().world_size)
        settings = {**given, **{name: setting.value for name, setting in usual.items()}}
        configs = build_configs(upstream.module, kind, settings, request.output_dir, device)
        request = dataclasses.replace(request, settings=settings)
        upstream = dataclasses.replace(upstream, adapter_config=configs[0], training_config=configs[1])
        source = f"recommended for {counted(songs, 'song')}; acestep-train recommended --songs {songs} says why"
    else:
        source = "ACE-Step's own"
    if missing:
        fields = {**ADAPTER_FIELDS[kind], **TRAINING_FIELDS}
        configs = (upstream.adapter_config, upstream.training_config)
        values = {
            name: next((getattr(config, fields[name]) for config in configs if hasattr(config, fields[name])), None)
            for name in missing
        }
        words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items() if value is not None)
        say(f"Settings: {words} ({source})")
    return request, upstream


def _check_values(
    dataset: Dataset, upstream: _Upstream, options: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Read every value of every song: slow for many songs, and quick compared with loading a model. Raises Refusal."""
    if dataset.links and hasattr(upstream.module, "safe_path"):
        names = ", ".join(f"{link.name} ({link.resolve()})" for link in dataset.links[:5])
        raise Refusal(
            f"Songs in {dataset.folder} are links to files outside of it: {names}. This ACE-Step only reads files "
            "inside of the folder. Put the songs themselves there."
        )
    # An option of that name promises that a plugin zeroes such values behind the mask.
    check_values(dataset.files, mask_nan=bool(options.get("mask_nan")), say=say)


def _announce(
    request: Request, registry: Registry, model: _Model, device: torch.device, say: Callable[[str], None]
) -> None:
    if request.resume_from is not None and not registry.implements("engine_resume"):
        say("Warning: ACE-Step's own resume restores the optimizer and the epoch, but none of the adapter's weights.")
    if not registry.implements("acestep_sample_timesteps") and (note := upstreams_timesteps(model.facts)) is not None:
        say(note)
    say(f"Loading {model.folder.name} on {device} ...")


def upstreams_timesteps(facts: ModelFacts) -> str | None:
    """A line for a model that upstream alone trains at timesteps which are not its own; None for any other."""
    try:
        treatment = decide_treatment(facts)
    except Refusal:  # what the model is cannot be told, and no plugin was asked for that has to know
        return None
    if treatment.is_upstreams_own:
        return None
    dropout = " and without condition dropout" if treatment.cfg_ratio > 0.0 else ""
    name = member_of(treatment.variant, facts.name)
    return (
        f"Warning: without a plugin ACE-Step trains {facts.name or 'this model'} at turbo's 8 timesteps{dropout}, "
        f"not the way {name} was trained. To train it the way {name} was trained, leave --plugin none out."
    )


def _load(model: _Model, device: torch.device, dataset: Dataset) -> Handler:
    """Load the model, and compare the songs with its weights. Raises Refusal."""
    handler = load_model(model.folder, device)
    width = getattr(getattr(handler.model, "null_condition_emb", None), "shape", (dataset.condition_width,))[-1]
    check_width(dataset, model.facts.name, int(width))
    return handler


def _made(
    request: Request,
    lock: OutputLock,
    attachment: Attachment,
    upstream: _Upstream,
    handler: Handler,
    dataset: Dataset,
    say: Callable[[str], None],
    decided: CommandLine,
) -> Launch:
    """Make upstream's trainer. Raises Refusal."""
    import torch

    config = upstream.training_config
    songs = _songs_upstream_sees(upstream.module, dataset)
    for name in dataset.missing:
        say(f"Note: manifest.json names {name}, which is not there; ACE-Step leaves it out.")
    # The first versions of upstream's trainer never seed, later ones seed again with the same number.
    torch.manual_seed(config.seed)
    trainer = upstream.trainer_class(handler, upstream.adapter_config, config)
    left = songs - len(decided.held_out) - _upstreams(songs, getattr(config, "val_split", 0.0))
    steps = math.ceil(math.ceil(left / ranks().world_size) / config.batch_size)
    each = int(getattr(config, "gradient_accumulation_steps", 1))
    return Launch(
        request=request,
        attachment=attachment,
        lock=lock,
        trainer=trainer,
        dataset=dataset,
        steps_per_epoch=steps,
        epochs=config.max_epochs,
        state={"should_stop": False},
        decided=decided,
        total_steps=last_step(attachment.options.get("max_steps"), steps, config.max_epochs, each),
    )


def _as_reports(lines: list[str]) -> Iterator[tuple[int, float, str]]:
    return ((0, 0.0, line) for line in lines)


def _songs_upstream_sees(module: Any, dataset: Dataset) -> int:
    """Count the songs as upstream's own dataset does. Raises Refusal when it would find none."""
    data_module = sys.modules[module.PreprocessedDataModule.__module__]
    try:
        found = len(data_module.PreprocessedTensorDataset(str(dataset.folder)))
    except Exception as error:  # upstream's own, such as its path guard's for a link that leads elsewhere
        if (page := _other_code_page(dataset.folder)) is not None:
            raise _misread(dataset.folder, page, f"cannot read it ({error})") from error
        raise Refusal(f"ACE-Step cannot read the songs in {dataset.folder}: {sentence(str(error))}") from error
    if found != dataset.songs and (page := _other_code_page(dataset.folder)) is not None:
        raise _misread(dataset.folder, page, "finds other songs than it names")
    if found not in (0, dataset.songs):
        raise Refusal(
            f"{dataset.folder} holds {counted(dataset.songs, 'song')}, but ACE-Step would train on {found}: it "
            "leaves out links and manifest entries that lead out of the folder. Put the songs themselves into it."
        )
    if found == 0:
        raise Refusal(
            f"{dataset.folder} holds {counted(dataset.songs, 'song')}, but this version of ACE-Step finds none: it "
            "reads the names in manifest.json from the current directory. Start from where they fit, or move "
            "manifest.json away."
        )
    return found


def _other_code_page(folder: Path) -> str | None:
    """The system's code page, in which upstream reads manifest.json, if it makes other names of those in it."""
    page = locale.getpreferredencoding(False)  # in Python's UTF-8 mode: utf-8
    try:
        raw = (folder / "manifest.json").read_bytes()
        return None if raw.isascii() or codecs.lookup(page).name == "utf-8" else page
    except (OSError, LookupError):
        return None


def _misread(folder: Path, page: str, what: str) -> Refusal:
    return Refusal(
        f"{folder / 'manifest.json'} has letters beyond ASCII. ACE-Step reads it in this system's code page ({page}) "
        f"instead of UTF-8, and so {what}. Start again with the environment variable PYTHONUTF8=1, or delete the file: "
        "then every .pt file of the folder is used."
    )


def _upstreams(songs: int, val_split: float) -> int:
    """Songs that upstream sets aside for validation."""
    return max(1, int(songs * val_split)) if val_split > 0.0 and songs > 1 else 0
