"""The questions of ``acestep-train --plugin sidestep`` on a terminal, answered in a real one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conftest import COMMAND

from sidestep_plugin.cli import cli

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
TRAIN = [*COMMAND, "--plugin", "sidestep"]
MODEL, SONGS, SAVE = r"Model \[1\]: $", r"\.pt files(.|\n)*?Folder: $", r"Where to save\s+Folder \[.*\]: $"
KIND, EPOCHS, RANK, START = r"lora or lokr \[lora\]: $", r"Epochs \[\d+\]: $", r"Rank \[64\]: $", r"Start\? .*: $"
AGAIN = r"Folder(?: \[.*\])?: $"


@pytest.fixture
def place(checkout, tmp_path):
    """A checkout's folder with models and songs, as a user has it."""
    from sidestep_plugin import miniature

    if checkout.real:
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "acestep").symlink_to(checkout.root / "acestep")
        shutil.copytree(checkout.checkpoints, tmp_path / "root" / "checkpoints")
        shutil.copytree(checkout.tensors, tmp_path / "root" / "my songs")
        return tmp_path / "root"
    built = miniature.build(tmp_path / "built", songs=4)
    shutil.copytree(built.tensors, built.root / "my songs")
    return built.root


@pytest.fixture
def answer_in_a_terminal(place):
    from terminal import in_a_terminal

    def run(*typed, more=()):
        return in_a_terminal([*TRAIN, "--device", "cpu", *more], typed, cwd=place)

    return run


@pytest.fixture
def answer(place, checkout, trainer, monkeypatch):
    """The same in this process, which takes a tenth of the time; what is asked has to be asked in this order."""

    def run(*typed, more=(), named=("--plugin", "sidestep")):
        monkeypatch.chdir(place)
        monkeypatch.setattr("sidestep_plugin.cli.terminal.on_a_terminal", lambda: True)
        # It would change the log of the tests after this one.
        monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)
        words = [*named, "--device", "cpu", *more]
        # The checkout that this process has imported, not the copy of it in the current folder.
        words += ["--acestep-root", str(checkout.root), "--checkpoint-dir", str(place / "checkpoints")]
        lines = "".join(f"{text}\n" for _, text in typed)
        done = CliRunner().invoke(cli, words, input=lines, catch_exceptions=False)
        since = 0
        for question, _ in typed:
            found = re.compile(question.removesuffix("$")).search(done.output, since)
            assert found, f"{question!r} was not asked in {done.output[since:]}"
            since = found.end()
        return SimpleNamespace(code=done.exit_code, text=done.output)

    return run


def facts_of(folder):
    return json.loads((folder / "final" / "adapter" / "training_config.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_from_nothing_to_an_adapter(answer_in_a_terminal, place, monkeypatch):
    seen = answer_in_a_terminal(
        (MODEL, ""), (SONGS, "my songs"), (SAVE, ""), (KIND, ""), (EPOCHS, "2"), (RANK, "4"), (START, "")
    )
    assert seen.code == 0, seen.text
    assert re.search(r"1  acestep-v15-base +base +\d\.\d MB", seen.text)
    assert re.search(r"\d songs, 0\.\d minutes", seen.text)
    assert re.search(r"Songs: \d, 0\.\d minutes; \d+ training steps, \d+ optimizer steps", seen.text)
    assert re.search(r"On disk: about 0\.\d MB \(the finished adapter 0\.\d MB, 2 checkpoints of 0", seen.text)
    assert "Timesteps: continuous, maximum of two logit-normal draws" in seen.text
    assert "To generate: shift 1.0, 50 steps, CFG on" in seen.text
    folder = place / "adapters" / "my songs-base"
    assert f"Adapter: {folder / 'final' / 'adapter'}" in seen.text
    facts = facts_of(folder)
    assert (facts["model_name"], facts["rank"], facts["alpha"]) == ("acestep-v15-base", 4, 8)
    assert (facts["max_epochs"], facts["batch_size"], facts["learning_rate"]) == (2, 1, 1e-4)

    # The command line that was shown does the same without a question.
    (command,) = re.findall(r"^  (acestep-train .*)$", seen.text, flags=re.MULTILINE)
    words = [word.replace("adapters/my songs-base", "other") for word in shlex.split(command)[1:]]
    done = subprocess.run([*COMMAND, *words], cwd=place, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    facts, other = (
        {name: value for name, value in told.items() if name not in ("created", "title")}
        for told in (facts, facts_of(place / "other"))
    )
    assert other == facts


def test_answers_are_checked_when_they_are_given(answer, place):
    (place / "empty").mkdir()
    seen = answer(
        (MODEL, "9"),
        (MODEL, "no-such-model"),
        (MODEL, "acestep-v15-turbo"),
        (SONGS, "nowhere"),
        (AGAIN, "empty"),
        (AGAIN, "'my songs'"),
        (SAVE, "my songs/song_01.pt/under a file"),
        (AGAIN, "out"),
        (KIND, "loha"),
        (KIND, "lora"),
        (EPOCHS, "many"),
        (EPOCHS, "0"),
        (EPOCHS, "2"),
        (RANK, "-1"),
        (RANK, "4"),
        (START, "perhaps"),
        (START, "n"),
    )
    assert seen.code == 0
    for says in (
        "There is no number 9: expected 1 to ",
        "No model 'no-such-model'",
        "No dataset folder ",
        "No songs in ",
        "Cannot write to ",
        "Expected lora or lokr.",
        "'many' is not a number of epochs. Expected a whole number from 1.",
        "'-1' is not a rank.",
        "Expected y, n or b.",
        "Nothing was started, nothing was written.",
        "variant turbo",
    ):
        assert says in seen.text, seen.text
    assert not (place / "out").exists()


def test_b_goes_back_and_changes_what_was_said(answer, place):
    seen = answer(
        (MODEL, "b"),
        (MODEL, "1"),
        (SONGS, "b"),
        (MODEL, "acestep-v15-turbo"),
        (SONGS, "my songs"),
        (SAVE, "out"),
        (KIND, ""),
        (EPOCHS, "2"),
        (RANK, "4"),
        (START, "b"),
        (RANK, "b"),
        (EPOCHS, "1"),
        (RANK, "2"),
        (START, "y"),
    )
    assert seen.code == 0, seen.text
    facts = facts_of(place / "out")
    assert (facts["model_name"], facts["max_epochs"], facts["rank"]) == ("acestep-v15-turbo", 1, 2)


def test_what_was_said_is_not_asked(answer, place):
    said = "--model sft --output-dir out --adapter-type lora --epochs 1 --rank 4"
    seen = answer((SONGS, "my songs"), (START, ""), more=said.split())
    assert seen.code == 0, seen.text
    assert facts_of(place / "out")["model_variant"] == "sft" and "Where to save" not in seen.text


def test_an_output_folder_that_is_in_use(answer, place):
    first = [(MODEL, ""), (SONGS, "my songs"), (SAVE, "out"), (KIND, ""), (EPOCHS, "1"), (RANK, "4"), (START, "")]
    assert answer(*first).code == 0
    other = [(MODEL, "turbo"), (SONGS, "my songs"), (SAVE, "out"), (AGAIN, "resume")]
    seen = answer(*other, (AGAIN, "again"), (KIND, ""), (EPOCHS, "1"), (RANK, "4"), (START, ""))
    assert "was trained for acestep-v15-base, and acestep-v15-turbo is chosen" in seen.text and seen.code == 0
    seen = answer((MODEL, ""), (SONGS, "my songs"), (SAVE, "out"), (AGAIN, "resume"), (EPOCHS, "2"), (START, ""))
    assert seen.code == 0, seen.text
    assert "out holds the adapters of a training. Type another folder; resume to go on" in seen.text
    assert "resumes from epoch_1" in seen.text and "Resumed: " in seen.text


def test_resuming_takes_the_settings_of_the_checkpoint(answer, place):
    more = ["--rank", "2", "--alpha", "2", "--learning-rate", "0.001", "--batch-size", "2", "--save-every", "1"]
    first = [(MODEL, ""), (SONGS, "my songs"), (SAVE, "out"), (KIND, ""), (EPOCHS, "1"), (START, "")]
    assert answer(*first, more=more).code == 0
    seen = answer((MODEL, ""), (SONGS, "my songs"), (SAVE, "out"), (AGAIN, "resume"), (EPOCHS, "3"), (START, ""))
    assert seen.code == 0, seen.text
    facts = facts_of(place / "out")
    assert (facts["rank"], facts["learning_rate"], facts["batch_size"], facts["max_epochs"]) == (2, 0.001, 2, 3)


@pytest.mark.slow
def test_what_was_said_of_resuming_and_overwriting_is_kept(answer, place):
    first = [(MODEL, ""), (SONGS, "my songs"), (SAVE, "out"), (KIND, ""), (EPOCHS, "1"), (RANK, "4"), (START, "")]
    assert answer(*first).code == 0
    seen = answer(*first, more=["--overwrite"])
    assert seen.code == 0 and "out (replaces what is there)" in seen.text, seen.text
    (checkpoint,) = (place / "out" / "checkpoints").iterdir()
    first = [(question, "2" if question == EPOCHS else "new" if question == SAVE else said) for question, said in first]
    first = [entry for entry in first if entry[0] not in (KIND, RANK)]
    seen = answer(*first, more=["--resume-from", str(checkpoint)])
    assert seen.code == 0 and "Resumed: " in seen.text and f"--resume-from {checkpoint}" in seen.text, seen.text


def test_what_was_said_is_looked_at_before_anything_is_asked(answer, place):
    for more, says in (
        (["--model", "nosuch"], "No model 'nosuch'"),
        (["--model", "base", "--dataset-dir", "nowhere"], "No dataset folder"),
    ):
        done = answer(more=more)
        assert done.code == 2 and says in done.text and "Where to save" not in done.text, done.text


def test_songs_that_were_said_decide_about_the_defaults(answer, place):
    said = ["--model", "base", "--dataset-dir", "my songs"]
    seen = answer((SAVE, "out"), (KIND, ""), (r"Epochs \[800\]: $", ""), (RANK, ""), (START, "n"), more=said)
    steps = len([*(place / "my songs").glob("*.pt")])
    each = next(each for each in (4, 3, 2, 1) if steps % each == 0)
    assert re.search(rf"batch size 1, gradient accumulation {each}, warmup steps \d+, save every 80\b", seen.text)


def test_typos_that_are_no_names_at_all(answer, place):
    typed = [(MODEL, "²"), (MODEL, "~nobody-at-all/x"), (MODEL, "x" * 300), (MODEL, "1")]
    typed += [(SONGS, "~nobody-at-all/x"), (AGAIN, "y" * 300), (AGAIN, "''"), (AGAIN, "my songs")]
    typed += [(SAVE, "''"), (AGAIN, "out"), (KIND, ""), (EPOCHS, "²"), (EPOCHS, "1"), (RANK, "4"), (START, "n")]
    seen = answer(*typed)
    assert seen.code == 0 and "Traceback" not in seen.text
    assert "There is no home folder for ~nobody-at-all" in seen.text and "Nothing was typed" in seen.text


def test_a_model_whose_variant_nothing_tells(answer, place):
    folder = place / "checkpoints" / "my-tune"
    shutil.copytree(place / "checkpoints" / "acestep-v15-base", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["is_turbo"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    seen = answer(
        (MODEL, "my-tune"),
        (r"turbo, base or sft: $", "other"),
        (r"turbo, base or sft: $", "base"),
        (SONGS, "my songs"),
        (SAVE, "out"),
        (KIND, ""),
        (EPOCHS, "1"),
        (RANK, "4"),
        (START, ""),
    )
    assert seen.code == 0, seen.text
    assert "variant not known" in seen.text and "Variant: neither config.json nor" in seen.text
    assert facts_of(place / "out")["model_variant"] == "base"


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_what_is_said_of_the_room_on_the_disk_is_what_is_written(checkout, require_kind, train, kind):
    require_kind(kind)
    from sidestep_plugin.adapters.weights_file import read_weights_file
    from sidestep_plugin.cli.guided.summary import adapter_size

    output = train("base", kind, max_epochs=1).output  # rank 4
    modules = ("q_proj", "k_proj", "v_proj", "o_proj")
    said = adapter_size(checkout.checkpoints / "acestep-v15-base", kind, 4, modules)
    (weights,) = (output / "final").rglob("*.safetensors")
    assert said == pytest.approx(weights.stat().st_size - read_weights_file(weights).data_start, rel=0.05)


@pytest.mark.slow
def test_ctrl_c_while_it_trains_prints_the_command_that_resumes(answer_in_a_terminal, place):
    from terminal import CTRL_C

    typed = [(MODEL, ""), (SONGS, "my songs"), (SAVE, "out it goes"), (KIND, ""), (EPOCHS, "5000"), (RANK, "4")]
    seen = answer_in_a_terminal(*typed, (START, ""), (r"epoch 3/", CTRL_C))
    assert seen.code == 130, seen.text
    (line,) = re.findall(r"^To resume:\n  acestep-train (.*)$", seen.text, flags=re.MULTILINE)
    words = shlex.split(line)
    assert (
        words[words.index("--output-dir") + 1] == "out it goes" and words[words.index("--resume-from") + 1] == "latest"
    )
    (steps,) = re.findall(r"^Interrupted after (\d+) of", seen.text, flags=re.MULTILINE)
    words[words.index("5000")] = str(int(steps) // 4 + 2)
    done = subprocess.run([*COMMAND, *words], cwd=place, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "✅ Resumed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_everything_as_it_was(answer_in_a_terminal, place):
    from terminal import CTRL_C

    before = sorted(place.rglob("*"))
    seen = answer_in_a_terminal((MODEL, ""), (SONGS, CTRL_C))
    assert seen.code == 130, seen.text
    assert seen.text.rstrip().endswith("Interrupted before the training began; nothing was saved."), seen.text
    assert "Traceback" not in seen.text and "Aborted" not in seen.text
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("more", [["--yes"], []])
def test_nobody_is_asked_with_yes_or_without_a_terminal(checkout, tmp_path, more):
    done = CliRunner().invoke(cli, ["--plugin", "sidestep", *more, "--acestep-root", str(checkout.root)])
    assert done.exit_code == 2 and "Missing option '--model'" in done.stderr


def test_yes_on_a_terminal_asks_nothing(answer_in_a_terminal):
    seen = answer_in_a_terminal(more=["--yes"])
    assert seen.code == 2 and "Missing option '--model'" in seen.text


def test_the_same_questions_mean_the_same_training(answer, place):
    """Whatever the command line says besides: the plugin takes part, unless somebody has chosen another way."""
    answers = ((MODEL, ""), (SONGS, "my songs"), (SAVE, ""), (KIND, ""), (EPOCHS, "2"), (RANK, "4"), (START, ""))
    seen = answer(*answers, named=())
    assert seen.code == 0, seen.text
    assert "Training with the plugin sidestep." in seen.text and "Timesteps: continuous" in seen.text
    (command,) = re.findall(r"^  acestep-train (.*)$", seen.text, flags=re.MULTILINE)
    assert "--plugin" not in command
    assert facts_of(place / "adapters" / "my songs-base")["max_epochs"] == 2

    seen = answer((MODEL, ""), (SONGS, "my songs"), (SAVE, ""), (AGAIN, "resume"), (EPOCHS, "3"), (START, ""), named=())
    assert seen.code == 0, seen.text
    assert facts_of(place / "adapters" / "my songs-base")["max_epochs"] == 3


def test_without_a_plugin_on_purpose_is_said_above_the_questions(answer, place):
    (place / "plain.toml").write_text("plugin = []\n", encoding="utf-8")  # as "none", which says it in words
    seen = answer((MODEL, ""), more=["--config", "plain.toml"], named=())
    assert "Training without a plugin, as ACE-Step trains." in seen.text


def test_what_can_be_added_is_offered_in_the_last_question(answer, place):
    first = [(MODEL, ""), (SONGS, "my songs"), (SAVE, "out"), (KIND, ""), (EPOCHS, "1"), (RANK, "4")]
    seen = answer(*first, (START, "v, comfy"), (START, "nonsense"), (START, "title Late Jazz"), (START, ""))
    assert seen.code == 0, seen.text
    assert re.search(
        r"\n  validate +hold 1 of the songs out.*\n  previews +clips.*\n  comfyui .*\n  title NAME ", seen.text
    )
    assert "Expected y, n or b. To add something: previews, title NAME." in seen.text
    assert "Also: validate 1, export comfyui, title Late Jazz" in seen.text and " and 1 held out, " in seen.text
    assert "--validate 1 --title 'Late Jazz' --export comfyui" in seen.text
    facts = facts_of(place / "out")
    assert (facts["title"], facts["held_out_songs"]) == ("Late Jazz", 1)
    assert (place / "out" / "final" / "adapter" / "comfyui_lora.safetensors").is_file()
    assert (facts["songs"] - 1) % facts["gradient_accumulation_steps"] == 0


def test_a_folder_of_models_is_listed(answer, place):
    seen = answer((MODEL, str(place / "checkpoints")), (MODEL.replace("1", r"\d"), "1"), (SONGS, "b"))
    assert "is a folder of models. Type the number or the name of one: 1 acestep-v15-base; 2 " in seen.text


def test_it_is_said_which_model_is_for_what(answer, place):
    seen = answer((MODEL, ""), (SONGS, "b"))
    assert "Choose the one that you will generate with:" in seen.text
    for name in ("turbo", "base", "sft", "xl"):
        assert re.search(rf"^  {name}: ", seen.text, re.MULTILINE)
