"""Model folders: finds one, checks its files, picks the device, and loads the model for training."""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import Refusal
from ..files import at_home, is_companion, not_a_file, stand_in
from ..run import ModelFacts
from ..text import counted, sentence
from ..variants import MODEL_ALIASES, words_of
from .checkout import find_root

if TYPE_CHECKING:
    import torch

_WEIGHT_DTYPES: Final = frozenset({"F64", "F32", "F16", "BF16"})
_READ: Final = frozenset({".safetensors", ".json", ".py"})
_UNQUANTIZED: Final = "Training needs the original weights, in bf16 or fp32. Use that model."


@dataclass
class Handler:
    """The part of the app's handler that upstream's trainers use."""

    model: Any
    device: str
    dtype: torch.dtype
    quantization: str | None = None


def checkpoint_folder(said: Path | None, root: Path) -> Path:
    """The folder of models: `said`, else ``$ACESTEP_CHECKPOINTS_DIR``, else ``checkpoints`` in the checkout."""
    if said is not None:
        return said
    from_environment = os.environ.get("ACESTEP_CHECKPOINTS_DIR", "").strip()
    try:
        return Path(at_home(from_environment)) if from_environment else root / "checkpoints"
    except Refusal as refusal:
        raise Refusal(f"Correct $ACESTEP_CHECKPOINTS_DIR, which is {from_environment}: {refusal}") from None


def checkpoints_of(said: Path | None, acestep_root: Path | None) -> Path:
    """The folder of models, for what needs no checkout: it is looked for only if nothing else says where they are.

    Raises:
        Refusal: nothing says where they are, and there is no checkout.
    """
    if said is not None or os.environ.get("ACESTEP_CHECKPOINTS_DIR", "").strip():
        return checkpoint_folder(said, Path())
    return checkpoint_folder(None, find_root(acestep_root))


def models_in(checkpoints: Path) -> list[str]:
    """Names of the model folders in a checkpoint folder, sorted."""
    try:
        return sorted(entry.name for entry in checkpoints.iterdir() if _is_model(entry))
    except OSError:
        return []


def _is_model(folder: Path) -> bool:
    """Whether a folder holds ACE-Step's DiT. The language model and the VAE beside it have another kind of config."""
    config = folder / "config.json"
    try:
        return config.is_file() and re.search(r'"model_type"\s*:\s*"acestep"', config.read_text("utf-8")) is not None
    except (OSError, UnicodeDecodeError):
        return False


def find_model(name: str, checkpoints: Path) -> Path:
    """The folder of a model: an alias ("base", "xl-sft"), a folder name, or a path. Raises Refusal."""
    name = at_home(name)
    candidates = [checkpoints / MODEL_ALIASES[name]] if name in MODEL_ALIASES else []
    if name.strip(".") and not re.search(r"[\\/]", name):  # a bare name, not a path
        candidates.append(checkpoints / name)
    candidates.append(Path(name).absolute())
    for candidate in candidates:
        if candidate.is_dir():
            return candidate.absolute()
    if _is_model(checkpoints):
        raise Refusal(
            f"--checkpoint-dir {checkpoints} is a model itself. Name the folder above it: {checkpoints.parent}"
        )
    if candidates[-1].is_file() and _is_model(candidates[-1].parent):
        raise Refusal(f"--model {name} is a file of a model. Name its folder: {candidates[-1].parent}")
    found = ", ".join(models_in(checkpoints)) or "none"
    last = re.split(r"[\\/]", name.lower())[-1]
    alias = "-".join(word for word in words_of(last) if word not in _IN_EVERY_NAME)
    near = [alias] if alias in MODEL_ALIASES else []
    near += difflib.get_close_matches(last, [*MODEL_ALIASES, *MODEL_ALIASES.values(), *models_in(checkpoints)], n=1)
    meant = f" Did you mean {near[0]}?" if near and near[0] != name else ""
    tried = " or ".join(str(candidate) for candidate in candidates)
    raise Refusal(
        f"No model {name!r}: expected the folder {tried}.{meant} Models in {checkpoints}: {found}. "
        "Name one of them with --model, say where they are (--checkpoint-dir DIR), or get one with ACE-Step's own "
        f"command: {download_command(name)}"
    )


_IN_EVERY_NAME: Final = frozenset({"ace", "step", "acestep", "v1", "5", "v15", "1"})
"""Words of a model's name that all of them have, in one spelling or another."""


def download_command(name: str = "base") -> str:
    """ACE-Step's command that downloads a model, for an alias or a folder's name; all of them for any other name."""
    folder = MODEL_ALIASES.get(name, name)
    return f"acestep-download --model {folder}" if folder in MODEL_ALIASES.values() else "acestep-download --list"


def check_weights(folder: Path, facts: ModelFacts) -> None:
    """Refuse quantized weights, and files that cannot be read, by their headers alone. Raises Refusal."""
    from safetensors import SafetensorError, safe_open

    files = [file for file in sorted(folder.iterdir()) if not is_companion(file.name)]
    for file in files:
        # Opening a named pipe would hang.
        if file.suffix in _READ and (problem := not_a_file(file)):
            raise Refusal(f"{file} {problem}. Copy the whole model folder again.")
    if facts.config.get("quantization_config") is not None:
        raise Refusal(f"{folder.name} is quantized (quantization_config in its config.json). {_UNQUANTIZED}")
    if not isinstance(facts.config.get("auto_map"), dict):
        raise Refusal(
            f"config.json of {folder.name} names no model code (auto_map). Copy the whole model folder again."
        )
    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - not a mapping
                    dtype = weights.get_slice(key).get_dtype()
                    if key.startswith("decoder.") and dtype not in _WEIGHT_DTYPES:
                        raise Refusal(f"{file.name} of {folder.name} is quantized ({key} is {dtype}). {_UNQUANTIZED}")
        except (SafetensorError, OSError) as error:
            if what := stand_in(file):
                raise Refusal(f"{file} {what}. Complete the model's folder, or download it again.") from None
            raise Refusal(f"{file} cannot be read ({error}). Download it again.") from None


def decoder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The decoder's layers that an adapter can be trained on, such as ``layers.0.self_attn.q_proj``, with their shapes.

    Read from the headers of the weights, before anything is loaded; check_weights has read them before. Empty for a
    model without safetensors.
    """
    from safetensors import safe_open

    layers = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a mapping
                shape = tuple(weights.get_slice(key).get_shape())
                if key.startswith("decoder.") and key.endswith(".weight") and len(shape) > 1:
                    layers[key.removeprefix("decoder.").removesuffix(".weight")] = shape
    return layers


def pick_device(said: str) -> torch.device:
    """The device to train on | given auto, cpu, cuda, cuda:N, mps or xpu | raises Refusal when there is none."""
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
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if hidden is None or not said.startswith("cuda") else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
        raise Refusal(
            f"No {said} on this machine: torch {torch.__version__} sees {', '.join(present)}{why}. Choose one of these."
        )
    # By now a chosen GPU is the only visible one, so it is the first.
    return torch.device(said.split(":")[0])


def restrict_gpus(said: str) -> None:
    """Make ``cuda:N`` the only visible GPU, as upstream's trainer takes the first. Call it before CUDA is used."""
    if said.startswith("cuda:"):
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
        index = int(said.partition(":")[2])
        if visible and index >= len(visible):
            raise Refusal(
                f"No {said}: CUDA_VISIBLE_DEVICES shows {counted(len(visible), 'GPU')}, counted from cuda:0. "
                "Choose one."
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index].strip() if visible else str(index)


def load_model(folder: Path, device: torch.device) -> Handler:
    """Load a model folder for training, from local files only.

    The dtype is bf16 on cuda and xpu and fp32 elsewhere: the compute dtype of upstream's trainer, or a wider one. Only
    the decoder is moved to the device, as training calls nothing else.

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
        place = error.filename if isinstance(error, OSError) else None
        if isinstance(error, OSError) and isinstance(place, str) and not Path(place).is_relative_to(folder):
            raise Refusal(
                f"transformers copies the code of {folder.name} into its cache, and cannot write there: "
                f"{error.strerror}: {place}. "
                "Correct $HF_HOME, or name a folder that can be written: HF_MODULES_CACHE=DIR"
            ) from error
        reason = sentence(f"{type(error).__name__}: {error}")
        raise Refusal(
            f"{folder} cannot be loaded as a model: {reason} Use ACE-Step's own Python environment; if you do, "
            "download the model again."
        ) from error
    missing = sorted(loaded["missing_keys"])
    lost = [key for key in missing if key.startswith("decoder.")]
    if lost:
        raise Refusal(
            f"The weights of {folder.name} lack {counted(len(lost), 'tensor')} of the decoder ({lost[0]}, ...). "
            "Download it again."
        )
    if "null_condition_emb" in missing:
        # transformers has filled it with random numbers, which must not be trained on.
        model.null_condition_emb = None
    model.eval()
    model.decoder.to(device)
    return Handler(model, str(device), dtype)
