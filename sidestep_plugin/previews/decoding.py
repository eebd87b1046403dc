"""From latents to sound: the VAE of the checkpoint folder, loaded when it is needed, in windows for long clips."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import Refusal
from ..files import at_home, read_json_object
from ..text import sentence
from .conditions import LATENT_CHANNELS

if TYPE_CHECKING:
    import torch

FOLDER: Final = "vae"  # folder of ACE-Step's VAE, beside the folders of the models

WINDOW: Final = 500  # frames that are decoded at once: 20 seconds
OVERLAP: Final = 64
"""Frames on either side of a window that are decoded with it and thrown away, as in ACE-Step's own tiled decoding."""


def find_vae(checkpoints: Path | None) -> Path | None:
    """The VAE's folder below a folder of models, else below ``$ACESTEP_CHECKPOINTS_DIR``; None if there is none."""
    said = os.environ.get("ACESTEP_CHECKPOINTS_DIR", "").strip()
    places = [place / FOLDER for place in (checkpoints, Path(at_home(said)) if said else None) if place is not None]
    return next((place for place in places if (place / "config.json").is_file()), None)


def why_not(folder: Path | None) -> str:
    """Why latents cannot be decoded, as the end of a sentence; "" when they can. Raises Refusal for another VAE."""
    if folder is None:
        return "the checkpoint folder has no vae folder"
    own = check_vae(folder)
    return "" if own or importlib.util.find_spec("diffusers") else "diffusers is not installed here"


def check_vae(folder: Path) -> bool:
    """Whether a VAE brings its own code (``auto_map`` in its config.json), as the miniature's does.

    Raises Refusal when ACE-Step's latents do not fit it.
    """
    try:
        config = read_json_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder / 'config.json'} cannot be read ({error}). Download the VAE again.") from None
    width = config.get("decoder_input_channels", LATENT_CHANNELS)
    kind = config.get("_class_name", "AutoencoderOobleck")
    own = isinstance(config.get("auto_map"), dict)
    if width != LATENT_CHANNELS or (kind != "AutoencoderOobleck" and not own):
        raise Refusal(
            f"The VAE in {folder} is an {kind} with {width} channels, expected ACE-Step's AutoencoderOobleck with "
            f"{LATENT_CHANNELS}. Download it again, or leave previews out."
        )
    return own


def load_vae(folder: Path, device: torch.device) -> Any:
    """Load the VAE: in half precision on cuda and xpu, in fp32 on the CPU for every other device. Raises Refusal."""
    import torch

    own = check_vae(folder)
    half = device.type == "xpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    place = device if half or device.type == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if half else torch.float16 if place.type == "cuda" else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers builds it with torch's older weight_norm
        load: Any  # diffusers has no types for it
        if own:
            from transformers import AutoModel

            load = partial(AutoModel.from_pretrained, trust_remote_code=True)
        else:
            from diffusers import AutoencoderOobleck

            load = partial(AutoencoderOobleck.from_pretrained, torch_dtype=dtype)
        try:
            vae = load(str(folder), local_files_only=True).to(dtype)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # diffusers and safetensors raise a dozen types for damaged files
            raise Refusal(f"The VAE in {folder} cannot be loaded: {sentence(error)} Download it again.") from error
    return vae.to(place).eval()


def rate_of(vae: Any) -> int:
    """The sampling rate of a VAE in Hz: 48,000 for ACE-Step's."""
    return int(vae.config.sampling_rate)


def decode(vae: Any, latents: torch.Tensor, *, window: int = WINDOW, overlap: int = OVERLAP) -> torch.Tensor:
    """Decode latents, shape [1,T,64], in overlapping windows. Returns samples, shape [C,N], fp32 on the CPU.

    The VAE stays where it is, in the type that it has. Draws no random number.
    """
    import torch

    weight = next(vae.parameters())
    frames = latents.shape[1]
    parts = []
    with torch.no_grad():
        for start in range(0, frames, window):
            end = min(start + window, frames)
            first, last = max(0, start - overlap), min(frames, end + overlap)
            piece = latents[:, first:last].to(weight.device, weight.dtype).transpose(1, 2).contiguous()
            samples = vae.decode(piece).sample[0].float().cpu()
            each = samples.shape[-1] // (last - first)  # samples of a frame
            parts.append(samples[:, (start - first) * each : (end - first) * each])
    return torch.cat(parts, dim=-1)
