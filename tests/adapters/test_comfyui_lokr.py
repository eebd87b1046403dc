"""The copy of a LoKr for ComfyUI: by ComfyUI's rules it gives every layer the weight that LyCORIS gives it."""

import copy

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sidestep_plugin.adapters.applied import applied, check_applicable
from sidestep_plugin.adapters.layers import read_adapter
from sidestep_plugin.cli import cli

from .comfyui_rules import (
    ATTENTION,
    a_decoder,
    check_differs,
    check_same,
    export,
    exported,
    make_random,
    measured,
    refused,
    weights_of,
)

# -- as upstream saves it --------------------------------------------------------------------------------------------


@pytest.fixture
def by_upstream(trainer, load, require_kind, tmp_path):
    """Attach a LoKr as upstream does, make every tensor of it random, and save it with upstream's own function.

    Returns its folder, the weights before and with it. The latter are measured: LyCORIS's ``get_merged_weight``
    multiplies by the strength twice, which its ``forward`` does not.
    """
    require_kind("lokr")

    def make(**settings):
        from acestep.training.configs import LoKRConfig
        from acestep.training.lokr_utils import inject_lokr_into_dit

        model = load("base").model
        before = weights_of(copy.deepcopy(model.decoder))
        config = LoKRConfig(**{"linear_dim": 2, "linear_alpha": 8} | settings)
        _, network, _ = inject_lokr_into_dit(model, config)
        make_random(network.named_parameters())
        folder = tmp_path / "by upstream"
        trainer.save_lokr_weights(network, str(folder), metadata={"lokr_config": config.to_dict()})
        return folder, before, measured(model.decoder, before)

    return make


LOKRS = {
    "upstream's default, which decomposes nothing here": {"linear_dim": 64, "linear_alpha": 128},
    "one factor decomposed": {},
    "full matrix": {"full_matrix": True},
    "both decomposed": {"decompose_both": True, "factor": 8},
    "the larger factor in full": {"decompose_both": True, "linear_dim": 3, "factor": 16},
    "another factor": {"factor": 4},
    "unbalanced": {"unbalanced_factorization": True, "factor": 4},
    "rs_lora": {"rs_lora": True},
    "rs_lora, full matrix": {"rs_lora": True, "full_matrix": True},
    "scalar": {"use_scalar": True},
    "bypass": {"bypass_mode": True},
    "tucker": {"use_tucker": True},
}


@pytest.mark.parametrize("settings", LOKRS.values(), ids=LOKRS)
def test_a_lokr_plays_as_in_lycoris(by_upstream, settings):
    folder, before, after = by_upstream(**settings)
    tensors = exported(folder)
    check_same(tensors, before, after)
    assert {key.partition(".")[0] for key in tensors} == {f"lycoris_{layer.replace('.', '_')}" for layer in before}


def test_the_alpha_of_a_lokr_matters(by_upstream):
    folder, before, after = by_upstream()
    tensors = {key: tensor for key, tensor in exported(folder).items() if not key.endswith(".alpha")}
    check_differs(tensors, before, after)


@pytest.mark.parametrize("settings", [{}, {"full_matrix": True}, {"decompose_both": True, "factor": 8}])
def test_a_strength_can_be_written_into_a_copy_of_a_lokr(by_upstream, settings):
    """Alpha alone would not do it: it has no effect in full matrices."""
    folder, before, after = by_upstream(**settings)
    tensors = exported(folder, "--strength", 0.6)
    check_same(tensors, before, {name: before[name] + 0.6 * (after[name] - before[name]) for name in before})


def test_a_decomposed_lokr_takes_no_strength(by_upstream, tmp_path):
    folder, before, _ = by_upstream(weight_decompose=True)
    model = base_model(tmp_path / "model", before)
    refused(folder, "--model", model, "--strength", 0.5, says="has weight decomposition, which no factor scales")


def exact_or_refused(folder, before, after):
    if export(folder).exit_code == 0:
        check_same(load_file(folder / "comfyui_lokr.safetensors"), before, after)
    else:
        refused(folder, says="")


def test_a_lokr_decomposed_by_rows_is_never_exported_wrong(by_upstream):
    """What ``weight_decompose`` trains. LyCORIS divides by the rows' norms of the changed weight, ComfyUI by those of
    the weight as it was; without the model no ``dora_scale`` makes the two the same."""
    exact_or_refused(*by_upstream(weight_decompose=True))


# -- weight decomposition by rows, with the base model at hand ---------------------------------------------------------


def base_model(folder, weights, prefix="decoder."):
    """A model's folder with these weights, in two files."""
    folder.mkdir()
    named = [(f"{prefix}{layer}.weight", weight.contiguous()) for layer, weight in weights.items()]
    save_file(dict(named[::2]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(named[1::2]), folder / "model-00002-of-00002.safetensors")
    return folder


TWO = ["lycoris_layers_0_self_attn_q_proj", "lycoris_layers_1_mlp_up_proj"]
DECOMPOSED = {
    "ACE-Step's default sizes": {"linear_dim": 64, "linear_alpha": 128},
    "one factor decomposed": {},
    "another factor": {"factor": 4},
    "both decomposed": {"decompose_both": True, "factor": 8},
}


@pytest.mark.parametrize("settings", DECOMPOSED.values(), ids=DECOMPOSED)
def test_with_the_base_model_a_lokr_decomposed_by_rows_plays_as_in_lycoris(by_upstream, tmp_path, settings):
    folder, before, after = by_upstream(weight_decompose=True, **settings)
    refused(folder, says="an exact copy needs the base model that it was trained on: name it with --model")
    model = base_model(tmp_path / "model", before)
    check_same(exported(folder, "--model", model), before, after)
    check_differs(load_file(folder / "lokr_weights.safetensors"), before, after)


def test_the_refusal_claims_no_strength(by_upstream):
    folder, _, _ = by_upstream(weight_decompose=True)
    said = export(folder).stderr
    assert "strength" not in said and "about" not in said


def test_another_base_model_is_refused(by_lycoris, tmp_path):
    folder, before, _ = by_lycoris(["lycoris_layers_0_self_attn_q_proj"], dora_wd=True)
    other = base_model(tmp_path / "other", {layer: 1.1 * weight for layer, weight in before.items()})
    refused(folder, "--model", other, says="was trained on another model than this one")
    narrow = base_model(tmp_path / "narrow", {layer: weight[:8] for layer, weight in before.items()})
    refused(folder, "--model", narrow, says="was trained on another model than this one")
    empty = base_model(tmp_path / "empty", before, prefix="encoder.")
    refused(folder, "--model", empty, says="No weights of a decoder in")
    refused(folder, "--model", tmp_path / "nowhere", "--checkpoint-dir", tmp_path, says="No model")


def test_a_decomposed_lokr_counts_the_layers_that_were_trained(by_lycoris, tmp_path):
    """The others hold the norms of the model's weights and a factor of zeros."""
    folder, before, after = by_lycoris(
        ["lycoris_layers_0_self_attn_q_proj", "lycoris_layers_1_mlp_up_proj"], dora_wd=True
    )
    adapter = read_adapter(folder)
    assert adapter.layers.keys() - adapter.untrained == {"layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"}
    result = CliRunner().invoke(cli, ["inspect", str(folder)])
    rest = len(before) - 2
    assert "2 layers (q_proj, up_proj), F32" in result.output
    assert f"{rest} more layers were not trained" in result.output
    assert "hold only zeros" not in result.output
    tensors = exported(folder, "--model", base_model(tmp_path / "model", before))
    check_same(tensors, before, after)
    assert len({key.partition(".")[0] for key in tensors}) == 2
    told = export(folder, "--model", tmp_path / "model", "--overwrite").output
    assert f"Left out: {rest} layers that were not trained.\n" in told


@pytest.mark.parametrize("columns", [False, True], ids=["by rows", "by columns"])
def test_a_decomposed_lokr_is_applied_as_lycoris_applies_it(by_lycoris, columns):
    folder, before, after = by_lycoris(dora_wd=True, wd_on_output=not columns)
    adapter, decoder = read_adapter(folder), a_decoder()
    layers = {name: decoder.get_submodule(name) for name in before if before[name].dim() == 2}
    for name in set(adapter.layers) - layers.keys():
        del adapter.layers[name]
    check_applicable(adapter, {name: tuple(weight.shape) for name, weight in before.items()}, "it")
    with applied(adapter, layers):
        played = measured(decoder, {name: before[name] for name in layers})
    for name in layers:
        torch.testing.assert_close(played[name], after[name].detach(), rtol=1e-4, atol=1e-5)


def test_a_decomposed_lokr_gets_its_copy_while_it_trains(train, load, require_kind, monkeypatch, trainer):
    require_kind("lokr")
    from acestep.training import configs

    made = configs.LoKRConfig
    monkeypatch.setattr(
        trainer, "LoKRConfig", lambda **settings: made(**settings, weight_decompose=True), raising=False
    )
    handler = load("base")
    before = weights_of(copy.deepcopy(handler.model.decoder))
    output = train("base", "lokr", handler=handler, options={"export": "comfyui"}).output
    dtype = next(weight.dtype for name, weight in handler.model.decoder.named_parameters() if "lokr" not in name)
    before = {layer: weight.to(dtype).float() for layer, weight in before.items()}
    (folder,) = (file.parent for file in output.glob("final/**/comfyui_lokr.safetensors"))
    check_same(load_file(folder / "comfyui_lokr.safetensors"), before, measured(handler.model.decoder.float(), before))
    assert "dora_scale" in str(load_file(folder / "comfyui_lokr.safetensors").keys())


@pytest.fixture
def by_lycoris(require_kind, tmp_path):
    """The same with LyCORIS alone on the layers of ACE-Step, a convolution among them."""
    require_kind("lokr")

    def make(layers=None, **settings):
        from lycoris import LycorisNetwork, create_lycoris

        decoder = a_decoder()
        before = weights_of(a_decoder())
        LycorisNetwork.apply_preset({"unet_target_name": [], "target_name": []})
        network = create_lycoris(decoder, 1.0, **{"algo": "lokr", "linear_dim": 2, "linear_alpha": 8} | settings)
        network.apply_to()
        for lora in network.loras:
            if layers is None or lora.lora_name in layers:
                make_random(lora.named_parameters())
        folder = tmp_path / "by LyCORIS"
        folder.mkdir()
        network.save_weights(str(folder / "lokr_weights.safetensors"), None, {"algo": "lokr"})
        after = {}
        for lora in network.loras:
            (layer,) = [name for name in before if lora.lora_name == f"lycoris_{name.replace('.', '_')}"]
            changed = before[layer] + lora.get_weight(lora.shape) * lora.scalar
            after[layer] = lora.apply_weight_decompose(changed) if lora.wd else changed
        return folder, before, after

    return make


def test_a_lokr_on_every_kind_of_layer(by_lycoris):
    folder, before, after = by_lycoris()
    check_same(exported(folder), before, after)


def test_a_lokr_decomposed_by_columns_plays_as_in_lycoris(by_lycoris):
    """What LyCORIS before 3.2 makes of ``weight_decompose``."""
    folder, before, after = by_lycoris(dora_wd=True, wd_on_output=False)
    assert load_file(folder / "lokr_weights.safetensors")["lycoris_condition_embedder.dora_scale"].shape == (1, 24)
    check_same(exported(folder), before, after)


def test_convolutions_that_were_not_trained_are_in_no_ones_way(by_lycoris):
    """Upstream attaches a LoKr to every layer, and trains those that were asked for."""
    folder, before, after = by_lycoris(["lycoris_layers_0_self_attn_q_proj"], full_matrix=True)
    assert torch.equal(after["proj_in.1"], before["proj_in.1"])
    tensors = exported(folder)
    check_same(tensors, before, after)
    assert {key.partition(".")[0] for key in tensors} == {"lycoris_layers_0_self_attn_q_proj"}, (
        "the others change nothing"
    )
    told = export(folder, "--overwrite").output
    assert f"Left out: {len(before) - 1} layers that hold only zeros and change nothing.\n" in told


def test_a_layer_that_was_not_trained_forbids_no_copy(by_lycoris):
    """A Tucker decomposition, which ComfyUI does not play: only convolutions have it, and none of them was trained."""
    folder, before, after = by_lycoris(["lycoris_layers_0_self_attn_q_proj"], use_tucker=True)
    assert any(key.endswith("lokr_t2") for key in load_file(folder / "lokr_weights.safetensors"))
    check_same(exported(folder), before, after)


def test_a_lokr_that_was_not_trained_has_no_copy(by_lycoris):
    folder, _, _ = by_lycoris([])
    refused(folder, says="holds only zeros and changes nothing")


def test_a_trained_convolution_in_full_is_never_exported_wrong(by_lycoris):
    exact_or_refused(*by_lycoris(full_matrix=True))


@pytest.mark.parametrize("rank", [2, 64], ids=["decomposed", "in full"])
def test_a_lokr_by_peft_is_never_exported_wrong(tmp_path, rank):
    """PEFT keeps a LoKr's alpha in its adapter_config.json alone, and scales by it in any case."""
    from peft import LoKrConfig, get_peft_model

    config = LoKrConfig(r=rank, alpha=8, target_modules=ATTENTION)
    model = get_peft_model(a_decoder(), config)
    make_random((name, parameter) for name, parameter in model.named_parameters() if "lokr" in name)
    model.save_pretrained(tmp_path / "by PEFT")
    exact_or_refused(tmp_path / "by PEFT", weights_of(a_decoder()), weights_of(model.merge_and_unload()))


def test_every_saved_lokr_has_its_copy_beside_it(train, load):
    handler = load("base")
    before = weights_of(copy.deepcopy(handler.model.decoder))
    output = train("base", "lokr", handler=handler, options={"export": "comfyui"}).output
    assert len(list(output.rglob("comfyui_lokr.safetensors"))) == 3, "two checkpoints and the final adapter"
    final = load_file(output / "final" / "comfyui_lokr.safetensors")
    # Some versions round the decoder to bf16, and leave it so: what a copy adds is measured on the rounded weights.
    decoder = handler.model.decoder
    dtype = next(weight.dtype for name, weight in decoder.named_parameters() if "lokr" not in name)
    before = {layer: weight.to(dtype).float() for layer, weight in before.items()}
    after = measured(decoder.float(), before)
    check_same(final, before, after)
    check_differs({}, before, after)
