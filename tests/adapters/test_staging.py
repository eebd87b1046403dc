"""A saved folder is there as a whole or not at all, and what is not ours in it stays."""

from __future__ import annotations

import pytest

from sidestep_plugin.adapters.staging import published, settle, settle_below, staged


def save(folder, content, *, names=("adapter/adapter_model.safetensors", "resume_state.pt"), fails=None):
    with staged(folder) as stage:
        for name in names:
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text(content)
        with published(stage, folder):
            if fails is not None:
                raise fails


def content(folder):
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_new_folder_and_one_that_replaces_it(tmp_path):
    save(tmp_path / "best", "one")
    assert content(tmp_path) == {"best/adapter/adapter_model.safetensors": "one", "best/resume_state.pt": "one"}
    save(tmp_path / "best", "two")
    assert set(content(tmp_path).values()) == {"two"}
    assert [place.name for place in tmp_path.iterdir()] == ["best"], "something was left"


def test_what_a_failed_plugin_leaves_is_published_and_what_ctrl_c_leaves_is_not(tmp_path):
    save(tmp_path / "best", "one")
    with pytest.raises(ValueError, match="plugin"):
        save(tmp_path / "best", "two", fails=ValueError("plugin"))
    assert set(content(tmp_path).values()) == {"two"}
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "best", "three", fails=KeyboardInterrupt())
    assert set(content(tmp_path).values()) == {"two"}
    assert [place.name for place in tmp_path.iterdir()] == ["best"]


def test_what_is_not_ours_stays_and_what_belonged_to_the_old_weights_goes(tmp_path):
    final = tmp_path / "final"
    save(final, "lora", names=["adapter/adapter_model.safetensors", "adapter/comfyui_lora.safetensors"])
    (final / "adapter" / "cover.png").write_text("picture")
    lora = ["adapter/adapter_model.safetensors", "adapter/training_config.json", "adapter/adapter_config.json"]
    save(final, "lora again", names=lora)
    kept = dict.fromkeys(lora, "lora again") | {"adapter/cover.png": "picture"}
    assert content(final) == kept
    save(final, "lokr", names=["lokr_weights.safetensors"])  # another kind of adapter in the same folder
    assert content(final) == kept | {"lokr_weights.safetensors": "lokr"}


def test_a_program_killed_between_the_two_renames(tmp_path):
    """The earlier folder is put back by whatever comes next: a save to that name, or a look for checkpoints."""
    for mend in (lambda: settle(tmp_path / "checkpoints" / "best"), lambda: settle_below(tmp_path)):
        best = tmp_path / "checkpoints" / "best"
        save(best, "one")
        best.rename(best.with_name(".best.0badcafe.replaced"))
        (best.parent / ".best.0badcafe.saving").mkdir()
        mend()
        assert set(content(best).values()) == {"one"}
        assert [place.name for place in best.parent.iterdir()] == ["best"]


def test_a_program_killed_after_them(tmp_path):
    best = tmp_path / "best"
    save(best, "one")
    best.rename(tmp_path / ".best.0badcafe.replaced")
    save(tmp_path / "other", "x")
    (tmp_path / "other").rename(best)
    settle(best)
    assert set(content(best).values()) == {"x"} and [place.name for place in tmp_path.iterdir()] == ["best"]


def test_names_with_the_letters_of_patterns(tmp_path):
    folder = tmp_path / "best [1] *"
    save(folder, "one")
    folder.rename(folder.with_name(f".{folder.name}.0badcafe.replaced"))
    settle_below(tmp_path)
    assert set(content(folder).values()) == {"one"}
