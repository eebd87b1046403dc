"""The promises of the design, bit for bit: equal losses, equal adapter tensors, equal random state afterwards.

1 off is off, 2 turbo is upstream, 3 base and sft are the model, 4 shift never trains.
"""

from __future__ import annotations

import pytest
import torch

from sidestep_plugin import attach

KINDS = ["lora", "lokr"]
SETTINGS = [{}, {"gradient_accumulation_steps": 2, "max_epochs": 3}, {"val_split": 0.34}]
TURBO_TIMES = (1.0, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3)


# -- 1: off is off ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "accumulation", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_attached_without_plugins_is_never_attached(train, equal_bits, kind, settings):
    assert equal_bits(train("base", kind, plugins=None, **settings), train("base", kind, plugins=(), **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_detached_is_never_attached(train, equal_bits, kind):
    before = train("base", kind, plugins=None)
    with_plugin = train("base", kind)
    after = train("base", kind, plugins=None)
    assert equal_bits(before, after)
    assert not equal_bits(before, with_plugin), "the plugin has to change a base run, or this test says nothing"


def test_detached_in_the_middle_of_a_process(trainer, load, module_for, batch_of):
    """A module that was stepped while attached steps as upstream's once detached."""
    handler, never = load("base"), load("base")
    module, reference = module_for(handler), module_for(never)
    module.load_state_dict(reference.state_dict())  # LoRA's first matrix is random
    with attach(trainer, announce=print):
        module.training_step(batch_of(handler.model, 3))
    torch.manual_seed(1)
    detached = module.training_step(batch_of(handler.model, 3))
    torch.manual_seed(1)
    assert torch.equal(detached, reference.training_step(batch_of(handler.model, 3)))


# -- 2: turbo is upstream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "accumulation", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_turbo_is_upstream(train, equal_bits, kind, settings):
    assert equal_bits(train("turbo", kind, plugins=None, **settings), train("turbo", kind, **settings))


# -- 3: base and sft are the model -----------------------------------------------------------------------------------


def losses_of_both(trainer, handler, module, batch, seed, options=None):
    """One step's loss by upstream's trainer with the plugin, and by the model's own forward(), with random states."""
    model = handler.model
    # The songs were preprocessed: what prepare_condition would compute is what stands in the batch.
    model.prepare_condition = lambda *_, **__: tuple(
        batch[key] for key in ("encoder_hidden_states", "encoder_attention_mask", "context_latents")
    )
    autocast = []
    hook = model.decoder.register_forward_pre_hook(
        lambda *_: autocast.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
    )
    with attach(trainer, options=options, announce=print):
        torch.manual_seed(seed)
        ours, our_state = module.training_step(batch), torch.get_rng_state()
    hook.remove()
    # Some versions of upstream step under autocast on every device; the model is asked under the same.
    ((enabled, dtype),) = autocast
    with torch.autocast("cpu", dtype=dtype, enabled=enabled):
        torch.manual_seed(seed)
        theirs = model(hidden_states=batch["target_latents"], attention_mask=batch["attention_mask"])["diffusion_loss"]
    return (ours, our_state), (theirs.float(), torch.get_rng_state())


@pytest.mark.parametrize("name", ["base", "sft", "xl-base", "turbo"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_models_own_forward(trainer, load, module_for, batch_of, require_kind, kind, name):
    require_kind(kind)
    handler = load(name)
    module = module_for(handler, kind)
    options = {"timestep_mode": "continuous"} if name == "turbo" else None
    for size in range(1, 10):
        batch = batch_of(handler.model, size, seed=size)
        (ours, our_state), (theirs, their_state) = losses_of_both(trainer, handler, module, batch, size, options)
        assert torch.equal(ours, theirs), f"batch of {size}"
        assert torch.equal(our_state, their_state), f"batch of {size}"


@pytest.mark.parametrize("name", ["base", "xl-base"])
def test_the_loss_is_the_models_own_in_bf16(trainer, load, module_for, batch_of, name):
    handler = load(name)
    module = module_for(handler)
    handler.model.to(torch.bfloat16)
    module.dtype = torch.bfloat16
    if hasattr(module, "timesteps_tensor"):
        module.timesteps_tensor = module.timesteps_tensor.bfloat16()
    for size in range(1, 10):
        batch = batch_of(handler.model, size, seed=size)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # as upstream steps on a GPU
            (ours, our_state), (theirs, their_state) = losses_of_both(trainer, handler, module, batch, size)
        assert torch.equal(ours, theirs), f"batch of {size}"
        assert torch.equal(our_state, their_state), f"batch of {size}"


def test_two_models_at_once_each_get_their_own_treatment(trainer, load, module_for, batch_of):
    base, turbo = load("base"), load("turbo")
    base_module, turbo_module = module_for(base), module_for(turbo)
    seen = {"base": [], "turbo": []}

    class Recorder:
        from sidestep_plugin import hookimpl

        @hookimpl
        def acestep_step_finished(self, step):
            seen["base" if step.module is base_module else "turbo"].append((step.t is not None, step.sampled_by))

    with attach(trainer, extra_plugins={"recorder": Recorder()}, announce=print):
        for seed in range(3):
            base_module.training_step(batch_of(base.model, 4, seed))
            turbo_module.training_step(batch_of(turbo.model, 4, seed))
    assert seen["base"] == [(True, "sidestep")] * 3, "base is sampled by the plugin"
    assert seen["turbo"] == [(True, None)] * 3, "turbo is sampled by upstream, and its timesteps are told too"


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_after_the_other_in_one_process(train, equal_bits, kind):
    first = train("base", kind)
    turbo = train("turbo", kind)
    assert equal_bits(turbo, train("turbo", kind, plugins=None))
    assert equal_bits(first, train("base", kind))


# PEFT warns of the adapter that upstream leaves on the model; training again in the app does just that.
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_a_second_training_of_the_same_model(train, load):
    """In the app the model stays loaded: every training of it is decided anew."""
    handler = load("base")
    for _ in range(2):
        result = train("base", handler=handler)
        if "without a single tensor" in result.messages[-1]:
            pytest.skip("this version saves an empty adapter when a model is trained again, which is refused")
        assert list(result.output.glob("final/**/training_config.json")), result.messages


# -- what the decoder sees -------------------------------------------------------------------------------------------


def times_of(result):
    return torch.cat(result.timesteps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["base", "sft"])
def test_base_and_sft_are_trained_at_continuous_times(train, kind, name):
    times = times_of(train(name, kind, max_epochs=4))
    assert ((times > 0) & (times < 1)).all()
    # The first versions sample in bf16, in which continuous times may meet each other and the table.
    assert torch.isin(times, torch.tensor(TURBO_TIMES).to(times)).sum() <= times.numel() // 4
    assert times.unique().numel() > 16


@pytest.mark.parametrize("kind", KINDS)
def test_turbo_is_trained_at_its_eight_times(train, kind):
    times = times_of(train("turbo", kind, max_epochs=4))
    assert torch.isin(times, torch.tensor(TURBO_TIMES).to(times)).all()


def test_turbo_shift1_is_trained_at_the_times_of_shift_1(train):
    times = times_of(train("turbo-shift1", max_epochs=6)).float()
    assert torch.isin(times, torch.arange(1, 9) / 8).all()
    assert times.unique().numel() > 3


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_are_dropped_in_training_and_never_in_validation(train, load, kind):
    handler = load("base")
    null = handler.model.null_condition_emb.detach()[0, 0]
    result = train("base", kind, handler=handler, options={"cfg_ratio": 1.0}, val_split=0.34)
    # The first versions of upstream train in bf16 on every device.
    dropped = [bool(torch.allclose(conditions.float(), null, atol=0.02)) for conditions in result.conditions]
    recorded = len(result.losses)  # validation's losses are not recorded
    assert sum(dropped) == recorded > 0
    if kind == "lora" and "val_split" in vars(result.config):
        assert len(dropped) > recorded, "no validation ran, so nothing was shown about it"


# -- 4: shift never trains -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "turbo"])
@pytest.mark.parametrize("kind", KINDS)
def test_shift_never_trains(train, equal_bits, kind, name):
    plain = train(name, kind)
    for options in ({"shift": 1.0}, {"shift": 3.0}, {"shift": 7.5, "num_inference_steps": 27}):
        assert equal_bits(plain, train(name, kind, options=options)), options
