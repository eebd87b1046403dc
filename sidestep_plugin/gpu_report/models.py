"""Models with random weights, which cost what real ones cost, and songs for them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Final

import torch

from ..engine.models import Handler, load_model
from ..errors import Refusal
from ..memory.estimate import FRAMES_A_SECOND, USUAL_TOKENS
from ..memory.sizes import DecoderSize
from ..run import read_config
from .jobs import SIZES, Job

_FAMILY: Final = {"tiny": "base", "2b": "base", "xl": "xl_base"}  # the folder of ACE-Step's model code for each size

# Only the decoder is trained; the rest of the model is as small as its code allows.
_ENCODERS: Final = {
    f"num_{name}_hidden_layers": 1 for name in ("lyric_encoder", "timbre_encoder", "attention_pooler", "audio_decoder")
}
_TINY_REST: Final = {"text_hidden_dim": 32, "fsq_dim": 64, "sliding_window": 32}


def size_of(job: Job) -> DecoderSize:
    """The decoder's size of a job. Raises Refusal when the given config.json does not say it."""
    if job.size != "xl" or not job.xl_config:
        return SIZES[job.size]
    size = DecoderSize.from_config(read_config(Path(job.xl_config)))
    if size is None:
        raise Refusal(f"{job.xl_config} does not say how large the model is. Copy the model folder again.")
    return size


def random_model(trainer: Any, job: Job, folder: Path) -> Handler:
    """A base model with random weights, its decoder on the device, as ``acestep-train`` loads one.

    Its config.json and silence_latent.pt are written into `folder`. Draws from the default generators of torch, which
    are seeded with 0 before. Raises Refusal.
    """
    from ..miniature import write_model

    name = f"acestep-v15-{'xl-' if job.size == 'xl' else ''}base"
    device = torch.device(job.device)
    if not job.root:
        return load_model(write_model(folder, name, seed=1), device)
    place = folder / name
    place.mkdir(parents=True)
    facts = {"is_turbo": False, "model_type": "acestep", "timestep_mu": -0.4, "timestep_sigma": 1.0}
    (place / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    torch.save(0.1 * torch.randn(1, 64, 750), place / "silence_latent.pt")
    model_class, config = model_code(trainer, job, place)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:  # billions of random numbers take minutes on a CPU
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    model.eval().to("cpu", dtype)
    model.decoder.to(device)  # training calls nothing else
    return Handler(model, job.device, dtype)


def model_code(trainer: Any, job: Job, place: Path) -> tuple[Any, Any]:
    """The class of a job's model, and the config to make one with; its name is that of `place`. Raises Refusal."""
    family, package = _FAMILY[job.size], trainer.__name__.partition(".")[0]
    files = sorted((Path(job.root) / package / "models" / family).glob("modeling*.py"))
    if not files:
        raise Refusal(
            f"{job.root} has no model code in {package}/models/{family}. Use ACE-Step's main version, or another "
            "--size."
        )
    code = importlib.import_module(f"{package}.models.{family}.{files[0].stem}")
    model_class, size = code.AceStepConditionGenerationModel, size_of(job)
    sizes: dict[str, Any] = {
        "hidden_size": size.width,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "head_dim": size.head_dim,
        "layer_types": ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(size.layers)],
        **_ENCODERS,
        **(_TINY_REST if job.size == "tiny" else {}),
    }
    if size.condition_width != size.width:
        # The widths of XL's condition encoder are those of the 2B model, whose encoder it has.
        two_b = SIZES["2b"]
        sizes |= {
            "encoder_hidden_size": size.condition_width,
            "encoder_intermediate_size": two_b.feed_forward,
            "encoder_num_attention_heads": two_b.heads,
            "encoder_num_key_value_heads": two_b.key_value_heads,
        }
    config_class = model_class.config_class or code.AceStepConfig
    return model_class, config_class(
        **sizes, is_turbo=False, model_version="base", name_or_path=str(place), attn_implementation="sdpa"
    )


def write_songs(folder: Path, job: Job, width: int) -> Path:
    """Write random songs with conditions as long as upstream's preprocessing makes them; return the folder."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    frames, tokens = max(1, int(FRAMES_A_SECOND * job.song_seconds)), USUAL_TOKENS

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for number in range(job.songs):
        song = {
            "target_latents": noise(frames, 64),
            "attention_mask": torch.ones(frames),
            "encoder_hidden_states": noise(tokens, width),
            "encoder_attention_mask": torch.ones(tokens),
            "context_latents": noise(frames, 128),
            "metadata": {},
        }
        torch.save(song, folder / f"song_{number}.pt")
    return folder
