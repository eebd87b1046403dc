"""A model that carries an adapter already: loaded in the app, or left by another training.

PEFT saves every adapter that it finds in a model, and asks the Hugging Face Hub for the base model of each.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidestep_plugin.adapters.foreign import drop_foreign_adapters, foreign_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning"),
]
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "condition_embedder"]


@pytest.fixture
def app(checkout):
    """Load an adapter as ACE-Step's app does: its own functions in a real checkout, the same calls otherwise."""

    def load(handler, folder, name=None, unload=False):
        if checkout.real:
            mixin = pytest.importorskip("acestep.core.generation.handler.lora_manager", exc_type=ImportError)
            if not hasattr(mixin.LoraManagerMixin, "add_lora"):
                pytest.skip("this version's app loads one LoRA, without a name")
            theirs = type("Handler", (mixin.LoraManagerMixin,), {})()
            vars(theirs).update(model=handler.model, device=handler.device, dtype=handler.dtype, quantization=None)
            vars(theirs).update(_base_decoder=None, lora_loaded=False, use_lora=False, lora_scale=1.0, _active_loras={})
            assert "loaded from" in theirs.add_lora(str(folder), name)
            if unload:
                assert "unloaded" in theirs.unload_lora()
            return
        if (folder / "adapter_config.json").is_file():
            from peft import PeftModel

            decoder, name = handler.model.decoder, name or folder.name
            if isinstance(decoder, PeftModel):
                decoder.load_adapter(str(folder), adapter_name=name)
            else:
                handler.model.decoder = PeftModel.from_pretrained(decoder, str(folder), adapter_name=name)
        else:
            from acestep.training.configs import LoKRConfig
            from acestep.training.lokr_utils import inject_lokr_into_dit

            _, network, _ = inject_lokr_into_dit(handler.model, LoKRConfig(linear_dim=4, linear_alpha=8))
        if unload and hasattr(handler.model.decoder, "get_base_model"):
            handler.model.decoder = handler.model.decoder.get_base_model()
        elif unload:
            network.restore()

    return load


@pytest.fixture
def made(train, load, require_kind, tmp_path):
    """The folder of an adapter that something else has trained: a LoRA in more layers than usual, or a LoKr."""

    def make(kind):
        require_kind(kind)
        if kind == "lokr":
            (file,) = train("base", "lokr").output.glob("final/**/*.safetensors")
            return file.parent
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(load("base").model.decoder, LoraConfig(r=4, lora_alpha=8, target_modules=EVERYWHERE))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        model.save_pretrained(tmp_path / "jazz")
        return tmp_path / "jazz"

    return make


CASES = {
    "a LoRA": ("lora", None, "lora", "the LoRA 'jazz'"),
    "a LoRA called as the trained one": ("lora", "default", "lora", "the LoRA 'default'"),
    "a LoKr under a LoRA": ("lokr", None, "lora", "a LoKr"),
    "a LoRA under a LoKr": ("lora", None, "lokr", "the LoRA 'jazz'"),
    "a LoKr under a LoKr": ("lokr", None, "lokr", "a LoKr"),
}


@pytest.mark.parametrize(("loaded", "name", "kind", "named"), CASES.values(), ids=CASES)
def test_a_model_with_a_loaded_adapter_is_not_trained(train, load, app, made, require_kind, loaded, name, kind, named):
    require_kind(kind)
    folder, handler = made(loaded), load("base")
    app(handler, folder, name)
    before = {key: value.clone() for key, value in handler.model.state_dict().items()}
    run = train("base", kind, handler=handler)
    assert not list(run.output.rglob("*.safetensors"))
    assert run.messages[-1].startswith("❌") and f"The model carries {named} already (in " in run.messages[-1]
    after = handler.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_lora_is_still_there_after_the_app_has_unloaded_it(train, load, app, made):
    handler = load("base")
    app(handler, made("lora"), unload=True)
    assert "The model carries the LoRA 'jazz' already" in train("base", handler=handler).messages[-1]


def test_a_lokr_that_the_app_has_unloaded_is_gone(train, load, app, made):
    handler = load("base")
    app(handler, made("lokr"), unload=True)
    assert train("base", handler=handler).tensors


@pytest.mark.parametrize("name", ["jazz", "default"])
def test_upstream_alone_saves_a_loaded_lora_with_the_trained_one(train, load, app, made, name):
    """What the refusal is for."""
    handler = load("base")
    app(handler, made("lora"), name)
    run = train("base", handler=handler, plugins=None)
    mixed = any(
        "condition_embedder" in key for key in load_file(run.output / "final" / "adapter" / "adapter_model.safetensors")
    )
    beside = (run.output / "final" / "adapter" / "jazz" / "adapter_model.safetensors").is_file()
    assert (mixed, beside) == (name == "default", name == "jazz")


def test_a_model_can_be_trained_twice_or_says_so(train, load, equal_bits):
    """PEFT starts the layers of an earlier training anew. The first versions of upstream save nothing then."""
    handler = load("base")
    train("base", handler=handler, learning_rate=0.5)
    assert foreign_adapters(handler.model, "lora", EVERYWHERE) == []
    assert [found.kind for found in foreign_adapters(handler.model, "lora", ["q_proj"])] == ["LoRA"]
    again = train("base", handler=handler)
    if again.messages[-1].startswith("❌"):
        assert "saved an adapter without a single tensor" in again.messages[-1]
        assert not list(again.output.rglob("*.safetensors"))
    else:
        assert equal_bits(again, train("base"))


def test_an_adapter_without_tensors_is_not_saved(train, trainer, monkeypatch, tmp_path):
    from safetensors.torch import save_file

    original = trainer.save_lora_weights

    def save_nothing(model, output_dir, *more, **named):
        result = original(model, output_dir, *more, **named)
        for file in Path(output_dir).rglob("*.safetensors"):
            file.unlink()
            save_file({}, file)
        return result

    monkeypatch.setattr(trainer, "save_lora_weights", save_nothing)
    run = train("base", save_every_n_epochs=9)
    assert run.messages[-1].startswith("❌") and "without a single tensor" in run.messages[-1]
    assert not (run.output / "final").exists()


def test_targets_in_one_expression(load, app, made):
    handler = load("base")
    app(handler, made("lora"), "default")
    assert foreign_adapters(handler.model, "lora", r".*\.(q|k|v|o)_proj|condition_embedder") == []
    (found,) = foreign_adapters(handler.model, "lora", r".*\.(q|k|v|o)_proj")
    assert found.name == "default" and found.layers == 1


def test_what_peft_saves_of_other_adapters_is_removed(load, app, made, tmp_path):
    handler, folder = load("base"), made("lora")
    app(handler, folder, "default")
    handler.model.decoder.load_adapter(str(folder), adapter_name="other")
    handler.model.decoder.save_pretrained(tmp_path / "saved")
    kept = sorted(file.name for file in (tmp_path / "saved").iterdir() if file.is_file())
    assert drop_foreign_adapters(tmp_path / "saved") == ["other"]
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == kept
    assert drop_foreign_adapters(tmp_path / "saved") == []


def test_peft_asks_nobody_for_the_base_model_of_our_adapters(train, load, app, monkeypatch, tmp_path):
    """It asks the hub for any name that is no folder here, whenever a model with the adapter is saved."""
    import peft.utils.other

    asked = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(peft.utils.other, "file_exists", lambda place, *_, **__: asked.append(place) or False)
    folder = train("base").output / "final" / "adapter"
    handler = load("base")
    app(handler, folder, "ours")
    for _ in range(3):
        handler.model.decoder.save_pretrained(tmp_path / "again")
    assert asked == []
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] is None
    named = shutil.copytree(folder, tmp_path / "named")
    config |= {"base_model_name_or_path": "acestep-v15-base"}
    (named / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    app(handler, named, "named")
    handler.model.decoder.save_pretrained(tmp_path / "again")
    assert asked == ["acestep-v15-base"], "so the test would notice"
