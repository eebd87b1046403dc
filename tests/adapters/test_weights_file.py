"""Safetensors files by their bytes: another header and the same tensors, and never half of a file."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidestep_plugin.adapters.weights_file import HASH_KEY, NewTensor, read_weights_file, write_copy, write_metadata
from sidestep_plugin.errors import Refusal
from sidestep_plugin.files import replacing

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
)
SHAPES = [(3, 5), (7,), (), (0, 4)]
TEXTS = {
    "": "",
    "title": "夜　曲 – Ноктюрн 🎵 e\u0301 \U0001f469\u200d\U0001f3a4",
    "trigger": 'quotes " and \\ and / and \u2028 and \x00 \x1b \x7f \ufeff \uffff',
    "right to left": "\u202e\u05e9\u05dc\u05d5\u05dd",
    "🎵\n": "a key that is no word",
    "long": "ё" * 100_000,
    "looks like the hash": f'"{HASH_KEY}":"0x{"0" * 64}"',
    f'{HASH_KEY}":"0x{"0" * 64}': "also as a key",
}


@pytest.fixture
def weights(tmp_path):
    """A file with a tensor of every dtype in every shape, its bytes at random."""
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        for shape in SHAPES:
            count = torch.empty(shape, dtype=dtype).nbytes
            raw = bytearray(random.Random(number).randbytes(count))
            raw = bytearray(byte & 1 for byte in raw) if dtype is torch.bool else raw
            tensor = torch.frombuffer(raw, dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
            tensors[f"{dtype}-{shape}"] = tensor
    file = tmp_path / "weights.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def handmade(file, header, data):
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return file


def data_of(file):
    raw = file.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def bits(tensors):
    return {name: (t.dtype, t.shape, bytes(t.view(-1).view(torch.uint8))) for name, t in tensors.items()}


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


# -- tensors stay as they are ----------------------------------------------------------------------------------------


def test_another_header_leaves_every_tensor_byte_for_byte(weights):
    before, tensors = data_of(weights), bits(load_file(weights))
    write_metadata(read_weights_file(weights), TEXTS)
    assert data_of(weights) == before
    assert bits(load_file(weights)) == tensors
    assert names_in(weights.parent) == [weights.name]


def test_any_text_can_stand_in_the_header_and_safetensors_reads_it(weights):
    said = TEXTS | {HASH_KEY: ""}
    write_metadata(read_weights_file(weights), said)
    expected = said | {HASH_KEY: "0x" + hashlib.sha256(data_of(weights)).hexdigest()}
    with safe_open(weights, "pt") as file:
        assert file.metadata() == expected
    assert read_weights_file(weights).metadata == expected
    assert read_weights_file(weights).data_hash() == expected[HASH_KEY]


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_of_a_length_that_looks_like_a_pickle_is_read(length, tmp_path):
    """Its first two bytes are those of a pickle of protocol 2 to 5."""
    file = tmp_path / "model.safetensors"
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"x": ""}}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (length - len(raw))
    file.write_bytes(length.to_bytes(8, "little") + raw + b"\0" * 4)
    assert file.read_bytes()[:1] == b"\x80" and load_file(file)["a"].item() == 0.0
    assert list(read_weights_file(file).tensors) == ["a"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_under_another_name_is_still_refused_as_one(protocol, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(pickle.dumps({"a": list(range(2000))}, protocol=protocol))
    with pytest.raises(Refusal, match="is a pickle file"):
        read_weights_file(file)


def test_without_the_key_no_hash_is_written(weights):
    write_metadata(read_weights_file(weights), {"title": "x"})
    assert read_weights_file(weights).metadata == {"title": "x"}


def test_writing_twice_is_writing_once(weights):
    write_metadata(read_weights_file(weights), TEXTS)
    once = weights.read_bytes()
    write_metadata(read_weights_file(weights), TEXTS)
    assert weights.read_bytes() == once


def test_a_file_without_tensors_keeps_being_one(tmp_path):
    file = tmp_path / "none.safetensors"
    save_file({}, file, metadata={"a": "b"})
    write_metadata(read_weights_file(file), {"c": "d", HASH_KEY: ""})
    assert load_file(file) == {}
    assert read_weights_file(file).metadata == {"c": "d", HASH_KEY: "0x" + hashlib.sha256(b"").hexdigest()}


def test_bytes_keep_their_order_whatever_the_header_s_order(tmp_path):
    """Also of dtypes that torch does not know, of empty tensors between others, and of names that sort otherwise."""
    sizes = [
        ("z", "F32", [2], 8),
        ("m", "F4", [4], 2),
        ("a", "F6_E2M3", [4], 3),
        ("e", "U8", [0], 0),
        ("b", "C64", [], 8),
    ]
    entries, position = {}, 0
    for name, dtype, shape, length in sizes:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + length]}
        position += length
    data = bytes(range(position))
    shuffled = {name: entries[name] for name in ("b", "e", "a", "z", "m")}
    file = handmade(tmp_path / "x.safetensors", shuffled, data)
    write_metadata(read_weights_file(file), {"a": "b"})
    assert data_of(file) == data
    written = read_weights_file(file)
    assert {name: written.read(tensor) for name, tensor in written.tensors.items()} == {
        name: data[slice(*entry["data_offsets"])] for name, entry in entries.items()
    }


def test_a_copy_holds_copied_and_new_tensors_and_leaves_its_source(weights):
    source, before = read_weights_file(weights), weights.read_bytes()
    tensors = {f"copy of {name}": NewTensor(t.dtype, t.shape, t) for name, t in source.tensors.items()}
    tensors["new"] = NewTensor("F32", (2,), torch.tensor([1.5, -2.0]).numpy().tobytes())
    copy = weights.parent / "copy.safetensors"
    write_copy(source, copy, tensors, {HASH_KEY: "?"})
    assert weights.read_bytes() == before
    written = load_file(copy)
    assert written.pop("new").tolist() == [1.5, -2.0]
    assert bits(written) == bits({f"copy of {name}": tensor for name, tensor in load_file(weights).items()})
    assert read_weights_file(copy).metadata[HASH_KEY] == "0x" + hashlib.sha256(data_of(copy)).hexdigest()


def test_new_numbers_before_wide_tensors_leave_them_readable(tmp_path):
    """safetensors' library needs a tensor to begin at a multiple of its element's size; an alpha takes four bytes."""
    file = tmp_path / "double.safetensors"
    save_file({"wide": torch.arange(3, dtype=torch.float64)}, file)
    source = read_weights_file(file)
    wide = source.tensors["wide"]
    tensors = {"alpha": NewTensor("F32", (), b"\0\0\x80?"), "wide": NewTensor(wide.dtype, wide.shape, wide)}
    write_copy(source, tmp_path / "copy.safetensors", tensors, {})
    assert load_file(tmp_path / "copy.safetensors")["wide"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_character_is_refused_and_nothing_is_written(text, weights):
    before = weights.read_bytes()
    with pytest.raises(ValueError):
        write_metadata(read_weights_file(weights), {"title": text})
    assert weights.read_bytes() == before
    assert names_in(weights.parent) == [weights.name]


# -- whole or not at all ---------------------------------------------------------------------------------------------

ERRORS = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=["disk full", "Ctrl-C"])
@pytest.mark.parametrize("failing", ["first write", "later write", "flush", "fsync", "chmod", "replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(failing, error, weights, monkeypatch):
    class Failing(io.BufferedWriter):
        writes = 0

        def write(self, data):
            Failing.writes += 1
            if (failing, Failing.writes) in (("first write", 1), ("later write", 3)):
                super().write(bytes(data)[: len(data) // 2])
                raise error
            return super().write(data)

        def flush(self):
            super().flush()
            if failing == "flush" and not self.closed:
                raise error

    def fail(*_args, **_kwargs):
        raise error

    source, before = read_weights_file(weights), weights.read_bytes()
    with monkeypatch.context() as patched:
        if failing in ("fsync", "chmod", "replace"):
            patched.setattr(os, failing, fail)
        else:
            patched.setattr(os, "fdopen", lambda handle, *_: Failing(io.FileIO(handle, "w")))
        with pytest.raises(type(error)):
            write_metadata(source, {"title": "new", HASH_KEY: ""})
    assert weights.read_bytes() == before
    assert names_in(weights.parent) == [weights.name]
    write_metadata(source, {"title": "new"})
    assert read_weights_file(weights).metadata == {"title": "new"}


def test_a_source_that_is_cut_off_meanwhile_leaves_no_copy(weights, tmp_path):
    source = read_weights_file(weights)
    os.truncate(weights, source.data_start + 10)
    tensors = {name: NewTensor(t.dtype, t.shape, t) for name, t in source.tensors.items()}
    with pytest.raises(OSError, match="was truncated while"):
        write_copy(source, tmp_path / "copy.safetensors", tensors, {})
    assert names_in(tmp_path) == [weights.name]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_limit_of_the_system_leaves_the_old_file(weights):
    """No stand-in: the system itself refuses to let the file grow."""
    before = weights.read_bytes()
    code = """if True:
        import resource, sys
        from pathlib import Path
        from sidestep_plugin.adapters.weights_file import read_weights_file, write_metadata
        source = read_weights_file(Path(sys.argv[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_metadata(source, {"title": "x" * 10_000})
        except OSError as error:
            print("refused:", error.strerror)
    """
    done = subprocess.run([sys.executable, "-c", code, weights], capture_output=True, text=True)
    assert done.stdout.startswith("refused:"), done.stderr
    assert weights.read_bytes() == before
    assert names_in(weights.parent) == [weights.name]


def test_no_handle_is_open_while_the_file_is_renamed(weights, monkeypatch):
    """On Windows a file that anybody in this process holds open, or has mapped into memory, cannot be replaced."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list open files")
    really, seen = os.replace, []

    def look(old, new):
        links = [link for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
        places = [str(link.readlink()) for link in links] + Path("/proc/self/maps").read_text().split()
        seen.append([place for place in places if str(weights.parent) in place])
        really(old, new)

    monkeypatch.setattr(os, "replace", look)
    with weights.open("rb") as stream:
        write_metadata(read_weights_file(weights), {"a": "b"})
        stream.read(1)
    write_metadata(read_weights_file(weights), {"a": "c", HASH_KEY: ""})
    assert seen == [[str(weights)], []], "the first rename shows that an open file is seen"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664, 0o444])
def test_a_file_stays_as_open_or_private_as_it_was(mode, weights):
    weights.chmod(mode)
    write_metadata(read_weights_file(weights), {"a": "b"})
    assert stat.S_IMODE(weights.stat().st_mode) == mode


def test_a_block_that_fails_writes_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "夜 🎵.json") as stream:
        stream.write(b"half")
        raise ZeroDivisionError
    assert names_in(tmp_path) == []
    with replacing(tmp_path / "夜 🎵.json") as stream:
        stream.write(b"whole")
    assert (tmp_path / "夜 🎵.json").read_bytes() == b"whole"
    assert names_in(tmp_path) == ["夜 🎵.json"]


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell a process its peak this way")
def test_memory_does_not_grow_with_the_file(tmp_path):
    length = 300_000_000
    entry = {"dtype": "F32", "shape": [length // 4], "data_offsets": [0, length]}
    file = handmade(tmp_path / "large.safetensors", {"x": entry}, b"")
    os.truncate(file, file.stat().st_size + length)
    code = """if True:
        import resource, sys
        from pathlib import Path
        from sidestep_plugin.adapters.weights_file import HASH_KEY, read_weights_file, write_metadata
        write_metadata(read_weights_file(Path(sys.argv[1])), {"a": "b", HASH_KEY: ""})
        status = Path("/proc/self/status")
        if status.exists():  # getrusage also counts what the process was before it became Python
            print(next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024)
        else:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    """
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = read_weights_file(file)
    file.unlink()
    assert written.tensors["x"].shape == (length // 4,) and written.metadata["a"] == "b"
    assert int(done.stdout) < 120_000_000


# -- what is no weights file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"'x' is F32 of shape \[2\]"),
        ({"x": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}}, "overlap or leave gaps"),
        ({"x": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, "too long: 3 bytes"),
        ({"x": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}}, "truncated: 5 bytes"),
        ({"x": {"dtype": "U8", "shape": "4", "data_offsets": [0, 4]}}, "not a tensor entry"),
        ({"x": {"dtype": 5, "shape": [4], "data_offsets": [0, 4]}}, "not a tensor entry"),
        ({"x": {"dtype": "U8", "shape": [True], "data_offsets": [0, 4]}}, "not a tensor entry"),
        ({"__metadata__": {"a": 1}}, "not an object of strings"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(header, says, tmp_path):
    with pytest.raises(Refusal, match=says):
        read_weights_file(handmade(tmp_path / "x.safetensors", header, b"1234"))
