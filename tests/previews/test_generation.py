"""What a clip is generated from and how. On real model code: tests/upstream/test_real_previews.py."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from sidestep_plugin import Refusal
from sidestep_plugin.previews.conditions import (
    Conditions,
    PreviewSettings,
    choose_songs,
    guidance_for,
    look_at,
    read_conditions,
    read_silence,
    silent_context,
)
from sidestep_plugin.previews.generation import ProjectedGuidance, euler, generate, noise_for, own_arguments

CPU = torch.device("cpu")


def settings(**changes):
    return PreviewSettings(**({"shift": 1.0, "steps": 4, "guidance": 1.0, "seed": 0, "seconds": 20.0} | changes))


def conditions(frames=5, width=3):
    silence = torch.arange(2 * 64, dtype=torch.float32).reshape(1, 2, 64)
    return Conditions(torch.ones(1, 2, width), torch.ones(1, 2), silent_context(silence, frames), torch.ones(1, frames))


class Linear(torch.nn.Module):
    """A decoder whose velocity is known: v = x, so an exact solution exists; it counts its rows."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, hidden_states, timestep, **given):
        self.seen.append((timestep.tolist(), {name: value.shape[0] for name, value in given.items()}))
        return (hidden_states * self.weight,)


@pytest.mark.parametrize("shift, steps", [(1.0, 4), (3.0, 8), (2.0, 5)])
def test_euler_steps_follow_the_schedule(shift, steps):
    decoder, noise = Linear(), noise_for(1, 5, CPU, torch.float32)
    made = euler(decoder, conditions(), settings(shift=shift, steps=steps), noise, None)
    times = [1.0 - i / steps for i in range(steps)]
    times = [*(shift * t / (1.0 + (shift - 1.0) * t) for t in times), 0.0]
    factor = 1.0
    for t, following in pairwise(times):
        factor *= 1.0 - (t - following)
    torch.testing.assert_close(made, factor * noise)
    assert [t for (t,), _ in decoder.seen] == pytest.approx(times[:-1])


def test_guidance_asks_twice_at_once_with_the_null_condition():
    decoder = Linear()
    model = SimpleNamespace(null_condition_emb=torch.zeros(1, 1, 3))
    generate(model, decoder, conditions(), settings(guidance=7.0), noise_for(1, 5, CPU, torch.float32))
    assert all(set(rows.values()) == {2} for _, rows in decoder.seen)


def test_guidance_is_orthogonal_to_the_velocity_and_bounded():
    generator = torch.Generator().manual_seed(0)
    with_it, without = torch.randn(2, 1, 9, 4, generator=generator).mul(3.0)
    guided = ProjectedGuidance(2.0).guided(with_it, without)
    change = guided - with_it
    assert float((change * with_it).sum(dim=1).abs().max()) < 1e-4
    assert float(change.norm(dim=1).max()) <= 2.5 + 1e-4 and float(change.norm()) > 0.1
    assert torch.equal(ProjectedGuidance(1.0).guided(with_it, without), with_it)
    remembering = ProjectedGuidance(2.0)
    remembering.guided(with_it, without)
    assert not torch.equal(remembering.guided(with_it, without), guided), "it has momentum"


class WithItsOwn(torch.nn.Module):
    """A model with generation code in upstream's shape."""

    def __init__(self):
        super().__init__()
        self.decoder = Linear()
        self.null_condition_emb = torch.nn.Parameter(torch.zeros(1, 1, 3))
        self.offset = 1.0

    def prepare_condition(self, **_):
        raise AssertionError("the conditions exist already")

    def generate_audio(self, text_hidden_states, src_latents, chunk_masks, infer_steps=30, shift=1.0, **kwargs):
        given = self.prepare_condition(text_hidden_states=text_hidden_states)
        noise = self.prepare_noise(given[2], 9)
        asked = {"steps": infer_steps, "shift": shift, "source": src_latents, "mask": chunk_masks, "context": given[2]}
        self.decoder(noise, torch.ones(1))
        WithItsOwn.asked = asked
        return {"target_latents": noise + self.offset, "time_costs": {}}


def test_the_models_own_code_gets_conditions_silence_and_a_full_mask():
    model, decoder, ready = WithItsOwn(), Linear(), conditions()
    noise = noise_for(1, 5, CPU, torch.float32)
    made = generate(model, decoder, ready, settings(steps=7, shift=2.0), noise)
    assert torch.equal(made, noise + 1.0) and len(decoder.seen) == 1 and not model.decoder.seen
    asked = WithItsOwn.asked
    assert (asked["steps"], asked["shift"]) == (7, 2.0) and asked["context"] is ready.context_latents
    assert torch.equal(asked["source"], ready.context_latents[..., :64]) and bool((asked["mask"] == 1).all())


def generating(function):
    return type("Model", (), {"generate_audio": function})()


@pytest.mark.parametrize(
    "function, changes, expected",
    [
        (lambda self, src_latents, fix_nfe=8, shift=3.0: 0, {"steps": 8, "shift": 3.0}, {"fix_nfe": 8, "shift": 3.0}),
        (lambda self, src_latents, fix_nfe=8, shift=3.0: 0, {"steps": 9, "shift": 3.0}, None),
        (lambda self, src_latents, fix_nfe=8, shift=3.0: 0, {"steps": 8, "shift": 2.5}, None),
        (
            lambda self, infer_steps=8, shift=1.0, diffusion_guidance_sale=7.0: 0,
            {"guidance": 3.0},
            {"infer_steps": 4, "shift": 1.0, "diffusion_guidance_sale": 3.0},
        ),
        (lambda self, infer_steps=8, shift=1.0: 0, {"guidance": 3.0}, None),
        (lambda self, infer_steps=8: 0, {"shift": 2.0}, None),
        (lambda self, infer_steps, new_and_needed: 0, {}, None),
        (None, {}, None),
    ],
)
def test_what_the_models_own_code_can_be_asked(function, changes, expected):
    assert own_arguments(generating(function), settings(**changes)) == expected


def test_noise_is_the_same_each_time_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, other = (noise_for(5, 4, CPU, torch.float32) for _ in range(2))
    assert torch.equal(one, other) and not torch.equal(one, noise_for(6, 4, CPU, torch.float32))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "wanted, expected", [("2", [1, 4]), ("1", [3]), ("6", [0, 1, 2, 3, 4, 5]), ("3", [1, 3, 5]), ("s4, s0.pt", [4, 0])]
)
def test_songs_are_chosen_evenly_or_by_name(tmp_path, wanted, expected):
    files = [tmp_path / f"s{number}.pt" for number in range(6)]
    assert choose_songs(files, wanted) == [files[number] for number in expected]


@pytest.mark.parametrize("wanted", ["0", "7", "nobody", ","])
def test_songs_that_are_not_there_are_refused(tmp_path, wanted):
    with pytest.raises(Refusal, match="--preview-songs"):
        choose_songs([tmp_path / f"s{number}.pt" for number in range(6)], wanted)


def test_the_songs_own_audio_is_in_no_condition(checkout):
    """A context with the song's latents would let the model copy. Only what the text encoder said is the song's."""
    file = sorted(checkout.tensors.glob("*.pt"))[0]
    song, stored = look_at(file, 0.4), torch.load(file, weights_only=True)
    assert (song.frames, song.whole, song.seconds) == (10, 16, 0.4)
    silence = read_silence(checkout.checkpoints / "acestep-v15-base")
    made = read_conditions(song, silence, CPU, torch.float32)
    assert torch.equal(made.encoder_hidden_states[0], stored["encoder_hidden_states"])
    assert torch.equal(made.context_latents[0, :, :64], silence[0, :10])
    assert bool((made.context_latents[..., 64:] == 1).all()) and bool((made.attention_mask == 1).all())
    assert not torch.equal(made.context_latents[0], stored["context_latents"][:10])


def test_silence_that_is_too_short_is_repeated():
    silence = torch.randn(1, 4, 64)
    assert torch.equal(silent_context(silence, 10)[:, 8:, :64], silence[:, :2])


def test_silence_of_another_form_is_refused(tmp_path):
    torch.save(torch.zeros(1, 7, 3), tmp_path / "silence_latent.pt")
    with pytest.raises(Refusal, match=r"shape \[1, 7, 3\], expected \[1, 64, N\]"):
        read_silence(tmp_path)
    (tmp_path / "silence_latent.pt").write_bytes(b"no tensor")
    with pytest.raises(Refusal, match="cannot be read"):
        read_silence(tmp_path)


def test_turbo_has_no_guidance():
    assert (guidance_for("turbo", None), guidance_for("base", None), guidance_for("sft", 3.0)) == (1.0, 7.0, 3.0)
