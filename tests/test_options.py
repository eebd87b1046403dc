"""Options that plugins add: checked by their own types, whether they come from a command line or from Python."""

import click
import pytest

from sidestep_plugin import Refusal
from sidestep_plugin.options import FiniteFloat, WholeNumber, resolve_options

DECLARED = [
    click.Option(["--variant"], type=click.Choice(["auto", "turbo", "base"]), default="auto"),
    click.Option(["--cfg-ratio"], type=FiniteFloat(0.0, 1.0), default=0.15),
    click.Option(["--shift"], type=FiniteFloat(0.0, min_open=True), default=None),
    click.Option(["--num-inference-steps"], type=WholeNumber(min=1), default=None),
    click.Option(["--loud"], is_flag=True, default=False),
]
DEFAULTS = {"variant": "auto", "cfg_ratio": 0.15, "shift": None, "num_inference_steps": None, "loud": False}


def test_without_values_every_option_has_its_default():
    assert resolve_options(DECLARED, {}) == DEFAULTS


@pytest.mark.parametrize("name", DEFAULTS)
def test_none_means_the_default(name):
    assert resolve_options(DECLARED, {name: None}) == DEFAULTS


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (click.Option(["--steps"], type=click.IntRange(min=1)), None),
        (click.Option(["--ratio"], type=FiniteFloat()), None),
        (click.Option(["--word"]), None),
        (click.Option(["--quiet"], is_flag=True), False),
        (click.Option(["--tag"], multiple=True), ()),
    ],
    ids=["whole number", "finite float", "text", "switch", "repeatable"],
)
def test_an_option_that_declares_no_default_has_what_click_gives_it(option, value):
    assert resolve_options([option], {}) == {option.name: value}


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("variant", "base", "base"),
        ("cfg_ratio", 0, 0.0),
        ("cfg_ratio", "0.5", 0.5),
        ("cfg_ratio", 1.0, 1.0),
        ("shift", 2.5, 2.5),
        ("num_inference_steps", "27", 27),
        ("loud", True, True),
    ],
)
def test_a_value_is_converted_by_the_options_type_and_leaves_the_others_alone(name, given, value):
    resolved = resolve_options(DECLARED, {name: given})
    assert resolved == {**DEFAULTS, name: value}
    assert type(resolved[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("variant", "sftt"),
        ("cfg_ratio", 1.5),
        ("cfg_ratio", -0.1),
        ("cfg_ratio", "much"),
        ("cfg_ratio", float("nan")),
        ("shift", 0.0),
        ("shift", -3),
        ("num_inference_steps", 0),
        ("num_inference_steps", "eight"),
    ],
)
def test_an_unusable_value_is_refused_by_the_options_name(name, given):
    with pytest.raises(Refusal, match=f"^Option {name}: "):
        resolve_options(DECLARED, {name: given})


@pytest.mark.parametrize("given", [[8], {}, object()], ids=["list", "dictionary", "object"])
@pytest.mark.parametrize("name", ["variant", "cfg_ratio", "num_inference_steps"])
def test_a_value_of_another_kind_is_refused_and_no_crash(name, given):
    with pytest.raises(Refusal, match=f"^Option {name}: "):
        resolve_options(DECLARED, {name: given})


def test_a_fraction_is_no_whole_number():
    with pytest.raises(Refusal, match=r"^Option num_inference_steps: "):
        resolve_options(DECLARED, {"num_inference_steps": 8.7})


def test_a_switch_is_no_ratio():
    with pytest.raises(Refusal, match=r"^Option cfg_ratio: "):
        resolve_options(DECLARED, {"cfg_ratio": True})


def test_a_misspelled_option_is_refused_with_a_suggestion():
    with pytest.raises(Refusal, match=r"'cfg_ration'\. Did you mean 'cfg_ratio'\?"):
        resolve_options(DECLARED, {"cfg_ration": 0.1})


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(Refusal, match=r"'zzz'\. Known: cfg_ratio, loud, num_inference_steps, shift, variant\."):
        resolve_options(DECLARED, {"zzz": None})


def test_without_options_every_name_is_unknown():
    assert resolve_options([], {}) == {}
    with pytest.raises(Refusal, match=r"Known: none\."):
        resolve_options([], {"shift": 1.0})


# -- finite floats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf", "1e999", "text", "", float("nan"), float("inf"), None])
def test_a_finite_float_refuses_what_is_no_finite_number(value):
    with pytest.raises(click.UsageError, match=r"is not a finite number"):
        FiniteFloat().convert(value, None, None)


@pytest.mark.parametrize("value", ["-0.001", "1.001", 2, -1])
def test_a_finite_float_refuses_what_lies_outside(value):
    with pytest.raises(click.UsageError, match=r"range"):
        FiniteFloat(0.0, 1.0).convert(value, None, None)


@pytest.mark.parametrize("value", [0, 1, "0", "1", 0.5, "5e-1"])
def test_a_finite_float_takes_its_bounds_and_what_lies_between(value):
    converted = FiniteFloat(0.0, 1.0).convert(value, None, None)
    assert converted == float(value)
    assert type(converted) is float


def test_an_open_bound_is_outside():
    with pytest.raises(click.UsageError, match=r"range"):
        FiniteFloat(0.0, min_open=True).convert("0", None, None)
    assert FiniteFloat(0.0, min_open=True).convert("1e-9", None, None) == 1e-9
