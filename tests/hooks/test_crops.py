"""Crops: every row has its own window within its song, cut alike in all entries, in training only."""

from __future__ import annotations

import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from sidestep_plugin.hooks import crops
from whole_plugin import prepared, resolved, started

from sidestep_plugin import PluginError, Refusal, attach, hookimpl
from sidestep_plugin.adapters.inspection import inspect_adapter
from sidestep_plugin.adapters.layers import read_adapter
from sidestep_plugin.run import Run, Step
from sidestep_plugin.validation.held_out import choose

WINDOW = 20  # frames, 0.8 s; the miniature's songs have 16 to 32


def a_step(name="acestep-v15-turbo", dtype=torch.float32, training=True, **options):
    model = torch.nn.Module()
    model.config = SimpleNamespace(_name_or_path=name, timestep_mu=-0.4, timestep_sigma=1.0)
    model.null_condition_emb = torch.nn.Parameter(torch.full((1, 1, 6), 5.0))
    run = Run("lora", None, None, resolved(**options), None, weakref.ref(model))
    started(run)
    return Step(run, SimpleNamespace(model=model), training, torch.device("cpu"), dtype)


def a_batch(lengths=(100, 100), mask_type=torch.float32):
    """Songs whose every value is the number of its frame, so that what was cut can be seen; -1 is padding."""
    frames = max(lengths)
    numbers = torch.arange(frames).expand(len(lengths), -1)
    mask = numbers < torch.tensor(lengths).unsqueeze(1)
    shown = torch.where(mask, numbers, -1).float()
    return {
        "target_latents": shown.unsqueeze(-1).repeat(1, 1, 64),
        "attention_mask": mask.to(mask_type),
        "encoder_hidden_states": torch.ones(len(lengths), 3, 6),
        "encoder_attention_mask": torch.ones(len(lengths), 3),
        "context_latents": shown.unsqueeze(-1).repeat(1, 1, 128),
        "metadata": [{} for _ in lengths],
    }


def starts(answer):
    return answer["target_latents"][:, 0, 0].tolist()


@pytest.mark.parametrize("mask_type", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_all_entries_are_cut_alike(mask_type):
    batch = a_batch((100, 60), mask_type)
    answer = prepared(step=a_step(crop_seconds=0.8), batch=batch)
    assert set(answer) == {"target_latents", "attention_mask", "context_latents"}
    for row in range(2):
        first = int(starts(answer)[row])
        for name, tensor in answer.items():
            assert tensor.dtype == batch[name].dtype
            assert torch.equal(tensor[row], batch[name][row, first : first + WINDOW]), name


def test_a_window_lies_within_its_own_song():
    """Every place in it is as likely as any other, the last one too; padding is never reached."""
    torch.manual_seed(1)
    step, lengths = a_step(crop_seconds=0.8), (100, 23, 20, 12)
    drawn = torch.tensor([starts(prepared(step=step, batch=a_batch(lengths))) for _ in range(400)])
    assert drawn[:, 1].unique().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert drawn[:, 0].min() < 5 and drawn[:, 0].max() > 75 and drawn[:, 0].max() <= 80
    assert torch.bincount(drawn[:, 1].long()).min() > 60, "about 100 of 400 each"
    assert not drawn[:, 2:].any(), "as long as the window, or shorter: whole"
    answer = prepared(step=step, batch=a_batch(lengths))
    assert answer["attention_mask"].sum(1).tolist() == [20, 20, 20, 12]


def test_rows_have_windows_of_their_own_and_new_ones_every_time():
    step, batch = a_step(crop_seconds=0.8), a_batch((100,) * 8)
    one, other = (starts(prepared(step=step, batch=batch)) for _ in range(2))
    assert len(set(one)) > 3 and one != other


def test_a_mask_with_holes_counts_up_to_its_last_frame():
    batch = a_batch((100, 60))
    batch["attention_mask"][:, :30] = 0
    step = a_step(crop_seconds=0.8)
    for _ in range(50):
        assert max(starts(prepared(step=step, batch=batch))[1:]) <= 40


@pytest.mark.parametrize(
    "options, more, frames",
    [({}, {}, 100), ({"crop_seconds": 0.8}, {"training": False}, 100), ({"crop_seconds": 9}, {}, 100)],
    ids=["off", "validation", "nothing longer"],
)
def test_whole_songs_draw_no_random_number(options, more, frames):
    state = torch.get_rng_state()
    assert prepared(step=a_step(**more, **options), batch=a_batch((frames, 60))) is None
    assert torch.equal(state, torch.get_rng_state())


def test_the_order_is_window_then_hidden_nan_then_dropout():
    """The window is drawn first, NaN behind the mask of what is left is zeroed, conditions are dropped last."""
    step = a_step("acestep-v15-base", crop_seconds=0.8, mask_nan=True, cfg_ratio=1.0)
    batch = a_batch((100, 12))
    batch["target_latents"][1, 15] = float("nan")
    torch.manual_seed(3)
    answer = prepared(step=step, batch=batch)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    first = int(torch.rand(2)[0] * 81)
    torch.rand(2)
    assert starts(answer)[0] == first and torch.equal(after, torch.get_rng_state())
    assert answer["target_latents"].isfinite().all() and answer["target_latents"].shape[1] == WINDOW
    assert (answer["encoder_hidden_states"] == 5.0).all()


@pytest.mark.parametrize("value", [0, -1, 0.1, float("nan"), float("inf"), "long", True])
def test_a_window_that_is_none_is_refused(value):
    with pytest.raises(Refusal, match="Option crop_seconds"):
        resolved(crop_seconds=value)


# -- whole trainings -------------------------------------------------------------------------------------------------


class Lengths:
    """Notes how long the songs are that upstream's step was given, in training and in validation."""

    def __init__(self):
        self.seen = {True: [], False: []}

    @hookimpl
    def acestep_prepare_batch(self, step, batch):
        self.seen[step.training].append(batch["target_latents"].shape[1])


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_training_with_crops_resumes_bit_for_bit(train, kind, capsys):
    lengths = Lengths()
    settings = {"max_epochs": 4, "options": {"crop_seconds": 0.8}}
    whole = train("base", kind, extra_plugins={"lengths": lengths}, **settings)
    said = capsys.readouterr().out
    assert "Crops: a random window of 0.8 s, a new one each time a song is seen (3 of 6 songs are longer)" in said
    assert "lyrics" in said
    assert lengths.seen[True] and max(lengths.seen[True]) == WINDOW
    checkpoint = sorted((whole.output / "checkpoints").glob("epoch_2*"))[0]
    rest = train("base", kind, resume_from=str(checkpoint), **settings)
    assert whole.tensors.keys() == rest.tensors.keys()
    assert all(torch.equal(whole.tensors[key], rest.tensors[key]) for key in whole.tensors)
    weights = next(whole.output.glob("final/**/*.safetensors"))
    assert inspect_adapter(weights).facts["crop_seconds"] == 0.8
    assert read_adapter(weights).file.metadata["sidestep.crop_seconds"] == "0.8"
    capsys.readouterr()
    train("base", kind, resume_from=str(checkpoint), max_epochs=3)
    assert "changed since the checkpoint: crops in seconds (was 0.8, now whole songs)" in capsys.readouterr().out


def test_a_window_that_is_longer_than_every_song_changes_nothing(train, equal_bits, capsys):
    plain = train("base", max_epochs=1)
    capsys.readouterr()
    assert equal_bits(plain, train("base", max_epochs=1, options={"crop_seconds": 60}))
    assert "Note: --crop-seconds 60 changes nothing, the longest song has 1.3 s." in capsys.readouterr().out


def test_validation_sees_whole_songs(trainer, train, checkout):
    lengths = Lengths()
    done = train("base", max_epochs=2, val_split=0.5, extra_plugins={"z": lengths}, options={"crop_seconds": 0.8})
    assert done.losses, done.messages
    assert max(lengths.seen[True]) <= WINDOW
    if lengths.seen[False]:
        assert max(lengths.seen[False]) > WINDOW


# -- the contract of acestep_prepare_batch ---------------------------------------------------------------------------

ALL = ("target_latents", "attention_mask", "context_latents")


class Shortening:
    def __init__(self, **lengths):
        self.lengths = lengths

    @hookimpl
    def acestep_prepare_batch(self, batch):
        return {name: batch[name][:, :length] for name, length in self.lengths.items()}


@pytest.fixture
def stepped(trainer, load, module_for, batch_of):
    def run(plugin):
        handler = load("base")
        module = module_for(handler)
        with attach(trainer, plugins=(), extra_plugins={"tester": plugin}):
            return module.training_step(batch_of(handler.model, 2))

    return run


def test_a_plugin_may_shorten_all_entries_at_once(stepped):
    assert stepped(Shortening(**dict.fromkeys(ALL, 10))).isfinite()


@pytest.mark.parametrize(
    "lengths, named",
    [
        ({"target_latents": 10}, "target_latents"),
        ({"attention_mask": 10}, "attention_mask"),
        ({"target_latents": 10, "attention_mask": 10}, "target_latents"),
        ({"target_latents": 10, "attention_mask": 10, "context_latents": 11}, "target_latents"),
        (dict.fromkeys(ALL, 0), "target_latents"),
        ({"encoder_hidden_states": 3}, "encoder_hidden_states"),
        ({**dict.fromkeys(ALL, 10), "encoder_attention_mask": 3}, "encoder_attention_mask"),
    ],
)
def test_entries_that_do_not_belong_together_stop_the_step(stepped, lengths, named):
    with pytest.raises(PluginError, match=f"'tester' returned '{named}' as .*expected a tensor of shape"):
        stepped(Shortening(**lengths))


def test_a_song_cannot_be_made_longer(stepped):
    class Longer:
        @hookimpl
        def acestep_prepare_batch(self, batch):
            return {name: torch.cat([batch[name], batch[name]], dim=1) for name in ALL}

    with pytest.raises(PluginError, match="expected a tensor of shape"):
        stepped(Longer())


def test_the_decoders_check_compares_with_the_window(trainer, load, module_for, batch_of):
    """The first step compares what the decoder received with the batch that was prepared, window and all."""
    handler = load("base")
    module = module_for(handler)

    def meddle(_, __, kwargs):
        return (), kwargs | {"context_latents": kwargs["context_latents"].flip(1)}

    with attach(trainer, options={"crop_seconds": 0.4}, announce=print):
        assert module.training_step(batch_of(handler.model, 2)).isfinite()
    with attach(trainer, options={"crop_seconds": 0.4}, announce=print):
        handler.model.decoder.register_forward_pre_hook(meddle, with_kwargs=True)
        with pytest.raises(Refusal, match="changes context_latents"):
            module.training_step(batch_of(handler.model, 2))


def test_the_window_is_whole_frames():
    run = SimpleNamespace(options={"crop_seconds": 0.21})
    assert crops.window_of(run) == 5
    run.options["crop_seconds"] = 30
    assert crops.window_of(run) == 750


def test_songs_that_are_held_out_are_not_counted(train, checkout, tmp_path, capsys):
    """Only the song that is held out is longer than the window: nothing is cut, and nothing says so."""
    shutil.copytree(checkout.tensors, tmp_path / "songs")
    songs = sorted((tmp_path / "songs").glob("*.pt"))
    (held_out,) = choose(songs, 1)
    for file in songs:
        song = torch.load(file, weights_only=True)
        cut = {name: song[name][:20].clone() for name in ("target_latents", "attention_mask", "context_latents")}
        torch.save(song if file == held_out else song | cut, file)
    options = {"crop_seconds": 0.8, "validate": 1}
    done = train("base", max_epochs=1, options=options, tensors=tmp_path / "songs")
    assert "Note: --crop-seconds 0.8 changes nothing, the longest song has 0.8 s." in capsys.readouterr().out
    weights = next(done.output.glob("final/**/*.safetensors"))
    assert "crop_seconds" not in inspect_adapter(weights).facts
