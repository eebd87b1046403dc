"""The five lines in a checkout: put in, taken out, byte for byte, whatever the file looks like."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import without_training_packages

from sidestep_plugin.cli import cli
from sidestep_plugin.engine import checkout_patch as patching
from sidestep_plugin.errors import Refusal
from sidestep_plugin.miniature import build

ORIGINAL = (
    '"""ACE-Step\'s training."""\n\nfrom acestep.training.configs import LoRAConfig\n\n__all__ = ["LoRAConfig"]\n'
)
FILES = {
    "plain": ORIGINAL.encode(),
    "Windows line ends": ORIGINAL.replace("\n", "\r\n").encode(),
    "byte order mark": b"\xef\xbb\xbf" + ORIGINAL.encode(),
    "both": b"\xef\xbb\xbf" + ORIGINAL.replace("\n", "\r\n").encode(),
    "empty": b"",
    "no last line end": b"import os",
    "comment first": b"# -*- coding: utf-8 -*-\n" + ORIGINAL.encode(),
    "mixed line ends": b"import os\r\nimport sys\n",
    "not ASCII": '"""音楽"""\n'.encode(),
}


@pytest.fixture
def checkout_of(tmp_path):
    def make(content):
        root = tmp_path / "checkout"
        file = root / patching.TARGET
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        (file.parent / "trainer.py").write_bytes(b"")
        return root, file

    return make


def patch(*arguments):
    done = CliRunner().invoke(cli, ["patch", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_it_goes_in_once_and_comes_out_leaving_every_byte(content, checkout_of):
    root, file = checkout_of(content)
    assert patching.status(root) == "not applied"
    assert patching.apply(root)
    patched = file.read_bytes()
    assert patched != content and patching.status(root) == "applied"
    compile(patched, "patched", "exec")
    if b"\r\n" in content.partition(b"\n")[0] + b"\n":
        assert patched.count(b"\r\n") == content.count(b"\r\n") + 5
    assert not patching.apply(root) and file.read_bytes() == patched
    assert patching.revert(root) and file.read_bytes() == content
    assert not patching.revert(root) and file.read_bytes() == content


def test_only_lines_are_added_and_none_of_upstreams_is_in_the_patch():
    lines = patching.patch_text().splitlines()
    assert lines[2] == "@@ -0,0 +1,5 @@"
    assert len(lines) == 8 and all(line.startswith("+") for line in lines[3:])


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.parametrize("name", ["plain", "Windows line ends", "comment first"])
def test_git_applies_and_reverts_the_same_patch(name, checkout_of, tmp_path):
    root, file = checkout_of(FILES[name])
    (tmp_path / "it.patch").write_text(patching.patch_text(), encoding="utf-8", newline="\n")

    def git(*arguments):
        line = ["git", "-C", root, "apply", "--unidiff-zero", *arguments, tmp_path / "it.patch"]
        return subprocess.run(line, check=True, capture_output=True)

    git()
    assert patching.status(root) == "applied"
    assert not patching.apply(root)
    git("-R")
    assert file.read_bytes() == FILES[name]
    # And the other way round: what one put in, the other takes out.
    git()
    assert patching.revert(root) and file.read_bytes() == FILES[name]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"_load_plugins()", b"_load_plugins(1)"),
        lambda text: b"import os\n" + text,
        lambda text: text.replace(b"    pass\n", b"", 1),
    ],
    ids=["a word", "a line before", "a line less"],
)
def test_changed_lines_are_left_alone(change, checkout_of):
    root, file = checkout_of(FILES["plain"])
    patching.apply(root)
    file.write_bytes(changed := change(file.read_bytes()))
    for action in (patching.status, patching.apply, patching.revert):
        with pytest.raises(Refusal, match="other lines about sidestep_plugin"):
            action(root)
    assert file.read_bytes() == changed
    assert patch("status", "--acestep-root", root)[0] == 2


@pytest.mark.parametrize(
    "content", [b"from __future__ import annotations\n", b"# coding: utf-16\n", b"def f(:\n", b"\xff\xfe"]
)
def test_a_file_that_cannot_take_lines_at_its_top_is_refused(content, checkout_of):
    root, file = checkout_of(content)
    with pytest.raises(Refusal, match="cannot take lines at its top"):
        patching.apply(root)
    assert file.read_bytes() == content
    assert sorted(entry.name for entry in file.parent.iterdir()) == ["__init__.py", "trainer.py"]


def test_the_command_says_what_it_did_and_what_to_do_next(checkout_of):
    root, file = checkout_of(FILES["plain"])
    where = ("--acestep-root", root)
    assert "is not applied. acestep-train patch apply puts it in" in patch("status", *where)[1]
    code, said = patch("apply", *where)
    assert code == 0 and "five lines were added at its top" in said and "Start ACE-Step as always" in said
    assert "has the lines already" in patch("apply", *where)[1]
    assert "is applied" in patch("status", *where)[1]
    assert "is as it was before the patch" in patch("revert", *where)[1]
    assert "has no such lines" in patch("revert", *where)[1]
    assert file.read_bytes() == FILES["plain"]
    assert patch("show") == (0, patching.patch_text())


def test_a_folder_that_is_no_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = patch("apply", "--acestep-root", tmp_path / "nowhere")
    assert code == 2 and "No ACE-Step 1.5 found" in said


JOB = """
import os
import acestep.training.trainer as trainer
from sidestep_plugin import attach
from sidestep_plugin.engine.attachment import _attached

print("attached:", [attachment.registry.names for attachment in _attached])
if "blocked" in os.environ:
    print("ended with:", [text for _, _, text in trainer.LoRATrainer.train_from_preprocessed(None, "")])
elif _attached:
    with attach(trainer, options={"cfg_ratio": 0.5}) as handle:
        print("made room:", _attached == [handle], handle.options["cfg_ratio"])
    print("back:", [attachment.options.get("cfg_ratio") for attachment in _attached])
    print("wrapped:", hasattr(trainer.sample_discrete_timestep, "__wrapped__"))
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    built = build(tmp_path_factory.mktemp("patched"), models=[], songs=0)
    patching.apply(built.root)
    return built.root


def import_in(root, code=JOB, **environment):
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUTF8": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=without_training_packages(environment),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_a_patched_checkout_attaches_sidestep_and_makes_room_for_whoever_attaches_himself(patched):
    said, _ = import_in(patched, SIDESTEP_CFG_RATIO="0.25")
    assert "attached: [['sidestep']]" in said
    assert "made room: True 0.5" in said
    assert "back: [0.25]" in said
    assert "wrapped: True" in said


@pytest.mark.slow
def test_an_empty_variable_attaches_nothing(patched):
    assert "attached: []" in import_in(patched, ACESTEP_PLUGINS="")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, told",
    [
        ({"ACESTEP_PLUGINS": "nothing-like-it"}, "No plugin 'nothing-like-it' is installed"),
        ({"ACESTEP_PLUGINS": "sidestep, nothing-like-it"}, "No plugin 'nothing-like-it' is installed"),
        ({"SIDESTEP_CFG_RATIO": "7"}, "Option cfg_ratio: 7.0 is not in the range"),
        ({"SIDESTEP_CFG_RATOI": "0.1"}, "Did you mean SIDESTEP_CFG_RATIO?"),
        ({"SIDESTEP_VARIANT": "bass"}, "'bass' is not one of"),
        ({"ACESTEP_WINS": "somebody"}, "no plugin of that name takes part"),
    ],
)
def test_what_cannot_be_attached_ends_trainings_with_a_message_and_nothing_else(environment, told, patched):
    said, log = import_in(patched, blocked="1", **environment)
    assert "❌ Plugins " in said and told in said
    assert told in log, "the log must say it too"


@pytest.mark.slow
def test_who_attaches_himself_is_not_blocked_and_afterwards_all_is_as_it_was(patched):
    code = JOB.partition("print(")[0] + (
        "train = lambda: list(trainer.LoRATrainer.train_from_preprocessed(None, ''))[0][2]\n"
        "assert 'nothing-like-it' in train()\n"
        "with attach(trainer) as handle:\n"
        "    assert hasattr(trainer.LoRATrainer.train_from_preprocessed, '__wrapped__'), 'still blocked'\n"
        "assert 'nothing-like-it' in train()\n"
    )
    import_in(patched, code, ACESTEP_PLUGINS="nothing-like-it")


@pytest.mark.slow
def test_a_variable_of_another_program_is_warned_about(patched):
    said, log = import_in(patched, SIDESTEP_INSTALL_DIR="elsewhere")
    assert "attached: [['sidestep']]" in said
    assert "SIDESTEP_INSTALL_DIR is set, but no loaded plugin has such an option" in log
