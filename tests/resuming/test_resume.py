"""Training 6 epochs, and training 3, stopping and resuming for 3, give the same adapter bit for bit on a CPU."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import SETTINGS, known_fields
from safetensors.torch import load_file

from sidestep_plugin import Refusal, attach, hookimpl
from sidestep_plugin.engine import shapes
from sidestep_plugin.resuming.checkpoints import newest_checkpoint, read_checkpoint
from sidestep_plugin.resuming.overwriting import Overwriting
from sidestep_plugin.resuming.plugin import acestep_adapter_saved
from sidestep_plugin.songs.dataset import songs_in
from sidestep_plugin.songs.fingerprint import fingerprint

KINDS = ("lora", "lokr")


class Stopper:
    """Presses upstream's stop button after some training steps of a run."""

    def __init__(self, state, steps):
        self.state, self.left = state, steps

    @hookimpl
    def acestep_step_finished(self, step):
        if step.training and self.left is not None:
            self.left -= 1
            self.state["should_stop"] = self.left <= 0


@pytest.fixture
def job(checkout, trainer, load, tmp_path, require_kind):
    """One training: ``job("out", "lora", epochs=6, stop_at=7)`` returns what was said, and the adapter's tensors."""

    def run(
        name,
        kind="lora",
        *,
        model="base",
        plugins=("sidestep",),
        resume_from=None,
        stop_at=None,
        options=None,
        songs=checkout.tensors,
        listen=lambda state: True,
        **settings,
    ):
        require_kind(kind)
        output = tmp_path / name
        config = getattr(trainer, shapes.CONFIG_CLASS[kind])
        adapter = config(r=4, alpha=8) if kind == "lora" else config(linear_dim=4, linear_alpha=8)
        training = SETTINGS | {"max_epochs": 6, "save_every_n_epochs": 3, "warmup_steps": 2} | settings
        training["output_dir"] = str(output)
        state = {"should_stop": False}
        stopper = Stopper(state, stop_at)
        attached = (
            nullcontext()
            if plugins is None
            else attach(
                trainer, plugins=plugins, options=options, announce=said.append, extra_plugins={"stopper": stopper}
            )
        )
        said.clear()
        with attached:
            torch.manual_seed(7)  # the first versions of upstream do not seed
            made = getattr(trainer, shapes.TRAINER_CLASS[kind])(
                load(model), adapter, known_fields(trainer.TrainingConfig, training)
            )
            more = {} if resume_from is None else {"resume_from": str(resume_from)}
            for *_, text in made.train_from_preprocessed(str(songs), state, **more):
                said.append(text)
                if not listen(state):
                    break
        weights = [*output.glob("final/**/*.safetensors")]
        assert weights or stop_at is not None, said
        return load_file(weights[0]) if weights else {}

    said = []
    run.said = said
    run.output = tmp_path
    return run


def same(one, other):
    assert one and one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def checkpoint_of(folder, epoch):
    (found,) = [place for place in (folder / "checkpoints").iterdir() if place.name.split("_")[1] == str(epoch)]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["base", "turbo"])
def test_three_and_three_epochs_are_six(job, kind, model):
    whole = job("whole", kind, model=model)
    resumed = job("resumed", kind, model=model, resume_from=checkpoint_of(job.output / "whole", 3))
    assert same(whole, resumed)
    (said,) = [line for line in job.said if line.startswith("✅ Resumed")]
    count = len(load_file(next((job.output / "whole" / "final").glob("**/*.safetensors"))))
    assert f"{count} of {count} tensors" in said
    assert same(
        load_file(next(checkpoint_of(job.output / "whole", 6).glob("**/*.safetensors"))),
        load_file(next(checkpoint_of(job.output / "resumed", 6).glob("**/*.safetensors"))),
    )
    # What comes out of upstream's loop is the same, too: the mean loss is in the name.
    assert checkpoint_of(job.output / "whole", 6).name == checkpoint_of(job.output / "resumed", 6).name


def test_the_same_resume_by_upstream_alone_gives_another_adapter(job, trainer):
    """So that the test above can fail: upstream restores the optimizer, no weights, and says that it has resumed."""
    if "resume_from" not in inspect.signature(trainer.LoRATrainer.train_from_preprocessed).parameters:
        pytest.skip("this checkout's trainer cannot resume")
    pytest.importorskip("lightning", reason="without Lightning upstream ignores resume_from")
    whole = job("whole", plugins=None)
    checkpoint = checkpoint_of(job.output / "whole", 3)
    own_guard = getattr(sys.modules.get("acestep.training.lora_utils"), "_safe_checkpoint_dir", None)
    if own_guard is not None and own_guard(str(checkpoint)) is None:
        pytest.skip("this version takes no checkpoint whose path is absolute")
    resumed = job("resumed", plugins=None, resume_from=checkpoint)
    assert any("Resumed from epoch 3" in line for line in job.said)
    assert not same(whole, resumed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 7, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (3, 4, 17))])
def test_a_training_that_was_stopped_anywhere_goes_on_as_if_it_had_not(job, kind, steps):
    """Also between two optimizer steps: gradients that waited for the next one are there again."""
    settings = {"gradient_accumulation_steps": 2, "save_every_n_epochs": 50}
    whole = job("whole", kind, **settings)
    assert job("stopped", kind, stop_at=steps, **settings) == {}
    assert f"after {steps} training step{'' if steps == 1 else 's'}" in job.said[-1]
    interrupted = job.output / "stopped" / "interrupted"
    assert same(whole, job("stopped", kind, resume_from=interrupted, **settings))


@pytest.mark.slow
def test_a_training_that_is_stopped_again_and_again(job):
    whole = job("whole")
    job("stopped", stop_at=2)
    for steps in (3, 1, 4):
        job("stopped", stop_at=steps, resume_from=job.output / "stopped" / "interrupted")
    assert same(whole, job("stopped", resume_from=job.output / "stopped" / "interrupted"))


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_listens_may_break_off(job, kind):
    """As the app's server does after its stop button: it does not wait for upstream to notice."""
    whole = job("whole", kind)
    job("stopped", kind, stop_at=5, listen=lambda state: not state["should_stop"])
    assert "after 5 training steps" in job.said[-1]
    assert same(whole, job("stopped", kind, resume_from=job.output / "stopped" / "interrupted"))


def test_whoever_breaks_off_without_stopping_gets_no_checkpoint(job):
    job("left", stop_at=50, listen=lambda state: False)
    assert not (job.output / "left" / "interrupted").exists()


def test_a_checkpoint_outside_of_the_folders_that_the_app_may_read(job, trainer):
    if not hasattr(trainer, "safe_path"):
        pytest.skip("this version has no path guard")
    with pytest.raises(AssertionError):
        job("resumed", resume_from="/usr")
    assert "is outside the folders that ACE-Step may read" in job.said[-1]


@pytest.mark.slow
def test_validation_and_the_best_checkpoint_are_what_they_would_have_been(job, trainer):
    pytest.importorskip("lightning", reason="upstream validates with Lightning only")
    if "val_split" not in inspect.signature(trainer.TrainingConfig).parameters:
        pytest.skip("this version does not validate")
    settings = {"val_split": 0.34, "batch_size": 1}
    whole = job("whole", **settings)
    job("stopped", stop_at=14, **settings)
    assert same(whole, job("stopped", resume_from=job.output / "stopped" / "interrupted", **settings))
    best = [
        load_file(next((job.output / name / "checkpoints" / "best").glob("**/*.safetensors")))
        for name in ("whole", "stopped")
    ]
    assert same(*best)
    # The best checkpoint, too, is one to go on from.
    assert same(whole, job("again", resume_from=job.output / "whole" / "checkpoints" / "best", **settings))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"persistent_workers": True}, {"persistent_workers": True, "val_split": 0.3}])
def test_songs_that_worker_processes_load(job, trainer, more):
    """They are read ahead; the order, and what is drawn beside it, has to be the same all the same.

    Workers that stay from epoch to epoch, as on the command line, have their seed drawn in the first epoch alone.
    """
    if "val_split" in more and "val_split" not in inspect.signature(trainer.TrainingConfig).parameters:
        pytest.skip("this version of ACE-Step has no val_split")
    settings = {"num_workers": 1, "prefetch_factor": 2, "max_epochs": 3, "batch_size": 1} | more
    whole = job("whole", **settings)
    job("stopped", stop_at=8, **settings)
    assert same(whole, job("stopped", resume_from=job.output / "stopped" / "interrupted", **settings))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_without_lightning(job, trainer, monkeypatch, kind):
    monkeypatch.setattr(trainer, "LIGHTNING_AVAILABLE", False)
    try:
        job("alone", kind, plugins=None)
    except AssertionError:
        pytest.skip("this version of upstream fails without Lightning")
    whole = job("whole", kind)
    assert same(whole, job("resumed", kind, resume_from=checkpoint_of(job.output / "whole", 3)))
    job("stopped", kind, stop_at=8)
    assert same(whole, job("stopped", kind, resume_from=job.output / "stopped" / "interrupted"))


def test_a_finished_training_can_be_made_longer(job):
    job("short", max_epochs=3)
    longer = job("longer", max_epochs=6, resume_from=checkpoint_of(job.output / "short", 3))
    assert not same(longer, load_file(next((job.output / "short" / "final").glob("**/*.safetensors"))))
    assert any("epochs (was 3, now 6)" in line for line in job.said)
    assert "Note: the learning rate follows the settings of this run, not those of the checkpoint" in job.said


def test_a_smaller_batch_after_the_memory_was_not_enough(job):
    """The epoch that had begun begins anew: its place in the old batches means nothing in the new ones."""
    job("stopped", stop_at=4, max_epochs=3)
    final = job("stopped", batch_size=1, max_epochs=3, resume_from=job.output / "stopped" / "interrupted")
    assert final
    said = "\n".join(job.said)
    assert "batch size (was 2, now 1)" in said and "epoch 2 starts over" in said
    assert "of the adapter, after epoch 1, 6 training steps done" in said
    assert "Epoch 2/3" in said and "Epoch 1/3" not in said


def test_another_weight_decay_is_used_and_not_only_told(job):
    job("stopped", stop_at=7)
    shutil.copytree(job.output / "stopped", job.output / "other")
    kept = job("stopped", resume_from=job.output / "stopped" / "interrupted")
    changed = job("other", weight_decay=50.0, resume_from=job.output / "other" / "interrupted")
    assert any("weight decay (was 0.01, now 50.0)" in line for line in job.said)
    assert not same(kept, changed)


def test_songs_that_the_manifest_names_are_the_songs(job, checkout, tmp_path):
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")

    def chosen(*numbers):
        names = [f"song_{number:02}.pt" for number in numbers]
        (songs / "manifest.json").write_text(json.dumps({"samples": names}), encoding="utf-8")

    assert [file.name for file in songs_in(songs)] == [f"song_{number:02}.pt" for number in range(1, 7)]
    one = fingerprint(songs)
    chosen(1, 2, 3)
    assert len(songs_in(songs)) == 3
    two = fingerprint(songs)
    chosen(4, 5, 6)
    assert len({one, two, fingerprint(songs)}) == 3


def test_another_accumulation_leaves_waiting_gradients_out(job):
    job("stopped", stop_at=3, gradient_accumulation_steps=2)
    assert job("stopped", gradient_accumulation_steps=3, resume_from=job.output / "stopped" / "interrupted")
    job("stopped", stop_at=1, gradient_accumulation_steps=2)
    assert job("stopped", gradient_accumulation_steps=3, resume_from=job.output / "stopped" / "interrupted")
    assert any("waited for the next optimizer step are left out" in line for line in job.said)


def test_resuming_at_the_very_end_saves_the_adapter_as_it_was(job):
    whole = job("whole")
    assert same(whole, job("again", resume_from=checkpoint_of(job.output / "whole", 6)))


def test_a_checkpoint_by_upstream_alone_gives_its_weights(job):
    if not hasattr(pytest.importorskip("acestep.training.trainer"), "save_training_checkpoint"):
        pytest.skip("this version saves no optimizer")
    whole = job("whole", plugins=None)
    folder = checkpoint_of(job.output / "whole", 6)
    if not (folder / "training_state.pt").is_file():
        pytest.skip("without Lightning upstream saves no optimizer")
    assert same(whole, job("again", resume_from=folder))
    assert any("does not say for which model" in line for line in job.said)
    assert any("has no random states" in line for line in job.said)
    job("further", max_epochs=8, resume_from=folder)


# -- what upstream does ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_songs_of_the_same_number_are_told(job, checkout, tmp_path):
    job("whole", max_epochs=3)
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    job("again", max_epochs=3, resume_from=checkpoint_of(job.output / "whole", 3), songs=songs)
    assert not any("songs have changed since the checkpoint" in line for line in job.said)
    (songs / "song_01.pt").rename(songs / "song_99.pt")
    if (songs / "manifest.json").is_file():
        (songs / "manifest.json").unlink()
    job("other", max_epochs=3, resume_from=checkpoint_of(job.output / "whole", 3), songs=songs)
    assert any("songs have changed since the checkpoint" in line for line in job.said)


def test_songs_replaced_by_others_of_the_same_names_and_sizes_are_told(job, checkout, tmp_path):
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    job("whole", max_epochs=3, songs=songs)
    file = songs / "song_01.pt"
    size, song = file.stat().st_size, torch.load(file, weights_only=True)
    song["target_latents"] += 1.0
    torch.save(song, file)
    assert file.stat().st_size == size
    job("again", max_epochs=3, resume_from=checkpoint_of(job.output / "whole", 3), songs=songs)
    assert any("songs have changed since the checkpoint" in line for line in job.said)


def test_a_checkpoint_is_of_the_songs_that_the_training_began_with(job, checkout, tmp_path):
    """Also where the folder was another one when it was saved, such as one on a disk that was away for a moment."""
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")

    def add_one(_):
        if not (songs / "song_99.pt").exists():
            (songs / "manifest.json").unlink(missing_ok=True)
            song = torch.load(songs / "song_01.pt", weights_only=True)
            song["target_latents"] += 1.0
            torch.save(song, songs / "song_99.pt")
        return True

    job("whole", max_epochs=3, songs=songs, listen=add_one)
    checkpoint = checkpoint_of(job.output / "whole", 3)
    facts = json.loads(next(checkpoint.rglob("training_config.json")).read_text(encoding="utf-8"))
    assert facts["songs"] == len(songs_in(checkout.tensors)) == len(songs_in(songs)) - 1
    job("again", max_epochs=3, resume_from=checkpoint, songs=checkout.tensors)
    assert not any("songs have changed since the checkpoint" in line for line in job.said)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_checkpoint_with_the_fingerprint_of_an_earlier_version(job, checkout, tmp_path, renamed):
    """Its songs were told by names and sizes: no false alarm, and a true one as before."""
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    job("whole", max_epochs=3, songs=songs)
    file = next(checkpoint_of(job.output / "whole", 3).rglob("resume_state.pt"))
    state = torch.load(file, weights_only=False)
    assert state["songs"].startswith("content-1:")
    found = [(song.name, song.stat().st_size) for song in songs_in(songs)]
    state["songs"] = hashlib.sha256(repr(found).encode()).hexdigest()
    torch.save(state, file)
    if renamed:
        (songs / "song_01.pt").rename(songs / "song_99.pt")
        (songs / "manifest.json").unlink(missing_ok=True)
    job("again", max_epochs=3, resume_from=checkpoint_of(job.output / "whole", 3), songs=songs)
    assert any("songs have changed since the checkpoint" in line for line in job.said) == renamed


@pytest.mark.parametrize("kind", KINDS)
def test_a_rest_that_upstream_carries_over_is_told_once(job, trainer, monkeypatch, kind):
    """Steps that accumulation does not divide: right in some versions, carried over in others, never silent."""
    calls = []
    step = trainer.AdamW.step
    monkeypatch.setattr(trainer.AdamW, "step", lambda *arguments, **more: calls.append("O") or step(*arguments, **more))
    compute = trainer.F.mse_loss
    monkeypatch.setattr(trainer.F, "mse_loss", lambda *arguments: calls.append("s") or compute(*arguments))
    job("whole", kind, gradient_accumulation_steps=2, log_every_n_steps=100)
    told = [line for line in job.said if "not divisible by --gradient-accumulation 2" in line]
    right = "".join(calls) == "ssOsO" * 6
    assert len(told) == (0 if right else 1), job.said


def test_gradients_that_are_not_finite_at_the_end_of_an_epoch(job, trainer, monkeypatch):
    """Some versions then divide by zero, others cannot clip them. What was trained is saved, with what to change."""
    compute, calls = trainer.F.mse_loss, []

    def spoilt(*arguments):
        calls.append(1)
        return compute(*arguments) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(trainer.F, "mse_loss", spoilt)
    settings = {"gradient_accumulation_steps": 2, "save_every_n_epochs": 50}
    try:
        job("spoilt", **settings)
    except AssertionError:
        assert "division by zero" in job.said[-1] or "it cannot be clipped" in job.said[-1], job.said
        assert "The gradients were NaN or infinite. Lower --learning-rate" in job.said[-1]
        assert any("Saved as it was after 6 training steps" in line for line in job.said)
        monkeypatch.undo()
        job("spoilt", resume_from=job.output / "spoilt" / "interrupted", **settings)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_what_a_failed_backward_pass_left_is_not_resumed_from(job, trainer, kind, monkeypatch):
    """Some tensors have their gradient of the failed step by then, others have not."""
    compute, calls = trainer.F.mse_loss, []

    class OutOfMemory(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("out of memory in the backward pass")

    def failing(*arguments):
        calls.append(1)
        loss = compute(*arguments)
        return OutOfMemory.apply(loss) if len(calls) == 5 else loss

    settings = {"gradient_accumulation_steps": 3, "save_every_n_epochs": 50}
    with monkeypatch.context() as patched:
        patched.setattr(trainer.F, "mse_loss", failing)
        with pytest.raises(AssertionError):
            job("broken", kind, **settings)
    assert "out of memory in the backward pass" in job.said[-1]
    interrupted = job.output / "broken" / "interrupted"
    point = read_checkpoint(interrupted).point
    assert point.steps_done == 5 and point.gradients is None
    job("broken", kind, resume_from=interrupted, **settings)


def test_a_checkpoint_that_upstream_names_zero_gets_its_loss_told(job):
    job("whole", max_epochs=3)
    folder = checkpoint_of(job.output / "whole", 3)
    said = acestep_adapter_saved(
        run=SimpleNamespace(state={"sidestep.songs_at_the_start": ""}, keeps={}),
        saved=SimpleNamespace(
            folder=folder,
            resume_point=read_checkpoint(folder).point,
            destination=folder.with_name("epoch_3_loss_0.0000") / "adapter" / "adapter_model.safetensors",
        ),
    )
    mean = float(read_checkpoint(folder).point.losses[-3:].mean())
    assert said == [f"Note: ACE-Step names this checkpoint loss_0.0000; the mean loss of its epoch was {mean:.4f}."]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "sft"}, "model (was acestep-v15-base, now acestep-v15-sft)"),
        ({"max_epochs": 2}, "saved later than that (after epoch 3), and --epochs is 2"),
    ],
)
def test_another_training_is_refused(job, change, says):
    job("whole", max_epochs=3)
    with pytest.raises(AssertionError):
        job("resumed", resume_from=checkpoint_of(job.output / "whole", 3), **change)
    assert says in job.said[-1]
    assert not (job.output / "resumed" / "final").exists()


def test_a_lora_does_not_go_on_as_a_lokr(job):
    job("whole", "lokr", max_epochs=3)
    with pytest.raises(AssertionError):
        job("resumed", "lora", resume_from=checkpoint_of(job.output / "whole", 3))
    assert "adapter type (was lokr, now lora)" in job.said[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_another_shape_are_refused_before_the_first_step(job, kind):
    """Even where nothing says for what the checkpoint was made."""
    job("whole", kind, max_epochs=3)
    folder = checkpoint_of(job.output / "whole", 3)
    (weights,) = folder.glob("**/*.safetensors")
    tensors = load_file(weights)
    del tensors[min(tensors)]
    (weights.parent / "training_config.json").unlink()
    (folder / "resume_state.pt").unlink()
    from safetensors.torch import save_file

    save_file(tensors, weights)
    if not (folder / "training_state.pt").is_file():
        pytest.skip("this version saves no optimizer")
    with pytest.raises(AssertionError):
        job("resumed", kind, resume_from=folder)
    assert "The checkpoint does not fit this adapter" in job.said[-1] and "1 are missing" in job.said[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_cut_off_or_missing_is_refused(job, kind, tmp_path):
    job("whole", kind, max_epochs=3)
    folder = checkpoint_of(job.output / "whole", 3)
    needed = [file for file in folder.rglob("*") if file.suffix in (".safetensors", ".pt")]
    assert len(needed) >= 2
    for number, file in enumerate(needed):
        for damage in ("missing", "cut off", "empty", "another byte"):
            if damage == "missing" and file.name == "resume_state.pt":
                continue  # then it looks like one by upstream alone
            copy = tmp_path / f"copy-{number}-{damage}"
            shutil.copytree(folder, copy)
            damaged = copy / file.relative_to(folder)
            content = damaged.read_bytes()
            if damage == "missing":
                damaged.unlink()
            elif damage == "another byte":
                place = len(content) - 9  # not in a header's texts, into which people write
                damaged.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
                if file.name == "resume_state.pt":
                    continue  # the zip format's own matter
            else:
                damaged.write_bytes(content[: len(content) // 2 if damage == "cut off" else 0])
            with pytest.raises(Refusal, match=r"not complete|is not a checkpoint"):
                read_checkpoint(copy)


def test_a_state_that_does_not_hang_together_is_refused(job):
    job("whole", "lokr", max_epochs=3)
    folder = checkpoint_of(job.output / "whole", 3)
    state = torch.load(folder / "resume_state.pt", weights_only=True)
    for broken in (
        {"losses": state["losses"][:-1]},
        {"losses": state["losses"].tolist()},
        {"losses": state["losses"].long()},
        {"epochs": "three"},
        {"epochs": float("inf")},
        {"epochs": float("nan")},
        {"steps": float("-inf")},
        {"save_number": float("inf")},
        {"save_number": "2"},
        {"steps": None},
        {"steps_per_epoch": "3"},
        {"schema_version": 99},
        {"schema_version": "1"},
        {"random": {}},
        {"random": {"torch": torch.zeros(3, dtype=torch.uint8)}},
        {"optimizer": {"state": {}}},
        {"gradients": {}},
    ):
        torch.save(state | broken, folder / "resume_state.pt")
        with pytest.raises(Refusal):
            read_checkpoint(folder)
    torch.save(state | {"parameters": state["parameters"][:-1]}, folder / "resume_state.pt")
    with pytest.raises(AssertionError):
        job("resumed", "lokr", max_epochs=4, resume_from=folder)
    assert "other tensors were trained in it" in "".join(job.said)


def test_latest_is_the_newest_that_is_whole(job):
    job("whole")
    output = job.output / "whole"
    newest = checkpoint_of(output, 6)
    assert newest_checkpoint(output) == (newest, [])
    (newest / "resume_state.pt").write_bytes(b"PK")
    folder, notes = newest_checkpoint(output)
    assert folder == checkpoint_of(output, 3)
    assert len(notes) == 1 and "skipped" in notes[0] and newest.name in notes[0]
    # Another training that lies in this folder is another training.
    shutil.copytree(output, output / "inner")
    shutil.rmtree(output / "checkpoints")
    with pytest.raises(Refusal, match="No checkpoint to resume from"):
        newest_checkpoint(output)


def test_the_checkpoints_of_a_training_that_was_replaced_are_not_its_successors(job):
    job("whole")
    Overwriting(job.output / "whole").begin()
    with pytest.raises(Refusal, match="of the training that --overwrite replaced"):
        newest_checkpoint(job.output / "whole")
    job("whole", max_epochs=3)
    folder, notes = newest_checkpoint(job.output / "whole")
    assert read_checkpoint(folder).point.epochs == 3 and not notes


def test_what_is_not_a_checkpoint_says_so(job, tmp_path):
    job("whole", max_epochs=3)
    for folder, says in (
        (tmp_path / "nowhere", "No checkpoint folder"),
        (job.output / "whole", "It holds checkpoints: --resume-from latest"),
        (job.output / "whole" / "final", "no training can be resumed from it"),
    ):
        with pytest.raises(Refusal, match=says):
            read_checkpoint(folder)
    folder = checkpoint_of(job.output / "whole", 3)
    if (folder / "adapter").is_dir():
        assert read_checkpoint(folder / "adapter").folder == folder
