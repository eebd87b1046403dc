"""Only regular files are ever replaced: devices, pipes, sockets and folders stay what they are, links stay links."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import COMMAND
from safetensors.torch import load_file, save_file

from sidestep_plugin.adapters.facts import read_training_config, write_training_config
from sidestep_plugin.adapters.staging import staged
from sidestep_plugin.adapters.weights_file import read_weights_file, write_metadata
from sidestep_plugin.cli import cli
from sidestep_plugin.engine import checkout_patch as patching
from sidestep_plugin.errors import Refusal
from sidestep_plugin.files import read_json_object, replacing
from sidestep_plugin.launch.launch import check_writable

from .test_inspect import PEFT, lora

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps no pipes, devices or sockets in folders")

KINDS = {"named pipe": stat.S_ISFIFO, "device": stat.S_ISCHR, "socket": stat.S_ISSOCK, "directory": stat.S_ISDIR}


@pytest.fixture(params=KINDS)
def special(request, tmp_path, monkeypatch):
    """Something that is no regular file, in a folder of its own | its path, what it is, and a test of that."""
    folder = tmp_path / "special"
    folder.mkdir()
    file = folder / "copy.safetensors"
    if request.param == "named pipe":
        os.mkfifo(file)
    elif request.param == "device":
        try:
            os.mknod(file, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("making a device node is not permitted here: run this test as root in a container")
    elif request.param == "socket":
        monkeypatch.chdir(folder)  # a socket's path may have about 100 characters
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
    else:
        file.mkdir()
    yield file, request.param
    assert KINDS[request.param](file.lstat().st_mode), "it is no longer what it was"
    assert [place.name for place in folder.iterdir()] == [file.name], "something was left beside it"


def test_a_special_file_is_not_replaced(special):
    file, kind = special
    with pytest.raises(OSError, match=f"{kind}.*only regular files are replaced"), replacing(file) as stream:
        stream.write(b"new")


def test_nor_through_a_link_to_it(special, tmp_path):
    file, kind = special
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OSError, match=kind), replacing(tmp_path / "link") as stream:
        stream.write(b"new")
    assert (tmp_path / "link").is_symlink()


def test_exporting_onto_it_is_refused(special, tmp_path):
    file, kind = special
    if kind == "directory":
        return  # the copy is written into it, under its usual name
    adapter = lora(tmp_path / "adapter", "base_model.model.{}.lora_{}.weight", config=PEFT)
    for more in ([], ["--overwrite"]):
        # In a process of its own: opening a pipe would wait for somebody to read it.
        line = [*COMMAND, "export", adapter, "--to", "comfyui", "--output", file, *more]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert kind in done.stderr and "Choose another --output." in done.stderr and str(file) in done.stderr


def test_a_saved_folder_does_not_take_its_place(special):
    file, kind = special
    if kind == "directory":
        return  # which is what a saved folder replaces
    with pytest.raises(OSError, match=f"{kind}.*expected a folder"), staged(file):
        pass


def test_the_patch_is_not_put_in_its_place(tmp_path):
    file = tmp_path / patching.TARGET
    file.parent.mkdir(parents=True)
    (file.parent / "trainer.py").touch()
    os.mkfifo(file)
    for command in ("status", "apply", "revert"):
        line = [*COMMAND, "patch", command, "--acestep-root", tmp_path]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "named pipe" in done.stderr, done.stderr
    with pytest.raises(Refusal, match="named pipe"):
        patching.apply(tmp_path)
    assert stat.S_ISFIFO(file.lstat().st_mode)


def test_reading_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "training_config.json")
    assert read_training_config(tmp_path) is None
    with pytest.raises(ValueError, match="it is a named pipe"):
        read_json_object(tmp_path / "training_config.json")


def test_weights_are_not_read_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    with pytest.raises(Refusal, match="named pipe"):
        read_weights_file(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["final", "checkpoints", "interrupted"])
def test_an_output_folder_that_could_not_take_the_adapter_is_refused_before_training(name, tmp_path):
    check_writable(tmp_path)
    os.mkfifo(tmp_path / name)
    with pytest.raises(Refusal, match=f"{name} is not a folder.*Choose another"):
        check_writable(tmp_path)


# -- links -----------------------------------------------------------------------------------------------------------


def through(link, file):
    """Check that a link still leads to the file, and that nothing lies beside either."""
    assert link.is_symlink() and link.resolve() == file and file.is_file() and not file.is_symlink()
    assert not [place for folder in {link.parent, file.parent} for place in folder.glob(".*.tmp")]


def linked(tmp_path, name, content=None):
    """A link to a file in another folder, by way of another link."""
    file = tmp_path / "elsewhere" / "file"
    file.parent.mkdir()
    if content is not None:
        file.write_bytes(content)
        file.chmod(0o640)
    (tmp_path / "between").symlink_to(file)
    link = tmp_path / "here" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("../between")
    return link, file.resolve()


@pytest.mark.parametrize("content", [b"old", None], ids=["a file", "nothing yet"])
def test_what_a_link_leads_to_is_replaced(content, tmp_path):
    link, file = linked(tmp_path, "link", content)
    with replacing(link) as stream:
        stream.write(b"new")
    through(link, file)
    assert file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == (0o640 if content else 0o644)


def test_a_link_to_itself_is_an_error(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(OSError, match="link"), replacing(tmp_path / "link"):
        pass
    assert (tmp_path / "link").is_symlink()


def test_everything_that_writes_follows_links(tmp_path):
    link, file = linked(tmp_path, "training_config.json", b"{}")
    write_training_config(link.parent, {"shift": 1.0})
    through(link, file)
    assert json.loads(file.read_bytes()) == {"shift": 1.0}

    folder = lora(tmp_path / "adapter", config=PEFT)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").rename(tmp_path / "weights")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "weights")
    write_metadata(read_weights_file(folder / "adapter_model.safetensors"), {"a": "b"})
    through(folder / "adapter_model.safetensors", (tmp_path / "weights").resolve())
    assert read_weights_file(tmp_path / "weights").metadata == {"a": "b"}
    assert load_file(tmp_path / "weights").keys() == tensors.keys()


def test_exporting_follows_a_link_and_never_replaces_the_adapter_through_one(tmp_path):
    folder = lora(tmp_path / "adapter", "base_model.model.{}.lora_{}.weight", config=PEFT)
    link, file = linked(tmp_path, "copy.safetensors", b"old")

    def export(target):
        line = ["export", str(folder), "--to", "comfyui", "--output", str(target), "--overwrite"]
        return CliRunner().invoke(cli, line)

    assert export(link).exit_code == 0
    through(link, file)
    assert any(key.endswith(".alpha") for key in load_file(file))
    link.unlink()
    link.symlink_to(folder / "adapter_model.safetensors")
    before = (folder / "adapter_model.safetensors").read_bytes()
    refused = export(link)
    assert refused.exit_code == 2 and "is the adapter itself" in refused.output
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_a_patched_file_that_is_a_link_stays_one(tmp_path):
    root = tmp_path / "checkout"
    file = tmp_path / "store" / "init.py"
    file.parent.mkdir()
    file.write_bytes(b"import os\n")
    (root / patching.TARGET).parent.mkdir(parents=True)
    (root / patching.TARGET).symlink_to(file)
    assert patching.apply(root) and patching.status(root) == "applied"
    through(root / patching.TARGET, file.resolve())
    assert patching.revert(root) and file.read_bytes() == b"import os\n"
    through(root / patching.TARGET, file.resolve())


def test_an_adapter_in_a_linked_folder_is_saved_through_the_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "final").symlink_to(tmp_path / "real", target_is_directory=True)
    save_file({}, tmp_path / "final" / "x.safetensors")
    with replacing(tmp_path / "final" / "notes.txt") as stream:
        stream.write(b"new")
    assert (tmp_path / "final").is_symlink() and (tmp_path / "real" / "notes.txt").read_bytes() == b"new"
