"""Every command and snippet in the README is run: here, in other tests that are named here, or by .ci/run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import without_training_packages

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_two_blocks_are_the_commands_of_a_fresh_machine():
    (kind, demo), (other_kind, tests) = BLOCKS[:2]
    assert kind == other_kind == "bash"
    assert "acestep-train demo" in demo and "pytest" in tests
    assert all("python3 -m venv" in block and "pip install" in block for block in (demo, tests))
    # .ci/run takes them out of the README by number, word for word, and what follows the demo by what it begins with.
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "readme_block 1" in ci and "readme_block 2" in ci and "acestep-train inspect [^`]*" in ci
    assert len(re.findall(r"`\.venv/bin/acestep-train inspect [^`]*`", README)) == 1
    # What the quick run leaves out, .ci/run runs.
    assert "-m 'not slow'" in tests and "-m slow" in ci


def test_every_other_command_has_a_test():
    commands = {
        line.partition("#")[0].strip()
        for kind, block in BLOCKS[2:]
        if kind == "text"
        for line in block.splitlines()
        if line and not line.startswith(("Model: ", "Timesteps: ", "Condition dropout: ", "To generate: ", "Warning: "))
    }
    assert commands == {
        "pip install PATH/TO/THIS/CLONE",  # .ci/run, with this clone's path and the pinned torch: the first command
        "acestep-train",  # cli/test_help.py, cli/test_guided.py
        "acestep-train --model base --dataset-dir DIR --output-dir DIR",  # below
        # test_docs.py
        "acestep-train --model base --dataset-dir DIR --output-dir DIR --resume-from latest",
        "acestep-train check",  # below
        "acestep-train run --plugin sidestep -- acestep",  # trainer/test_programs.py, upstream/test_app.py
        "acestep-train patch apply",  # trainer/test_checkout_patch.py
        "acestep-train patch revert",  # trainer/test_checkout_patch.py
        "acestep-train inspect OUTPUT",  # test_docs.py
        "acestep-train export OUTPUT --to comfyui",  # test_docs.py
    }


def test_every_command_in_the_text_has_a_test():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    found = {" ".join(command.split()) for command in re.findall(r"`([^`]*)`", text) if " " in command}
    assert {command for command in found if re.match(r"(\S*/)?(acestep|pip|python|git)", command)} == {
        ".venv/bin/acestep-train inspect acestep-demo/output/base-lora",  # .ci/run, after the first command
        "acestep-train estimate",  # cli/test_estimate.py
        "acestep-train train --help",  # cli/test_train.py
        "acestep-train prepare music --model base --output songs",  # preparing/test_command.py
        "acestep-train timesteps --model base --plot timesteps.png",  # test_docs.py
    }


def cli(*arguments, cwd, trains=True):
    line = [sys.executable, "-c", "from sidestep_plugin.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"PYTHONUTF8": "1"}
    environment = environment if trains else without_training_packages(environment)
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, encoding="utf-8", env=environment)


@pytest.mark.slow
def test_training_from_the_checkouts_folder(checkout, tmp_path):
    """With no more options than the README's: checkout and models are found from the current directory."""
    from sidestep_plugin import miniature

    built = miniature.build(tmp_path / "built", songs=2)
    output = tmp_path / "output"
    command = ["--model", "base", "--dataset-dir", built.tensors, "--output-dir", output]
    done = cli(*command, "--epochs", "2", cwd=built.root)  # 100 epochs would show the same
    assert done.returncode == 0, done.stderr
    shown = next(block for kind, block in BLOCKS if block.startswith("Model: acestep-v15-base"))
    assert shown in done.stdout, "the README shows other lines than the program"
    facts = json.loads((output / "final" / "adapter" / "training_config.json").read_text(encoding="utf-8"))
    assert facts["model_name"] == "acestep-v15-base"


def test_the_warning_without_a_plugin(tmp_path):
    from sidestep_plugin import miniature
    from sidestep_plugin.launch.launch import upstreams_timesteps
    from sidestep_plugin.run import ModelFacts

    built = miniature.build(tmp_path, models=["acestep-v15-base", "acestep-v15-turbo"], songs=0)
    shown = next(block.strip() for kind, block in BLOCKS if block.startswith("Warning: "))
    assert upstreams_timesteps(ModelFacts.from_folder(built.checkpoints / "acestep-v15-base")) == shown
    assert upstreams_timesteps(ModelFacts.from_folder(built.checkpoints / "acestep-v15-turbo")) is None


@pytest.mark.parametrize("page", ["docs/settings.md", "docs/memory.md", "docs/guided.md"])
def test_pages_that_a_reader_needs_are_linked(page):
    assert f"]({page})" in README.replace("\n", " ")


@pytest.mark.slow
def test_checking_from_the_checkouts_folder(tmp_path):
    from sidestep_plugin import miniature

    done = cli("check", cwd=miniature.build(tmp_path, songs=0).root)
    assert done.returncode == 0, done.stderr
    assert "acestep-v15-base: base" in done.stdout and "Verdict: Compatible: LoRA" in done.stdout


def test_only_commands_that_work_today():
    """The package is on no registry."""
    assert "pip install sidestep-plugin" not in README


def test_it_begins_with_one_sentence_and_the_two_commands():
    what, _, rest = README.partition("\n```bash\n")
    assert what.startswith("# sidestep-plugin\n\nTrains ") and len(what) < 800
    titles = re.findall(r"^## (.*)", rest, flags=re.MULTILINE)
    assert titles == [
        "Train on your songs",
        "Use the adapter",
        "Why it matters",
        "In ACE-Step's own app",
        "From Python",
        "More",
    ]


@pytest.mark.slow
def test_the_tests_take_a_checkout(tmp_path):
    """As docs/how-it-is-tested.md and CONTRIBUTING.md say."""
    from sidestep_plugin import miniature

    built = miniature.build(tmp_path, models=[], songs=0)
    # A real checkout has settings of its own for pytest, which must not be taken for these tests'.
    (built.root / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '--nothing-like-it'\n", "utf-8")
    line = [sys.executable, "-m", "pytest", f"--acestep-root={built.root}", "-q", "tests/engine/test_seams.py"]
    done = subprocess.run([*line, "-k", "the_checkout_fits"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_the_python_snippet(trainer):
    (snippet,) = (block for kind, block in BLOCKS if kind == "python")
    before = trainer.sample_discrete_timestep
    exec(compile(snippet, "README.md", "exec"), {})
    assert trainer.sample_discrete_timestep is before


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
