"""The stand-in keeps upstream's contract, traps included; with --acestep-root the real one shows the same traps."""

from __future__ import annotations

import hashlib
import inspect

import pytest
import torch

from sidestep_plugin import miniature


def digest(folder):
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_built_twice_it_is_the_same_and_draws_no_random_number(tmp_path):
    state = torch.get_rng_state()
    for name in ("one", "two"):
        miniature.build(tmp_path / name)
    assert torch.equal(state, torch.get_rng_state())
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    before = digest(tmp_path / "one")
    miniature.build(tmp_path / "one")
    assert digest(tmp_path / "one") == before


def test_it_is_small(tmp_path):
    miniature.build(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 2_500_000


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no official model"):
        miniature.build(tmp_path, models=["acestep-v15-jazz"])


@pytest.mark.parametrize("name", miniature.OFFICIAL_MODELS)
def test_every_official_model_is_decided_by_its_folder(tmp_path, name):
    from sidestep_plugin.run import ModelFacts
    from sidestep_plugin.timesteps.treatment import decide_variant

    folder = miniature.write_model(tmp_path, name, seed=1)
    expected = next(variant for variant in ("turbo", "base", "sft") if variant in name)
    assert decide_variant(ModelFacts.from_folder(folder)).variant == expected


# -- upstream's traps ------------------------------------------------------------------------------------------------


def test_trap_a_failure_is_a_message_and_never_raised(train):
    result = train("base", plugins=None, max_epochs=1, learning_rate="not a number")
    assert result.messages[-1].startswith("❌")


def test_trap_the_same_eight_timesteps_for_every_model(train):
    times = torch.cat(train("base", plugins=None, max_epochs=4).timesteps)
    table = torch.tensor([1.0, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3]).to(times)
    assert torch.isin(times, table).all()


def test_trap_stopping_saves_nothing(trainer, load, checkout, tmp_path):
    loading = {"num_workers": 0, "pin_memory": False, "persistent_workers": False}
    known = inspect.signature(trainer.TrainingConfig).parameters
    config = trainer.TrainingConfig(
        output_dir=str(tmp_path / "output"), **{name: value for name, value in loading.items() if name in known}
    )
    made = trainer.LoRATrainer(load("base"), trainer.LoRAConfig(r=4, alpha=8), config)
    messages = [text for _, _, text in made.train_from_preprocessed(str(checkout.tensors), {"should_stop": True})]
    assert any("stopped" in text for text in messages), messages
    assert not list((tmp_path / "output").rglob("*.safetensors"))


def test_trap_the_config_class_says_turbo_for_every_model(load):
    config = load("base").model.config
    assert type(config)().model_version == "turbo" and not hasattr(type(config)(), "is_turbo")


def test_trap_a_resume_that_says_it_succeeded_restores_no_weights(trainer, train, load, checkout, tmp_path):
    if "resume_from" not in inspect.signature(trainer.LoRATrainer.train_from_preprocessed).parameters:
        pytest.skip("this checkout's trainer cannot resume")
    pytest.importorskip("lightning", reason="without Lightning upstream ignores resume_from")
    first = train("base", plugins=None)
    (checkpoint,) = first.output.glob("checkpoints/epoch_2*")
    config = trainer.TrainingConfig(output_dir=str(tmp_path / "output"), max_epochs=2, num_workers=0, pin_memory=False)
    made = trainer.LoRATrainer(load("base"), trainer.LoRAConfig(r=4, alpha=8), config)
    messages = [
        text
        for _, _, text in made.train_from_preprocessed(
            str(checkout.tensors), {"should_stop": False}, resume_from=str(checkpoint)
        )
    ]
    assert any("✅ Resumed" in text for text in messages), messages
    restored = [weight for name, weight in made.module.model.named_parameters() if "lora_B" in name]
    assert restored and all(float(weight.detach().abs().sum()) == 0.0 for weight in restored)
