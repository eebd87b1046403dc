"""A table or a clip that was edited or damaged, and an adapter that generates NaN: one message, no traceback."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sidestep_plugin import Refusal
from sidestep_plugin.cli import cli
from sidestep_plugin.previews.conditions import choose_songs, guidance_for
from sidestep_plugin.previews.making import decode_rest
from sidestep_plugin.previews.table import Row, Table, read_table
from sidestep_plugin.report.page import page

ABOUT = {
    "model_name": "acestep-v15-base",
    "songs": [{"name": "one", "seconds": 0.2}, {"name": "two", "seconds": 1}],
    "settings": {"shift": 1.0, "steps": 50, "guidance": 7.0, "seed": 42},
}
ROWS = [
    Row("base model", 0, None, ["base_model/01_one.wav", "base_model/02_two.safetensors"]),
    Row("epoch 1", 1, 0.5, ["epoch_1/01_one.wav", "epoch_1/02_two.wav"]),
]
ODD = [None, 5, -1, 1.5, math.nan, 10**400, True, "x", "", [], {}, [1], {"a": 1}]


def values_in(value, path=()):
    """The place of every value in a nested one."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from values_in(value[key], (*path, key))


def test_whatever_is_changed_in_a_table_it_is_a_table_or_refused(tmp_path):
    Table(ABOUT, ROWS).write(tmp_path)
    file = tmp_path / "previews.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    assert read_table(tmp_path) == Table(ABOUT, ROWS)
    refused = 0
    for path in list(values_in(written))[1:]:
        for odd in [*ODD, "left out"]:
            content = copy.deepcopy(written)
            place = content
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = odd
            if odd == "left out":
                del place[path[-1]]
            file.write_text(json.dumps(content), encoding="utf-8")
            try:
                table = read_table(tmp_path)
            except Refusal as refusal:
                refused += 1
                assert str(tmp_path) in str(refusal) and "Delete the folder" in str(refusal)
                continue
            assert table is not None
            page({"state": "clips", "written": "", "clips": table.as_report()})
            assert isinstance(table.undecoded, list)
            table.put(Row("epoch 2", 2, None, ["a.wav", "b.wav"]))
    assert refused > 300


# -- a clip of latents -----------------------------------------------------------------------------------------------


def damaged(file, how):
    latents = torch.zeros(1, 5, 64)
    if how == "missing":
        return
    if how == "cut":
        save_file({"latents": latents}, file)
        file.write_bytes(file.read_bytes()[:-10])
    elif how == "folder":
        file.mkdir()
    elif how == "text":
        file.write_text("no clip", encoding="utf-8")
    else:
        content = {
            "other name": {"sound": latents},
            "other shape": {"latents": torch.zeros(5, 64)},
            "other width": {"latents": torch.zeros(1, 5, 8)},
            "whole numbers": {"latents": torch.zeros(1, 5, 64, dtype=torch.int64)},
            "NaN": {"latents": latents * math.nan},
            "empty": {"latents": torch.zeros(1, 0, 64)},
        }[how]
        save_file(content, file)


@pytest.mark.parametrize(
    "how",
    ["missing", "cut", "folder", "text", "other name", "other shape", "other width", "whole numbers", "NaN", "empty"],
)
def test_a_damaged_clip_is_named(tmp_path, how):
    (tmp_path / "base_model").mkdir()
    about = ABOUT | {"songs": ABOUT["songs"][:1]}
    table = Table(about, [Row("base model", 0, None, ["base_model/01_one.safetensors"])])
    file = tmp_path / "base_model" / "01_one.safetensors"
    damaged(file, how)
    with pytest.raises(Refusal) as refused:
        decode_rest(tmp_path, table, vae=None)
    said = str(refused.value)
    assert str(file) in said and "Make it again" in said and ".." not in said.replace("...", "")


# -- an adapter that generates NaN -----------------------------------------------------------------------------------


def test_an_adapter_that_generates_nan(checkout, trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)
    folders = [f"--acestep-root={checkout.root}", f"--checkpoint-dir={checkout.checkpoints}"]
    folders += [f"--dataset-dir={checkout.tensors}", "--device=cpu"]
    line = ["train", "--plugin", "sidestep", "--model", "base", "--epochs", "1", f"--output-dir={tmp_path / 'out'}"]
    assert CliRunner().invoke(cli, [*line, *folders], catch_exceptions=False).exit_code == 0
    weights = tmp_path / "out" / "final" / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, 1e30) for name, tensor in load_file(weights).items()}, weights)
    line = ["preview", str(tmp_path / "out"), "--model", "base", f"--output={tmp_path / 'clips'}"]
    done = CliRunner().invoke(cli, [*line, *folders], catch_exceptions=False)
    assert done.exit_code == 2, done.output
    assert "holds NaN or infinity" in done.stderr and "Choose an earlier checkpoint" in done.stderr


def test_options_are_called_as_the_command_calls_them(tmp_path):
    files = [tmp_path / "a.pt"]
    for option in ("--songs", "--preview-songs"):
        with pytest.raises(Refusal, match=f"^{option} 5: there is 1 song\\. Expected 1 to 1"):
            choose_songs(files, "5", option)
        with pytest.raises(Refusal, match=f"^{option}: no song is named 'b'"):
            choose_songs(files, "b", option)
    for option in ("--cfg", "--preview-cfg"):
        with pytest.raises(Refusal, match=f"^{option} 3: .* Leave {option} out\\.$"):
            guidance_for("turbo", 3.0, option)
