"""The copy of a LoRA for ComfyUI: by ComfyUI's rules it gives every layer the weight that PEFT gives it."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .comfyui_rules import (
    ATTENTION,
    MLP,
    a_decoder,
    check_differs,
    check_same,
    export,
    exported,
    make_random,
    play,
    refused,
    weights_of,
)


def header_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


# -- as PEFT saves it ------------------------------------------------------------------------------------------------


@pytest.fixture
def decoder():
    return a_decoder()


@pytest.fixture
def by_peft(tmp_path):
    """Make a LoRA with PEFT, every tensor of it random, and save it | returns its folder and PEFT's merged weights."""
    from peft import LoraConfig, get_peft_model

    def make(**settings):
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | settings
        model = get_peft_model(a_decoder(), LoraConfig(**settings))
        make_random((name, parameter) for name, parameter in model.named_parameters() if "lora_" in name)
        folder = tmp_path / "by PEFT"
        model.save_pretrained(folder)
        return folder, weights_of(model.merge_and_unload())

    return make


EVERYTHING = [*ATTENTION, *MLP, "proj_in.1", "condition_embedder", "time_embed.linear_1"]
LORAS = {
    "plain": {},
    "ranks": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6}},
    "alphas": {"alpha_pattern": {"cross_attn.k_proj": 3, "o_proj": 1.5}},
    "ranks and alphas": {"rank_pattern": {"layers.0.*q_proj": 2}, "alpha_pattern": {"^layers.0.self_attn.q_proj": 3}},
    "a start that no layer has": {"alpha_pattern": {"^q_proj": 50}},
    "dots for any character": {"alpha_pattern": {"q.proj": 50, "self.attn.v_proj": 3}},
    "names of another program": {"alpha_pattern": {"to_q": 50, "to_out.0": 3}},
    "only a part of a name": {"alpha_pattern": {"proj": 50, "attn.k_proj": 3, "0.self_attn.v_proj": 5}},
    # PEFT saves them sorted, and then the first one counts.
    "the first pattern counts": {"alpha_pattern": {"layers.0.self_attn.q_proj": 7, "q_proj": 3, "self_attn.q_proj": 5}},
    "escaped dots": {"alpha_pattern": {r"self_attn\.q_proj$": 3, r"q\.proj": 50}},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA, ranks, alphas": {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 6}},
    "alpha below one": {"lora_alpha": 0.3},
    "every kind of layer": {"target_modules": EVERYTHING, "rank_pattern": {"proj_in.1": 3}},
}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")  # newer PEFT
@pytest.mark.parametrize("settings", LORAS.values(), ids=LORAS)
def test_a_lora_plays_as_in_peft(by_peft, decoder, settings):
    folder, merged = by_peft(**settings)
    before = weights_of(decoder)
    check_same(exported(folder), before, merged)
    check_differs(load_file(folder / "adapter_model.safetensors"), before, merged)  # what the copy is for


def in_diffusers(tensors):
    theirs = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}
    named = {}
    for key, tensor in tensors.items():
        for name in ATTENTION:
            key = key.replace(f".{name}.", f".{theirs[name]}.")
        named[key.replace("base_model.model.", "transformer.")] = tensor
    return named


def in_kohya(tensors):
    named = {}
    for key, tensor in tensors.items():
        layer, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
        named[f"lora_unet_decoder_{layer.replace('.', '_')}.{part}"] = tensor
    return named


def with_alphas(tensors, alpha):
    downs = [key for key in tensors if key.endswith(".lora_down.weight")]
    return tensors | {key.replace(".lora_down.weight", ".alpha"): alpha.clone() for key in downs}


def in_comfyui(tensors):
    return {key.replace("base_model.model.", "diffusion_model.decoder."): tensor for key, tensor in tensors.items()}


DIFFUSERS_HEADER = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
NAMINGS = {
    "diffusers": (in_diffusers, DIFFUSERS_HEADER, ()),
    "diffusers, alpha said": (in_diffusers, None, ("--alpha", 8)),
    "kohya": (lambda tensors: with_alphas(in_kohya(tensors), torch.tensor(8.0)), {"ss_network_alpha": "3"}, ()),
    "kohya without alphas": (in_kohya, {"ss_network_alpha": "8"}, ()),
    "kohya, bf16 alphas": (lambda tensors: with_alphas(in_kohya(tensors), torch.tensor(8.0).bfloat16()), None, ()),
    "ComfyUI": (in_comfyui, None, ("--alpha", "8.0")),
    "no prefix": (lambda ts: {key.removeprefix("base_model.model."): t for key, t in ts.items()}, None, ("--alpha", 8)),
}


@pytest.mark.parametrize(("naming", "header", "arguments"), NAMINGS.values(), ids=NAMINGS)
def test_a_lora_in_another_programs_names(by_peft, decoder, tmp_path, naming, header, arguments):
    folder, merged = by_peft(target_modules=[*ATTENTION, *MLP])
    file = tmp_path / "downloads" / "jazz.safetensors"
    file.parent.mkdir()
    save_file(naming(load_file(folder / "adapter_model.safetensors")), file, header)
    check_same(exported(file, *arguments), weights_of(decoder), merged)


@pytest.mark.parametrize("naming", [in_kohya, in_comfyui], ids=["kohya", "ComfyUI"])
def test_layers_outside_the_blocks_in_another_programs_names(by_peft, decoder, tmp_path, naming):
    folder, merged = by_peft(target_modules=EVERYTHING)
    file = tmp_path / "downloads" / "jazz.safetensors"
    file.parent.mkdir()
    save_file(naming(load_file(folder / "adapter_model.safetensors")), file)
    check_same(exported(file, "--alpha", 8), weights_of(decoder), merged)


def test_a_lora_that_cannot_play_as_trained_is_refused(by_peft, tmp_path):
    folder, _ = by_peft(use_dora=True)
    refused(folder, says="is a DoRA")
    refused(folder, "--alpha", 8, says="is a DoRA")
    refused(folder, "--output", tmp_path / "elsewhere.safetensors", says="is a DoRA")
    assert not (tmp_path / "elsewhere.safetensors").exists()


def test_comfyui_would_indeed_play_a_dora_otherwise(by_peft, decoder):
    """Why it is refused: ComfyUI divides by the norms of the weight as it was, PEFT by those of the changed one."""
    folder, merged = by_peft(use_dora=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith("lora_magnitude_vector")]:
        tensors[key.replace("lora_magnitude_vector", "dora_scale")] = tensors.pop(key)[:, None]
        tensors[key.replace("lora_magnitude_vector", "alpha")] = torch.tensor(8.0)
    assert play(tensors, weights_of(decoder))[1] == []
    check_differs(tensors, weights_of(decoder), merged)


def test_an_alpha_that_nobody_says_is_refused_until_somebody_does(by_peft, decoder, tmp_path):
    folder, merged = by_peft()
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "adapter_model.safetensors", alone)
    refused(alone, says="The alpha of")
    refused(alone, "--alpha", "-1", says="Invalid value for '--alpha'")
    tensors = exported(alone, "--alpha", 8)
    check_same(tensors, weights_of(decoder), merged)
    refused(alone, "--alpha", 8, says="already exists")
    check_differs(
        exported(alone / "adapter_model.safetensors", "--alpha", 4, "--output", alone / "b.safetensors"),
        weights_of(decoder),
        merged,
    )


def test_an_alpha_that_contradicts_the_file_is_refused(by_peft):
    folder, _ = by_peft()
    refused(folder, "--alpha", 16, says="already has alpha 8")


# -- patterns that are more than a name ------------------------------------------------------------------------------

PATTERNS = [r".*layers\.0\..*q_proj", "(q|k)_proj", "layers.*.q_proj", "q_proj|v_proj"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("arguments", [(), ("--alpha", 8)], ids=["", "--alpha"])
def test_an_alpha_pattern_that_is_a_regular_expression_is_refused_by_name(by_peft, decoder, pattern, arguments):
    """A copy with one alpha for all layers would play those of the pattern at a wrong strength."""
    folder, merged = by_peft(alpha_pattern={pattern: 3})
    tensors = load_file(folder / "adapter_model.safetensors")
    downs = [key for key in tensors if key.endswith(".lora_A.weight")]
    wrong = tensors | {key.replace(".lora_A.weight", ".alpha"): torch.tensor(8.0) for key in downs}
    check_differs(wrong, weights_of(decoder), merged)
    refused(folder, *arguments, says=f"alpha_pattern {pattern!r}".replace("\\\\", "\\"))


def test_alphas_among_the_tensors_count_more_than_a_pattern(by_peft, tmp_path, decoder):
    folder, merged = by_peft()
    tensors = with_alphas(in_kohya(load_file(folder / "adapter_model.safetensors")), torch.tensor(8.0))
    (folder / "adapter_model.safetensors").unlink()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {".*q_proj": 3}}))
    check_same(exported(folder), weights_of(decoder), merged)


# -- layers that change nothing --------------------------------------------------------------------------------------


def test_untrained_layers_are_left_out_and_counted(by_peft, decoder):
    folder, merged = by_peft()
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if "cross_attn" in key and "lora_B" in key]:
        tensors[key] = torch.zeros_like(tensors[key])
    save_file(tensors, folder / "adapter_model.safetensors")
    output = folder / "copy.safetensors"
    done = export(folder, "--output", output)
    assert done.exit_code == 0 and "Left out: 8 layers that hold only zeros and change nothing.\n" in done.output
    copied = load_file(output)
    assert {key.split(".")[4] for key in copied} == {"self_attn"} and len(copied) == 8 * 3
    expected = {
        layer: merged[layer] if "self_attn" in layer else weight for layer, weight in weights_of(decoder).items()
    }
    check_same(copied, weights_of(decoder), expected)


def test_an_adapter_that_changes_nothing_has_no_copy(by_peft):
    folder, _ = by_peft()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    refused(folder, says="holds only zeros and changes nothing")


# -- while training --------------------------------------------------------------------------------------------------


def test_every_saved_lora_has_its_copy_beside_it(train, load):
    from peft import PeftModel

    output = train("base", options={"export": "comfyui"}).output
    copies = sorted(output.rglob("comfyui_lora.safetensors"))
    assert len(copies) == 3, "two checkpoints and the final adapter"
    before = weights_of(load("base").model.decoder)
    for file in copies:
        merged = PeftModel.from_pretrained(load("base").model.decoder, file.parent).merge_and_unload()
        tensors = load_file(file)
        assert {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")} == {8.0}
        check_same(tensors, before, weights_of(merged))
        header = header_of(file)
        assert header["modelspec.usage_hint"] == "ACE-Step 1.5 base: shift 1.0, 50 steps, CFG on"
        assert "lora_adapter_metadata" not in header, "diffusers does not load it"
    check_differs(load_file(copies[-1].with_name("adapter_model.safetensors")), before, weights_of(merged))


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_exporting_afterwards_makes_the_same_copy(train, kind):
    output = train("base", kind, options={"export": "comfyui"}).output
    (during,) = output.glob(f"final/**/comfyui_{kind}.safetensors")
    afterwards = output / "later.safetensors"
    assert export(during.parent, "--output", afterwards).exit_code == 0
    assert afterwards.read_bytes() == during.read_bytes()


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_the_adapter_itself_is_the_same_with_and_without_a_copy(train, kind):
    with_copy, without = (train("base", kind, options=options) for options in ({"export": "comfyui"}, None))
    assert with_copy.tensors.keys() == without.tensors.keys()
    assert all(torch.equal(with_copy.tensors[key], without.tensors[key]) for key in without.tensors)
    assert not list(without.output.rglob("comfyui_*"))
