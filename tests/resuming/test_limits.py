"""A training that ends early because somebody said so, checkpoints that are removed, and a start from an adapter."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.cli import cli, quiet
from sidestep_plugin.options import resolve_options
from sidestep_plugin.resuming import limits
from sidestep_plugin.resuming.starting import settings_to_start_from

KINDS = ["lora", "lokr"]


@pytest.fixture
def run(checkout, trainer, tmp_path, monkeypatch):
    """``acestep-train`` in this process: ``run("--epochs", 2)``."""
    monkeypatch.setattr(quiet, "quiet_upstream", lambda: None)
    places = [f"--acestep-root={checkout.root}", f"--checkpoint-dir={checkout.checkpoints}", "--model=base"]
    places += [f"--dataset-dir={checkout.tensors}", f"--output-dir={tmp_path / 'output'}", "--device=cpu"]

    def invoke(*words):
        return CliRunner().invoke(cli, [*places, *map(str, words)], catch_exceptions=False)

    return invoke


def facts_in(folder):
    return json.loads(next(folder.rglob("training_config.json")).read_text(encoding="utf-8"))


def names_in(output):
    return sorted(re.sub("_loss.*", "", folder.name) for folder in (output / "checkpoints").iterdir())


# -- how long --------------------------------------------------------------------------------------------------------


def test_a_training_of_so_many_steps_is_the_beginning_of_a_longer_one(train):
    """Three steps an epoch, two to an optimizer step: it goes on to the end of one, so that no gradient is lost."""
    settings = {"max_epochs": 3, "gradient_accumulation_steps": 2}
    whole = train("base", **settings)
    short = train("base", options={"max_steps": 4}, **settings)
    assert short.losses == whole.losses[:5] and len(whole.losses) == 9
    assert "✅ Training complete after 5 training steps (--max-steps)." in "\n".join(short.messages)
    assert facts_in(short.output / "final")["training_steps"] == 5 and short.tensors


def test_epochs_and_warm_up_go_with_the_number_of_steps(run, tmp_path):
    done = run("--max-steps", 5, "--gradient-accumulation", 2, "--rank", 4)
    assert done.exit_code == 0, done.output
    assert "Settings: epochs 1, alpha 8," in done.output and "step 6/6," in done.output  # two to an optimizer step
    again = run("--max-steps", 5, "--resume-from", "latest")
    assert again.exit_code == 0 and "nothing was changed" in again.output


def test_when_the_time_is_over_it_is_saved_and_stops_as_by_ctrl_c(run, tmp_path):
    # The program, which is this one, has been running for longer than that.
    done = run("--time-limit", "1s", "--epochs", 2, "--batch-size", 2, "--rank", 4)
    assert done.exit_code == 130, done.output
    assert "The time limit of 1s is reached: stopping after this step." in done.output
    assert "Saved as it was after 1 training step: " in done.output and "Interrupted after 1 of 6 steps." in done.output
    (command,) = re.findall(r"^To resume:\n  acestep-train (.*)$", done.output, flags=re.MULTILINE)
    assert "--resume-from latest" in command and "--time-limit 1s" in command and "--warmup" not in command
    resumed = run("--time-limit", "300d", "--resume-from", "latest")
    assert resumed.exit_code == 0 and (tmp_path / "output" / "final" / "adapter").is_dir(), resumed.output


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28_800), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1d2h", 93_600), ("1H", 3600)]
)
def test_lengths_of_time(text, seconds):
    value = resolve_options(limits.acestep_options(), {"time_limit": text})["time_limit"]
    assert limits.seconds_of(value) == seconds


@pytest.mark.parametrize("text", ["", "8", "8 hours", "h", "0s", "1m1h", "-1h", "1.5h", 8, True, "99999999999d"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(Refusal, match="Expected one such as 8h"):
        resolve_options(limits.acestep_options(), {"time_limit": text})


# -- how many checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_newest_checkpoints_stay_and_everything_else_that_is_no_checkpoint_of_an_epoch(train, tmp_path):
    output = tmp_path / "output"
    others = [output / "checkpoints" / "average", output / "checkpoints" / "my epoch_1"]
    for folder in others:
        folder.mkdir(parents=True)
        (folder / "training_state.pt").touch()
    options = {"keep_last": 2, "validate": 2, "validate_every": 1}
    kept = train("base", options=options, max_epochs=4, output_dir=str(output))
    assert names_in(output) == ["average", "best", "epoch_3", "epoch_4", "my epoch_1"]
    everything = train("base", options=options | {"keep_last": None}, max_epochs=4)
    assert names_in(everything.output) == ["best", "epoch_1", "epoch_2", "epoch_3", "epoch_4"]
    assert kept.losses == everything.losses
    (file,) = (output / "final").rglob("*.safetensors")
    tensors = load_file(file)
    assert all(torch.equal(tensors[name], everything.tensors[name]) for name in everything.tensors)


def test_a_checkpoint_is_removed_only_when_the_next_one_is_there(train, tmp_path, monkeypatch):
    from sidestep_plugin.engine.wrappers import saving

    published, saved = saving.published, []

    def failing(stage, folder):
        saved.append(folder.name)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        return published(stage, folder)

    monkeypatch.setattr(saving, "published", failing)
    seen = []

    class Looking:
        @hookimpl
        def acestep_step_finished(self, step):
            if step.run.steps % 3 == 1:
                seen.append(names_in(tmp_path / "output") if step.run.steps > 3 else [])

    settings = {"max_epochs": 3, "output_dir": str(tmp_path / "output")}
    train("base", options={"keep_last": 1}, extra_plugins={"looking": Looking()}, **settings)
    assert seen[1:] == [["epoch_1"], ["epoch_1"]] and names_in(tmp_path / "output") == ["epoch_3"]


# -- from a finished adapter -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_starts_from_the_weights_of_an_adapter(train, capsys, kind):
    before = train("base", kind, max_epochs=1)
    (file,) = (before.output / "final").rglob("*.safetensors")
    seen = []

    class Looking:
        @hookimpl
        def acestep_step_finished(self, step):
            if not seen:
                seen.append({name: tensor.clone() for name, tensor in step.run.engine.adapter_tensors.items()})

    after = train(
        "base", kind, options={"init_from": before.output}, extra_plugins={"looking": Looking()}, max_epochs=1
    )
    assert after.losses[0] != before.losses[0]
    weights = load_file(file)
    assert seen[0].keys() == weights.keys()
    assert all(torch.equal(seen[0][name].cpu(), weights[name].to(seen[0][name].dtype)) for name in weights)
    facts = facts_in(after.output / "final")
    assert re.fullmatch(r"\w+ for acestep-v15-base \(SHA-256 [0-9a-f]{16}\)", facts["init_from"])
    assert facts["epoch"] == 1 and "init_from" not in facts_in(before.output / "final")

    # A training that is resumed remembers it, and goes on from its checkpoint.
    (checkpoint,) = (after.output / "checkpoints").iterdir()
    more = train("base", kind, options={"init_from": before.output}, resume_from=str(checkpoint), max_epochs=2)
    assert facts_in(more.output / "final")["init_from"] == facts["init_from"]
    assert "✅ Resumed: " in capsys.readouterr().out


def test_its_size_is_taken_over_and_another_one_refused(train):
    adapter = train("base", max_epochs=1).output
    assert settings_to_start_from(adapter, "lora", {}, {})["rank"] == 4
    assert settings_to_start_from(adapter, "lora", {"alpha": 8}, {"rank": 4})["alpha"] == 8
    with pytest.raises(Refusal, match=r"has rank 4, and --rank is 8. Leave --rank out, or .* average .* --to-rank 8"):
        settings_to_start_from(adapter, "lora", {}, {"rank": 8})
    with pytest.raises(Refusal, match="has alpha 8, and --alpha is 16. Leave --alpha out."):
        settings_to_start_from(adapter, "lora", {}, {"alpha": 16})
    with pytest.raises(Refusal, match="is a LoRA, and a LoKr was asked for. Use --adapter-type lora"):
        settings_to_start_from(adapter, "lokr", {}, {})
    with pytest.raises(Refusal, match="No adapter at"):
        settings_to_start_from(adapter / "nowhere", "lora", {}, {})


def test_an_adapter_that_does_not_fit_trains_nothing(train):
    (file,) = (train("base", max_epochs=1).output / "final").rglob("*.safetensors")
    tensors = load_file(file)
    tensors[f"{min(tensors)}.of.another.layer"] = tensors.pop(min(tensors))
    save_file(tensors, file)
    done = train("base", options={"init_from": file}, max_epochs=1)
    assert not done.losses and not done.tensors
    assert any(text.startswith("❌") and "does not fit" in text for text in done.messages), done.messages
