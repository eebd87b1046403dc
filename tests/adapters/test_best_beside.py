"""The commands that show or copy a finished adapter say when the training has left a better one."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from sidestep_plugin.adapters.facts import better_than, better_than_final
from sidestep_plugin.cli import cli


def saved(folder, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training_config.json").write_text(json.dumps(facts), encoding="utf-8")


@pytest.mark.parametrize(
    ("best", "final", "songs", "better"),
    [
        (-0.03, -0.02, (2, 2), True),
        (-0.02, -0.02, (2, 2), False),
        (-0.01, -0.02, (2, 2), False),
        (-0.03, -0.02, (2, 3), False),
        (None, -0.02, (2, 2), False),
        (-0.03, None, (2, 2), False),
    ],
)
def test_a_better_one_is_named_with_both_numbers(tmp_path, best, final, songs, better):
    saved(tmp_path / "checkpoints/best/adapter", epoch=6, validation_change=best, validation_songs=songs[0])
    saved(tmp_path / "final/adapter", epoch=9, validation_change=final, validation_songs=songs[1])
    said = better_than_final(tmp_path)
    assert said == better_than(tmp_path / "final/adapter/adapter_model.safetensors")
    if not better:
        assert said is None
        return
    assert said.startswith("best (epoch 6, -3.00 % on the held-out songs) is better than final (epoch 9, -2.00 %): ")
    assert said.endswith(str(tmp_path / "checkpoints/best"))
    assert better_than(tmp_path / "checkpoints/best/adapter/adapter_model.safetensors") is None


def test_inspect_export_and_list_say_so(train, tmp_path):
    output = train("base", options={"validate": 2, "validate_every": 1}, max_epochs=1).output
    for folder, change in (("checkpoints/best", -0.5), ("final", 0.5)):
        (file,) = (output / folder).rglob("training_config.json")
        facts = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(facts | {"validation_change": change}), encoding="utf-8")
    commands = (["inspect"], ["list"], ["export", "--to", "comfyui", "--output", str(tmp_path / "copy.safetensors")])
    for command in commands:
        said = CliRunner().invoke(cli, [*command, str(output)]).output
        assert "best (epoch 1, -50.00 % on the held-out songs) is better than final (epoch 1, +50.00 %)" in said, said
