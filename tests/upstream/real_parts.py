"""Tiny real parts for tests on a checkout: its own model code, a tiny Qwen3 text encoder with a tokenizer, a tiny VAE.

Everything has random weights and upstream's real classes and files, in the layout of an official checkpoint folder.
"""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from upstream.test_real_models import FILES, TINY, TINY_XL

FRAME = 1920
"""Samples of a frame."""

GERMAN = "\n".join(
    f"[Strophe {verse}]\nÜber den Flüssen zieht der Morgen auf, und jede Brücke trägt {verse} Lichter\n"
    "Wir gehen langsam, weil die Straße singt, und keiner fragt, wohin die Züge fahren"
    for verse in range(1, 12)
)
"""Lyrics that are longer than 512 tokens of the tiny tokenizer, which is what upstream's preprocessing keeps."""

SONGS = {
    "instrumental": {
        "caption": "a slow piano piece, felt, close microphones",
        "lyrics": "[Instrumental]",
        "language": "unknown",
        "bpm": 72,
        "keyscale": "A minor",
        "timesignature": "4",
        "seconds": 12.4,
    },
    "short": {
        "caption": "bright synth pop with a female voice",
        "lyrics": "[Verse]\nLights over the harbour\n[Chorus]\nStay a little longer",
        "language": "en",
        "bpm": 118,
        "keyscale": "F# major",
        "timesignature": "3",
        "seconds": 7.0,
    },
    "german": {
        "caption": "Deutschrock, rauer Gesang, zwei Gitarren",
        "lyrics": GERMAN,
        "language": "de",
        "bpm": None,
        "keyscale": "",
        "timesignature": "",
        "seconds": 31.0,
    },
}


def write_text_encoder(folder, width=32):
    """Save a tiny Qwen3 model and a byte-level tokenizer that ends every text as the original does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([GERMAN, "# Languages\n\n# Lyric\n# Instruction\n# Caption\n# Metas\n"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=131072
    )
    made.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(made),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=4096,
    )
    torch.manual_seed(5)
    Qwen3Model(config).save_pretrained(folder)
    return folder


def quick_encoder(vae):
    """Put a convolution into the place of a VAE's encoder, which takes seconds for a second of audio on a CPU."""
    torch.manual_seed(9)
    convolution = torch.nn.Conv1d(2, 128, FRAME, stride=FRAME)
    vae.encoder = convolution.to(next(vae.parameters()))
    return vae.eval()


def tiny_vae():
    """A real AutoencoderOobleck with next to no weights, whose encoder is a convolution."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from diffusers import AutoencoderOobleck

        torch.manual_seed(3)
        vae = AutoencoderOobleck(
            encoder_hidden_size=128,
            downsampling_ratios=[2, 4, 4, 6, 10],
            channel_multiples=[1, 1, 1, 1, 1],
            decoder_channels=4,
            decoder_input_channels=64,
            audio_channels=2,
            sampling_rate=48000,
        )
    return quick_encoder(vae)


def write_model(checkpoints, family, *, attention="sdpa", silence=900):
    """Save a tiny model of a family in a folder that loads like an official one, biases included."""
    modeling = modeling_of(family)
    config = modeling.AceStepConfig(**(TINY_XL if family.startswith("xl") else TINY))
    torch.manual_seed(len(family))
    model = modeling.AceStepConditionGenerationModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):  # zero biases would make the zero reference a zero row
                weight.add_(0.2 * torch.randn_like(weight))
    folder = checkpoints / f"acestep-v15-{family}"
    model.save_pretrained(folder)
    source = Path(modeling.__file__)
    for file in source.parent.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written |= {
        "is_turbo": "turbo" in family,
        "model_type": "acestep",
        "auto_map": {
            "AutoConfig": f"{configuration_of(source)}.AceStepConfig",
            "AutoModel": f"{source.stem}.AceStepConditionGenerationModel",
        },
    }
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    generator = torch.Generator().manual_seed(8)
    torch.save(0.3 * torch.randn(1, 64, silence, generator=generator), folder / "silence_latent.pt")
    return folder


def configuration_of(source):
    return next(file.stem for file in sorted(source.parent.glob("configuration*.py")))


def modeling_of(family):
    try:
        return importlib.import_module(FILES[family])
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("acestep"):
            raise
        pytest.skip(f"this checkout has no {FILES[family]}")


class Left(Exception):
    """Raised to leave a generation as soon as the decoder was called."""


def handed_to_the_decoder(handler, song, **more):
    """What the real generate_music hands to the decoder first | conditions [1,L,D], context [1,T,128], of one song."""
    seen = []

    def leave(_, __, kwargs):
        seen.append({name: kwargs[name].clone() for name in ("encoder_hidden_states", "context_latents")})
        raise Left

    hook = handler.model.decoder.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        answer = handler.generate_music(
            captions=song["caption"],
            lyrics=song["lyrics"],
            bpm=song["bpm"],
            key_scale=song["keyscale"],
            time_signature=song["timesignature"],
            vocal_language=song["language"],
            audio_duration=song["seconds"],
            batch_size=1,
            seed=3,
            use_random_seed=False,
            **more,
        )
    finally:
        hook.remove()
    assert seen, f"the decoder was never called: {answer}"
    return seen[0]["encoder_hidden_states"][:1], seen[0]["context_latents"][:1]
