"""One training as one process of several, for the tests: ``python job.py FOLDER`` trains what FOLDER/job.json says.

What a process saw is left in ``FOLDER/seen-RANK.pt``. Without RANK it is the only process.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import types
from contextlib import contextmanager, nullcontext
from pathlib import Path

SETTINGS = {
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_epochs": 3,
    "save_every_n_epochs": 1,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "num_workers": 0,
    "pin_memory": False,
    "persistent_workers": False,
    "seed": 7,
    "log_every_n_steps": 1,
}


def digest(tensor):
    """Bits of a tensor as a text."""
    return hashlib.sha256(tensor.detach().contiguous().cpu().numpy().tobytes()).hexdigest()[:16]


class Noting:
    """A plugin that notes what each step got. With `inject`, noise and t depend on song and epoch."""

    def __init__(self, job):
        self.job = job
        self.songs, self.t, self.dropped, self.began, self.steps = [], [], [], [], 0
        self.ended, self.epochs, self.validated = 0, [], []

    def acestep_prepare_batch(self, step, batch):
        import torch

        song = digest(batch["target_latents"])
        if not step.training:
            return
        self.began.append(digest(torch.get_rng_state()))
        self.songs.append(song)
        if self.job.get("inject"):
            epoch = step.run.steps // (self.job["songs"] // step.run.ranks.world_size)
            torch.manual_seed(int(song[:8], 16) + epoch)

    def acestep_step_finished(self, step):
        from sidestep_plugin.run import ROWS_WITHOUT_CONDITION

        if not step.training:
            self.validated.append(float(step.loss))
            return
        self.t.append(step.t.tolist())
        self.dropped += [int(part.sum()) for part in step.run.state.get(ROWS_WITHOUT_CONDITION, [])[-1:]]
        self.steps += 1
        rank = step.run.ranks.rank
        if self.job.get("stop") == [rank, self.steps]:
            self.state["should_stop"] = self.state["interrupted"] = True
        if self.job.get("fail") == [rank, self.steps]:
            raise RuntimeError("made to fail")
        if self.job.get("kill") == [rank, self.steps]:
            os.kill(os.getpid(), 9)

    def acestep_epoch_finished(self, run, epoch, loss):
        self.epochs.append(loss)

    def acestep_run_ended(self, run):
        self.ended += 1


def hooked(plugin):
    from sidestep_plugin import hookimpl

    for name in dir(type(plugin)):
        if name.startswith("acestep_"):
            hookimpl(getattr(type(plugin), name))
    return plugin


def watched_engine(trainer, seen):
    """Note the gradients after every backward pass."""
    own = trainer.Fabric

    class Watched(own):
        def backward(self, *args, **kwargs):
            result = super().backward(*args, **kwargs)
            weights = [weight for group in seen["optimizer"]().param_groups for weight in group["params"]]
            seen["gradients"].append([digest(weight.grad) for weight in weights if weight.grad is not None])
            return result

        def setup(self, module, *optimizers, **kwargs):
            seen["optimizer"] = lambda: optimizers[0]
            return super().setup(module, *optimizers, **kwargs)

    Watched.__module__ = own.__module__
    return own, Watched


def in_the_order_of_several(trainer):
    """Let one process read the songs in the order in which several take turns."""
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler

    own = trainer.PreprocessedDataModule.train_dataloader

    def ordered(self):
        made = own(self)
        made.dataset.valid_paths.sort()
        sampler = DistributedSampler(made.dataset, num_replicas=1, rank=0, seed=SETTINGS["seed"])
        return DataLoader(made.dataset, made.batch_size, sampler=sampler, collate_fn=made.collate_fn)

    trainer.PreprocessedDataModule.train_dataloader = ordered
    return own


@contextmanager
def no_room_for_best():
    """Let the disk be full when ``best`` is to be saved."""
    from sidestep_plugin.engine.wrappers import saving

    staged = saving.staged

    @contextmanager
    def failing(folder):
        if folder.name == "best":
            raise OSError(28, "No space left on device")
        with staged(folder) as stage:
            yield stage

    saving.staged = failing
    try:
        yield
    finally:
        saving.staged = staged


def train(trainer, job, folder):
    """Train | returns what was seen."""
    import torch
    from conftest import known_fields

    from sidestep_plugin import attach
    from sidestep_plugin.engine import shapes
    from sidestep_plugin.engine.models import find_model, load_model
    from sidestep_plugin.ranks import ranks

    kind = job.get("kind", "lora")
    handler = load_model(find_model(job["model"], Path(job["checkpoints"])), torch.device("cpu"))
    torch.set_num_threads(1)
    config_class = getattr(trainer, shapes.CONFIG_CLASS[kind])
    dropout = job.get("dropout", 0.0)
    adapter = (
        known_fields(config_class, {"r": 4, "alpha": 8, "dropout": dropout})
        if kind == "lora"
        else known_fields(config_class, {"linear_dim": 4, "linear_alpha": 8})
    )
    output = folder / "output"
    settings = SETTINGS | {"output_dir": str(output)} | job.get("settings", {})
    seen = {"gradients": [], "said": [], "messages": []}
    noting = hooked(Noting(job))
    own_engine, trainer.Fabric = watched_engine(trainer, seen)
    own_loader = in_the_order_of_several(trainer) if job.get("ordered") and not ranks().several else None
    try:
        with (
            no_room_for_best() if job.get("no_room") else nullcontext(),
            attach(
                trainer,
                plugins=job.get("plugins", ["sidestep"]),
                options=job.get("options", {}),
                extra_plugins={"noting": noting},
                allowed_folders=[Path(job["tensors"]), folder],
                announce=seen["said"].append,
            ),
        ):
            torch.manual_seed(7)
            made = getattr(trainer, shapes.TRAINER_CLASS[kind])(
                handler, adapter, known_fields(trainer.TrainingConfig, settings)
            )
            state = noting.state = {"should_stop": False}
            more = {}
            if job.get("resume_from"):
                place = Path(job["resume_from"])
                more["resume_from"] = str(next(place.parent.glob(place.name)))
            for _, _, text in made.train_from_preprocessed(job["tensors"], state, **more):
                seen["messages"].append(text)
                if text.startswith("❌"):
                    print(text, file=sys.stderr, flush=True)
                    if noting.steps:  # the other process waits for this one's gradients
                        os._exit(1)
        weights = {
            name: weight.detach().clone()
            for name, weight in made.module.named_parameters()
            if weight.requires_grad
        } if made.module is not None else {}  # fmt: skip
    finally:
        trainer.Fabric = own_engine
        if own_loader is not None:
            trainer.PreprocessedDataModule.train_dataloader = own_loader
    seen.pop("optimizer", None)
    return seen | vars(noting) | {
        "weights": sorted((digest(weight), tuple(weight.shape)) for weight in weights.values()),
        "losses": [] if made.module is None else list(made.module.training_losses),
        "random": torch.get_rng_state(),
    }  # fmt: skip


def main(folder):
    import torch

    from sidestep_plugin.engine.checkout import import_trainer

    torch.set_num_threads(1)
    jobs = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    if jobs[0].get("real"):
        import transformers  # noqa: F401 - it looks for torchaudio, and should not find the one below

        stand_in = types.ModuleType("torchaudio")
        stand_in.transforms = types.ModuleType("torchaudio.transforms")
        sys.modules.setdefault("torchaudio", stand_in)
    os.chdir(folder)
    trainer = import_trainer(Path(jobs[0]["root"]))
    for number, job in enumerate(jobs):
        place = folder / str(number)
        seen = train(trainer, job, place)
        place.mkdir(exist_ok=True)
        torch.save(seen, place / f"seen-{os.environ.get('RANK', 'alone')}.pt")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(Path(sys.argv[1]))
