"""Going on with a training as if it had never stopped: what is kept while one runs, and how the next one catches up.

Upstream's loops cannot begin in the middle: for a LoKr and without Lightning there is no such argument, and for a LoRA
the weights are forgotten. So a resumed run goes through upstream's own loop from its first epoch. Until it stands where
the checkpoint was made, no song is read and no model is called: each step answers with the loss that was recorded
then, and upstream's counters, curves and learning rate come out as they were. Then the weights, the optimizer's memory,
waiting gradients and the random states are put in place, and the step that follows is the one that would have followed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final

from .errors import Refusal

if TYPE_CHECKING:
    import torch

    from .run import Run

_TOGETHER: Final = 4096  # losses that are kept apart before they become one tensor
_SKIPPED: Final[dict[str, Any]] = {}
"""Stands for a batch that is not read while a run catches up."""


@dataclass(frozen=True)
class ResumePoint:
    """A place in a training, and everything that the rest of it depends on.

    Attributes:
        epochs: whole passes through the songs.
        steps: training steps of the pass after them; 0 between two passes.
        steps_per_epoch: training steps of a whole pass; None when they were not recorded.
        losses: the loss of every training step so far, shape [N]; None when they were not recorded.
        validation: the loss of every validation step so far, shape [M]; None when they were not recorded.
        random: states of the random generators here; None when they were not recorded.
        epoch_random: the same at the start of the pass that has begun, which shuffles the songs; None between two.
        gradients: of each trained tensor what waits for the next optimizer step, None when nothing does.
        optimizer, scheduler: their ``state_dict()``; None to begin with new ones.
        optimizer_class: name of the optimizer's class, "" when unknown.
        weights: the adapter's tensors under the names that they are saved with; empty when they lie in a file.
        parameters: the trained tensors themselves, where the file's are computed from them (LyCORIS multiplies its
            scalar into them); None where they are the same.
        songs: fingerprint of the songs that it was trained on, "" when unknown.
        lines: what the user should know about going on from here.
    """

    epochs: int
    steps: int
    steps_per_epoch: int | None = None
    losses: torch.Tensor | None = None
    validation: torch.Tensor | None = None
    random: Mapping[str, Any] | None = None
    epoch_random: Mapping[str, Any] | None = None
    gradients: list[torch.Tensor | None] | None = None
    optimizer: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    optimizer_class: str = ""
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parameters: list[torch.Tensor] | None = None
    songs: str = ""
    lines: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The place in words."""
        return f"in epoch {self.epochs + 1}" if self.steps else f"after epoch {self.epochs}"

    @property
    def steps_done(self) -> int | None:
        """Training steps so far, None when an epoch's number of them is not known."""
        if self.losses is not None:
            return len(self.losses)
        return None if self.steps_per_epoch is None else self.epochs * self.steps_per_epoch + self.steps


class Journal:
    """What the host keeps of one run: how far it is, its losses, its random states. No step waits for a GPU.

    Args:
        device: where the run computes.
        point: where to go on; None for a run from the start.
        accumulation: training steps of an optimizer step; 0 when unknown.

    Attributes:
        catching_up: whether upstream's loop still walks over steps that an earlier run has done.
        scheduler: upstream's learning-rate scheduler, once it is made; it knows the optimizer.
        finished: whether the finished adapter was saved.
        unsaved: whether the newest checkpoint could not be saved, which upstream does not know.
        ending: whether the run has stopped or failed, and is saved as it is.
        summed_up: whether plugins were asked for their summary.
        epoch_finished: called with run, number and mean loss after the last step of every epoch that was computed.
    """

    def __init__(self, device: torch.device, point: ResumePoint | None = None, accumulation: int = 0) -> None:
        self.device = device
        self.point = point
        self.catching_up = point is not None
        self.scheduler: Any = None
        self.finished = self.unsaved = self.ending = self.summed_up = False
        self.epoch_finished: Callable[[Run, int, float], None] | None = None
        self.lines: list[str] = []  # what there is to say since the last look
        self._losses, self._validation = _Losses(), _Losses()
        self._epochs_begun = self._in_epoch = 0
        self._steps_per_epoch: int | None = None
        self._epoch_random: dict[str, Any] | None = None
        self._walked = self._validated = self._unknown = 0
        self._checked = self._told_accumulation = False
        self._accumulation = accumulation
        self._optimizer_steps = 0

    @property
    def walking(self) -> bool:
        """Whether upstream's loop is on its way through steps that are done: what it reports is no news."""
        return self.catching_up and self._epochs_begun > 0

    @property
    def steps(self) -> int:
        """Training steps that are done, those of earlier runs among them."""
        return len(self._losses)

    def loss_by_epoch(self) -> dict[int, float]:
        """Mean loss of every whole epoch whose losses are known, those of earlier runs, too. Waits for the GPU."""
        length = self._steps_per_epoch
        if not length:
            return {}
        losses = self._losses.all().float()
        first = -(-self._unknown // length)
        return {
            number + 1: float(losses[number * length : (number + 1) * length].mean())
            for number in range(first, len(losses) // length)
        }

    @property
    def computed(self) -> int:
        """Training steps that this run has computed itself."""
        return len(self._losses) - self._walked

    # -- while it runs -----------------------------------------------------------------------------------------------

    def record(self, loss: torch.Tensor, training: bool) -> None:
        """Remember the loss of a step that was computed."""
        if training:
            self._look_at_accumulation()
        (self._losses if training else self._validation).append(loss.detach())
        self._in_epoch += training

    def epoch(self, run: Run, songs: Callable[[], Iterator[Any]], length: int) -> Generator[Any, None, None]:
        """One pass of the training loop: upstream's own batches, or placeholders for those that are done.

        Raises:
            Refusal: a resumed run has another number of steps an epoch.
        """
        skipped = 0
        if self.catching_up:
            assert self.point is not None
            self._check_length(length)
            skipped = min(length, self._left(length))
            if skipped == length:
                self._begin(length)
                yield from repeat(_SKIPPED, length)
                return
            if skipped == 0:
                self.catch_up(run)
            elif self.point.epoch_random is not None:
                set_random_states(self.point.epoch_random, self.device)
        self._begin(length)
        self._epoch_random = random_states(self.device)
        batches = songs()
        for _ in range(skipped):
            next(batches)  # the sampler's order has to be gone through
            yield _SKIPPED
        yield from batches
        if self.epoch_finished is not None and self._in_epoch:
            self.epoch_finished(run, self._epochs_begun, self._losses.mean_of_newest(self._in_epoch))

    def validation(self, run: Run, songs: Callable[[], Iterator[Any]], length: int) -> Generator[Any, None, None]:
        """One pass of the validation loop, likewise."""
        if self.catching_up:
            assert self.point is not None
            recorded = self.point.validation
            if recorded is None or self._validated + length <= len(recorded):
                yield from repeat(_SKIPPED, length)
                return
            self.catch_up(run)
        yield from songs()

    def recorded(self, run: Run, training: bool) -> torch.Tensor | None:
        """The loss of a step that an earlier run has done; None for one that has to be computed.

        Raises:
            Refusal: the checkpoint's tensors do not fit the adapter.
        """
        if not self.catching_up:
            return None
        import torch

        assert self.point is not None
        if not self._checked:
            check_weights(run, self.point)
            if self.scheduler is None:
                raise Refusal(
                    "This ACE-Step makes its optimizer otherwise than is known, so nothing can be resumed in it. "
                    "Train anew, or use upstream's main version."
                )
            self._checked = True
        if not training:
            known = self.point.validation
            loss = torch.tensor(float("inf")) if known is None else known[self._validated].clone()
            self._validated += 1
            self.record(loss, training)
            return loss
        if self._left(self._steps_per_epoch or 1) == 0:
            self.catch_up(run)
            return None
        known = self.point.losses
        loss = torch.zeros(()) if known is None else known[self._walked].clone()
        self._walked += 1
        self._unknown += known is None
        self.record(loss, training)
        # A gradient of zero for one tensor: some versions stop, and loss scaling fails, where there is none at all.
        anchor = self._trained()[0]
        return loss.nan_to_num(0.0).to(anchor.device) + 0.0 * anchor.flatten()[0].to(loss.dtype)

    def here(self, run: Run, *, failed: bool = False) -> ResumePoint | None:
        """The place where the run stands; None before its first step, and where upstream is not known well enough.

        Args:
            failed: the newest step failed on its way, so that what it left of gradients is worth nothing.
        """
        if self.scheduler is None or not len(self._losses) or self._epochs_begun == 0:
            return None
        between = self._in_epoch in (0, self._steps_per_epoch)
        begun = self._epochs_begun - (self._in_epoch != self._steps_per_epoch)
        now = random_states(self.device)
        if self._in_epoch == 0 and self._epoch_random is not None:
            now = self._epoch_random  # the next pass has been shuffled, and will be again
        gradients = [None if weight.grad is None else weight.grad.detach() for weight in self._trained()]
        return ResumePoint(
            epochs=begun,
            steps=0 if between else self._in_epoch,
            steps_per_epoch=self._steps_per_epoch,
            losses=self._losses.all(),
            validation=self._validation.all(),
            random=now,
            epoch_random=None if between else self._epoch_random,
            gradients=None if failed or all(gradient is None for gradient in gradients) else gradients,
            optimizer=self.scheduler.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            optimizer_class=type(self.scheduler.optimizer).__name__,
            parameters=[weight.detach() for weight in self._trained()] if run.adapter_type == "lokr" else None,
        )

    # -- catching up -------------------------------------------------------------------------------------------------

    def catch_up(self, run: Run) -> None:
        """Put everything in place: from here on the run computes. Raises Refusal when the tensors do not fit."""
        import torch

        point, self.catching_up = self.point, False
        assert point is not None
        for values in (point.parameters, point.gradients):
            if values is not None and [weight.shape for weight in self._trained()] != [
                weight.shape if value is None else value.shape
                for weight, value in zip(self._trained(), values, strict=False)
            ]:
                raise Refusal(
                    "The checkpoint does not fit this adapter: other tensors were trained in it than are trained here. "
                    "Resume with the settings that it was made with."
                )
        put_weights(run, point)
        if point.parameters is not None:
            with torch.no_grad():
                for weight, value in zip(self._trained(), point.parameters, strict=True):
                    weight.copy_(value)
        count = len(point.weights)
        run.steps = run.resumed_at = len(self._losses)
        self._put_optimizer(point)
        if point.random is not None:
            set_random_states(point.random, self.device)
        self.lines.append(
            f"✅ Resumed: {count} of {count} tensors of the adapter, {point.where}, "
            f"{len(self._losses)} training steps done"
        )
        self.point = None  # its tensors are not needed any more

    def _put_optimizer(self, point: ResumePoint) -> None:
        optimizer, trained = self.scheduler.optimizer, self._trained()
        for weight in trained:
            weight.grad = None
        if point.gradients is not None:
            for weight, gradient in zip(trained, point.gradients, strict=True):
                weight.grad = None if gradient is None else gradient.to(weight.device, copy=True)
        name = type(optimizer).__name__
        if point.optimizer is None or point.optimizer_class not in ("", name):
            optimizer.state.clear()
            if point.optimizer is not None:
                made_with = f"the checkpoint was made with {point.optimizer_class}, here it is {name}"
                self.lines.append(f"⚠️ The optimizer's memory begins anew: {made_with}")
            return
        groups = optimizer.state_dict()["param_groups"]
        same = point.scheduler is not None and _law(point.scheduler) == _law(self.scheduler.state_dict())
        if same:  # of the old settings the learning rate alone: weight decay and others are this run's
            for group, old in zip(groups, point.optimizer["param_groups"], strict=False):
                group |= {name: old[name] for name in ("lr", "initial_lr") if name in old}
        optimizer.load_state_dict({"state": point.optimizer["state"], "param_groups": groups})
        if same:
            self.scheduler.load_state_dict(point.scheduler)
        elif point.scheduler is not None:
            self.lines.append("⚠️ The learning rate follows the settings of this run, not those of the checkpoint")

    def _check_length(self, length: int) -> None:
        assert self.point is not None
        if self.point.steps_per_epoch not in (None, length):
            raise Refusal(
                f"The checkpoint's training took {self.point.steps_per_epoch} steps an epoch, this one takes {length}. "
                "Resume with the same songs and validation split."
            )

    def _left(self, length: int) -> int:
        """Recorded steps that the loop has not walked over yet."""
        assert self.point is not None
        done = self.point.steps_done
        return (self.point.epochs * length if done is None else done) - self._walked

    def _look_at_accumulation(self) -> None:
        """Say it once when an optimizer step came at another place of the epoch than accumulation puts it.

        Some versions of upstream forget to begin counting anew after an epoch whose length gradient accumulation does
        not divide, and go on with shorter sums of gradients. They are left as they are: mending that would train
        otherwise than upstream does, for turbo too.
        """
        done = int(self.scheduler.last_epoch) if self.scheduler is not None else 0
        if done == self._optimizer_steps:
            return
        self._optimizer_steps = done
        if self._accumulation and self._in_epoch % self._accumulation and not self._told_accumulation:
            self._told_accumulation = True
            self.lines.append(
                f"⚠️ ACE-Step carries gradients over from one epoch to the next: {self._steps_per_epoch} steps an epoch "
                f"are not divisible by --gradient-accumulation {self._accumulation}. Choose one that divides them."
            )

    def _begin(self, length: int) -> None:
        self._epochs_begun, self._in_epoch, self._steps_per_epoch = self._epochs_begun + 1, 0, length

    def _trained(self) -> list[torch.Tensor]:
        return [weight for group in self.scheduler.optimizer.param_groups for weight in group["params"]]


class _Losses:
    """Numbers that stay where they were computed: reading them one by one would wait for the GPU each time."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._newest: list[torch.Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, loss: torch.Tensor) -> None:
        self._newest.append(loss.reshape(()))
        self._count += 1
        if len(self._newest) == _TOGETHER:
            self._join()

    def mean_of_newest(self, count: int) -> float:
        """Mean of the newest ones. Waits for the GPU."""
        import torch

        if count <= len(self._newest):
            return float(torch.stack([loss.float() for loss in self._newest[-count:]]).mean())
        return float(self.all()[-count:].float().mean())

    def all(self) -> torch.Tensor:
        """All of them, on the CPU."""
        import torch

        self._join()
        return torch.cat([part.cpu() for part in self._parts]) if self._parts else torch.empty(0)

    def _join(self) -> None:
        import torch

        if self._newest:
            self._parts.append(torch.stack([loss.to(self._newest[-1].device) for loss in self._newest]))
            self._newest.clear()


def watch(loader: Any, passes: Callable[[Callable[[], Iterator[Any]], int], Iterator[Any]]) -> Any:
    """Let every pass through a DataLoader go by way of `passes`, which is given its own iterator and its length.

    The loader stays what it is, a DataLoader of upstream's: Lightning looks at it closely.
    """
    own = type(loader)

    class Watched(own):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[Any]:
            return passes(super().__iter__, len(self))

    Watched.__name__, Watched.__qualname__, Watched.__module__ = own.__name__, own.__qualname__, own.__module__
    loader.__class__ = Watched
    return loader


def live_weights(run: Run) -> dict[str, torch.Tensor]:
    """The adapter's own tensors of a run, under the names that they are saved with. Raises Refusal."""
    module = run.module_ref() if run.module_ref else None
    if module is None:
        raise Refusal("The training module of this run was freed while the run went on. Start it again.")
    if run.adapter_type == "lokr":
        return dict(module.lycoris_net.state_dict())
    decoder = module.model.decoder
    decoder = getattr(decoder, "_forward_module", decoder)  # Fabric's wrapper
    if not hasattr(decoder, "peft_config"):
        raise Refusal("This ACE-Step trains without PEFT here, and such an adapter cannot be resumed. Train anew.")
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(decoder, save_embedding_layers=False))


def check_finite(run: Run) -> None:
    """Raise Refusal when the adapter holds numbers that are not finite: saved, it would replace one that is of use."""
    for name, tensor in live_weights(run).items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            rate = getattr(run.training_config, "learning_rate", None)
            raise Refusal(
                f"The adapter holds numbers that are not finite after {run.steps} steps ({name}), so it was not saved "
                f"over anything and the training was ended. Lower --learning-rate (now {rate}), and go on from an "
                "earlier checkpoint, if there is one."
            )


def put_weights(run: Run, point: ResumePoint) -> None:
    """Put a checkpoint's tensors into the adapter, and look whether they are there. Raises Refusal."""
    import torch

    live = check_weights(run, point)
    if run.adapter_type == "lokr":  # its state_dict is computed, so it has to be loaded the same way
        module = run.module_ref() if run.module_ref else None
        assert module is not None
        module.lycoris_net.load_state_dict(dict(point.weights), strict=False)
    else:
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(point.weights[name])
    for name, tensor in live_weights(run).items():
        if not torch.equal(tensor.cpu(), point.weights[name].to(tensor.dtype)):
            raise Refusal(
                f"The adapter's tensor {name} is not what the checkpoint holds after loading it. "
                "Resume from another checkpoint, or train anew."
            )


def check_weights(run: Run, point: ResumePoint) -> dict[str, torch.Tensor]:
    """The adapter's tensors, when each has one of its name and shape in the checkpoint. Raises Refusal."""
    live = live_weights(run)
    missing = sorted(live.keys() - point.weights.keys())
    foreign = sorted(point.weights.keys() - live.keys())
    shapes = [name for name in live if name in point.weights and live[name].shape != point.weights[name].shape]
    if not live or missing or foreign or shapes:
        example = f"{shapes[0]} has shape {list(point.weights[shapes[0]].shape)} there" if shapes else ""
        example = example or f"{(missing or foreign or ['an adapter without tensors'])[0]} is only on one side"
        raise Refusal(
            f"The checkpoint does not fit this adapter: of {len(live)} tensors {len(missing)} are missing in it and "
            f"{len(shapes)} have another shape, {len(foreign)} more belong to no layer here ({example}). Nothing was "
            "trained. Resume with the model, the rank and the target modules that it was made with."
        )
    return live


def _law(scheduler: Mapping[str, Any]) -> Any:
    """What of a scheduler's state decides its curve, without how far it is."""
    counters = {"last_epoch", "_step_count", "_last_lr", "T_cur", "T_i", "_get_lr_called_within_step", "_is_initial"}
    kept = {key: value for key, value in scheduler.items() if key not in counters and key != "_schedulers"}
    return kept, [_law(part) for part in scheduler.get("_schedulers", ()) if isinstance(part, Mapping)]


# -- random states ---------------------------------------------------------------------------------------------------


def random_states(device: torch.device) -> dict[str, Any]:
    """States of the random generators that a training may draw from: torch's, of its device too, Python's, numpy's."""
    import torch

    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": _as_lists(random.getstate())}
    if device.type in ("cuda", "xpu", "mps"):
        states[device.type] = _of_device(device, "get_rng_state")
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = [name, [int(key) for key in keys], *rest]
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put the random generators into states of :func:`random_states`; those of another device are left out."""
    import torch

    torch.set_rng_state(states["torch"].cpu())
    if "python" in states:
        version, keys, gauss = states["python"]
        random.setstate((version, tuple(keys), gauss))
    if device.type in states:
        _of_device(device, "set_rng_state", states[device.type].cpu())
    if "numpy" in states and (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = states["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))


def _of_device(device: torch.device, function: str, *state: torch.Tensor) -> Any:
    import torch

    ask = getattr(getattr(torch, device.type), function)
    # MPS has one generator, CUDA and XPU one for each device.
    return ask(*state) if device.type == "mps" else ask(*state, device)


def _as_lists(state: tuple[Any, ...]) -> list[Any]:
    version, keys, gauss = state
    return [version, list(keys), gauss]
