"""Audio and encoders for tests of preparing: the miniature's, or on a real checkout tiny real ones."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import pytest


def write_wav(file, seconds=2.0, *, rate=48000, channels=2, seed=0):
    """Write noise of 16 bit that is the same for the same seed, and not silent."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(-10000, 10000, (int(seconds * rate) * channels,), generator=generator, dtype=torch.int16)
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(channels)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes(samples.numpy().tobytes())
    return file


@pytest.fixture(scope="session")
def checkpoints(checkout, trainer, tmp_path_factory):
    """A folder with models, a VAE and a text encoder."""
    folder = tmp_path_factory.mktemp("preparing") / "checkpoints"
    if not checkout.real:
        from sidestep_plugin import miniature

        for number, name in enumerate(("acestep-v15-base", "acestep-v15-turbo", "acestep-v15-xl-base")):
            miniature.write_model(folder, name, seed=number)
        miniature.write_encoders(folder)
        return folder
    pytest.importorskip("vector_quantize_pytorch", reason="upstream's models need vector-quantize-pytorch and einops")
    from preview_parts import write_tiny_vae
    from upstream.real_parts import write_model, write_text_encoder

    for family in ("base", "turbo"):
        write_model(folder, family)
    write_text_encoder(folder / "Qwen3-Embedding-0.6B")
    write_tiny_vae(folder / "vae", encoder_hidden_size=128)
    return folder


@pytest.fixture(autouse=True)
def quick_vae(checkout, monkeypatch):
    """On a real checkout the VAE's encoder is a convolution: the real one takes seconds for a second of audio."""
    if not checkout.real:
        return
    from upstream.real_parts import quick_encoder

    from sidestep_plugin.preparing import job

    original = job.load_vae
    monkeypatch.setattr(job, "load_vae", lambda folder, device: quick_encoder(original(folder, device)))


SONGS = {
    "rock/one": {"caption": "loud guitars", "lyrics": "[Verse]\nOne and two", "bpm": 120, "keyscale": "E minor"},
    "two": {"caption": "a quiet piano", "bpm": 70},
    "three": {"caption": "Chor, leise", "lyrics": "[Strophe]\nÜber den Flüssen", "language": "de"},
}
"""Songs of the folder `music`, by their path."""


@pytest.fixture
def music(tmp_path):
    """A folder of three short songs with their texts."""
    folder = tmp_path / "music"
    for number, (name, said) in enumerate(SONGS.items()):
        write_wav(folder / f"{name}.wav", 2.0 + number, seed=number)
        write_texts(folder, name, **said)
    return folder


def write_texts(folder, name, *, caption=None, lyrics=None, **said):
    file = Path(folder, name)
    if caption is not None:
        file.with_name(f"{file.name}.caption.txt").write_text(caption, encoding="utf-8")
    if lyrics is not None:
        file.with_name(f"{file.name}.lyrics.txt").write_text(lyrics, encoding="utf-8")
    if said:
        file.with_name(f"{file.name}.json").write_text(json.dumps(said), encoding="utf-8")


@pytest.fixture
def prepare(checkout, checkpoints, tmp_path):
    """Prepare a folder | returns what was done, with the lines that were said under `said`."""
    from sidestep_plugin.preparing.job import prepare
    from sidestep_plugin.preparing.request import PrepareRequest

    class Result:
        def __init__(self, done, said, folder):
            self.done, self.said, self.folder = done, said, folder

    def run(source, output=None, model="base", **asked):
        output = output or tmp_path / "songs"
        said = []
        request = PrepareRequest(
            source,
            model,
            output,
            acestep_root=checkout.root,
            checkpoint_dir=checkpoints,
            device="cpu",
            **asked,
        )
        return Result(prepare(request, said.append), said, output)

    return run


@pytest.fixture
def app(checkout, checkpoints):
    """A handler with everything loaded, as the app has it: ``app("base")``."""
    import torch
    from transformers import AutoModel

    from sidestep_plugin.engine import song_encoding
    from sidestep_plugin.previews.conditions import read_silence
    from sidestep_plugin.previews.decoding import load_vae

    def make(name="base"):
        folder = checkpoints / f"acestep-v15-{name}"
        device = torch.device("cpu")
        vae = load_vae(checkpoints / "vae", device)
        if checkout.real:
            from upstream.real_parts import quick_encoder

            vae = quick_encoder(vae)
        text = checkpoints / song_encoding.TEXT_ENCODER
        model = AutoModel.from_pretrained(str(folder), trust_remote_code=True, attn_implementation="sdpa")
        return song_encoding.make_handler(
            song_encoding.import_handler(checkout.root),
            model=model.float().eval(),
            vae=vae,
            tokenizer=song_encoding.load_tokenizer(text),
            text_encoder=song_encoding.load_text_encoder(text, device, torch.float32),
            silence=read_silence(folder),
        )

    return make
