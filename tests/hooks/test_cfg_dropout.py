"""Condition dropout: which rows are replaced, by what, when, and with which random numbers."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import binom, binomtest, chisquare
from sidestep_plugin.hooks.condition_dropout import acestep_prepare_batch
from sidestep_plugin.hooks.treatment import acestep_run_started
from whole_plugin import resolved

from sidestep_plugin import Refusal
from sidestep_plugin.run import Run, Step

CPU = torch.device("cpu")
WIDTH = 6


def a_step(name="acestep-v15-base", training=True, dtype=torch.float32, null_dtype=torch.float32, **options):
    model = torch.nn.Module()
    model.config = SimpleNamespace(_name_or_path=name, timestep_mu=-0.4, timestep_sigma=1.0)
    null = torch.linspace(2.0, 3.1, WIDTH).view(1, 1, WIDTH)
    model.null_condition_emb = torch.nn.Parameter(null.to(null_dtype))
    run = Run("lora", None, None, resolved(**options), None, weakref.ref(model))
    acestep_run_started(run)
    return Step(run, SimpleNamespace(model=model), training, CPU, dtype)


def a_batch(rows=8, length=3, width=WIDTH, dtype=torch.float32):
    # Between 0 and 1, so that no number in it is one of the null condition's.
    conditions = torch.rand(rows, length, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {"encoder_hidden_states": conditions, "target_latents": torch.zeros(rows, 4, 64)}


def prepared(step, batch):
    answer = acestep_prepare_batch(step=step, batch=batch)
    return None if answer is None else answer["encoder_hidden_states"]


def null_of(step):
    return step.module.model.null_condition_emb.detach().to(step.dtype)


def dropped_rows(step, batch):
    """Which rows of a batch were dropped. A row is dropped whole, or not at all."""
    result = prepared(step, batch)
    if result is None:  # on the CPU a batch of which nothing is dropped is left alone
        result = batch["encoder_hidden_states"].to(step.dtype)
    is_null = (result == null_of(step)).flatten(1)
    assert torch.equal(is_null.all(1), is_null.any(1))
    return is_null.all(1)


# -- how many, and which ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cfg_ratio": 0.4}])
@pytest.mark.parametrize("name", ["acestep-v15-base", "acestep-v15-sft", "acestep-v15-xl-sft"])
def test_the_share_of_dropped_rows_is_the_ratio(name, options):
    step, batch = a_step(name, **options), a_batch(16)
    torch.manual_seed(7)
    dropped = sum(int(dropped_rows(step, batch).sum()) for _ in range(500))
    ratio = options.get("cfg_ratio", 0.15)
    assert binomtest(dropped, 500 * 16, ratio).pvalue > 0.01
    assert binomtest(dropped, 500 * 16, ratio + 0.05).pvalue < 1e-6, "the test would notice another ratio"


def test_rows_are_dropped_one_by_one_and_not_batch_by_batch():
    rows, batches, ratio = 4, 4000, 0.4
    step, batch = a_step(cfg_ratio=ratio), a_batch(rows)
    torch.manual_seed(8)
    counts = torch.stack([dropped_rows(step, batch).sum() for _ in range(batches)])
    seen = [int((counts == k).sum()) for k in range(rows + 1)]
    expected = binom.pmf(range(rows + 1), rows, ratio) * batches
    assert chisquare(seen, expected * sum(seen) / expected.sum()).pvalue > 0.01
    assert counts.double().var().item() == pytest.approx(rows * ratio * (1 - ratio), rel=0.1)


def test_every_place_in_the_batch_is_dropped_alike():
    step, batch = a_step(cfg_ratio=0.5), a_batch(6)
    torch.manual_seed(9)
    times = torch.stack([dropped_rows(step, batch) for _ in range(2000)]).sum(0)
    assert all(binomtest(int(count), 2000, 0.5).pvalue > 1e-3 for count in times)


def test_ratio_one_drops_every_row():
    for dtype in (torch.float32, torch.bfloat16):
        assert dropped_rows(a_step(cfg_ratio=1.0, dtype=dtype), a_batch(500)).all()


# -- by what ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("null_dtype", [torch.float32, torch.bfloat16])
def test_dropped_rows_are_the_null_condition_and_others_are_untouched(dtype, batch_dtype, null_dtype):
    step, batch = a_step(cfg_ratio=0.5, dtype=dtype, null_dtype=null_dtype), a_batch(9, dtype=batch_dtype)
    torch.manual_seed(2)
    dropped = torch.rand((9,), dtype=dtype) < 0.5
    state = torch.get_rng_state()
    assert 0 < int(dropped.sum()) < 9

    torch.manual_seed(2)
    result = prepared(step, batch)
    assert torch.equal(torch.get_rng_state(), state), "exactly one draw, of one number a row, in the compute dtype"
    assert result.dtype == dtype
    assert result.shape == batch["encoder_hidden_states"].shape
    assert torch.equal(result[dropped], null_of(step).expand_as(result)[dropped])
    assert torch.equal(result[~dropped], batch["encoder_hidden_states"].to(dtype)[~dropped])


@pytest.mark.parametrize("rows", range(1, 10))
def test_the_mask_is_the_first_random_number_of_the_step(rows):
    step, batch = a_step(cfg_ratio=0.5), a_batch(rows)
    torch.manual_seed(rows)
    expected = torch.rand((rows,)) < 0.5
    torch.manual_seed(rows)
    assert torch.equal(dropped_rows(step, batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mask_is_drawn_in_the_compute_dtype(dtype):
    rows, ratio = 20_000, 0.3
    step, batch = a_step(cfg_ratio=ratio, dtype=dtype), a_batch(rows, length=1)
    torch.manual_seed(5)
    expected = torch.rand((rows,), dtype=dtype) < ratio
    torch.manual_seed(5)
    assert not torch.equal(torch.rand((rows,)) < ratio, expected), "with so many rows another dtype would show"
    torch.manual_seed(5)
    assert torch.equal(dropped_rows(step, batch), expected)


def test_only_the_conditions_are_replaced():
    step = a_step(cfg_ratio=0.9)
    assert list(acestep_prepare_batch(step=step, batch=a_batch())) == ["encoder_hidden_states"]


def test_a_batch_of_which_nothing_is_dropped_is_left_alone_after_the_draw():
    torch.manual_seed(4)
    torch.rand(8)
    expected = torch.get_rng_state()
    torch.manual_seed(4)
    assert acestep_prepare_batch(step=a_step(cfg_ratio=1e-9), batch=a_batch(rows=8)) is None
    assert torch.equal(torch.get_rng_state(), expected)


def test_nothing_is_trained_through_the_null_condition():
    assert not prepared(a_step(cfg_ratio=1.0), a_batch()).requires_grad


@pytest.mark.parametrize("ratio", [0.9, 1.0])
def test_the_callers_batch_is_left_as_it_was(ratio):
    step, batch = a_step(cfg_ratio=ratio), a_batch()
    conditions = batch["encoder_hidden_states"]
    before, null = conditions.clone(), null_of(step).clone()
    result = prepared(step, batch)
    assert batch["encoder_hidden_states"] is conditions
    assert torch.equal(conditions, before)
    result.fill_(99.0)
    assert torch.equal(conditions, before), "the result shares no memory with the caller's tensor"
    assert torch.equal(null_of(step), null), "nor with the model's parameter"


def test_a_batch_that_follows_uses_the_same_null_condition():
    step, batch = a_step(cfg_ratio=1.0), a_batch()
    prepared(step, batch).fill_(99.0)
    assert torch.equal(prepared(step, batch), null_of(step).expand(8, 3, WIDTH))


# -- when not --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda: a_step(training=False), id="validation"),
        pytest.param(lambda: a_step(training=False, cfg_ratio=1.0), id="validation at ratio 1"),
        pytest.param(lambda: a_step(cfg_ratio=0.0), id="ratio 0"),
        pytest.param(lambda: a_step("acestep-v15-turbo"), id="turbo"),
        pytest.param(lambda: a_step("acestep-v15-turbo", cfg_ratio=1.0), id="turbo at ratio 1"),
        pytest.param(lambda: a_step("acestep-v15-turbo-shift1"), id="turbo-shift1"),
        pytest.param(lambda: a_step("acestep-v15-xl-turbo"), id="xl-turbo"),
    ],
)
def test_without_dropout_nothing_is_drawn_and_nothing_returned(step):
    step, batch = step(), a_batch()
    before, state = batch["encoder_hidden_states"].clone(), torch.get_rng_state()
    assert prepared(step, batch) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch["encoder_hidden_states"], before)


def test_songs_of_another_model_are_refused_with_both_widths():
    with pytest.raises(Refusal, match=rf"\b7 wide.*\b{WIDTH}\b"):
        prepared(a_step(), a_batch(width=7))


def test_conditions_of_width_one_are_not_stretched_to_the_models():
    with pytest.raises(Refusal, match=rf"\b1 wide.*\b{WIDTH}\b"):
        prepared(a_step(), a_batch(width=1))


@pytest.mark.parametrize("missing", ["removed", "None"])
def test_a_model_without_a_null_condition_is_refused_before_the_first_step(missing):
    def start(**options):
        model = torch.nn.Module()
        model.config = SimpleNamespace(_name_or_path="acestep-v15-sft", timestep_mu=-0.4, timestep_sigma=1.0)
        if missing == "None":
            model.null_condition_emb = None
        acestep_run_started(Run("lora", None, None, resolved(**options), None, lambda: model))

    with pytest.raises(Refusal, match=r"acestep-v15-sft has no null_condition_emb.*--cfg-ratio 0"):
        start()
    start(cfg_ratio=0.0)
    start(variant="turbo")


def test_a_single_dropped_row_is_not_copied_and_stays_the_null_condition():
    """Of one kept copy, for the longest so far; made anew when somebody wrote to it."""
    step = a_step(cfg_ratio=1.0)
    null = step.run.model.null_condition_emb.detach()

    def dropped(length):
        batch = {name: value[:1] for name, value in a_batch(rows=1).items() if hasattr(value, "shape")}
        batch["encoder_hidden_states"] = torch.randn(1, length, null.shape[-1])
        return acestep_prepare_batch(step=step, batch=batch)["encoder_hidden_states"]

    for length in (5, 3, 9, 9):
        answer = dropped(length)
        assert answer.shape[1] == length and answer.is_contiguous() and (answer == null).all()
    assert dropped(9).data_ptr() == answer.data_ptr() == dropped(4).data_ptr()
    answer.zero_()
    assert (dropped(9) == null).all()
