"""Songs with NaN: refused before the first step, or zeroed where the mask hides it, and nowhere else."""

from __future__ import annotations

import json
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from whole_plugin import prepared, resolved, started

from sidestep_plugin import attach
from sidestep_plugin.engine import shapes
from sidestep_plugin.run import Run, Step

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def a_step(name="acestep-v15-turbo", dtype=torch.float32, **options):
    model = torch.nn.Module()
    model.config = SimpleNamespace(_name_or_path=name, timestep_mu=-0.4, timestep_sigma=1.0)
    model.null_condition_emb = torch.nn.Parameter(torch.full((1, 1, 6), 5.0))
    run = Run("lora", None, None, resolved(**options), None, weakref.ref(model))
    started(run)
    return Step(run, SimpleNamespace(model=model), True, CPU, dtype)


def a_batch(mask_type=torch.float32):
    """Two songs whose last row is padding, with values that are not finite in it, and one in a row that counts."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]]).to(mask_type)
    batch = {
        "target_latents": torch.ones(2, 3, 64),
        "attention_mask": mask,
        "encoder_hidden_states": torch.ones(2, 3, 6),
        "encoder_attention_mask": mask,
        "context_latents": torch.ones(2, 3, 128),
        "metadata": [{}, {}],
    }
    for name, value in (("target_latents", NAN), ("encoder_hidden_states", INF), ("context_latents", -INF)):
        batch[name][0, 2, 1] = value
    batch["target_latents"][1, 1, 0] = NAN
    return batch


@pytest.mark.parametrize("mask_type", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_exactly_the_hidden_values_are_zeroed(mask_type):
    batch = a_batch(mask_type)
    before = {name: value.clone() for name, value in batch.items() if name != "metadata"}
    answer = prepared(step=a_step(mask_nan=True), batch=batch)
    assert set(answer) == {"target_latents", "encoder_hidden_states", "context_latents"}
    for name, tensor in answer.items():
        expected = before[name].clone()
        expected[0, 2, 1] = 0.0
        assert torch.equal(tensor.nan_to_num(7.0), expected.nan_to_num(7.0)), name
    assert answer["target_latents"][1, 1, 0].isnan(), "a row that counts stays as it is"
    assert all(torch.equal(batch[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


def test_the_dtype_of_the_step_is_that_of_the_answer():
    answer = prepared(step=a_step(mask_nan=True, dtype=torch.bfloat16), batch=a_batch())
    assert {tensor.dtype for tensor in answer.values()} == {torch.bfloat16}


def test_off_is_off():
    state = torch.get_rng_state()
    assert prepared(step=a_step(), batch=a_batch()) is None
    assert torch.equal(state, torch.get_rng_state())


def test_conditions_are_dropped_after_the_masking():
    step = a_step("acestep-v15-base", mask_nan=True, cfg_ratio=0.5)
    torch.manual_seed(3)
    rows = {bool((row == 5.0).all()): row for _ in range(20) for row in _conditions(step)}
    assert set(rows) == {True, False}, "some are dropped, some not"
    assert rows[False].isfinite().all()
    plain = a_step("acestep-v15-base", cfg_ratio=0.5)
    torch.manual_seed(3)
    prepared(step=plain, batch=a_batch())
    state = torch.get_rng_state()
    torch.manual_seed(3)
    prepared(step=step, batch=a_batch())
    assert torch.equal(state, torch.get_rng_state()), "masking draws nothing"


def _conditions(step):
    return prepared(step=step, batch=a_batch())["encoder_hidden_states"]


# -- whole trainings -------------------------------------------------------------------------------------------------


@pytest.fixture
def songs(checkout, tmp_path):
    """Songs with padding, finite in the folder "clean" and with NaN there in the folder "nan"."""
    for folder in ("clean", "nan"):
        shutil.copytree(checkout.tensors, tmp_path / folder)
        song = torch.load(tmp_path / folder / "song_02.pt", weights_only=True)
        song["encoder_attention_mask"][-2:] = 0
        song["encoder_hidden_states"][-2:] = NAN if folder == "nan" else 0.0
        torch.save(song, tmp_path / folder / "song_02.pt")
    return tmp_path


@pytest.fixture
def train_on(trainer, load, tmp_path):
    """As the app trains: ``train_on("nan", mask_nan=True)`` returns what was said and the losses."""

    def train_on(folder, **options):
        settings = trainer.TrainingConfig(output_dir=str(tmp_path / f"out-{folder}"), max_epochs=2)
        settings.batch_size, settings.num_workers, settings.seed = 2, 0, 7
        settings.pin_memory = settings.persistent_workers = False
        said = []
        with attach(trainer, options=options, announce=said.append, allowed_folders=[tmp_path]):
            adapter = getattr(trainer, shapes.CONFIG_CLASS["lora"])(r=4)
            made = getattr(trainer, shapes.TRAINER_CLASS["lora"])(load("base"), adapter, settings)
            torch.manual_seed(7)
            said += [text for *_, text in made.train_from_preprocessed(str(tmp_path / folder), {"should_stop": False})]
        return said, list(made.module.training_losses) if made.module is not None else []

    return train_on


def test_the_app_refuses_songs_with_nan(songs, train_on):
    said, losses = train_on("nan")
    assert said[-1].startswith("❌ Songs with values that are not finite") and "song_02.pt" in said[-1]
    assert "--mask-nan" in said[-1] and losses == []


def test_masked_nan_trains_as_zeros_do(songs, train_on):
    before = (songs / "nan" / "song_02.pt").read_bytes()
    said, losses = train_on("nan", mask_nan=True)
    assert any(line.startswith("NaN: set to zero in rows that the mask hides, in 1 of ") for line in said)
    clean, expected = train_on("clean")
    assert losses == expected and len(losses) > 2 and all(loss == loss for loss in losses)
    assert not any("NaN" in line for line in clean)
    assert (songs / "nan" / "song_02.pt").read_bytes() == before
    (facts,) = (songs / "out-nan" / "final").rglob("training_config.json")
    assert json.loads(facts.read_text(encoding="utf-8"))["mask_nan"] is True
    (facts,) = (songs / "out-clean" / "final").rglob("training_config.json")
    assert "mask_nan" not in json.loads(facts.read_text(encoding="utf-8"))


def test_masking_where_there_is_nothing_says_so(songs, train_on):
    said, losses = train_on("clean", mask_nan=True)
    assert "Note: --mask-nan changes nothing, all values of all songs are finite." in said
    assert losses == train_on("clean")[1]
