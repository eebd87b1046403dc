"""The compatibility check: a checkout's seams, the versions that matter, its models and variants, the plugins."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..adapters.kinds import BY_NAME, DEFAULT, title_of
from ..errors import Refusal, UpstreamMismatch
from ..registry import Listing, list_plugins, version_of
from ..run import AdapterType, ModelFacts
from ..text import sentence
from ..timesteps.treatment import decide_variant
from ..variants import member_of
from .checkout import import_trainer
from .models import download_command, models_in
from .seams import Found, cannot_do, examine
from .shapes import adapter_types

_VERSIONS: Final = (
    "sidestep-plugin", "torch", "transformers", "peft", "safetensors", "lightning", "lycoris-lora", "tensorboard",
)  # fmt: skip

_TOO_OLD: Final = re.compile(r"incompatible version of (\w+).*?only versions above (\d[\w.]*\w)", re.DOTALL)
"""PEFT's words for a package that is installed beside it and too old."""


@dataclass(frozen=True)
class FoundModel:
    """A model folder."""

    name: str
    variant: str | None  # turbo, base or sft; None when it is not known
    evidence: str  # what the variant was read from, or why it is not known
    member: str | None = None  # the variant in more words, such as turbo-shift1, which has its own schedule


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
            package = BY_NAME[kind].package
            uninstalled = "" if version_of(package) else f"{package} is not installed (pip install {package})"
            verdicts.append((kind, problem or uninstalled or injection_problem(kind)))
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


def injection_problem(kind: AdapterType) -> str:
    """What keeps an adapter of this kind out of a model, and what to do; "" if nothing does.

    Found out by putting one into a single small layer. That a package is installed says little: PEFT refuses every LoRA
    where a package beside it, such as torchao, has a version that it does not like, and ACE-Step takes a PEFT that
    cannot be imported for one that is not there. Nothing is changed, and no random number is used up.
    """
    import torch

    with torch.random.fork_rng(devices=()):
        layer = torch.nn.Sequential()
        layer.add_module("q_proj", torch.nn.Linear(8, 8))
        try:
            BY_NAME[kind].try_on(layer)
        except (Exception, SystemExit) as error:  # whatever an import may raise
            return f"{sentence(f'{type(error).__name__}: {error}')} {_way_out(kind, str(error))}"
    return ""


def _way_out(kind: AdapterType, reason: str) -> str:
    if found := _TOO_OLD.search(reason):
        name, oldest = found.groups()
        return f'Install a newer one: pip install --upgrade "{name}>={oldest}"; or remove it: pip uninstall {name}'
    return f"Install it again: pip install --upgrade {BY_NAME[kind].package}"
