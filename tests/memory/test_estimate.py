"""What a training needs in memory: counts against the real figures, and what each setting changes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from sidestep_plugin.memory.estimate import MARGIN, Needs, Settings, needs, shown
from sidestep_plugin.memory.known import TWO_B, XL, known_size
from sidestep_plugin.memory.of_training import settings_of
from sidestep_plugin.memory.savings import SAVINGS, advice_for, enough, savings_for
from sidestep_plugin.memory.sizes import DecoderSize, adapter_parameters

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
OPTIONS = {saving.option for saving in SAVINGS}
GIB = 2**30


def test_the_2b_decoder_has_as_many_parameters_as_the_real_one():
    assert TWO_B.parameters == 1_575_458_880
    assert adapter_parameters(TWO_B, "lora", 64, TARGETS) == 44_040_192


def test_half_the_weights_stay_when_they_stay_in_bf16():
    fp32, bf16 = (needs(TWO_B, Settings(frozen=frozen)).weights for frozen in ("fp32", "bf16"))
    assert fp32 == 4 * TWO_B.parameters
    assert round((fp32 - bf16) / GIB, 2) == 2.93  # measured on the real model


def test_a_lokr_keeps_its_target_layers_in_fp32():
    lora, lokr = (needs(TWO_B, Settings(kind=kind)).weights for kind in ("lora", "lokr"))
    adapted = TWO_B.layers * sum(one * other for one, other in TWO_B.targets(TARGETS).values())
    assert lokr - lora == 2 * adapted


def test_a_running_mean_is_one_more_copy_of_the_adapter_in_fp32():
    without, averaged = (needs(TWO_B, Settings(averaged=averaged)) for averaged in (False, True))
    assert averaged.total - without.total == 4 * adapter_parameters(TWO_B, "lora", 64, TARGETS)
    configs = SimpleNamespace(), SimpleNamespace(r=64)
    assert [settings_of(*configs, {"average": on}, mixed=True).averaged for on in (True, False)] == [True, False]


@pytest.mark.parametrize(
    ("outputs", "rank", "parameters"),
    [(2048, 64, 32 * 32 + 64 * 64), (2048, 8, 32 * 32 + 8 * 128), (6144, 64, 64 * 32 + 96 * 64)],
)
def test_a_lokr_is_counted_as_lycoris_makes_it(outputs, rank, parameters):
    size = dataclasses.replace(TWO_B, layers=1, feed_forward=outputs)
    assert adapter_parameters(size, "lokr", rank, ["gate_proj"]) == parameters


def test_a_config_that_says_too_little_gives_no_size():
    assert DecoderSize.from_config({"hidden_size": 64}) is None
    assert DecoderSize.from_config({"hidden_size": "64", "num_attention_heads": 1}) is None
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 8, "num_hidden_layers": 1}
    assert DecoderSize.from_config(sizes) == DecoderSize(64, 64, 8, 1, 4, 4, 16)


@pytest.mark.parametrize(
    ("model", "size"),
    [("base", TWO_B), ("acestep-v15-turbo-shift1", TWO_B), ("xl-sft", XL), ("jazz", None)]
    + [(name, None) for name in ("my-xl-turbo-thing", "turbo-2", "acestep-v15-base-jazz", "acestep-v15-xl")],
)
def test_official_models_are_known_by_name(model, size):
    assert known_size(model) == size


@pytest.mark.parametrize("size", [TWO_B, XL])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_every_saving_needs_less_than_what_is_before_it(size, kind):
    now = Settings(kind=kind, frozen="fp32", batch_size=2)
    for saving, then in savings_for(now, OPTIONS):
        if kind == "lora" or saving.flag(then) != "--rank 32":  # LyCORIS makes the same matrices for both ranks
            assert needs(size, then).total < needs(size, now).total, saving.option
        now = then


def test_what_changes_no_bit_comes_first():
    costs = [saving.cost for saving in SAVINGS]
    same = [cost.startswith("same adapter, bit for bit") for cost in costs]
    assert same == sorted(same, reverse=True) and sum(same) == 2


def test_only_options_that_are_there_are_advised():
    assert advice_for(Settings(batch_size=1, rank=1), {"gradient_checkpointing"}) == [
        "use --gradient-checkpointing on (same adapter, bit for bit; steps take longer)"
    ]


def test_the_flags_that_are_enough_hold_none_that_is_not_needed():
    now = Settings(batch_size=8, frames=60 * 25)

    def fits(then):
        return then.batch_size == 1 and then.checkpointing

    assert enough(now, OPTIONS, fits)[0] == ["--gradient-checkpointing on", "--batch-size 1 --gradient-accumulation 32"]
    assert enough(now, OPTIONS, lambda then: False) is None


def test_a_saving_takes_the_place_of_another_value_of_its_option():
    now = Settings(frozen="fp32", batch_size=1, rank=1)
    flags, then = enough(now, {"base_weights"}, lambda then: then.frozen == "int8")
    assert flags == ["--base-weights int8"] and then.frozen == "int8"


def test_a_margin_is_left_free():
    need = Needs(GIB, 0, 0, 0, 0)
    assert need.fits(int(GIB * MARGIN) + 1) and not need.fits(int(GIB * MARGIN) - 1)


def test_sizes_are_shown_as_people_read_them():
    assert shown(3 * GIB // 2) == "1.5 GiB" and shown(300 * 2**20) == "300 MiB" and shown(2**18) == "0.2 MiB"
