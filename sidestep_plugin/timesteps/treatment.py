"""Decides which variant a model is, how it is trained and what to generate with. Pure.

Order of evidence: what the user says; ``is_turbo`` in the config file; a whole word of the folder's name. Without
evidence, or when the config and the name contradict each other, nothing is guessed: the user is asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

from ..errors import Refusal
from ..run import ModelFacts, Run
from ..variants import TURBO_SHIFT, TURBO_STEPS, VARIANTS, Variant, inference_settings, words_of
from .schedule import inference_timesteps, max_of_two_logit_normal_quantile, why_no_training_law

TimestepMode = Literal["discrete", "continuous"]

CFG_RATIO = 0.15
"""Probability with which the models' own ``forward()`` replaces a condition by the null condition."""

POINTS: Final = 8
"""Timesteps per song at which a model is validated; turbo has as many inference steps."""

_ASK = "Say which one it is: --variant turbo, --variant base or --variant sft."


@dataclass(frozen=True)
class Decision:
    """The variant and the evidence for it."""

    variant: Variant  # turbo, base or sft
    evidence: str  # what it was read from, for the user
    note: str | None = None  # a contradiction that ``--variant`` settled, or None


@dataclass(frozen=True)
class Treatment:
    """How a model is trained, and the settings that its adapters are meant for."""

    model_name: str  # name of the model's folder, ``""`` when unknown
    decision: Decision  # its variant and the evidence
    timestep_mode: TimestepMode  # "discrete" (uniform over `schedule`) or "continuous" (maximum of two draws)
    schedule: tuple[float, ...]  # the discrete timesteps, noisiest first; empty when continuous
    mu: float | None  # of the logit-normal law, as sigma is; None when discrete
    sigma: float | None
    cfg_ratio: float  # probability in [0, 1] with which a row's condition is replaced by the null condition
    shift: float  # for generating only, as the next one is: no training value depends on them
    num_inference_steps: int

    @property
    def variant(self) -> Variant:
        return self.decision.variant

    @cached_property  # asked in every step
    def is_upstreams_own(self) -> bool:
        """Whether upstream's own sampler draws exactly this schedule, so that it can be left to do so."""
        return self.timestep_mode == "discrete" and self.schedule == inference_timesteps(TURBO_SHIFT, TURBO_STEPS)


def decide_variant(facts: ModelFacts, said: Variant | None = None) -> Decision:
    """Find the variant by the order of evidence.

    Args:
        facts: what is known of the model.
        said: the user's ``--variant``, which wins; contradictions with it are reported.

    Raises:
        Refusal: no evidence, contradicting evidence, or an ``is_turbo`` that is neither true nor false.
    """
    written = facts.config if facts.written is None else facts.written
    source = "config" if facts.written is None else "config.json"
    is_turbo = written.get("is_turbo")
    if is_turbo is not None and not isinstance(is_turbo, bool):
        raise Refusal(
            f"{source} of {facts.name or 'the model'} has is_turbo = {is_turbo!r}, expected true or false. {_ASK}"
        )
    flag = None if is_turbo is None else f"{source}: is_turbo = {str(is_turbo).lower()}"
    named = [variant for variant in VARIANTS if variant in words_of(facts.name)]
    folder = f"folder name: {facts.name}"

    if said is not None:
        against = [
            text
            for text, contradicts in (
                (flag, is_turbo is not None and is_turbo != (said == "turbo")),
                (folder, bool(named) and said not in named),
            )
            if contradicts and text
        ]
        note = f"--variant {said} contradicts {' and '.join(against)}" if against else None
        return Decision(said, f"--variant {said}", note)

    says_turbo, says_other = "turbo" in named, any(name != "turbo" for name in named)
    # A fine-tune of sft often keeps "base" in its name; both are trained alike.
    other: Variant = "sft" if "sft" in named else "base"
    if is_turbo is None:
        if says_turbo and says_other:
            raise Refusal(f"The folder name {facts.name!r} names more than one variant. {_ASK}")
        if not named:
            raise Refusal(
                f"Cannot tell the variant of {facts.name or 'this model'!r}: {source} has no is_turbo, and the folder "
                f"name has none of the words turbo, base, sft. {_ASK}"
            )
        return Decision("turbo" if says_turbo else other, folder)
    if named and (says_turbo if is_turbo else says_other) is False:
        raise Refusal(f"{flag}, but the {folder}. These contradict each other. {_ASK}")
    assert flag is not None
    if is_turbo:
        return Decision("turbo", f"{flag}; {folder}" if says_turbo else flag)
    return Decision(other, f"{flag}; {folder}" if says_other else flag)


def decide_treatment(
    facts: ModelFacts,
    *,
    variant: Variant | None = None,
    timestep_mode: TimestepMode | None = None,
    cfg_ratio: float = CFG_RATIO,
    shift: float | None = None,
    num_inference_steps: int | None = None,
) -> Treatment:
    """Decide how a model is trained. ``None`` means: what is right for the model's variant.

    Continuous timesteps and condition dropout are the models' own training (their ``forward()``), and come together;
    a turbo model on its discrete schedule has no dropout, because its 8 steps are generated without guidance.

    Raises:
        Refusal: the variant cannot be told, or the config's mu and sigma are needed and missing or no training law.
    """
    decision = decide_variant(facts, variant)
    turbo = decision.variant == "turbo"
    mode: TimestepMode = timestep_mode or ("discrete" if turbo else "continuous")
    own_shift, own_steps = inference_settings(decision.variant, facts.name)
    mu = sigma = None
    if mode == "continuous":
        mu, sigma = _number(facts, "timestep_mu"), _number(facts, "timestep_sigma")
        if sigma <= 0.0:
            raise Refusal(
                f"{facts.name or 'The model'} has timestep_sigma = {sigma!r} in its config, expected a number above 0 "
                "(the official models have 1.0). Correct config.json."
            )
        if reason := why_no_training_law(mu, sigma):
            raise Refusal(
                f"{facts.name or 'The model'} has timestep_mu = {mu!r} and timestep_sigma = {sigma!r} in its config, "
                f"which is no training law: {reason}. Expected values such as the official models' -0.4 and 1.0. "
                "Correct config.json."
            )
    return Treatment(
        model_name=facts.name,
        decision=decision,
        timestep_mode=mode,
        schedule=inference_timesteps(own_shift if turbo else TURBO_SHIFT, TURBO_STEPS) if mode == "discrete" else (),
        mu=mu,
        sigma=sigma,
        cfg_ratio=0.0 if turbo and mode == "discrete" else cfg_ratio,
        shift=own_shift if shift is None else shift,
        num_inference_steps=own_steps if num_inference_steps is None else num_inference_steps,
    )


def validation_grid(treatment: Treatment) -> tuple[float, ...]:
    """The timesteps at which a model is validated, lowest first | values in (0, 1].

    Discrete: its training schedule, which is turbo's 8 inference steps. Continuous: the middles of 8 parts of the
    training law that are equally likely, so that a mean over them is an estimate of the training loss (stratified
    sampling with one point per stratum).
    """
    if treatment.mu is None or treatment.sigma is None:
        return tuple(sorted(treatment.schedule))
    parts = ((number + 0.5) / POINTS for number in range(POINTS))
    return tuple(max_of_two_logit_normal_quantile(part, treatment.mu, treatment.sigma) for part in parts)


def law_of(facts: ModelFacts) -> tuple[float, float] | None:
    """mu and sigma of the model's own training law, for every variant; None when its config has no usable ones."""
    try:
        mu, sigma = _number(facts, "timestep_mu"), _number(facts, "timestep_sigma")
    except Refusal:
        return None
    return (mu, sigma) if sigma > 0.0 and not why_no_training_law(mu, sigma) else None


def _number(facts: ModelFacts, key: str) -> float:
    # The model's own forward() uses the live value, but a default of the class counts only if the file says it, too.
    value = facts.config.get(key) if facts.written is None or key in facts.written else None
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        found = "no value" if value is None else repr(value)[:80]
        raise Refusal(
            f"{facts.name or 'The model'} has {found} for {key} in its config, expected a number (the official models "
            "have timestep_mu -0.4 and timestep_sigma 1.0). Correct config.json."
        )
    return number


PLUGIN: Final = "sidestep"
"""The plugin that decides; a run keeps the decision under this name."""


def treatment_of(run: Run) -> Treatment:
    """What was decided for a run when it started."""
    treatment: Treatment = run.state[PLUGIN]
    return treatment


def other_sampler(run: Run) -> str | None:
    """The plugin that samples the timesteps instead of the treatment's law; None if none does."""
    return None if run.sampled_by in (None, PLUGIN) else run.sampled_by
