"""What ACE-Step's decoder is told about a song when the app generates it: by the app's own functions, bit for bit.

Upstream's preprocessing encodes a song in another way than its generation does: without the header and the end mark of
the lyrics, cut at 512 tokens, padded, and with zeros for reference audio. Here the text goes through the functions of
the app's handler, as text2music with "Think" off calls them, and what they return is what the decoder would receive.

This needs the condition encoder of the model, the text encoder with its tokenizer, and the latents of silence; neither
decoder, VAE nor language model. ``initialize_service`` of the app is never called: it would download models, overwrite
model code and put the whole decoder on the GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import Refusal, UpstreamMismatch
from .checkout import import_module_of, not_automatic

if TYPE_CHECKING:
    import torch

HANDLER: Final = "acestep.handler"
_CONSTANTS: Final = "acestep.constants"
_PREPROCESSING: Final = "acestep.training.dataset_builder_modules"

TEXT_ENCODER: Final = "Qwen3-Embedding-0.6B"
"""Folder of ACE-Step's text encoder, beside the folders of the models."""

SAMPLES_A_FRAME: Final = 1920
"""Samples at 48 kHz of one frame of latents."""

PROMPT_TOKENS: Final = 256
"""Tokens of a prompt that a generation keeps."""
LYRIC_TOKENS: Final = 2048
"""Tokens of lyrics, header included, that a generation keeps."""

_NEEDED: Final = ("prepare_batch_data", "_prepare_batch", "preprocess_batch", "_format_lyrics")


@dataclass(frozen=True)
class Words:
    """What the app is asked for when it generates a song."""

    caption: str
    lyrics: str  # "[Instrumental]" for none
    language: str  # of the lyrics, such as "en"; "unknown" for none
    bpm: int | float | str | None  # beats per minute; None if unknown
    keyscale: str  # such as "F# minor"; "" if unknown
    timesignature: str  # such as "4"; "" if unknown
    seconds: float  # length of the song; the prompt states it without its fraction


@dataclass(frozen=True)
class Told:
    """The texts that the encoders read."""

    prompt: str  # instruction, caption and metadata
    lyrics: str  # the lyrics with header and end mark
    prompt_tokens: int  # before anything is cut
    lyric_tokens: int

    @property
    def prompt_lost(self) -> int:
        """Tokens of the prompt that the model never sees."""
        return max(0, self.prompt_tokens - PROMPT_TOKENS)

    @property
    def lyrics_lost(self) -> int:
        """Tokens of the lyrics that the model never sees."""
        return max(0, self.lyric_tokens - LYRIC_TOKENS)


@dataclass(frozen=True)
class Encoded:
    """What the decoder receives for a song."""

    encoder_hidden_states: torch.Tensor  # the conditions, shape [L,D], on the CPU in the model's dtype
    encoder_attention_mask: torch.Tensor  # shape [L], ones in the same dtype; upstream's has zeros for its padding
    context_latents: torch.Tensor  # silence and a mask of ones side by side, shape [T,128]
    told: Told


def import_handler(root: Path | None) -> Any:
    """The class ``AceStepHandler`` of upstream, from a checkout when one is given.

    Raises:
        UpstreamMismatch: it cannot be imported, or lacks a function that is needed; says which.
    """
    handler = getattr(import_module_of(HANDLER, root, "Its app does not start either."), "AceStepHandler", None)
    if lacking := [name for name in _NEEDED if not callable(getattr(handler, name, None))]:
        raise UpstreamMismatch(
            f"{HANDLER}.AceStepHandler has no {', '.join(lacking)}, so conditions as generated cannot be made. "
            "Use ACE-Step's main repository, or --conditions upstream."
        )
    return handler


def make_handler(
    handler_class: Any,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    model: Any = None,
    vae: Any = None,
    tokenizer: Any = None,
    text_encoder: Any = None,
    silence: torch.Tensor | None = None,
) -> Any:
    """A handler of upstream's with the given parts, and nothing downloaded, moved or compiled.

    Args:
        silence: the latents of silence, shape [1,N,64]. None: zeros, which is enough for looking at texts.
    """
    import torch

    dtype = torch.float32 if dtype is None else dtype
    handler = handler_class()
    silence = torch.zeros(1, 750, 64) if silence is None else silence
    vars(handler).update(
        model=model,
        config=getattr(model, "config", None),
        vae=vae,
        text_tokenizer=tokenizer,
        text_encoder=text_encoder,
        silence_latent=silence.to(device, dtype),
        device=device,
        dtype=dtype,
        _models_loaded=True,  # one fork asks for it
    )
    workaround = getattr(handler, "_apply_cuda_bool_argsort_workaround", None)
    if model is not None and callable(workaround):
        workaround()
    return handler


def encode(handler: Any, words: Words, frames: int) -> Encoded:
    """What the decoder receives when the app generates a song of these words | draws no random number.

    Args:
        handler: with model, tokenizer, text encoder and silence.
        frames: length of the song in frames of latents. The app generates at least 128 frames; what it hands to the
            decoder is cut to this length.

    Raises:
        UpstreamMismatch: this version of ACE-Step works in another way.
        Refusal: this version cannot generate a song of this length.
    """
    import torch

    with torch.inference_mode():
        batch, told = _batch_of(handler, words, frames)
        prepared = handler.preprocess_batch(batch)
        try:
            _, _, source, _, text, text_mask, lyrics, lyric_mask, _, reference, order, chunk, *_ = prepared
        except (TypeError, ValueError) as error:
            raise _changed("preprocess_batch", error) from error
        with handler._load_model_context("model"):  # the app may have put the model aside
            states, mask = handler.model.encoder(
                text_hidden_states=text,
                text_attention_mask=text_mask,
                lyric_hidden_states=lyrics,
                lyric_attention_mask=lyric_mask,
                refer_audio_acoustic_hidden_states_packed=reference,
                refer_audio_order_mask=order,
            )
        context = torch.cat([source, chunk.to(source.dtype)], dim=-1)
    if len(states) != 1 or not bool(mask.all()):
        raise _changed("preprocess_batch", ValueError("a single song has rows that are padding"))
    if context.shape[1] < frames:
        raise Refusal(
            f"This ACE-Step generates at most {context.shape[1]} frames, and the song has {frames}. Shorten the song, "
            "or use a newer version of ACE-Step."
        )
    states = states[0].cpu().clone()
    return Encoded(states, torch.ones(len(states), dtype=states.dtype), context[0, :frames].cpu().clone(), told)


def encode_as_upstream(handler: Any, words: Words, frames: int) -> Encoded:
    """What upstream's own preprocessing saves for these words in its "lora" mode, by its own functions.

    The lyrics have no header and are cut at 512 tokens, everything is padded to 256 + 512 tokens, and the reference
    audio is one frame of zeros.

    Args:
        handler: with model, tokenizer, text encoder and silence.
        frames: length of the song in frames of latents.

    Raises:
        UpstreamMismatch: this version of ACE-Step has no such functions.
    """
    import torch

    device, dtype = torch.device(handler.device), handler.dtype
    try:
        with not_automatic():
            names = ("models", "preprocess_text", "preprocess_lyrics", "preprocess_encoder", "preprocess_context")
            models, text, lyrics, encoder, context = (
                importlib.import_module(f"{_PREPROCESSING}.{name}") for name in names
            )
        said = {name: value for name, value in vars(words).items() if name != "seconds"}
        sample = models.AudioSample(**said, duration=int(words.seconds), labeled=True)
        prompt = text.build_text_prompt(sample, "prepend", False)
        sung = words.lyrics or "[Instrumental]"
        parts = (handler.text_encoder, handler.text_tokenizer)
        text_states, text_mask = text.encode_text(*parts, prompt, device, dtype)
        with_language = "vocal_language" in inspect.signature(lyrics.encode_lyrics).parameters
        lines = (sung, words.language) if with_language else (sung,)
        lyric_states, lyric_mask = lyrics.encode_lyrics(*parts, *lines, device, dtype)
        states, mask = encoder.run_encoder(
            handler.model,
            text_hidden_states=text_states,
            text_attention_mask=text_mask,
            lyric_hidden_states=lyric_states,
            lyric_attention_mask=lyric_mask,
            device=device,
            dtype=dtype,
        )
        latents = context.build_context_latents(handler.silence_latent, frames, device, dtype)
    except (ImportError, AttributeError, TypeError) as error:
        raise UpstreamMismatch(
            f"The preprocessing of this ACE-Step has other functions ({type(error).__name__}: {error}), so "
            "--conditions upstream cannot be made. Use ACE-Step's main repository, or its own LoRA tab."
        ) from error
    told = _told(handler, prompt, sung)
    return Encoded(states[0].cpu().clone(), mask[0].cpu().clone(), latents[0].cpu().clone(), told)


def read_words(handler: Any, words: Words) -> Told:
    """The texts that the encoders would read, without encoding them; the handler needs only a tokenizer."""
    import torch

    with torch.inference_mode():
        return _batch_of(handler, words, 128)[1]


def _batch_of(handler: Any, words: Words, frames: int) -> tuple[Any, Told]:
    """Upstream's batch of one song, and the texts in it."""
    import torch

    instruction = importlib.import_module(_CONSTANTS).DEFAULT_DIT_INSTRUCTION
    try:
        captions, instructions, lyrics, languages, metas = handler.prepare_batch_data(
            1, None, words.seconds, words.caption, words.lyrics, words.language, instruction, words.bpm,
            words.keyscale, words.timesignature,
        )  # fmt: skip
        batch = handler._prepare_batch(
            captions=captions,
            instructions=instructions,
            lyrics=lyrics,
            vocal_languages=languages,
            metas=metas,
            target_wavs=torch.zeros(1, 2, frames * SAMPLES_A_FRAME),
            refer_audios=[[torch.zeros(2, 30 * handler.sample_rate)]],
        )
        whole = batch["text_inputs"][0]
        sung = handler._format_lyrics(words.lyrics, words.language)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise _changed("_prepare_batch", error) from error
    if not whole.endswith(f"\n\n{sung}"):
        raise _changed("_prepare_batch", ValueError("the lyrics are not at the end of the text"))
    return batch, _told(handler, whole[: -len(sung) - 2], sung)


def _told(handler: Any, prompt: str, lyrics: str) -> Told:
    prompt_tokens, lyric_tokens = (len(handler.text_tokenizer(text).input_ids) for text in (prompt, lyrics))
    return Told(prompt, lyrics, prompt_tokens, lyric_tokens)


def encode_audio(vae: Any, audio: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """The latents of a song, by upstream's own way of encoding it in windows.

    Args:
        vae: on its device, in its dtype, in eval mode.
        audio: shape [2,N], 48 kHz.
        dtype: of the latents.
        seed: the VAE's latents are drawn from a distribution; the same seed gives the same draw. The random states of
            the CPU and of the VAE's device are afterwards as they were.

    Returns:
        Shape [T,64], on the CPU. T is about N / 1920; upstream's windows can lose one frame at a seam.
    """
    import torch

    device = next(vae.parameters()).device
    encoder = _encoder_of_audio()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        latents: torch.Tensor = encoder(vae, audio.unsqueeze(0).to(device, vae.dtype), dtype)
    return latents.squeeze(0).cpu().clone()


def _encoder_of_audio() -> Any:
    """Upstream's function (vae, audio, dtype): with windows, in older versions in one piece."""
    try:
        with not_automatic():
            module = importlib.import_module(f"{_PREPROCESSING}.preprocess_vae")
    except ImportError:
        return _in_one_piece
    for name in ("tiled_vae_encode", "vae_encode"):
        function = getattr(module, name, None)
        if callable(function) and len(inspect.signature(function).parameters) >= 3:
            return function
    return _in_one_piece


def _in_one_piece(vae: Any, audio: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As versions without windows encode, inside of their preprocessing."""
    latents: torch.Tensor = vae.encode(audio).latent_dist.sample().transpose(1, 2).to(dtype)
    return latents


def _changed(where: str, error: Exception) -> UpstreamMismatch:
    return UpstreamMismatch(
        f"{where} of this ACE-Step works otherwise than in every version that is known ({type(error).__name__}: "
        f"{error}), so conditions as generated cannot be made. Use ACE-Step's main repository, or --conditions "
        "upstream."
    )


# -- loading -----------------------------------------------------------------------------------------------------------


def dtype_on(device: torch.device) -> torch.dtype:
    """The dtype in which the app computes on a device: bf16 where a GPU can, fp16 on older ones, fp32 elsewhere."""
    import torch

    if device.type == "xpu":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.float32


def attention_on(device: torch.device) -> str:
    """How the app's attention is computed on a device: by flash attention where it is installed, else by torch."""
    import torch

    if device.type != "cuda":
        return "sdpa"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "eager"
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"


def find_text_encoder(checkpoints: Path) -> Path:
    """The folder of the text encoder. Raises Refusal."""
    folder = checkpoints / TEXT_ENCODER
    if not (folder / "config.json").is_file():
        raise Refusal(
            f"No text encoder: expected the folder {folder}, with config.json. ACE-Step's own command downloads it "
            "with the main models: acestep-download"
        )
    return folder


def load_tokenizer(folder: Path) -> Any:
    """The text encoder's tokenizer, from local files. Raises Refusal."""
    return _loaded("AutoTokenizer", folder)


def load_text_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The text encoder, from local files, on a device. Raises Refusal."""
    return _loaded("AutoModel", folder).to(dtype).to(device).eval()


def load_condition_encoder(folder: Path, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    """A model whose condition encoder is on a device, and whose decoder is given up. Raises Refusal.

    The decoder is read into the CPU's memory and never reaches the device.
    """
    import transformers

    of_dtype = (
        "dtype" if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) >= (4, 56) else "torch_dtype"
    )
    settings = {"trust_remote_code": True, "attn_implementation": attention, of_dtype: dtype}
    model = _loaded("AutoModel", folder, **settings)
    model.config._attn_implementation = attention
    model.decoder = None
    model.encoder.to(device, dtype)
    return model.eval()


def _loaded(kind: str, folder: Path, **settings: Any) -> Any:
    """What one of transformers' Auto classes makes of local files. Raises Refusal."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True, **settings)
    except (Exception, SystemExit) as error:  # the model's own code may do anything
        reason = " ".join(str(error).split())
        raise Refusal(
            f"{folder} cannot be loaded: {type(error).__name__}: {reason}. Use ACE-Step's own Python environment; if "
            "you do, download it again."
        ) from error
