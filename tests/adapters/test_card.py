"""The card beside every adapter, by the rules of Hugging Face's own package, and the folder that is shared."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidestep_plugin.adapters.card import base_model_id, model_card
from sidestep_plugin.cli import cli
from sidestep_plugin.variants import MODEL_ALIASES

from .readers import demon

FACTS = {
    "title": "Night Jazz",
    "author": "Anna",
    "trigger": "a jazz: band",
    "license": "CC-BY-4.0",
    "model_name": "acestep-v15-base",
    "model_variant": "base",
    "shift": 1.0,
    "num_inference_steps": 50,
    "adapter_type": "lora",
    "rank": 64,
    "alpha": 128,
    "songs": 12,
    "held_out_songs": 2,
    "validation_songs": 2,
    "validation_change": -0.0421,
    "cfg_ratio": 0.15,
    "target_modules": ["q_proj", "v_proj"],
}


def read(text):
    """The front matter as Hugging Face's package reads it."""
    hub = pytest.importorskip("huggingface_hub")
    return hub.ModelCard(text).data


def test_a_card_says_what_the_hub_asks_for():
    data = read(model_card(FACTS)).to_dict()
    assert data == {
        "license": "cc-by-4.0",
        "base_model": "ACE-Step/acestep-v15-base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-to-audio",
        "instance_prompt": "a jazz: band",
        "tags": ["ace-step", "ace-step-1.5", "lora", "music", "text-to-music"],
    }
    card = model_card(FACTS)
    assert "More Information Needed" not in card
    for words in ("# Night Jazz", "by Anna", "| shift | 1.0 |", "| CFG | on |", "| songs | 10 of 12, 2 held out |"):
        assert words in card
    assert "loss on 2 songs that it was not trained on: -4.21 %, against the model without it" in card


ODD = ["", "  ", "a\nb: c\n---\n", "| a | b |", "<script>", "yes", "null", "1.5", "- x", "# x", "a\x1b[31m", "夜曲 🎵"]
ODD += ['"', "\\\\", "'", "{a: b}", "&x *y", "`x`"]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_whatever_people_type_stays_text(text):
    facts = FACTS | {key: text for key in ("title", "author", "trigger", "license", "model_name")}
    data = read(model_card(facts)).to_dict()
    assert all(isinstance(data.get(key, ""), str) for key in ("license", "license_name", "instance_prompt"))
    assert data["tags"][0] == "ace-step" and "base_model" not in data
    body = model_card(facts).split("---\n", 2)[2]
    assert "<script>" not in body and "\x1b" not in body
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)


def test_a_card_of_nothing_is_one_as_well():
    data = read(model_card({})).to_dict()
    assert data["pipeline_tag"] == "text-to-audio" and "license" not in data and "base_model" not in data
    assert "None" not in model_card({}) and "nan" not in model_card({"shift": None})


@pytest.mark.parametrize("alias", MODEL_ALIASES)
def test_every_official_model_has_a_name_on_the_hub(alias):
    assert base_model_id(MODEL_ALIASES[alias]).startswith("ACE-Step/")
    assert base_model_id("my-model") is None


def test_every_saved_adapter_has_a_card(train, kinds):
    for kind in kinds:
        output = train("base", kind, options={"title": "Jazz", "trigger": "a band"}).output
        folders = {file.parent for name in ("adapter_model", "lokr_weights") for file in output.rglob(f"{name}.*")}
        assert len(folders) == 3
        for folder in folders:
            card = (folder / "README.md").read_text(encoding="utf-8")
            data = read(card)
            assert data["base_model"] == "ACE-Step/acestep-v15-base" and data["instance_prompt"] == "a band"
            assert "# Jazz" in card and "More Information Needed" not in card


# -- a folder to share -------------------------------------------------------------------------------------------------


def publish(adapter, output, *words):
    return CliRunner().invoke(
        cli, ["publish", str(adapter), "--output", str(output), *map(str, words)], catch_exceptions=False
    )


def files_in(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_clips_of_the_previews_are_taken_along_if_asked(trained, tmp_path):
    from sidestep_plugin.previews.table import Row, Table

    final = trained()
    refused = publish(final, tmp_path / "none", "--previews")
    assert refused.exit_code == 2 and "Make some: acestep-train preview" in refused.output
    previews, songs = final.parent / "previews", [{"name": "secret", "seconds": 0.2}]
    rows = [Row(label, 1, None, [f"{label[:5]}/01_secret.wav"]) for label in ("base model", "epoch 1", "final x 0.5")]
    for row in rows:
        (previews / row.clips[0]).parent.mkdir(parents=True)
        (previews / row.clips[0]).write_bytes(row.label.encode())
    Table({"model_name": "base", "songs": songs, "settings": {}}, rows).write(previews)
    assert publish(final, tmp_path / "without").exit_code == 0
    assert not [*(tmp_path / "without").glob("clip*")]
    done = publish(final, tmp_path / "share", "--previews")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "share" / "clip-1.wav").read_bytes() == b"epoch 1"
    assert not [file for file in files_in(tmp_path / "share") if "secret" in file or "clip-2" in file]


@pytest.fixture
def trained(train):
    def run(kind="lora", **options):
        words = {"title": "Night Jazz", "trigger": "a band", "license": "cc0-1.0", "author": "Anna"} | options
        return train("base", kind, max_epochs=1, options=words).output / "final"

    return run


def test_a_lora_to_share(trained, tmp_path):
    final = trained()
    (final / "adapter" / "training_options.toml").write_text(
        'model = "base"\npreview-songs = "secret song"\nvalidation-dir = "/home/anna/x"\nrank = 4\n', encoding="utf-8"
    )
    clip = tmp_path / "a secret song.wav"
    clip.write_bytes(b"RIFF")
    done = publish(final, tmp_path / "share", "--clip", clip)
    assert done.exit_code == 0, done.output
    assert files_in(tmp_path / "share") == [
        *("README.md", "clip-1.wav", "night-jazz.metadata.json", "night-jazz.safetensors"),
        *(
            f"night-jazz/{name}"
            for name in ("adapter_config.json", "adapter_model.safetensors", "training_config.json")
        ),
        "training_options.toml",
    ]
    share = tmp_path / "share"
    assert (share / "night-jazz" / "adapter_model.safetensors").read_bytes() == (
        final / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    options = (share / "training_options.toml").read_text(encoding="utf-8")
    assert options == 'model = "base"\nrank = 4\n'
    facts = json.loads((share / "night-jazz.metadata.json").read_text(encoding="utf-8"))
    assert facts["id"] == "night-jazz" and facts["inference"]["primary_trigger_word"] == "a band"
    assert facts["inference"]["recommended_shift"] == 1.0 and facts["inference"]["recommended_guidance"] == 7.0
    card = (share / "README.md").read_text(encoding="utf-8")
    assert read(card)["license"] == "cc0-1.0"
    assert all(f"| {name} |" in card for name in ("night-jazz/", "night-jazz.safetensors", "clip-1.wav"))
    tensors = load_file(final / "adapter" / "adapter_model.safetensors")
    name = "layers.0.self_attn.q_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(demon(share / "night-jazz.safetensors", {})[name], 2.0 * b @ a)
    for file in share.rglob("*"):
        if file.is_file():
            raw = file.read_bytes()
            for word in (str(tmp_path), str(Path.home()), socket.gethostname(), "secret", "anna/"):
                assert len(word) < 4 or word.encode() not in raw, (file, word)


def test_a_lokr_to_share(trained, require_kind, tmp_path):
    require_kind("lokr")
    done = publish(trained("lokr"), tmp_path / "share", "--name", "jazz")
    assert done.exit_code == 0, done.output
    assert files_in(tmp_path / "share") == [
        *("README.md", "jazz.metadata.json", "jazz.safetensors"),
        *("jazz/lokr_weights.safetensors", "jazz/training_config.json"),
    ]
    assert "library_name" not in read((tmp_path / "share" / "README.md").read_text(encoding="utf-8")).to_dict()


def test_a_name_of_this_machine_is_refused(trained, tmp_path):
    final = trained()
    file = final / "adapter" / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file(load_file(file), file, header | {"from": str(Path.cwd() / "x")})
    done = publish(final, tmp_path / "share")
    assert done.exit_code == 2 and "which is of this machine" in done.stderr
    assert not (tmp_path / "share").exists()


def test_what_cannot_be_shared_is_refused(trained, tmp_path):
    final = trained()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "no clip.txt").write_text("x", encoding="utf-8")
    for output, words, says in (
        ("full", (), "is not empty"),
        ("share", ("--name", "a.b"), "expected letters, digits, - and _"),
        ("share", ("--clip", tmp_path / "no clip.txt"), "is no audio file"),
        ("no clip.txt", (), "is no folder"),
    ):
        done = publish(final, tmp_path / output, *words)
        assert done.exit_code == 2 and says in done.stderr, done.output
    assert not (tmp_path / "share").exists()
    assert publish(final, tmp_path / "full", "--overwrite").exit_code == 0
    assert (tmp_path / "full" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_the_name_comes_from_the_folder_without_a_title(train, tmp_path):
    output = train("base", max_epochs=1).output
    shutil.move(output, tmp_path / "My Jazz v1.2")
    done = publish(tmp_path / "My Jazz v1.2" / "final", tmp_path / "share")
    assert done.exit_code == 0 and (tmp_path / "share" / "my-jazz-v1-2.safetensors").is_file()
    assert "The card has no licence and no author" in done.output
