"""The pages under docs/: every command is run, every key that is written is listed, every link leads somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import wave
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import running
from safetensors import safe_open

from sidestep_plugin.adapters.facts import FACTS, SCHEMA_VERSION, read_training_config
from sidestep_plugin.cli import cli

ROOT = Path(__file__).parent.parent
# The commands of write-a-plugin.md are run in test_plugins_of_others.py, with its plugin installed.
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
COMMANDS = [
    line
    for name, page in PAGES.items()
    if name != "write-a-plugin.md"
    for block in re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith("acestep-train ") and name != "guided.md"  # test_the_recording_is_what_is_seen
]

GOING_ON = [command for command in COMMANDS if "--resume-from latest" in command]


@pytest.fixture(scope="module")
def output(checkout, trainer, tmp_path_factory):
    """The folder of a training, made by the page's own training command."""
    folder = tmp_path_factory.mktemp("output") / "jazz"
    (training,) = [command for command in COMMANDS if "--output-dir" in command and "--export comfyui" in command]
    place = ["--acestep-root", str(checkout.root), "--checkpoint-dir", str(checkout.checkpoints)]
    settings = ["--rank", "4", "--alpha", "16", "--save-every", "1"]
    done = run(training, checkout, folder, *place, *settings, "--epochs", "1")
    assert done.exit_code == 0, done.output
    assert "For ComfyUI: " in done.output
    for command in dict.fromkeys(GOING_ON):
        done = run(command, checkout, folder, *place, *settings, "--epochs", "2")
        assert done.exit_code == 0 and "✅ Resumed: " in done.output, done.output
    return folder


def run(command, checkout, output, *more):
    words = {"DIR": str(checkout.tensors), "OUTPUT": str(output)}
    # The small training stands for the long ones of the pages.
    words |= {"4": "2", "300-500": "1-2", "one/final": f"{output}/final"}
    words |= {"two/final": str(next(iter(output.glob("checkpoints/epoch_1_*"))))} if "two/final" in command else {}
    arguments = [words.get(word, word) for word in shlex.split(command)[1:]]
    return CliRunner().invoke(cli, [*arguments, *more])


ELSEWHERE = {
    "acestep-train run --plugin sidestep -- acestep",  # trainer/test_programs.py, upstream/test_app.py
    "acestep-train preview OUTPUT --checkpoint-dir DIR",  # previews/test_clips.py
    # preparing/test_command.py, previews/test_prompts.py
    *(command for command in COMMANDS if command.startswith("acestep-train prepare ") or " --prompt " in command),
    "acestep-train --queue jazz.toml rock.toml folk.toml",  # cli/test_queue.py
    "acestep-train patch apply",  # trainer/test_checkout_patch.py
}


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if "--dataset-dir" not in c} - ELSEWHERE))
def test_every_command_runs_as_it_stands_there(command, checkout, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "clip.wav" in command:
        with wave.open("clip.wav", "wb") as clip:
            clip.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
            clip.writeframes(bytes(16000))
    if "timesteps" in command:
        pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'sidestep-plugin[plot]'")
        monkeypatch.setenv("ACESTEP_CHECKPOINTS_DIR", str(checkout.checkpoints))
        command += f" --acestep-root {checkout.root}"
    for copy in output.rglob("comfyui_*"):
        copy.unlink()  # written by the training; export refuses to replace it unasked
    done = run(command, checkout, output)
    assert done.exit_code == 0, done.output


def test_what_inspect_is_said_to_print_is_printed(checkout, output):
    (shown,) = re.findall(r"```text\n(LoRA for .*?)```", PAGES["using-your-adapter.md"], flags=re.DOTALL)
    printed = run("acestep-train inspect OUTPUT", checkout, output).output
    for line in shown.splitlines():
        assert line.replace("2 (rank 64, alpha 128)", "4 (rank 4, alpha 16)") in printed


def test_every_key_of_the_files_is_listed(output):
    page = PAGES["adapter-file.md"]
    assert {key for key in FACTS if f"| `{key}` | {FACTS[key]} |" not in page} == set()
    assert f"`schema_version` is {SCHEMA_VERSION}." in page
    facts = read_training_config(output / "final" / "adapter")
    with safe_open(output / "final" / "adapter" / "adapter_model.safetensors", framework="pt") as weights:
        header = weights.metadata()
    listed = set(re.findall(r"`([\w.]+)`", page)) | {"format"}
    for key in header:
        if key.startswith("sidestep."):
            assert key.removeprefix("sidestep.") in facts
        elif key.startswith(("modelspec.", "ss_")):
            assert key.removeprefix("modelspec.").removeprefix("ss_") in listed, key
        else:
            assert key in listed, key


@pytest.mark.parametrize(
    "page, link", [(name, link) for name, text in PAGES.items() for link in re.findall(r"\]\((?!http)([^)#]+)\)", text)]
)
def test_links_lead_somewhere(page, link):
    assert (ROOT / "docs" / link).exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_the_recording_is_what_is_seen(checkout):
    if checkout.real:
        pytest.skip("the page shows the stand-in; a real checkout is recorded by hand")
    import record_guided

    shown = re.findall(r"```text\n(\$ acestep-train.*?)```", PAGES["guided.md"], flags=re.DOTALL)[0]
    changing = re.compile(r"(^Training  |^Loss by t|^Report: |^Loss: |^Total time: ).*(\n    \S.*)*", re.MULTILINE)

    def steady(text):
        # Numbers may differ in the last digit from one processor to another, some versions of transformers show a bar
        # of their own while they load, and where a line with a path is wrapped depends on the path's length.
        whole = re.sub(r"\n {4}(?=\S)", " ", changing.sub("", text))
        lines = re.sub(r"\d\.\d{4}", "x", whole).splitlines()
        return [line for line in lines if line.strip() and "Loading weights" not in line]

    assert steady(record_guided.on_the_stand_in()) == steady(shown)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a shell script for clusters")
def test_the_script_for_batch_jobs(tmp_path):
    """Stopped by SIGTERM and started again by the same lines, until the training has finished."""
    from sidestep_plugin import miniature

    built = miniature.build(tmp_path, songs=4)
    scripts = re.findall(r"```bash\n(.*?)```", PAGES["several-gpus.md"], flags=re.DOTALL)
    (script,) = [script for script in scripts if script.startswith("resume=")]
    command = f"exec {shlex.quote(sys.executable)} -c 'from sidestep_plugin.cli import main; main()'"
    script = script.replace("--yes", '--yes --epochs "$EPOCHS" --save-every 100 --device cpu')
    line = ["bash", "-euc", script.replace("acestep-train", command)]
    environment = os.environ | {"SONGS": str(built.tensors), "OUTPUT": str(tmp_path / "out"), "PYTHONUTF8": "1"}
    job = {"cwd": built.root, "stderr": subprocess.STDOUT}

    # So many epochs that it cannot be through before the signal reaches it.
    with running(line, env=environment | {"EPOCHS": "100000"}, **job) as first:
        for text in first.stdout:
            if "epoch 3/" in text:
                break
        first.terminate()
        said = first.communicate()[0]
    assert first.returncode == 130 and "Saved as it was after" in said, said

    epochs = int(re.search(r"Saved as it was after (\d+) training steps", said)[1]) // 4 + 2
    with running(line, env=environment | {"EPOCHS": str(epochs)}, **job) as second:
        said = second.communicate()[0]
    assert second.returncode == 0 and "✅ Resumed: " in said, said


def test_every_page_is_linked_from_the_readme_or_from_one_that_is():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    texts = [readme, *PAGES.values()]
    assert all(any(f"{name})" in text or f"{name}#" in text for text in texts) for name in PAGES)


HOUSE = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
FOLDERS = ("sidestep_plugin/", "hooks/", "patches/", "tests/", "docs/", ".ci/", ".github/")


@pytest.mark.parametrize("page", [*HOUSE, ROOT / "docs" / "how-it-is-tested.md"], ids=lambda page: page.stem)
def test_files_and_tests_that_a_page_names_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {word for code in re.findall(r"`([^`]+)`", text) for word in code.split() if word.startswith(FOLDERS)}
    assert len(named) > 3
    for name in named:
        file, _, test = name.partition("::")
        assert (ROOT / file).exists(), f"{page.name} names {file}"
        if test:
            assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page.name} names {name}"


def test_the_architecture_names_every_room_and_its_files_of_steps_and_saves():
    text = HOUSE[0].read_text(encoding="utf-8")
    rooms = [folder.name for folder in (ROOT / "sidestep_plugin").iterdir() if (folder / "__init__.py").is_file()]
    assert rooms and {room for room in rooms if f"**`{room}/`**" not in text} == set()
    for file in re.findall(r"(?<!tests/)\b(?:wrappers|hooks|adapters|resuming)/\w+\.py", text):
        places = [ROOT / file, ROOT / "sidestep_plugin" / file, ROOT / "sidestep_plugin" / "engine" / file]
        assert any(place.is_file() for place in places), file


def test_every_test_file_is_in_the_table_of_contributing():
    text = HOUSE[1].read_text(encoding="utf-8")
    files = [file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("test_*.py")]
    named = set(re.findall(r"`(tests/[^`]*)`", text))
    missing = [file for file in files if file not in named and f"{file.rpartition('/')[0]}/" not in named]
    assert [file for file in missing if not file.startswith("tests/plugins/")] == []


def test_the_recipes_that_contributing_names_are_there():
    recipes = set(re.findall(r"^(\w+)[^:\n]*:(?!=)", (ROOT / "justfile").read_text(encoding="utf-8"), re.MULTILINE))
    text = HOUSE[1].read_text(encoding="utf-8")
    table = text.partition("\n## Test\n")[2].partition("\n#")[0]
    named = {name.split()[0] for name in re.findall(r"^\|.*\| `([^`]+)` \|$", table, re.MULTILINE)} - {"just"}
    assert {"quick", "slow", "ci"} <= named <= recipes


def test_the_index_lists_every_page():
    assert {name for name in PAGES if name != "README.md" and f"({name})" not in PAGES["README.md"]} == set()
