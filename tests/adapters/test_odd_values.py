"""One odd value in otherwise good files: ``inspect`` and ``export`` still answer, in words and in valid JSON."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from sidestep_plugin.adapters.facts import FACTS
from sidestep_plugin.adapters.inspection import usable
from sidestep_plugin.cli import cli

ODD = [
    *("null", "true", "5", "-1", "0", "0.5", "1e999", "-1e999", "NaN", "1" + "0" * 400, "1" + "0" * 4200),
    *('""', '"abc"', '"many"', '"NaN"', '"1e999"', '" "', '"\\ud800"', '"a\\nb"', '"../../etc"', '"C:\\\\"'),
    *("[]", "{}", "[1]", "[1.0, 1.0]", "[null, null]", '["a", "b"]', '[[["x"]]]', '{"a": {"b": [null]}}'),
]
NAME = "base_model.model.layers.0.self_attn.q_proj"
LORA = {f"{NAME}.lora_A.weight": [4, 8], f"{NAME}.lora_B.weight": [8, 4]}
LOKR = {"lycoris_layers_0_self_attn_q_proj.lokr_w1": [2, 2], "lycoris_layers_0_self_attn_q_proj.lokr_w2": [4, 4]}
OURS = {"schema_version": 1, "model_name": "acestep-v15-base", "model_variant": "base", "shift": 1.0, "rank": 4}
OURS |= {"num_inference_steps": 50, "alpha": 8, "cfg_ratio": 0.15, "timestep_schedule": None, "adapter_type": "lora"}
SIDE_STEP = {"model_variant": "base", "is_turbo": False, "shift": 3.0, "num_inference_steps": 50, "cfg_ratio": 0.15}
SIDE_STEP_KEYS = [*SIDE_STEP, "base_model", "timestep_mode", "timestep_mu", "timestep_sigma", "run_name", "r", "rank"]
SIDE_STEP_KEYS += ["alpha", "dropout", "trigger_word", "custom_tag"]
PEFT = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "acestep-v15-base"}
PEFT_KEYS = [*PEFT, "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "target_modules"]
KOHYA = {"ss_network_dim": "4", "ss_network_alpha": "8", "ss_sd_model_name": "acestep-v15-base"}
KOHYA_KEYS = [*KOHYA, "ss_output_name", "ss_num_train_items", "ss_num_train_images", "ss_epoch", "ss_steps"]
KOHYA_KEYS += ["ss_timestep_sampling", "ss_base_model_version", "modelspec.title", "modelspec.date"]
KOHYA_KEYS += ["modelspec.hash_sha256", "modelspec.trigger_phrase", "modelspec.architecture"]

# Where a value stands: the keys, and what of an adapter's files it is put into.
PLACES = {
    "our file": (list(FACTS), lambda key, odd: {"beside": merged(OURS, key, odd)}),
    "our header": (list(FACTS), lambda key, odd: {"metadata": texts(OURS) | {f"sidestep.{key}": text_of(odd)}}),
    "file and header": (
        list(FACTS),
        lambda key, odd: {"metadata": texts(OURS), "beside": merged(OURS, key, odd)},
    ),
    "Side-Step's file": (SIDE_STEP_KEYS, lambda key, odd: {"beside": merged(SIDE_STEP, key, odd)}),
    "PEFT's file": (PEFT_KEYS, lambda key, odd: {"config": merged(PEFT, key, odd)}),
    "diffusers' header": (
        PEFT_KEYS,
        lambda key, odd: {
            "config": None,
            "metadata": {"lora_adapter_metadata": merged({f"transformer.{k}": v for k, v in PEFT.items()}, key, odd)},
        },
    ),
    "kohya's header": (KOHYA_KEYS, lambda key, odd: {"config": None, "metadata": KOHYA | {key: text_of(odd)}}),
    "ACE-Step's LoKr header": (
        ["lokr_config", "run_metadata"],
        lambda key, odd: {"shapes": LOKR, "config": None, "metadata": {key: text_of(odd)}},
    ),
    "inside ACE-Step's LoKr header": (
        ["linear_dim", "linear_alpha", "num_samples", "training_config"],
        lambda key, odd: {
            "shapes": LOKR,
            "config": None,
            "metadata": {name: merged({}, key, odd) for name in ("lokr_config", "run_metadata")},
        },
    ),
}


def merged(values, key, odd):
    """JSON in which a key has a value that Python may not be able to write."""
    entries = {name: json.dumps(value) for name, value in values.items()} | {key: odd}
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in entries.items()) + "}"


def texts(values):
    return {f"sidestep.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def text_of(odd):
    """What stands in a header for a JSON value: a text as it is."""
    text = json.loads(odd) if odd.startswith('"') else odd
    return text if text.isascii() else "?"


def write(folder, shapes=LORA, metadata=None, config=json.dumps(PEFT), beside=None):  # noqa: B008
    header, position = {"__metadata__": metadata or {}}, 0
    for name, (height, width) in shapes.items():
        header[name] = {"dtype": "F32", "shape": [height, width]}
        header[name]["data_offsets"] = [position, position := position + 4 * height * width]
    raw = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    file = folder / ("adapter_model.safetensors" if shapes is LORA else "lokr_weights.safetensors")
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(position))
    for name, content in (("adapter_config.json", config), ("training_config.json", beside)):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(content, encoding="utf-8")
    return folder


def no_json(word):
    raise ValueError(f"{word} is no JSON")


def complaints(folder, copy):
    """What is wrong with the answers about an adapter."""
    for words in (["inspect", folder], ["inspect", folder, "--json"], ["export", folder, "--to", "comfyui"]):
        more = ["--output", copy, "--overwrite"] if words[0] == "export" else []
        done = CliRunner().invoke(cli, [*map(str, words), *map(str, more)])
        if done.exception and not isinstance(done.exception, SystemExit):
            yield f"{words[0]}: {type(done.exception).__name__}: {str(done.exception)[:100]}"
        elif done.exit_code not in (0, 2):
            yield f"{words[0]}: exit code {done.exit_code}"
        elif "--json" in words and done.stdout:
            try:
                json.loads(done.stdout, parse_constant=no_json)
            except ValueError as error:
                yield f"inspect --json: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_an_odd_value_is_no_crash_and_no_broken_json(place, tmp_path):
    keys, files = PLACES[place]
    found = []
    for key in keys:
        for odd in ODD:
            folder = write(tmp_path / "adapter", **files(key, odd))
            found += [f"{key} = {odd[:30]}: {complaint}" for complaint in complaints(folder, tmp_path / "copy")]
    assert found == []


@pytest.mark.parametrize("place", PLACES)
def test_the_good_values_beside_the_odd_ones_are_read(place, tmp_path):
    """Or the test above would pass because nothing is looked at."""
    _, files = PLACES[place]
    folder = write(tmp_path / "adapter", **files("nothing", '"known"'))
    assert list(complaints(folder, tmp_path / "copy")) == []
    said = json.loads(CliRunner().invoke(cli, ["inspect", str(folder), "--json"]).stdout)
    assert said["problems"] == []
    if "LoKr" not in place:
        assert said["facts"]["model_variant" if "diffusers" not in place else "rank"] in ("base", 4)
        assert said["strengths"] == {"2.0": 1}


def test_facts_of_optional_features_are_possible_values():
    facts = {"mask_nan": True, "crop_seconds": 30.0, "frozen_weights": "bf16", "base_weights": "int8"}
    facts |= {"base_weights_loss_change": -0.001, "compiled": True}
    notes = []
    assert usable(facts, notes) == facts and not notes
    wrong = {"mask_nan": 1, "crop_seconds": -1, "frozen_weights": True, "base_weights": 8, "compiled": "yes"}
    assert usable(wrong, notes) == {} and len(notes) == len(wrong)
