"""The pages under docs/: every command in them is run as it stands there, and every key that is written is listed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
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
    (training,) = [command for command in COMMANDS if "--dataset-dir" in command and command not in GOING_ON]
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
    arguments = [words.get(word, word) for word in shlex.split(command)[1:]]
    return CliRunner().invoke(cli, [*arguments, *more])


ELSEWHERE = {
    "acestep-train run --plugin sidestep -- acestep",  # trainer/test_programs.py, upstream/test_app.py
    "acestep-train patch apply",  # trainer/test_checkout_patch.py
}


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if "--dataset-dir" not in c} - ELSEWHERE))
def test_every_command_runs_as_it_stands_there(command, checkout, output, tmp_path, monkeypatch):
    if "timesteps" in command:
        pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'sidestep-plugin[plot]'")
        monkeypatch.setenv("ACESTEP_CHECKPOINTS_DIR", str(checkout.checkpoints))
        command += f" --acestep-root {checkout.root}"
        monkeypatch.chdir(tmp_path)
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


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_the_recording_is_what_is_seen(checkout):
    if checkout.real:
        pytest.skip("the page shows the stand-in; a real checkout is recorded by hand")
    import record_guided

    shown = re.findall(r"```text\n(\$ acestep-train.*?)```", PAGES["guided.md"], flags=re.DOTALL)[0]
    changing = re.compile(r"(^Training  |^Loss by t|^Report: |^Loss: |^Total time: ).*", re.MULTILINE)

    def steady(text):
        # Numbers may differ in the last digit from one processor to another, and some versions of transformers show a
        # bar of their own while they load.
        lines = re.sub(r"\d\.\d{4}", "x", changing.sub("", text)).splitlines()
        return [line for line in lines if line.strip() and "Loading weights" not in line]

    assert steady(record_guided.on_the_stand_in()) == steady(shown)


@pytest.mark.skipif(os.name == "nt", reason="a shell script for clusters")
def test_the_script_for_batch_jobs(tmp_path):
    """Killed by SIGTERM and started again by the same lines, until it is through."""
    from sidestep_plugin import miniature

    built = miniature.build(tmp_path, songs=4)
    (script,) = re.findall(r"```bash\n(.*?)```", PAGES["cluster-and-notebook.md"], flags=re.DOTALL)
    command = f"{shlex.quote(sys.executable)} -c 'from sidestep_plugin.cli import main; main()'"
    script = script.replace("acestep-train", command).replace(
        "--yes", "--yes --epochs 300 --save-every 100 --device cpu"
    )
    environment = os.environ | {"SONGS": str(built.tensors), "OUTPUT": str(tmp_path / "out"), "PYTHONUTF8": "1"}
    script = script.replace(command, f"exec {command}")
    with subprocess.Popen(
        ["bash", "-euc", script], cwd=built.root, env=environment, stdout=subprocess.PIPE, text=True
    ) as job:
        for line in job.stdout:
            if "epoch 3/" in line:
                break
        job.terminate()
        said = job.communicate(timeout=60)[0]
    assert job.returncode == 130 and "Saved as it was after" in said, said
    done = subprocess.run(["bash", "-euc", script], cwd=built.root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "✅ Resumed: " in done.stdout, done.stdout + done.stderr


def test_every_page_is_linked_from_the_readme_or_from_one_that_is():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    texts = [readme, *PAGES.values()]
    assert all(any(f"{name})" in text or f"{name}#" in text for text in texts) for name in PAGES)
