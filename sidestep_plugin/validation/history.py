"""The validations of one training: what was measured, which epoch is the best, when to stop, what to say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..errors import Refusal
from ..text import counted

if TYPE_CHECKING:
    import torch

_SHARE: Final = 0.1  # of the training's time, that validation may take by default

_FORWARD: Final = 0.46
"""Time of a forward pass of one song in training steps of one song, measured without gradient checkpointing."""

_WORSE: Final = 0.002
"""By how much of its lowest value the loss of one half of the timesteps must rise to count as getting worse."""


def usual_interval(forwards: int, songs: int, epochs: int) -> tuple[int, Callable[[int], float]]:
    """Epochs between validations that take a tenth of the training's time, and the share that any number takes.

    `forwards` is the number of forward passes of a validation, `songs` that of the songs that are trained on.
    """

    def share(every: int) -> float:
        validations = 1 + epochs // every + (epochs % every > 0)
        return validations * forwards * _FORWARD / max(1, songs * epochs)

    return next((every for every in range(1, epochs + 1) if share(every) <= _SHARE), max(1, epochs)), share


@dataclass(frozen=True)
class Validation:
    """What was measured on the songs of a plan."""

    epoch: int  # epochs done; 0 for the model without adapter
    losses: torch.Tensor  # upstream's loss, shape [songs, timesteps, conditions], float64 on the CPU
    seconds: float  # how long it took
    # The same losses of other tensors in the adapter's place, by their name, such as "average".
    variants: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What follows from a validation."""

    best: bool = False  # whether this is the best adapter so far, which is then saved as ``checkpoints/best``
    stop: bool = False  # whether the training has gone on for long enough. ``final`` is then the best adapter
    lines: tuple[str, ...] = ()  # lines for the user
    # Numbers for upstream's log by name, which TensorBoard shows.
    log: Mapping[str, float] = field(default_factory=dict)


@dataclass
class History:
    """The validations of one training."""

    # songs, contents: names of the songs, and hashes of their files.
    songs: list[str]
    contents: list[str]
    from_folder: bool  # whether they are of another folder; else they are held out of the dataset
    timesteps: Sequence[float]
    null_share: float  # weight of the losses without condition in the mean
    conditions: tuple[bool, ...]  # the last axis of the losses
    every: int  # epochs between validations
    patience: int | None  # validations without a better one after which the training stops; None: never
    # By epoch, shape [songs, timesteps, conditions], float64.
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    # Those of other tensors in the adapter's place, by name and epoch.
    variants: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    # Epochs whose adapter is in no checkpoint any more, so none of them can be the best.
    lost: set[int] = field(default_factory=set)
    times: list[float] = field(default_factory=list)  # how long each validation of this run took, in seconds
    warned: bool = False
    apart: bool = False

    # -- numbers -----------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> list[int]:
        """The validated epochs, without epoch 0."""
        return sorted(epoch for epoch in self.losses if epoch > 0)

    def mean(self, epoch: int, variant: str = "") -> float:
        """The loss that the training minimizes, on the held-out songs, of the adapter or of a variant of it."""
        return mean_loss(self._losses(epoch, variant), self.null_share)

    def by_t(self, epoch: int, condition: int = 0, variant: str = "") -> list[float]:
        """Mean loss of the songs at each timestep."""
        return losses_by_t(self._losses(epoch, variant), condition)

    def change(self, epoch: int, variant: str = "") -> float:
        """The mean relative to the model without adapter: -0.02 is 2 % lower."""
        return self.mean(epoch, variant) / self.mean(0) - 1.0

    def improved(self, epoch: int, variant: str = "") -> int:
        """At how many timesteps the loss is lower than without adapter."""
        pairs = zip(self.by_t(epoch, variant=variant), self.by_t(0), strict=True)
        return sum(now / before - 1.0 < 0.0 for now, before in pairs)

    def _losses(self, epoch: int, variant: str) -> torch.Tensor:
        return self.variants[variant][epoch] if variant and epoch > 0 else self.losses[epoch]

    def measured(self, epoch: int) -> list[str]:
        """What was measured after an epoch: "" for the adapter, and the names of its variants."""
        return ["", *(name for name, losses in self.variants.items() if epoch in losses)]

    @property
    def best(self) -> int | None:
        """The epoch with the lowest finite mean of the adapter or a variant, the first of several; None without one."""
        return self._lowest_of_all()[0]

    @property
    def best_variant(self) -> str:
        """What has the lowest mean: "" for the adapter of the best epoch, or the name of a variant of it."""
        return self._lowest_of_all()[1]

    def _lowest_of_all(self) -> tuple[int | None, str]:
        known = [(epoch, name) for epoch in self.trained if epoch not in self.lost for name in self.measured(epoch)]
        finite = [(epoch, name) for epoch, name in known if math.isfinite(self.mean(epoch, name))]
        return min(finite, key=lambda one: (self.mean(*one), one), default=(None, ""))

    @property
    def waited(self) -> int:
        """Validations since the best one."""
        return sum(epoch > (self.best or 0) for epoch in self.trained)

    @property
    def over(self) -> bool:
        """Whether patience has ended the training."""
        return self.patience is not None and self.waited >= self.patience

    def is_of(self, other: History, epoch: int) -> bool:
        """Whether another history has measured the same adapter as this one after an epoch: no bit of it differs."""
        import torch

        return epoch in self.losses and epoch in other.losses and torch.equal(self.losses[epoch], other.losses[epoch])

    # -- judging -----------------------------------------------------------------------------------------------------

    def judge(self, validation: Validation) -> Verdict:
        """Add a validation and say what follows from it. Raises Refusal when the model itself has no loss."""
        epoch = validation.epoch
        self.losses[epoch] = validation.losses
        for name, losses in validation.variants.items():
            self.variants.setdefault(name, {})[epoch] = losses
        self.times.append(validation.seconds)
        if epoch == 0:
            self._check_baseline()
            return Verdict(lines=(self._first_line(),), log=self._log(0))
        best = self.best == epoch
        lines = [self._line(epoch)]
        if not math.isfinite(self.mean(epoch)):
            lines = [] if self.warned else [self._warning(epoch)]
            self.warned = True
        elif (note := self._parting(epoch)) is not None:
            lines.append(note)
        return Verdict(best=best, stop=self.over, lines=tuple(lines), log=self._log(epoch))

    def why_over(self) -> str:
        """Why patience has ended the training, in a line."""
        return (
            f"Validation: not better than epoch {self.best} for {counted(self.waited, 'validation')} (--patience "
            f"{self.patience}), so the training stops here"
        )

    def _check_baseline(self) -> None:
        for name, losses in zip(self.songs, self.losses[0], strict=True):
            if not bool(losses.isfinite().all()):
                raise Refusal(
                    f"The loss of {name}, which is held out for validation, is NaN or infinite even without an "
                    "adapter. Preprocess that song again, or take it out of its folder."
                )

    def _first_line(self) -> str:
        at = f"{self.by_t(0)[0]:.4f} at t {self.timesteps[0]:.2f}, {self.by_t(0)[-1]:.4f} at t {self.timesteps[-1]:.2f}"
        return f"Validation before the first step: loss {self.mean(0):.4f} without adapter ({at})"

    def _line(self, epoch: int) -> str:
        change, best = self.change(epoch), self.best
        variants = "".join(f", {name} {percent(self.change(epoch, name))}" for name in self.measured(epoch)[1:])
        told = (
            f"Validation after epoch {epoch}: loss {self.mean(epoch):.4f} ({percent(change)} vs. no adapter{variants})"
            f", lower at {self.improved(epoch)} of {len(self.timesteps)} timesteps"
        )
        which = f" ({self.best_variant})" if self.best_variant else ""
        if best is None or best == epoch:
            return f"{told}; the best so far{which}"
        return f"{told}; best: epoch {best}{which} ({percent(self.change(best, self.best_variant))})"

    def _warning(self, epoch: int) -> str:
        return (
            f"Warning: the validation loss after epoch {epoch} is NaN or infinite, so this epoch cannot be the best. "
            "The training goes on; if its loss is not finite either, lower --learning-rate."
        )

    def _parting(self, epoch: int) -> str | None:
        """A note when one half of the timesteps begins to get worse while the other still gets better."""
        low, high = self._lowest(epoch, high=False), self._lowest(epoch, high=True)
        now = bool(low and high) and ((low[0] == epoch) != (high[0] == epoch)) and max(low[1], high[1]) > _WORSE
        began, self.apart = now and not self.apart, now
        if not began:
            return None
        worse, name = (high, "high") if high[1] > low[1] else (low, "low")
        other = "low" if name == "high" else "high"
        meaning = ", which is often the first sign of overfitting" if name == "high" else ""
        return (
            f"Note: the loss at {name} t is {percent(worse[1])} above its lowest (epoch {worse[0]}), while that at "
            f"{other} t still falls{meaning}"
        )

    def _lowest(self, epoch: int, *, high: bool) -> tuple[int, float]:
        """For one half of the timesteps: the epoch of its lowest loss, and how far above that it is now."""
        half = len(self.timesteps) // 2

        def loss(number: int) -> float:
            values = self.by_t(number)
            return sum(values[half:] if high else values[:half])

        finite = [number for number in self.trained if number <= epoch and math.isfinite(loss(number))]
        lowest = min(finite, key=lambda number: (loss(number), number))
        return lowest, loss(epoch) / loss(lowest) - 1.0

    def _log(self, epoch: int) -> dict[str, float]:
        """Numbers for TensorBoard."""
        logged = {
            "validation/loss": self.mean(epoch),
            "validation/change to the model without adapter": self.change(epoch),
        }
        for name in self.measured(epoch)[1:]:
            logged[f"validation/loss of the {name}"] = self.mean(epoch, name)
        logged["validation/share of t improved"] = self.improved(epoch) / len(self.timesteps)
        for place, condition in enumerate(self.conditions):
            for t, loss, before in zip(self.timesteps, self.by_t(epoch, place), self.by_t(0, place), strict=True):
                name = f"t {t:.2f}" if condition else f"t {t:.2f} without condition"
                logged[f"validation/change at {name}"] = loss / before - 1.0
        return {name: value for name, value in logged.items() if math.isfinite(value)}

    # -- keeping and telling -----------------------------------------------------------------------------------------

    def facts(self, epoch: int | None, variant: str = "") -> dict[str, Any]:
        """For an adapter that is saved as it was after an epoch; None: it was saved within one."""
        held_out = {} if self.from_folder else {"held_out_songs": len(self.songs)}
        facts: dict[str, Any] = held_out | {"validation_songs": len(self.songs)}
        if epoch is None or epoch not in self.trained or variant not in self.measured(epoch):
            return facts
        if not math.isfinite(self.mean(epoch, variant)):
            return facts
        return facts | {
            "validation_epoch": epoch,
            "validation_loss": round(self.mean(epoch, variant), 6),
            "validation_change": round(self.change(epoch, variant), 6),
            "validation_improved": round(self.improved(epoch, variant) / len(self.timesteps), 6),
        }

    def report(self, place: str | None) -> dict[str, Any]:
        """For JSON, with the folder of the best adapter; None if it is in none, or nobody has looked."""
        return {
            "songs": self.songs,
            "timesteps": [round(t, 6) for t in self.timesteps],
            "weight_without_condition": self.null_share,
            "every": self.every,
            "patience": self.patience,
            "best_epoch": self.best,
            **({"best_variant": self.best_variant} if self.best_variant else {}),
            "best_in": place,
            "epochs": [self._entry(epoch) for epoch in sorted(self.losses)],
        }

    def _entry(self, epoch: int) -> dict[str, Any]:
        told: dict[str, Any] = {
            "epoch": epoch,
            "loss": _finite(self.mean(epoch)),
            "change": _finite(self.change(epoch)),
            "improved": self.improved(epoch),
            "loss_by_t": [_finite(loss) for loss in self.by_t(epoch)],
        }
        if len(self.conditions) > 1:
            told["loss_by_t_without_condition"] = [_finite(loss) for loss in self.by_t(epoch, 1)]
        told["loss_by_song"] = [_finite(loss) for loss in self.losses[epoch][:, :, 0].mean(dim=1).tolist()]
        if variants := self.measured(epoch)[1:]:
            told["variants"] = {
                name: {"loss": _finite(self.mean(epoch, name)), "change": _finite(self.change(epoch, name))}
                for name in variants
            }
        return told

    def summary(self, place: str | None) -> str:
        """The end of a training, in one line, with the place of the best adapter; None if it is in no folder."""
        best, name = self._lowest_of_all()
        if best is None and self.lost:
            return "Validation: the best adapter of this training is in no checkpoint any more"
        if best is None:
            return "Validation: no epoch had a finite loss, so there is no best one"
        which = f" ({name})" if name else ""
        told = (
            f"Validation: best epoch {best}{which}, loss {self.mean(best, name):.4f} "
            f"({percent(self.change(best, name))} vs. no adapter)"
        )
        worse = "; none was better than the model without adapter" if self.change(best, name) >= 0.0 else ""
        where = f", in {place}" if place else "; its adapter is in no checkpoint"
        took = f". It took {sum(self.times):.3g} s in all" if self.times else ""
        return f"{told}{where}{worse}{took}"

    def comparable(self, other: History) -> bool:
        """Whether another history has measured the same."""
        mine, theirs = ((h.songs, h.contents, [round(t, 9) for t in h.timesteps], h.conditions) for h in (self, other))
        return mine == theirs

    def differs_from(self, other: History) -> str:
        """What another history has measured otherwise, in words."""
        theirs = dict(zip(other.songs, other.contents, strict=True))
        mine = dict(zip(self.songs, self.contents, strict=True))
        if changed := sorted(song for song in mine if theirs.get(song, mine[song]) != mine[song]):
            return f"other contents of {', '.join(changed[:5])}"
        if mine.keys() != theirs.keys():
            return f"other songs ({', '.join(sorted(theirs)[:5])})"
        return "other timesteps or conditions" if mine == theirs else "songs in another order"

    def take_over(self, before: History) -> None:
        """Go on where an earlier run of this training was."""
        self.losses, self.lost = dict(before.losses), set(before.lost)
        self.variants = {name: dict(losses) for name, losses in before.variants.items()}
        self.warned, self.apart = before.warned, before.apart

    def as_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "songs": self.songs,
            "contents": self.contents,
            "from_folder": self.from_folder,
            "timesteps": list(self.timesteps),
            "null_share": self.null_share,
            "conditions": list(self.conditions),
            "losses": dict(self.losses),
            "variants": {name: dict(losses) for name, losses in self.variants.items()},
            "lost": sorted(self.lost),
            "warned": self.warned,
            "apart": self.apart,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """Read what :meth:`as_state` gave. Raises Refusal when it is not that."""
        try:
            return cls(
                songs=list(state["songs"]),
                contents=list(state["contents"]),
                from_folder=bool(state["from_folder"]),
                timesteps=tuple(state["timesteps"]),
                null_share=float(state["null_share"]),
                conditions=tuple(state["conditions"]),
                every=1,
                patience=None,
                losses={int(epoch): losses for epoch, losses in state["losses"].items()},
                variants={
                    str(name): {int(epoch): losses for epoch, losses in found.items()}
                    for name, found in state.get("variants", {}).items()
                },
                lost={int(epoch) for epoch in state.get("lost", ())},
                warned=bool(state["warned"]),
                apart=bool(state["apart"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Refusal(
                f"The checkpoint is not complete: what was saved of the validation is unusable "
                f"({error!r}). Resume from another one, as with --resume-from latest."
            ) from None


def mean_loss(losses: torch.Tensor, null_share: float) -> float:
    """The loss that a training minimizes: conditions are dropped with the probability of condition dropout.

    The losses have the shape [songs, timesteps, conditions]; the last axis may be that with the condition alone.
    """
    by_condition = losses.mean(dim=(0, 1)).tolist()
    if len(by_condition) == 1:
        return float(by_condition[0])
    return float((1.0 - null_share) * by_condition[0] + null_share * by_condition[1])


def losses_by_t(losses: torch.Tensor, condition: int) -> list[float]:
    """Mean loss of the songs at each timestep."""
    values: list[float] = losses[:, :, condition].mean(dim=0).tolist()
    return values


def percent(share: float) -> str:
    """A relative change in words: "-1.9 %"."""
    return f"{100 * share:+.2f} %"


def _finite(number: float) -> float | None:
    """A number for JSON, which has no NaN and no infinity."""
    return round(number, 6) if math.isfinite(number) else None
