"""The compatibility check: a checkout's seams, the versions that matter, its models and variants, the plugins."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..adapters.kinds import BY_NAME, DEFAULT, title_of
from ..errors import Refusal, UpstreamMismatch
from ..registry import Listing, list_plugins, version_of
from ..run import AdapterType, ModelFacts
from ..timesteps.treatment import decide_variant
from ..variants import member_of
from .checkout import import_trainer
from .injection import injection_problem
from .models import download_command, models_in
from .seams import Found, cannot_do, examine
from .shapes import adapter_types

_VERSIONS: Final = (
    "sidestep-plugin",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "lightning",
    "lycoris-lora",
    "tensorboard",
)


@dataclass(frozen=True)
class FoundModel:
    """A model folder."""

    name: str
    variant: str | None  # turbo, base or sft; None when it is not known
    evidence: str  # what the variant was read from, or why it is not known
    # the variant in more words, such as turbo-shift1, which is trained on a schedule of its own
    member: str | None = None


@dataclass(frozen=True)
class Fitness:
    """What ``acestep-train check`` found."""

    root: str
    fits: bool  # whether every kind of adapter that was asked for can be trained here, for which a model must be there
    verdict: str  # the same in a sentence
    seams: tuple[Found, ...]  # every seam that was checked; empty when the trainer cannot be imported
    versions: dict[str, str]  # distribution names with versions, "not installed" for a missing one
    checkpoint_dir: str
    models: tuple[FoundModel, ...]
    plugins: tuple[Listing, ...]


def examine_checkout(root: Path, checkpoints: Path, kinds: Sequence[AdapterType] = ()) -> Fitness:
    """Check a checkout without changing or training anything.

    Args:
        root: the folder that holds the package ``acestep``; its trainer is imported.
        checkpoints: the folder of models.
        kinds: kinds of adapter to check; empty: every kind that this trainer trains.
    """
    seams: list[Found] = []
    fitting = ""
    try:
        trainer = import_trainer(root)
        judged = list(kinds) or adapter_types(trainer) or [DEFAULT.name]
        verdicts = []
        for kind in judged:
            looked = examine(trainer, kind)
            seams += looked
            misfits = [seam for seam in looked if seam.status != "found" and not seam.optional]
            problem = f"{misfits[0].name}: {misfits[0].reason}" if misfits else ""
            verdicts.append((kind, problem or _uninstalled(kind) or injection_problem(kind)))
        problems = [f"{title_of(kind)} does not fit: {problem}" for kind, problem in verdicts if problem]
        fitting = " and ".join(title_of(kind) for kind, problem in verdicts if not problem)
        good = [f"Compatible: {fitting} can be trained"] if fitting else []
        lost = dict.fromkeys(seam.without for seam in seams if seam.status != "found" and seam.without)
        limits = [cannot_do(trainer, lost)] if lost and fitting else []
        fits, verdict = not problems, ". ".join(good + limits + problems)
    except UpstreamMismatch as mismatch:
        fits, verdict = False, str(mismatch).removesuffix(".")
    models = tuple(examine_model(checkpoints / name) for name in models_in(checkpoints))
    if fits and not models:
        fits = False
        verdict = (
            f"No model found in {checkpoints}, so nothing can be trained yet. Download one ({download_command()}), or "
            f"say where yours are: --checkpoint-dir DIR. The trainer itself is compatible ({fitting})"
        )
    return Fitness(
        root=str(root),
        fits=fits,
        verdict=f"{verdict}.",
        seams=tuple(seams),
        versions={
            "python": platform.python_version(),
            **{name: version_of(name) or "not installed" for name in _VERSIONS},
        },
        checkpoint_dir=str(checkpoints),
        models=models,
        plugins=tuple(list_plugins()),
    )


def examine_model(folder: Path) -> FoundModel:
    """The variant of a model folder, or why it is not known."""
    try:
        decision = decide_variant(ModelFacts.from_folder(folder))
    except Refusal as refusal:
        return FoundModel(folder.name, None, str(refusal))
    return FoundModel(folder.name, decision.variant, decision.evidence, member_of(decision.variant, folder.name))


def _uninstalled(kind: AdapterType) -> str:
    """What this kind of adapter needs and is not installed, "" when nothing is missing."""
    needed = BY_NAME[kind].package
    return f"{needed} is not installed (pip install {needed})" if version_of(needed) is None else ""
