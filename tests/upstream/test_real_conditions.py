"""Promise 8 on real code: a song's conditions are those that the app's own generation hands to the decoder.

    pytest --acestep-root DIR tests/upstream/test_real_conditions.py

Tiny real models, a tiny real Qwen3 text encoder and tokenizer, a tiny real VAE; upstream's real ``generate_music``.
"""

from __future__ import annotations

import pytest
import torch
from upstream.real_parts import FRAME, SONGS, handed_to_the_decoder, tiny_vae, write_model, write_text_encoder

from sidestep_plugin.trainer import song_encoding
from sidestep_plugin.trainer.song_encoding import Words, encode, import_handler, make_handler

pytestmark = pytest.mark.upstream

FAMILIES = ("base", "sft", "turbo", "xl-base")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="session")
def checkpoints(trainer, tmp_path_factory):
    pytest.importorskip("vector_quantize_pytorch", reason="upstream's models need vector-quantize-pytorch and einops")
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("checkpoints")
    write_text_encoder(folder / song_encoding.TEXT_ENCODER)
    return folder


@pytest.fixture(scope="session")
def handler_class(checkout, trainer):
    return import_handler(checkout.root)


@pytest.fixture(scope="session")
def vae():
    return tiny_vae()


@pytest.fixture
def handler(checkpoints, handler_class, vae):
    """Make a handler around a tiny real model, as the app has it, decoder included."""
    from transformers import AutoModel

    from sidestep_plugin.previews.conditions import read_silence

    def make(family, dtype=torch.float32, attention="sdpa", silence=900):
        folder = write_model(checkpoints, family, silence=silence)
        model = AutoModel.from_pretrained(
            str(folder), trust_remote_code=True, attn_implementation=attention, torch_dtype=dtype
        )
        text = checkpoints / song_encoding.TEXT_ENCODER
        device = torch.device("cpu")
        return make_handler(
            handler_class,
            dtype=dtype,
            model=model.to(dtype).eval(),
            vae=vae,
            tokenizer=song_encoding.load_tokenizer(text),
            text_encoder=song_encoding.load_text_encoder(text, device, dtype),
            silence=read_silence(folder),
        )

    return make


def words_of(song):
    return Words(**song)


def frames_of(song):
    return round(song["seconds"] * 48000) // FRAME


@pytest.mark.parametrize("song", SONGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_conditions_are_those_that_generate_music_hands_to_the_decoder(handler, family, dtype, song):
    song = SONGS[song]
    made = handler(family, DTYPES[dtype])
    states, context = handed_to_the_decoder(made, song)
    ours = encode(made, words_of(song), frames_of(song))
    assert torch.equal(ours.encoder_hidden_states, states[0])
    assert torch.equal(ours.context_latents, context[0, : frames_of(song)])
    assert ours.context_latents.shape == (frames_of(song), 128)
    told = ours.told
    assert len(ours.encoder_hidden_states) == told.prompt_tokens + told.lyric_tokens + 1
    if song is SONGS["german"]:
        assert told.lyric_tokens > 512, "the case is to be longer than what upstream's preprocessing keeps"
