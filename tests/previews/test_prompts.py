"""Prompts of one's own: read from TOML, encoded as the app encodes them, heard in a training and from an adapter."""

from __future__ import annotations

import json
import wave

import pytest
import torch
from preparing.conftest import app, checkpoints  # noqa: F401 - fixtures
from preparing.parts import handed_to_the_decoder

from sidestep_plugin.errors import Refusal
from sidestep_plugin.previews.prompts import encode_prompts, prompt_of, read_prompts

FILE = """
[[prompt]]
name = "piano"
caption = "a slow piano piece"
bpm = 72
key = "Am"
time_signature = "4/4"
seconds = 2

[[prompt]]
caption = "Chor, leise und weit"
lyrics_file = "words.txt"
language = "german"
seconds = 3.2
"""


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "words.txt").write_text("[Strophe]\nÜber den Flüssen", encoding="utf-8")
    file = tmp_path / "prompts.toml"
    file.write_text(FILE, encoding="utf-8")
    return file


def test_a_file_is_read_and_values_are_brought_into_the_models_words(prompts):
    piano, choir = read_prompts(prompts)
    assert (piano.name, piano.seconds, piano.text.keyscale, piano.text.timesignature) == ("piano", 2.0, "A minor", "4")
    assert piano.text.lyrics == "[Instrumental]" and piano.text.problems == piano.problems == ()
    assert (choir.name, choir.text.language) == ("chor-leise-und-weit", "de")
    assert choir.text.lyrics == "[Strophe]\nÜber den Flüssen"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no prompts"),
        ("[[prompt]]\nbpm = 3", "has no caption"),
        ("[[prompt]]\ncaption = 3", "caption = 3, expected text"),
        ('[[prompt]]\ncaption = "a"\nseconds = 0', "expected 0.04 to 600"),
        ('[[prompt]]\ncaption = "a"\ntempo = 3', "has tempo, expected name, caption"),
        ('[[prompt]]\ncaption = "a"\nbpm = true', "expected a whole number or a number or text"),
        ('[[prompt]]\ncaption = "a"\nlyrics = "x"\nlyrics_file = "y"', "both lyrics and lyrics_file"),
        ('[[prompt]]\ncaption = "a"\nlyrics_file = "y"', "lyrics .* cannot be read"),
        ('caption = "a"', "has no prompts"),
        ('seed = 1\n[[prompt]]\ncaption = "a"', "has seed outside"),
        ("[[prompt]", "is not TOML"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, text, message):
    file = tmp_path / "prompts.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(Refusal, match=message):
        read_prompts(file)


def test_two_prompts_of_one_name_are_told_apart(tmp_path):
    file = tmp_path / "prompts.toml"
    file.write_text('[[prompt]]\ncaption = "a"\n[[prompt]]\ncaption = "a"\n', encoding="utf-8")
    assert [prompt.name for prompt in read_prompts(file)] == ["a", "a-2"]


def test_a_prompt_is_encoded_as_the_app_encodes_it(prompts, app, checkpoints, tmp_path, checkout):  # noqa: F811
    handler = app("base")
    state = torch.get_rng_state()
    files = encode_prompts(
        read_prompts(prompts), handler.model, checkpoints / "acestep-v15-base", tmp_path / "out", checkout.root
    )
    assert torch.equal(state, torch.get_rng_state())
    assert [file.stem for file in files] == ["piano", "chor-leise-und-weit"]
    for file in files:
        song = torch.load(file, weights_only=True)
        words = song["metadata"]["prepared"]["words"]
        states, context = handed_to_the_decoder(handler, words)
        assert torch.equal(song["encoder_hidden_states"], states)
        assert torch.equal(song["context_latents"], context[: len(song["target_latents"])])
        assert not bool(song["target_latents"].any()), "there is no sound in it"


# -- heard ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def handler(checkpoints):  # noqa: F811
    from sidestep_plugin.engine.models import find_model, load_model

    return lambda: load_model(find_model("base", checkpoints), torch.device("cpu"))


@pytest.mark.slow
def test_prompts_are_heard_while_it_trains_and_change_no_bit(train, handler, prompts, equal_bits, checkout, capsys):
    if checkout.real:
        pytest.skip("the songs are the miniature's")
    plain = train("base", handler=handler(), options={"num_inference_steps": 2})
    options = {"num_inference_steps": 2, "preview_every": 1, "preview_prompts": prompts}
    heard = train("base", handler=handler(), options=options)
    out = capsys.readouterr().out
    assert equal_bits(plain, heard), out
    table = json.loads((heard.output / "previews" / "previews.json").read_text(encoding="utf-8"))
    assert [song["name"] for song in table["songs"]] == ["piano", "chor-leise-und-weit"]
    assert [song["seconds"] for song in table["songs"]] == [2.0, 3.2]
    with wave.open(str(heard.output / "previews" / table["rows"][1]["clips"][0])) as clip:
        assert (clip.getframerate(), clip.getnframes()) == (48000, 96000)


@pytest.mark.slow
def test_songs_are_heard_too_if_they_are_named(train, handler, prompts, checkout):
    if checkout.real:
        pytest.skip("the songs are the miniature's")
    options = {"num_inference_steps": 2, "preview_every": 1, "preview_prompts": prompts, "preview_songs": "song_03"}
    heard = train("base", handler=handler(), options=options, max_epochs=1)
    table = json.loads((heard.output / "previews" / "previews.json").read_text(encoding="utf-8"))
    assert [song["name"] for song in table["songs"]] == ["piano", "chor-leise-und-weit", "song_03"]


@pytest.mark.slow
def test_a_prompt_is_heard_from_an_adapter_with_and_without_it(train, handler, checkpoints, checkout, tmp_path):  # noqa: F811
    from sidestep_plugin.previews.clips import ClipRequest, make_clips

    if checkout.real:
        pytest.skip("the songs are the miniature's")
    done = train("base", handler=handler(), options={"num_inference_steps": 2, "trigger": "zxsound"})
    said = []
    prompt = prompt_of({"caption": "late night jazz", "seconds": 2}, "here")
    request = ClipRequest(
        done.output / "final",
        model="base",
        acestep_root=checkout.root,
        checkpoint_dir=checkpoints,
        prompt=prompt,
        device="cpu",
        without=True,
    )
    folder = make_clips(request, said.append)
    assert folder.parent == done.output / "prompts"
    table = json.loads((folder / "previews.json").read_text(encoding="utf-8"))
    assert [song["prompt"] for song in table["songs"]] == [prompt.text.caption]
    assert [row["label"] for row in table["rows"]] == ["base model", "final"]
    assert any("trigger word, zxsound, is not in the prompt" in line for line in said)
    with wave.open(str(folder / table["rows"][0]["clips"][0])) as clip:
        assert clip.getnframes() == 96000


def test_the_command_line_says_what_belongs_to_a_prompt(tmp_path):
    from click.testing import CliRunner

    from sidestep_plugin.cli import cli

    for line, message in (
        (["preview", "x", "--bpm", "90"], "--bpm belongs to a prompt"),
        (["preview", "x", "--without"], "--without belongs to a prompt"),
        (["preview", "x", "--prompt", "a", "--songs", "2"], "Leave one of them out"),
    ):
        result = CliRunner().invoke(cli, line)
        assert result.exit_code == 2 and message in result.output, result.output
