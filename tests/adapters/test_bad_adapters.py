"""What strangers' files can do to ``inspect`` and ``export``: nothing. One clear error, in time, in little memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from functools import partial

import pytest

WATCHED = """
import atexit, os, sys
from pathlib import Path
def peak():
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the process was before it became Python
        (text,) = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        Path(os.environ["PEAK"]).write_text(text)
    elif sys.platform == "darwin":
        import resource
        Path(os.environ["PEAK"]).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
atexit.register(peak)
from sidestep_plugin.cli import main; main()
"""
MEMORY = 200_000  # KiB
SECONDS = 20

LAYER = "base_model.model.layers.0.self_attn.q_proj"
SHAPES = {f"{LAYER}.lora_A.weight": [4, 8], f"{LAYER}.lora_B.weight": [8, 4]}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "acestep-v15-base"}
# An escape sequence that no program takes out for us: it sets the window's title, rings, and turns the text around.
ESCAPES = "\x1b]0;owned\x07\x9b31m\u202e\r\x00"
NAMED = ESCAPES.strip("\0")  # as part of a file's name

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files, or not for everybody")


# -- making files ----------------------------------------------------------------------------------------------------


def entries(shapes=SHAPES):
    header, position = {}, 0
    for name, shape in shapes.items():
        length = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + length]}
        position += length
    return header


def raw(folder, content, name="adapter_model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def with_header(folder, header, data=bytes(256), name="adapter_model.safetensors"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return raw(folder, len(text).to_bytes(8, "little") + text + data, name)


def adapter(folder, *, metadata=None, shapes=SHAPES, config=CONFIG, beside=None, **more):
    header = entries(shapes) | ({} if metadata is None else {"__metadata__": metadata})
    size = max(entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry)
    file = with_header(folder, header, bytes(size), **more)
    for name, content in (("adapter_config.json", config), ("training_config.json", beside)):
        if content is not None:
            raw(folder, content if isinstance(content, bytes) else json.dumps(content).encode(), name)
    return file


def changed(**changes):
    """A header whose first tensor has another entry."""
    header = entries()
    header[f"{LAYER}.lora_A.weight"] |= changes
    return lambda folder: with_header(folder, header)


class Payload:
    """A pickle that makes a file when it is opened."""

    def __init__(self, folder):
        self.marker = str(folder / "the pickle was opened")

    def __reduce__(self):
        return io.open, (self.marker, "w")


def pickled(folder, name, protocol=2):
    folder.mkdir(parents=True, exist_ok=True)
    return raw(folder, pickle.dumps(Payload(folder), protocol), name)


def zipped(folder, name):
    """As torch.save writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(folder), 2))
    return folder / name


def sparse(folder, start, length, name="adapter_model.safetensors"):
    file = raw(folder, start, name)
    os.truncate(file, length)
    return file


def linked(folder, name, target):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)
    return folder


def fifo(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / name)
    return folder / name


# -- asking ----------------------------------------------------------------------------------------------------------


def everything_in(folder):
    """Every file's place, time and content, without following a link or opening a pipe."""
    found = {}
    for file in sorted(folder.rglob("*")):
        about, content = file.lstat(), ""
        if file.is_symlink():
            content = os.fsencode(file.readlink())
        elif file.is_file():
            content = hashlib.sha256(file.read_bytes()).hexdigest()
        found[file] = (about.st_mode, about.st_mtime_ns, about.st_size if file.is_file() else 0, content)
    return found


@pytest.fixture
def ask(tmp_path):
    """Run ``inspect``, ``inspect --json`` and ``export`` on a path, and hold them to what always holds."""
    deep = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)  # to read here what could be written there
    yield partial(asked, tmp_path)
    sys.setrecursionlimit(deep)


def asked(tmp_path, path, cwd=None):
    case, copy = tmp_path / "case", tmp_path / "copy.safetensors"
    before, running, done = everything_in(case), [], []
    commands = ["inspect", path], ["inspect", path, "--json"], ["export", path, "--to", "comfyui", "--output", copy]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for number, words in enumerate(commands):
        peak = tmp_path / f"peak-{number}"
        environment = os.environ | {"PEAK": str(peak), "PYTHONUTF8": "1"}
        line = [sys.executable, "-c", WATCHED, *map(str, words)]
        running.append((subprocess.Popen(line, cwd=cwd, env=environment, **pipes), peak))
    try:
        for process, peak in running:
            stdout, stderr = process.communicate(timeout=SECONDS)
            done.append((process.returncode, stdout.decode(), stderr.decode()))
            assert b"Traceback" not in stderr, stderr.decode()[-1500:]
            assert process.returncode in (0, 2)
            for text in (stdout, stderr):
                assert not {0x1B, 0x07, 0x00, 0x0D} & set(text), f"raw control characters: {text[:500]!r}"
                assert "\u202e" not in text.decode() and "\x9b" not in text.decode()
                assert text.startswith(b"{") or len(text) < 10_000
            assert not peak.exists() or int(peak.read_text()) < MEMORY
    finally:
        for process, _ in running:
            process.kill()
            process.communicate()
    assert everything_in(case) == before, "something was written"
    (_, _, _), (_, as_json, _), (exported, _, _) = done
    if as_json:
        json.loads(as_json, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert copy.exists() == (exported == 0)
    return done


def refused(done, says):
    for code, stdout, stderr in done:
        assert code == 2, stdout
        assert len(stderr.splitlines()) == 1, stderr
        assert stderr.startswith("Error: ") and stdout == ""
        assert says in stderr


# -- files that are no adapter ---------------------------------------------------------------------------------------

KOHYA_XL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"
OTHERS = {
    "SDXL": {KOHYA_XL: [4, 8], KOHYA_XL.replace("down", "up"): [8, 4]},
    "Llama": {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": [4, 4] for part in "AB"},
    "ACE-Step 1": {f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.weight": [4, 4] for part in "AB"},
}
GOOD = json.dumps(entries()).encode()
GOOD = len(GOOD).to_bytes(8, "little") + GOOD + bytes(256)
LONG = 50_000_000
NO_FILE = "is not a readable safetensors file"

REFUSED = {
    "nothing there": (lambda f: f / "nowhere.safetensors", "No adapter at"),
    "a very long name": (lambda f: f / ("x" * 5000), ""),
    "an empty folder": (lambda f: f.mkdir() or f, "No adapter in"),
    "a folder of other files": (lambda f: raw(f, b"{}", "config.json").parent, "No adapter in"),
    "a folder called like one": (lambda f: (f / "adapter_model.safetensors").mkdir(parents=True) or f, ""),
    "a folder of that name": (lambda f: (f / "x.safetensors").mkdir(parents=True) or f, ""),
    "two of them": (lambda f: adapter(f, name="a.safetensors") and adapter(f, name="b.safetensors").parent, "Name one"),
    "0 bytes": (lambda f: raw(f, b""), "is empty, as an interrupted download leaves it"),
    "7 bytes": (lambda f: raw(f, GOOD[:7]), f"{NO_FILE}: it has 7 bytes"),
    "cut in the header": (lambda f: raw(f, GOOD[:100]), NO_FILE),
    "cut in the tensors": (lambda f: raw(f, GOOD[:-1]), f"{NO_FILE}: it is truncated"),
    "bytes too many": (lambda f: raw(f, GOOD + b"x"), f"{NO_FILE}: it is too long"),
    "header of exabytes": (lambda f: raw(f, b"\xff" * 7 + b"\x7f" + GOOD[8:]), NO_FILE),
    "header of 50 MB": (lambda f: sparse(f, LONG.to_bytes(8, "little"), LONG + 8), NO_FILE),
    "header not JSON": (lambda f: with_header(f, b"{" * 50), NO_FILE),
    "header not UTF-8": (lambda f: with_header(f, b'{"\xff\xfe": 1}'), NO_FILE),
    "header a list": (lambda f: with_header(f, []), "it holds a list"),
    "header a number": (lambda f: with_header(f, b"1" * 5000), NO_FILE),
    "deep list": (lambda f: with_header(f, b"[" * 1_000_000), NO_FILE),
    "deep object": (lambda f: with_header(f, b'{"a":' * 1_000_000), NO_FILE),
    "deep entry": (lambda f: with_header(f, b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), NO_FILE),
    "half a character": (lambda f: adapter(f, metadata={"title": "\ud800"}), NO_FILE),
    "half a character as key": (lambda f: adapter(f, metadata={"\udfff": "x"}), NO_FILE),
    "NaN": (lambda f: with_header(f, b'{"__metadata__": NaN}'), NO_FILE),
    "NaN as place": (changed(data_offsets=[0, float("nan")]), NO_FILE),
    "infinite place": (changed(data_offsets=[0, float("inf")]), NO_FILE),
    "overlapping": (changed(data_offsets=[64, 192]), "overlap or leave gaps"),
    "gap": (lambda f: with_header(f, {"x": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}), "gaps"),
    "negative place": (changed(data_offsets=[-128, 0]), "not a tensor entry"),
    "backwards": (changed(data_offsets=[128, 0]), NO_FILE),
    "another shape": (changed(shape=[4, 9]), "does not have 128 bytes"),
    "negative shape": (changed(shape=[-4, -8]), "not a tensor entry"),
    "shape without end": (changed(shape=[10**4000] * 2000), NO_FILE),
    "shape of millions": (changed(shape=[1] * 2_000_000), ""),
    "entry a text": (lambda f: with_header(f, {"x": "y"}), "not a tensor entry"),
    "entry empty": (lambda f: with_header(f, {"x": {}}), "not a tensor entry"),
    "text of 50 MB": (lambda f: adapter(f, metadata={"a": "x" * LONG}), "but at most"),
    "text of 50 MB in Unicode": (
        lambda f: with_header(f, b'{"__metadata__":{"a":"' + "🎵".encode() * (LONG // 4) + b'"}}'),
        "but at most",
    ),
    "not a text": (lambda f: adapter(f, metadata={"a": {"b": 1}}), "not an object of strings"),
    "no LoRA": (lambda f: adapter(f, shapes={"decoder.weight": [2, 2]}), "is not an adapter"),
    **{name: (lambda f, s=shapes: adapter(f, shapes=s), "for another model") for name, shapes in OTHERS.items()},
    "escapes in names": (lambda f: adapter(f, shapes={f"x{ESCAPES}.lora_A.weight": [2, 2]}), "for another model"),
    "escapes in the architecture": (
        lambda f: adapter(f, shapes=OTHERS["SDXL"], metadata={"modelspec.architecture": ESCAPES}),
        "for another model",
    ),
    "pickle .bin": (lambda f: pickled(f, "adapter_model.bin"), "a pickle file"),
    "pickle .bin in its folder": (lambda f: pickled(f, "adapter_model.bin").parent, "a pickle file"),
    "pickle .pt": (lambda f: zipped(f, "lora_weights.pt"), "a pickle file"),
    "pickle .PT": (lambda f: zipped(f, "lora_weights.PT"), "a pickle file"),
    "pickle .pt in its folder": (lambda f: zipped(f, "lora_weights.pt").parent, "a pickle file"),
    **{
        f"pickle {protocol} as safetensors": (lambda f, p=protocol: pickled(f, "adapter_model.safetensors", p), "")
        for protocol in range(6)
    },
    "zip as safetensors": (lambda f: zipped(f, "adapter_model.safetensors"), "a pickle file"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_adapter_is_one_clear_error(name, ask, tmp_path):
    make, says = REFUSED[name]
    refused(ask(make(tmp_path / "case")), says)


def test_the_pickles_here_do_something_when_they_are_opened(tmp_path):
    """Or the tests above would pass however they were read."""
    pickle.loads(pickled(tmp_path, "x.bin").read_bytes()).close()
    assert (tmp_path / "the pickle was opened").exists()


@pytest.mark.parametrize("cwd_holds_one", [False, True])
def test_an_empty_path_is_not_the_current_folder(cwd_holds_one, ask, tmp_path):
    """What a script passes when its variable is empty."""
    case = tmp_path / "case"
    case.mkdir()
    if cwd_holds_one:
        adapter(case)
    for code, _, stderr in ask("", cwd=case):
        assert code == 2 and "name is empty" in stderr.splitlines()[-1]


# -- links and pipes -------------------------------------------------------------------------------------------------

OUT = "is a link out of its folder"
LINKS = {
    "weights": (lambda f: linked(f, "adapter_model.safetensors", adapter(f.parent / "else")), OUT),
    "weights of any name": (lambda f: linked(f, "x.safetensors", adapter(f.parent / "else")), OUT),
    "named file": (lambda f: linked(f, "x.safetensors", adapter(f.parent / "else")) / "x.safetensors", OUT),
    "folder inside": (lambda f: linked(f, "final", adapter(f.parent / "else").parent), OUT),
    "training_config.json": (lambda f: linked(adapter(f).parent, "training_config.json", "/etc/hosts"), OUT),
    "adapter_config.json": (
        lambda f: linked(adapter(f, config=None).parent, "adapter_config.json", raw(f.parent / "else", b"{}")),
        OUT,
    ),
    "to a name of escapes": (
        lambda f: linked(f, "adapter_model.safetensors", adapter(f.parent / NAMED)),
        OUT,
    ),
    "to nowhere": (lambda f: linked(f, "adapter_model.safetensors", "nowhere"), "is a broken link"),
    "to itself": (lambda f: linked(f, "adapter_model.safetensors", "adapter_model.safetensors"), "is a broken link"),
    "named, to itself": (lambda f: linked(f, "x.safetensors", "x.safetensors") / "x.safetensors", ""),
    "config to itself": (
        lambda f: linked(adapter(f).parent, "training_config.json", "training_config.json"),
        "is a broken link",
    ),
    "pipe": (lambda f: fifo(f, "x.safetensors"), "neither a file nor a folder"),
    "pipe in its folder": (lambda f: fifo(f, "adapter_model.safetensors").parent, ""),
    "pipe of any name in its folder": (lambda f: fifo(f, "x.safetensors").parent, ""),
    "link to a pipe": (lambda f: linked(fifo(f, "pipe").parent, "adapter_model.safetensors", "pipe"), ""),
    "training_config.json to a pipe": (
        lambda f: linked(fifo(adapter(f).parent, "pipe").parent, "training_config.json", "pipe"),
        "",
    ),
    "adapter_config.json to a pipe": (
        lambda f: linked(fifo(adapter(f, config=None).parent, "pipe").parent, "adapter_config.json", "pipe"),
        "",
    ),
    "device": (lambda f: linked(f, "adapter_model.safetensors", "/dev/zero"), OUT),
    "two names of escapes": (
        lambda f: [adapter(f, name=n + NAMED + ".safetensors").parent for n in "ab"].pop(),
        "Name one",
    ),
    "pickle of escapes": (lambda f: pickled(f, f"x{NAMED}.bin").parent, "a pickle file"),
}


@pytest.mark.slow
@posix_only
@pytest.mark.parametrize("name", LINKS)
def test_links_and_pipes_are_told_and_not_followed(name, ask, tmp_path):
    make, says = LINKS[name]
    for code, stdout, stderr in ask(make(tmp_path / "case")):
        assert code == 2
        problems = json.loads(stdout)["problems"] if stdout.startswith("{") else stderr.splitlines()
        assert any(says in problem for problem in problems), problems


# -- good weights, strange neighbours --------------------------------------------------------------------------------


def text_of(depth):
    return b'{"schema_version": 1, "title": ' + b"[" * depth + b"]" * depth + b"}"


LONG_LAYER = "base_model.model.layers.0.mlp." + "a" * 60
OURS = {"schema_version": 1, "model_variant": "base", "shift": 1.0, "num_inference_steps": 50, "rank": 4, "alpha": 8}
SAID = {"title": ESCAPES, "trigger": ESCAPES, "model_name": ESCAPES, "model_variant": "base" + ESCAPES}
SAID |= {"shift": ESCAPES, "songs": ESCAPES, "timestep_law": ESCAPES, "cfg_ratio": ESCAPES, "rank": ESCAPES}
NEIGHBOURS = {
    # What ask() holds every answer to is what counts here; the text says what else must be in inspect's.
    "config of 50 MB": (lambda f: adapter(f, config=b'{"r": "' + b"x" * LONG + b'"}'), "longer than"),
    "facts of 50 MB": (lambda f: adapter(f, beside=b'{"r": "' + b"x" * LONG + b'"}'), "longer than"),
    "config not JSON": (lambda f: adapter(f, config=b"{"), "cannot be read"),
    "facts not JSON": (lambda f: adapter(f, beside=b"{"), "cannot be read"),
    "facts not UTF-8": (lambda f: adapter(f, beside=b'{"title": "\xff"}'), "cannot be read"),
    "facts a list": (lambda f: adapter(f, beside=[]), "it holds a list"),
    "facts too deep": (lambda f: adapter(f, beside=text_of(100_000)), "nested too deeply"),
    **{
        f"facts {depth} deep": (lambda f, d=depth: adapter(f, beside=text_of(d)), "")
        for depth in (450, 900, 930, 940, 950, 960, 970, 5000)
    },
    "header 700 deep": (
        lambda f: adapter(f, metadata={"sidestep.schema_version": "1", "x": "[" * 700 + "]" * 700}),
        "",
    ),
    "facts of escapes": (lambda f: adapter(f, beside=OURS | SAID), "\\x1b]0;owned\\x07"),
    "Side-Step of escapes": (lambda f: adapter(f, beside=SAID), "\\x1b]0;owned\\x07"),
    "header of escapes": (
        lambda f: adapter(f, metadata={f"sidestep.{key}": str(value) for key, value in (OURS | SAID).items()}),
        "\\x1b]0;owned\\x07",
    ),
    "kohya of escapes": (
        lambda f: adapter(f, config=None, metadata={"ss_output_name": ESCAPES, "ss_sd_model_name": ESCAPES}),
        "\\x1b]0;owned\\x07",
    ),
    "config of escapes": (lambda f: adapter(f, config=CONFIG | {"base_model_name_or_path": ESCAPES}), "\\x1b]0;owned"),
    "layers of escapes": (
        lambda f: adapter(f, shapes={f"layers.0.mlp.{ESCAPES}.lora_{part}.weight": [4, 4] for part in "AB"}),
        "",
    ),
    "other tensors of escapes": (lambda f: adapter(f, shapes=SHAPES | {ESCAPES: [1, 1]}), "\\x1b]0;owned\\x07"),
    "dtype of escapes": (changed(dtype="F32" + ESCAPES), ""),
    "half a character in a name": (
        lambda f: adapter(f, shapes={f"layers.0.mlp.\ud800.lora_{part}.weight": [4, 4] for part in "AB"}),
        "",
    ),
    "half a character in a dtype": (changed(dtype="\ud800"), ""),
    "half a character in facts": (lambda f: adapter(f, beside=OURS | {"title": "\ud800"}), "\\ud800"),
    "pattern without end": (lambda f: adapter(f, config=CONFIG | {"alpha_pattern": {"(a+)+$": 3}}), ""),
    "rank pattern without end": (lambda f: adapter(f, config=CONFIG | {"rank_pattern": {"(a+)+$": 3}}), ""),
    "pattern of alternatives": (
        lambda f: adapter(
            f,
            shapes={f"{LONG_LAYER}.lora_{part}.weight": [4, 4] for part in "AB"},
            config=CONFIG | {"alpha_pattern": {"(.|.)" * 39 + "Z": 3}},
        ),
        "",
    ),
    "pattern on a long name": (
        lambda f: adapter(
            f,
            shapes={f"{LONG_LAYER * 500}.lora_{part}.weight": [4, 4] for part in "AB"},
            config=CONFIG | {"alpha_pattern": {".*a.*a.*aZ": 3}},
        ),
        "",
    ),
    "thousands of patterns": (
        lambda f: adapter(
            f,
            shapes={f"layers.{n}.mlp.up_proj.lora_{part}.weight": [1, 1] for n in range(500) for part in "AB"},
            config=CONFIG | {"alpha_pattern": {f"no_such_{n}": 3 for n in range(10_000)}},
        ),
        "",
    ),
    "text of 14 MB in Unicode": (lambda f: adapter(f, metadata={"a": "é" * 1_000_000 + "🎵" * 3_000_000}), ""),
    "many tensors": (
        lambda f: adapter(f, shapes=SHAPES | {f"{n:x}": [0, 1] for n in range(200_000)}),
        "",
    ),
    "many empty lists": (lambda f: with_header(f, b"[" + b"[]," * 5_000_000 + b"0]"), ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_strange_neighbours_do_no_harm(name, ask, tmp_path):
    make, says = NEIGHBOURS[name]
    (code, stdout, stderr), (json_code, _, _), _ = ask(make(tmp_path / "case"))
    assert says in stdout + stderr
    assert code == json_code
