"""The miniature: a tiny stand-in for an ACE-Step 1.5 checkout. It makes no music.

Its models are small random networks with the shape of ACE-Step's, its songs are made-up tensors that have
something in common, and its trainer (`checkout/acestep/training/`) is our own short text that keeps the contract of
ACE-Step's trainer, traps included. With it a fresh machine runs the whole training job on a CPU in seconds, and tests
reach every seam. An adapter trained on it is useless.

`build()` writes a folder like this one, the same bytes every time:

    ACE-Step-miniature/            what `--acestep-root` wants
        acestep/training/…         copied from `checkout/`
        checkpoints/acestep-v15-base/ …   config.json, model.safetensors, silence_latent.pt, the two files of `model/`
    tensors/                       preprocessed songs, as `--dataset-dir` wants them
    tensors-xl/                    the same for XL models, whose conditions are narrower; only if one is built

torch is imported when something is written, not when this module is.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .encoders import write_audio as write_audio
from .encoders import write_encoders, write_json

OFFICIAL_MODELS = tuple(
    f"acestep-v15-{name}"
    for name in (
        "base", "sft", "turbo", "turbo-shift1", "turbo-shift3", "turbo-continuous", "xl-base", "xl-sft", "xl-turbo",
    )
)  # fmt: skip
MODELS = OFFICIAL_MODELS[:3]

CONDITION_WIDTH = 64
XL_CONDITION_WIDTH = 48  # an XL decoder is wider than the encoder that feeds it

_HERE = Path(__file__).parent
_MODEL_FILES = ("configuration_acestep_v15.py", "modeling_acestep_v15_miniature.py")


@dataclass(frozen=True)
class Miniature:
    """Where the parts of a built miniature are."""

    root: Path
    checkpoints: Path
    tensors: Path

    @property
    def xl_tensors(self) -> Path:
        """The songs for XL models; there only if an XL model was built."""
        return self.tensors.with_name(f"{self.tensors.name}-xl")

    def tensors_for(self, model: str) -> Path:
        """The songs whose conditions are as wide as this model expects."""
        return self.xl_tensors if _is_xl(model) else self.tensors


def build(directory: Path, *, models: Sequence[str] = MODELS, songs: int = 6, encoders: bool = False) -> Miniature:
    """Write the checkout, the named models and the songs; an earlier build there is overwritten.

    Args:
        directory: where to.
        models: names of official models.
        songs: how many preprocessed songs.
        encoders: whether the VAE and the text encoder are written as well, which preparing songs needs.
    """
    for name in models:
        if name not in OFFICIAL_MODELS:
            raise ValueError(f"no official model is named {name!r}; there are {', '.join(OFFICIAL_MODELS)}")
    root = directory / "ACE-Step-miniature"
    miniature = Miniature(root=root, checkpoints=root / "checkpoints", tensors=directory / "tensors")
    write_checkout(miniature.root)
    for name in models:
        write_model(miniature.checkpoints, name, seed=1 + OFFICIAL_MODELS.index(name))
    if encoders:
        write_encoders(miniature.checkpoints)
    write_tensors(miniature.tensors, condition_width=CONDITION_WIDTH, songs=songs, seed=101)
    if any(_is_xl(name) for name in models):
        write_tensors(miniature.xl_tensors, condition_width=XL_CONDITION_WIDTH, songs=songs, seed=102)
    return miniature


def write_checkout(root: Path) -> Path:
    """Copy the stand-in `acestep` package into `root`; return `root`."""
    source = _HERE / "checkout"
    for file in sorted(source.rglob("*.py")):
        target = root / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return root


def write_model(directory: Path, name: str, *, seed: int, **config_overrides: Any) -> Path:
    """Write a model folder which `AutoModel.from_pretrained(…, trust_remote_code=True)` loads; return it.

    Args:
        directory: The checkpoints folder; the model goes to `directory/name`.
        name: An official name or any other. Its words say what config.json says: `turbo`, `xl`.
        seed: What the weights are drawn from.
        **config_overrides: Keys of config.json to set otherwise; None leaves a key out of the file.
    """
    import torch
    from safetensors.torch import save_file

    modeling = import_module(f"{__name__}.model.modeling_acestep_v15_miniature")
    settings: dict[str, Any] = {
        "architectures": ["AceStepConditionGenerationModel"],
        "auto_map": {
            "AutoConfig": "configuration_acestep_v15.AceStepConfig",
            "AutoModel": "modeling_acestep_v15_miniature.AceStepConditionGenerationModel",
        },
        "data_proportion": 0.5,
        "dtype": "float32",
        "encoder_hidden_size": XL_CONDITION_WIDTH if _is_xl(name) else None,
        "hidden_size": 64,
        "intermediate_size": 64,
        "is_turbo": "turbo" in name.split("-"),
        "model_type": "acestep",
        "model_version": name.removeprefix("acestep-v15-"),
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "text_hidden_dim": 32,
        "timestep_mu": -0.4,
        "timestep_sigma": 1.0,
        **config_overrides,
    }
    settings = {key: value for key, value in settings.items() if value is not None}

    with torch.device("meta"):  # shapes only: building it for real would draw from the global generator
        model = modeling.AceStepConditionGenerationModel(modeling.AceStepConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, weight in model.state_dict().items():
        scale = 1.0 if key == "null_condition_emb" else weight.shape[-1] ** -0.5
        drawn = torch.randn(weight.shape, generator=generator, device="cpu", dtype=torch.float32)
        weights[key] = scale * drawn

    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in _MODEL_FILES:
        shutil.copyfile(_HERE / "model" / file, folder / file)
    write_json(folder / "config.json", settings)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # As beside every official model: what a generation from nothing has for context.
    silence = 0.1 * torch.randn((1, 64, 40), generator=generator, device="cpu", dtype=torch.float32)
    torch.save(silence, folder / "silence_latent.pt")
    return folder


def write_tensors(directory: Path, *, condition_width: int, songs: int, seed: int) -> Path:
    """Write `songs` preprocessed songs of different lengths and their manifest; return the folder.

    They can be learned: all share a sound and the direction of their prompts, and each adds a sound of its own and
    noise. So a training of seconds has a loss that falls.
    """
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    names = [f"song_{number:02d}.pt" for number in range(1, songs + 1)]
    sound, prompt = noise(64), noise(condition_width)
    for index, name in enumerate(names):
        frames, tokens = 16 + 4 * (index % 5), 6 + 3 * (index % 4)
        song = {
            "target_latents": 1.5 * sound + 0.3 * noise(64) + 0.3 * noise(frames, 64),
            "attention_mask": torch.ones(frames),
            "encoder_hidden_states": 0.7 * prompt + 0.7 * noise(tokens, condition_width),
            "encoder_attention_mask": torch.ones(tokens),
            "context_latents": torch.cat([0.1 * noise(frames, 64), torch.ones(frames, 64)], dim=-1),
            "metadata": {
                "filename": name.replace(".pt", ".wav"),
                "caption": f"made-up tensors, number {index + 1}",
                "lyrics": "[Instrumental]",
                "bpm": 90 + 5 * index,
                "is_instrumental": True,
            },
        }
        torch.save(song, directory / name)
    manifest = {"metadata": {"name": "miniature"}, "num_samples": len(names), "samples": names}
    write_json(directory / "manifest.json", manifest)
    return directory


def _is_xl(model: str) -> bool:
    return "xl" in model.split("-")
