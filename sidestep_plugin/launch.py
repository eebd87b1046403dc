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
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import upstream
from .attach import FINAL, INTERRUPTED, WEIGHT_FILES, Attachment, attach
from .checkpoints import begin_anew, newest_checkpoint, read_checkpoint
from .dataset import Dataset, inspect_dataset, made_for
from .errors import Refusal
from .registry import Registry
from .run import AdapterType, ModelFacts
from .variant import words_of

if TYPE_CHECKING:
    import torch

MODEL_ALIASES: Final = {
    alias: f"acestep-v15-{alias}"
    for alias in (
        "turbo",
        "turbo-shift1",
        "turbo-shift3",
        "turbo-continuous",
        "base",
        "sft",
        "xl-turbo",
        "xl-base",
        "xl-sft",
    )
}

# What the options are called in upstream's configurations.
TRAINING_FIELDS: Final = {
    "epochs": "max_epochs",
    "batch_size": "batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "save_every": "save_every_n_epochs",
    "val_split": "val_split",
    "num_workers": "num_workers",
    "log_every": "log_every_n_steps",
}
ADAPTER_FIELDS: Final[dict[AdapterType, dict[str, str]]] = {
    "lora": {"rank": "r", "alpha": "alpha", "dropout": "dropout", "target_modules": "target_modules"},
    "lokr": {"rank": "linear_dim", "alpha": "linear_alpha", "dropout": "dropout", "target_modules": "target_modules"},
}
LATEST: Final = Path("latest")
_WEIGHT_DTYPES: Final = frozenset({"F64", "F32", "F16", "BF16"})


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
class Handler:
    """What upstream's trainers want of the app's handler."""

    model: Any
    device: str
    dtype: torch.dtype
    quantization: str | None = None


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
    root = upstream.find_root(request.acestep_root)
    folder = find_model(request.model, checkpoint_folder(request.checkpoint_dir, root))
    facts = ModelFacts.from_folder(folder)
    check_weights(folder, facts)
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
    module = upstream.import_trainer(root)
    upstream.require(module, request.adapter_type, registry.implements)
    configs = build_configs(module, request, device)
    if request.settings.get("val_split", 0.0) > 0.0 and (
        request.adapter_type == "lokr" or not getattr(module, "LIGHTNING_AVAILABLE", True)
    ):
        raise Refusal(
            "ACE-Step would hold songs back for --val-split and never validate on them: it validates LoRA trainings "
            "with Lightning only. Leave --val-split out."
        )
    arguments = inspect.signature(
        getattr(module, upstream.TRAINER_CLASS[request.adapter_type]).train_from_preprocessed
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
    _fail_on_width(dataset, facts.name, int(width))

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
        trainer = getattr(module, upstream.TRAINER_CLASS[request.adapter_type])(
            handler, adapter_config, training_config
        )
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


# -- the model -------------------------------------------------------------------------------------------------------


def checkpoint_folder(said: Path | None, root: Path) -> Path:
    """The folder of models: the one said, else ``$ACESTEP_CHECKPOINTS_DIR``, else ``checkpoints`` in the checkout."""
    if said is not None:
        return said
    from_environment = os.environ.get("ACESTEP_CHECKPOINTS_DIR", "").strip()
    return Path(from_environment).expanduser() if from_environment else root / "checkpoints"


def models_in(checkpoints: Path) -> list[str]:
    """Names of the model folders in a checkpoint folder, sorted."""
    try:
        return sorted(entry.name for entry in checkpoints.iterdir() if _is_model(entry))
    except OSError:
        return []


def _is_model(folder: Path) -> bool:
    """A folder of ACE-Step's DiT: the language model and the VAE beside it have other config.json files."""
    config = folder / "config.json"
    try:
        return config.is_file() and re.search(r'"model_type"\s*:\s*"acestep"', config.read_text("utf-8")) is not None
    except (OSError, UnicodeDecodeError):
        return False


def find_model(name: str, checkpoints: Path) -> Path:
    """The folder of a model: an alias ("base", "xl-sft"), a folder name, or a path. Raises Refusal."""
    candidates = [checkpoints / MODEL_ALIASES[name]] if name in MODEL_ALIASES else []
    if name.strip(".") and not re.search(r"[\\/]", name):  # a bare name, not a path
        candidates.append(checkpoints / name)
    candidates.append(Path(name).absolute())
    for candidate in candidates:
        if candidate.is_dir():
            return candidate.absolute()
    found = ", ".join(models_in(checkpoints)) or "none"
    tried = " or ".join(str(candidate) for candidate in candidates)
    raise Refusal(
        f"No model {name!r}: expected the folder {tried}. Models in {checkpoints}: {found}. "
        "Name one of them with --model, or say where they are: --checkpoint-dir DIR."
    )


def check_weights(folder: Path, facts: ModelFacts) -> None:
    """Refuse quantized weights and missing weight files by their headers alone. Raises Refusal."""
    from safetensors import SafetensorError, safe_open

    if facts.config.get("quantization_config") is not None:
        raise Refusal(f"{folder.name} is quantized (quantization_config in its config.json). {_UNQUANTIZED}")
    if not isinstance(facts.config.get("auto_map"), dict):
        raise Refusal(
            f"config.json of {folder.name} names no model code (auto_map). Copy the whole model folder again."
        )
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - not a mapping
                    dtype = weights.get_slice(key).get_dtype()
                    if key.startswith("decoder.") and dtype not in _WEIGHT_DTYPES:
                        raise Refusal(f"{file.name} of {folder.name} is quantized ({key} is {dtype}). {_UNQUANTIZED}")
        except (SafetensorError, OSError) as error:
            raise Refusal(f"{file} cannot be read ({error}). Download it again.") from None


_UNQUANTIZED: Final = "Training needs the weights as they were published, in bf16 or fp32. Take that model."


def pick_device(said: str) -> torch.device:
    """The device to train on | given auto, cpu, cuda, cuda:N, mps or xpu | raises Refusal when it is not there."""
    import torch

    present = [
        name
        for name, there in (
            ("cuda", torch.cuda.is_available()),
            ("xpu", hasattr(torch, "xpu") and torch.xpu.is_available()),
            ("mps", torch.backends.mps.is_available()),
            ("cpu", True),
        )
        if there
    ]
    if said == "auto":
        return torch.device(present[0])
    if said.split(":")[0] not in present:
        raise Refusal(
            f"No {said} on this machine: torch {torch.__version__} sees {', '.join(present)}. Choose one of these."
        )
    # A chosen GPU is the only visible one by now, and so the first.
    return torch.device(said.split(":")[0])


def restrict_gpus(said: str) -> None:
    """Make ``cuda:N`` the only visible GPU: upstream's trainer takes the first one it sees. Before CUDA is touched."""
    if said.startswith("cuda:"):
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
        index = int(said.partition(":")[2])
        if visible and index >= len(visible):
            raise Refusal(
                f"No {said}: CUDA_VISIBLE_DEVICES shows {len(visible)} GPUs, counted from cuda:0. Choose one."
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index].strip() if visible else str(index)


def load_model(folder: Path, device: torch.device) -> Handler:
    """Load a model folder for training, from this folder alone.

    bf16 on cuda and xpu, fp32 elsewhere: the compute type of upstream's trainer, or wider. Only the decoder goes to
    the device; training calls nothing else.

    Raises:
        Refusal: the folder cannot be loaded, or its weights lack some of the decoder's.
    """
    import torch
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type in ("cuda", "xpu") else torch.float32
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    try:
        model, loaded = transformers.AutoModel.from_pretrained(
            str(folder),
            trust_remote_code=True,
            local_files_only=True,
            output_loading_info=True,
            **{"dtype" if version >= (4, 56) else "torch_dtype": dtype},
        )
    except (Exception, SystemExit) as error:  # the model's own code may do anything
        reason = " ".join(str(error).split())
        raise Refusal(
            f"{folder} cannot be loaded as a model: {type(error).__name__}: {reason}. Use the Python "
            "environment in which ACE-Step runs; if it is that, download the model again."
        ) from error
    missing = sorted(loaded["missing_keys"])
    lost = [key for key in missing if key.startswith("decoder.")]
    if lost:
        raise Refusal(
            f"The weights of {folder.name} lack {len(lost)} tensors of the decoder ({lost[0]}, ...). Download it again."
        )
    if "null_condition_emb" in missing:
        # transformers has filled it with random numbers; nobody may train towards those.
        model.null_condition_emb = None
    model.eval()
    model.decoder.to(device)
    return Handler(model, str(device), dtype)


# -- upstream's objects ----------------------------------------------------------------------------------------------


def build_configs(module: Any, request: Request, device: torch.device) -> tuple[Any, Any]:
    """Upstream's adapter and training configurations, with the fields that this version of it has.

    Raises:
        Refusal: a setting was given that this version has no field for, or a value that it refuses.
    """
    kind = request.adapter_type
    fields = ADAPTER_FIELDS[kind]
    settings = request.settings
    adapter = {fields[name]: settings[name] for name in fields if name in settings}
    training = {known: settings[name] for name, known in TRAINING_FIELDS.items() if name in settings}
    workers = training.get("num_workers", 0)
    precision = {"cuda": "bf16", "xpu": "bf16", "mps": "fp16"}.get(device.type, "fp32")
    ours = {
        "num_workers": 0,  # songs are small; worker processes cost seconds an epoch on Windows
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
        "mixed_precision": precision,
    }
    training["output_dir"] = str(request.output_dir.absolute())
    return (
        _build(getattr(module, upstream.CONFIG_CLASS[kind]), adapter, {}, fields),
        _build(module.TrainingConfig, training, ours, TRAINING_FIELDS),
    )


def _build(cls: Any, given: Mapping[str, Any], ours: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    known = {entry.name for entry in dataclasses.fields(cls)}
    unknown = [f"--{name.replace('_', '-')}" for name, entry in names.items() if entry in given and entry not in known]
    if unknown:
        raise Refusal(f"This ACE-Step's {cls.__name__} has no such setting: {', '.join(unknown)}. Leave it out.")
    try:
        return cls(**{name: value for name, value in ours.items() if name in known} | dict(given))
    except (TypeError, ValueError) as error:
        raise Refusal(f"ACE-Step refuses these settings: {error}") from None


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


def check_songs(dataset: Dataset, facts: ModelFacts) -> None:
    """Refuse songs that do not fit a model, as far as its config tells. Raises Refusal."""
    _check_widths(dataset, facts)
    _check_made_for(dataset, facts)


def _check_widths(dataset: Dataset, facts: ModelFacts) -> None:
    channels = facts.config.get("in_channels")
    if isinstance(channels, int) and dataset.channels != channels:
        raise Refusal(
            f"The songs in {dataset.folder} have {dataset.channels} channels (latents and context), {facts.name} takes "
            f"{channels}: they were preprocessed otherwise. Preprocess them again with this model."
        )
    width = facts.config.get("encoder_hidden_size") or facts.config.get("hidden_size")
    if isinstance(width, int):
        _fail_on_width(dataset, facts.name, width)


def _fail_on_width(dataset: Dataset, model: str, width: int) -> None:
    if dataset.condition_width != width:
        raise Refusal(
            f"The songs in {dataset.folder} have conditions of width {dataset.condition_width}, {model} "
            f"expects {width}: they were preprocessed for another model. Preprocess them again with this one."
        )


def _check_made_for(dataset: Dataset, facts: ModelFacts) -> None:
    """Refuse songs whose conditions were made by the encoder of another family, where somebody wrote that down."""
    said = made_for(dataset.folder)
    if said is None:
        return
    turbo = facts.config.get("is_turbo", "turbo" in words_of(facts.name))
    then, now = words_of(said), words_of(facts.name)
    if not {"turbo", "base", "sft"} & set(then):
        return
    if ("turbo" in then) != turbo or ("xl" in then) != ("xl" in now):
        raise Refusal(
            f"The songs in {dataset.folder} were preprocessed for {said} (preprocess_meta.json), and {facts.name} has "
            "another condition encoder. Preprocess them again with this model; if the file is wrong, delete it."
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
