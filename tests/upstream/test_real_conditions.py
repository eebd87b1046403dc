"""Promise 8 on real code: a song's conditions are those that the app's own generation hands to the decoder.

    pytest --acestep-root DIR tests/upstream/test_real_conditions.py

Tiny real models, a tiny real Qwen3 text encoder and tokenizer, a tiny real VAE; upstream's real ``generate_music``.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from upstream.real_parts import FRAME, SONGS, handed_to_the_decoder, tiny_vae, write_model, write_text_encoder

from sidestep_plugin.engine import song_encoding
from sidestep_plugin.engine.song_encoding import Words, encode, import_handler, make_handler
from sidestep_plugin.errors import Refusal

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


def test_there_is_no_padding_and_no_random_number(handler):
    made = handler("base")
    state = torch.get_rng_state()
    ours = encode(made, words_of(SONGS["short"]), 175)
    assert torch.equal(torch.get_rng_state(), state)
    assert bool((ours.encoder_attention_mask == 1).all())
    again = encode(made, words_of(SONGS["short"]), 175)
    assert torch.equal(ours.encoder_hidden_states, again.encoder_hidden_states)


@pytest.mark.parametrize("change", ["lyrics", "language", "bpm", "seconds", "caption"])
def test_the_comparison_can_fail(handler, change):
    made, song = handler("base"), SONGS["short"]
    states, _ = handed_to_the_decoder(made, song)
    other = {"lyrics": "[Verse]", "language": "de", "bpm": 119, "seconds": 9.0, "caption": "x"}[change]
    ours = encode(made, words_of(song | {change: other}), frames_of(song))
    assert ours.encoder_hidden_states.shape != states[0].shape or not torch.equal(ours.encoder_hidden_states, states[0])


def test_a_song_longer_than_the_silence(handler, handler_class):
    """Newer versions repeat the silence, older ones generate a shorter song."""
    song, made = SONGS["instrumental"] | {"seconds": 40.0}, handler("base", silence=900)
    _, context = handed_to_the_decoder(made, song)
    if not hasattr(handler_class, "_get_silence_latent_slice"):
        assert context.shape[1] == 900
        with pytest.raises(Refusal, match="at most 900 frames"):
            encode(made, words_of(song), 1000)
        return
    assert torch.equal(encode(made, words_of(song), 1000).context_latents, context[0])


@pytest.mark.parametrize("seconds", [0.1, 2.0, 5.1])
def test_songs_shorter_than_the_128_frames_of_a_generation(handler, seconds):
    song = SONGS["instrumental"] | {"seconds": seconds}
    made = handler("base")
    states, context = handed_to_the_decoder(made, song)
    frames = max(1, int(seconds * 25))
    ours = encode(made, words_of(song), frames)
    assert torch.equal(ours.encoder_hidden_states, states[0])
    assert torch.equal(ours.context_latents, context[0, :frames])


# -- as upstream's own preprocessing ----------------------------------------------------------------------------------


@pytest.fixture
def upstreams_own(checkout, tmp_path):
    """Preprocess one song by upstream's own DatasetBuilder | returns what it saved and the file with the audio."""
    soundfile = pytest.importorskip("soundfile")
    builder = importlib.import_module("acestep.training.dataset_builder")
    try:
        sample_class = importlib.import_module("acestep.training.dataset_builder_modules.models").AudioSample
    except ModuleNotFoundError:
        pytest.skip("this version's preprocessing is one function")

    def preprocess(handler, song, seed=None, **mode):
        generator = torch.Generator().manual_seed(4)
        wave = 0.1 * torch.randn(round(song["seconds"] * 48000), 2, generator=generator)
        file = tmp_path / "song.wav"
        soundfile.write(str(file), wave.numpy(), 48000, subtype="FLOAT")
        made = builder.DatasetBuilder()
        said = {name: song[name] for name in ("caption", "lyrics", "language", "bpm", "keyscale", "timesignature")}
        sample = sample_class(
            audio_path=str(file), filename=file.name, duration=int(song["seconds"]), labeled=True, **said
        )
        made.samples = [sample]
        if seed is not None:
            torch.manual_seed(seed)
        paths, status = made.preprocess_to_tensors(handler, str(tmp_path / "out"), **mode)
        assert len(paths) == 1, status
        return torch.load(paths[0], weights_only=True), wave.T.contiguous()

    return preprocess


@pytest.mark.parametrize("song", SONGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["base", "turbo", "xl-base"])
def test_upstreams_conditions_are_its_own(handler, upstreams_own, family, dtype, song):
    song = SONGS[song]
    made = handler(family, DTYPES[dtype])
    theirs, _ = upstreams_own(made, song)
    ours = song_encoding.encode_as_upstream(made, words_of(song), len(theirs["target_latents"]))
    for name in ("encoder_hidden_states", "encoder_attention_mask", "context_latents"):
        assert torch.equal(getattr(ours, name), theirs[name]), name
        assert getattr(ours, name).dtype == theirs[name].dtype
    assert len(ours.encoder_hidden_states) == 256 + 512 + 1


@pytest.mark.parametrize("seconds", [0.04, 1.0, 14.9, 24.0, 33.021, 47.3])
def test_latents_are_those_of_upstreams_own_encoding(handler, upstreams_own, vae, seconds):
    made, song = handler("base"), SONGS["short"] | {"seconds": seconds}
    theirs, wave = upstreams_own(made, song, seed=77)
    state = torch.get_rng_state()
    ours = song_encoding.encode_audio(vae, wave, torch.float32, 77)
    assert torch.equal(torch.get_rng_state(), state), "the random state is as before"
    assert torch.equal(ours, theirs["target_latents"])
    assert not torch.equal(ours, song_encoding.encode_audio(vae, wave, torch.float32, 78))
    samples = wave.shape[1]
    assert len(ours) in (samples // FRAME, samples // FRAME - 1)


def test_a_frame_is_lost_where_the_file_ends_just_behind_a_seam(vae):
    """Windows overlap by 2 s and begin every 11 s; the rest behind a seam is rounded, not cut."""
    pytest.importorskip("acestep.training.dataset_builder_modules.preprocess_vae")
    whole = song_encoding.encode_audio(vae, torch.randn(2, 33 * 48000 + 960), torch.float32, 1)
    short = song_encoding.encode_audio(vae, torch.randn(2, 33 * 48000 + 961), torch.float32, 1)
    assert (len(whole), len(short)) == (825, 824)


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_song_in_a_padded_batch_is_the_song_alone(handler, family, attention):
    """With --mask-padding; without it the decoder attends to the rows that fill up the shorter song."""
    from sidestep_plugin.hooks.pad_masking import Masking

    made, frames = handler(family, attention=attention), 40
    encoded = [encode(made, words_of(SONGS[name]), frames) for name in ("instrumental", "german")]
    rows = [len(one.encoder_hidden_states) for one in encoded]
    states = torch.nn.utils.rnn.pad_sequence([one.encoder_hidden_states for one in encoded], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([one.encoder_attention_mask for one in encoded], batch_first=True)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "hidden_states": torch.randn(2, frames, 64, generator=generator),
        "timestep": torch.full((2,), 0.6),
        "timestep_r": torch.full((2,), 0.6),
        "attention_mask": torch.ones(2, frames),
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
        "context_latents": torch.stack([one.context_latents for one in encoded]),
    }
    decoder = made.model.decoder
    with torch.no_grad():
        padded = decoder(**batch)[0]
        masking = Masking(decoder)
        masked = decoder(**batch)[0]
        for row in range(2):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            one |= {name: one[name][:, : rows[row]] for name in ("encoder_hidden_states", "encoder_attention_mask")}
            with_hooks = decoder(**one)[0][0]
            masking.remove()
            alone = decoder(**one)[0][0]
            assert torch.equal(with_hooks, alone), "a batch of one is left alone, bit for bit"
            masking = Masking(decoder)
            difference = float((masked[row] - alone).norm() / alone.norm())
            print(f"\n{family} {attention} row {row}: masked {difference:.1e}")
            assert difference < 1e-6
            if row == 0:
                before = float((padded[0] - alone).norm() / alone.norm())
                print(f"padded {before:.3f}")
                assert before > 1e-4, "a hundred times the bound: the comparison can fail"
        masking.remove()
