"""What turns audio and texts into songs, as stand-ins: a VAE, a text encoder with its tokenizer, and a few wav files.

They lie beside the miniature's models as the official ones do, under the same names.
"""

from __future__ import annotations

import json
import math
import shutil
import wave
from pathlib import Path
from typing import Any, Final

TEXT_ENCODER: Final = "Qwen3-Embedding-0.6B"
VAE: Final = "vae"

_HERE: Final = Path(__file__).parent
_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_RATE: Final = 48000

_SONGS: Final = (
    ("morning", "a slow bright melody, bells", "[Verse]\nLight on the river\nSlow is the day", "en", 80, "C major"),
    ("evening", "a slow dark melody, organ", "[Instrumental]", "", 80, "A minor"),
    ("harbour", "a calm song with a low voice", "[Strophe]\nSchiffe im Hafen\nAlles ist still", "de", 90, "G major"),
    ("mountain", "a wide melody, flute and strings", "[Instrumental]", "", 72, "D major"),
)
"""Name, caption, lyrics, language, bpm and key of the songs that are made on the spot."""


def write_encoders(checkpoints: Path, width: int = 32) -> None:
    """Write the VAE and the text encoder into a checkpoints folder; the same bytes every time."""
    _write_vae(checkpoints / VAE)
    _write_text_encoder(checkpoints / TEXT_ENCODER, width)


def write_audio(folder: Path, *, seconds: float = 12.0) -> Path:
    """Write four short wav files with what belongs to them, in the forms that people use; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, caption, lyrics, language, bpm, key) in enumerate(_SONGS):
        _write_wav(folder / f"{name}.wav", number, seconds, bpm)
        if number % 2 == 0:
            (folder / f"{name}.caption.txt").write_text(caption + "\n", encoding="utf-8")
            (folder / f"{name}.lyrics.txt").write_text(lyrics + "\n", encoding="utf-8")
            said = {"bpm": bpm, "keyscale": key, "timesignature": "4/4", "language": language}
            write_json(folder / f"{name}.json", said)
        else:
            text = f"caption: {caption}\nbpm: {bpm}\nkey: {key}\nsignature: 4/4\nlyrics:\n{lyrics}\n"
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def _write_wav(file: Path, number: int, seconds: float, bpm: int) -> None:
    """A melody of plain tones, which no two songs share."""
    import torch

    scale = torch.tensor([0, 2, 4, 7, 9, 12], dtype=torch.float64)
    beat = 60.0 / bpm
    at = torch.arange(int(seconds * _RATE), dtype=torch.float64) / _RATE
    note = (at / beat).floor()
    within = at - note * beat
    step = scale[((3 * note + (note / 4).floor() + number) % len(scale)).long()]
    pitch = 220.0 * 2.0 ** ((step - 2 * number) / 12.0)
    loudness = 0.5 * torch.exp(-2.0 * within) * (100.0 * within).clamp(max=1.0)
    samples = (32767 * loudness * torch.sin(2.0 * math.pi * pitch * within)).round().to(torch.int16)
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(2)
        stream.setsampwidth(2)
        stream.setframerate(_RATE)
        stream.writeframes(samples.repeat_interleave(2).numpy().tobytes())


def _write_vae(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_HERE / "model" / "modeling_miniature_vae.py", folder / "modeling_miniature_vae.py")
    code = "modeling_miniature_vae"
    settings = {
        "architectures": ["MiniatureVAE"],
        "auto_map": {"AutoConfig": f"{code}.MiniatureVAEConfig", "AutoModel": f"{code}.MiniatureVAE"},
        "decoder_input_channels": 64,
        "hop": 1920,
        "model_type": "miniature_vae",
        "sampling_rate": _RATE,
    }
    write_json(folder / "config.json", settings)
    save_file({"gain": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})


def _write_text_encoder(folder: Path, width: int) -> None:
    """A Qwen3 model of two layers, and a tokenizer of bytes that ends a text as the original does."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*_SPECIAL, *sorted(_byte_signs())]
    write_json(folder / "tokenizer.json", _tokenizer(tokens))
    about = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "model_max_length": 131072}
    write_json(folder / "tokenizer_config.json", about | {"tokenizer_class": "PreTrainedTokenizerFast"})
    layers, heads, size = 2, 2, 16
    settings = {
        "architectures": ["Qwen3Model"],
        "head_dim": size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 4096,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "vocab_size": len(tokens),
    }
    write_json(folder / "config.json", settings)
    generator = torch.Generator().manual_seed(11)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (len(tokens), width), "norm.weight": (width,)}
    for layer in range(layers):
        at = f"layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.post_attention_layernorm.weight": (width,),
            f"{at}.mlp.down_proj.weight": (width, 2 * width),
            f"{at}.mlp.gate_proj.weight": (2 * width, width),
            f"{at}.mlp.up_proj.weight": (2 * width, width),
            f"{at}.self_attn.k_norm.weight": (size,),
            f"{at}.self_attn.k_proj.weight": (size, width),
            f"{at}.self_attn.o_proj.weight": (width, heads * size),
            f"{at}.self_attn.q_norm.weight": (size,),
            f"{at}.self_attn.q_proj.weight": (heads * size, width),
            f"{at}.self_attn.v_proj.weight": (size, width),
        }
    weights = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator, dtype=torch.float32) * shape[1] ** -0.5
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _byte_signs() -> list[str]:
    """The signs that byte-level tokenizers write for the 256 bytes: themselves if printable, else one from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + place) for place in range(len(others)))]


def _tokenizer(tokens: list[str]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": content, "special": True, **plain} for number, content in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [],
        },
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object; the same bytes every time."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
