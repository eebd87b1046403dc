"""The alpha that a LoRA's configuration gives each layer is the one that PEFT's own lookup gives it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sidestep_plugin.adapters.layers import read_adapter
from sidestep_plugin.adapters.peft_config import alpha_patterns, by_pattern

from .comfyui_rules import a_decoder, weights_of

NAMES = [
    *weights_of(a_decoder()),
    "layers.10.self_attn.q_proj",
    "layers.0.self_attn.to_q",
    "decoder.layers.0.mlp.up_proj",
]
PATTERNS = [
    *("q_proj", "^q_proj", "q_proj$", "^q_proj$", "q.proj", r"q\.proj", "proj", "_proj", ".q_proj", "q_proj."),
    *("self_attn.q_proj", "^self_attn.q_proj", r"self_attn\.q_proj", "attn.q_proj", "self-attn.q_proj"),
    *("layers.0.self_attn.q_proj", "^layers.0.self_attn.q_proj$", "layers.1.self_attn.q_proj", "0.self_attn.q_proj"),
    *("to_q", "to_out.0", "proj_in.1", "proj.in.1", "time_embed.linear_1", "linear.1", "condition_embedder"),
    *("decoder.layers.0.mlp.up_proj", "base_model.model.layers.0.self_attn.q_proj", "......", "Q_PROJ", "..proj"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_the_layers_that_it_matches_in_peft(pattern):
    from peft.utils.other import get_pattern_key

    ours = alpha_patterns({"alpha_pattern": {pattern: 50}})
    assert ours is not None
    for name in NAMES:
        theirs = {pattern: 50.0}.get(get_pattern_key([pattern], name), 2.0)
        assert by_pattern(ours, name, 2.0) == theirs, name


def test_the_first_of_several_patterns_counts_as_in_peft():
    from peft.utils.other import get_pattern_key

    for start in range(len(PATTERNS)):
        given = {pattern: number for number, pattern in enumerate(PATTERNS[start:] + PATTERNS[:start], 1)}
        ours = alpha_patterns({"alpha_pattern": given})
        assert [by_pattern(ours, name, None) for name in NAMES] == [
            given.get(get_pattern_key(list(given), name)) for name in NAMES
        ]


NAMINGS = {
    # A file's keys, where its configuration is, and the pattern that PEFT matches there.
    "PEFT beside the file": ("base_model.model.layers.0.self_attn.q_proj", True, "q_proj", "to_q"),
    "diffusers' names beside the file": ("base_model.model.layers.0.self_attn.to_q", True, "to_q", "q_proj"),
    "a header of ours": ("base_model.model.layers.0.self_attn.q_proj", False, "to_q", "q_proj"),
    "a header of diffusers": ("transformer.layers.0.self_attn.to_q", False, "to_q", "q_proj"),
}


@pytest.mark.parametrize(("key", "beside", "matches", "matches_not"), NAMINGS.values(), ids=NAMINGS)
def test_patterns_are_matched_against_the_names_that_they_are_written_for(tmp_path, key, beside, matches, matches_not):
    for pattern, alpha in ((matches, 50.0), (matches_not, 8.0)):
        config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {pattern: 50}}
        header = {f"transformer.{name}": value for name, value in config.items()}
        tensors = {f"{key}.lora_A.weight": torch.ones(4, 8), f"{key}.lora_B.weight": torch.ones(8, 4)}
        file = tmp_path / "adapter_model.safetensors"
        save_file(tensors, file, None if beside else {"lora_adapter_metadata": json.dumps(header)})
        if beside:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        (layer,) = read_adapter(tmp_path).layers.values()
        assert (layer.name, layer.alpha) == ("layers.0.self_attn.q_proj", alpha)
