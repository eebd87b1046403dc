"""Decides once a run how its model is treated, refuses what cannot be honoured, and says what was decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import click

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.options import FiniteFloat, WholeNumber
from sidestep_plugin.run import ModelFacts, Run
from sidestep_plugin.timesteps.treatment import CFG_RATIO, Treatment, decide_treatment
from sidestep_plugin.variants import VARIANTS, guidance

NAME = "sidestep"
"""The plugin's name, under which it keeps what it decided."""


def treatment_of(run: Run) -> Treatment:
    """What was decided for a run when it started."""
    treatment: Treatment = run.state[NAME]
    return treatment


def options() -> list[click.Option]:
    """What can be said about the treatment."""
    return [
        click.Option(
            ["--variant"],
            type=click.Choice(["auto", *VARIANTS]),
            default="auto",
            show_default=True,
            help="What the model is. auto reads its config.json (is_turbo) and its folder's name.",
        ),
        click.Option(
            ["--timestep-mode"],
            type=click.Choice(["auto", "discrete", "continuous"]),
            default="auto",
            show_default=True,
            help="Training timesteps. auto: turbo's 8 inference steps for turbo; the model's own continuous law, "
            "with condition dropout, for base and sft.",
        ),
        click.Option(
            ["--cfg-ratio"],
            type=FiniteFloat(0.0, 1.0),
            default=CFG_RATIO,
            show_default=True,
            help="Condition dropout for base and sft: the probability of training a row without its prompt.",
        ),
        click.Option(
            ["--shift"],
            type=FiniteFloat(0.0, min_open=True),
            default=None,
            help="For generating only, saved with the adapter; never changes training. "
            "[default: the model's: turbo 3.0, base and sft 1.0]",
        ),
        click.Option(
            ["--num-inference-steps"],
            type=WholeNumber(min=1),
            default=None,
            help="For generating only, saved with the adapter; never changes training. "
            "[default: the model's: turbo 8, base and sft 50]",
        ),
    ]


@hookimpl
def acestep_model_chosen(facts: ModelFacts, options: Mapping[str, Any]) -> None:
    _decide(facts, options)


@hookimpl
def acestep_run_started(run: Run) -> list[str]:
    treatment = _decide(ModelFacts.from_model(run.model), run.options)
    if treatment.cfg_ratio > 0.0 and getattr(run.model, "null_condition_emb", None) is None:
        raise Refusal(
            f"{treatment.model_name or 'The model'} has no null_condition_emb, which condition dropout puts in the "
            "place of dropped conditions. Complete the model's weights, or train without dropout: --cfg-ratio 0."
        )
    run.state[NAME] = treatment
    return [*_statements(treatment, run.options, other_sampler(run)), *_dead_slider(run.training_config)]


def other_sampler(run: Run) -> str | None:
    """The plugin that samples timesteps in this one's place, None when this one does."""
    return None if run.sampled_by in (None, NAME) else run.sampled_by


def _dead_slider(config: Any) -> list[str]:
    """A line for whoever moved the shift slider of the app's training tab, which upstream's trainer never reads."""
    entries = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    default = next((entry.default for entry in entries if entry.name == "shift"), None)
    moved = getattr(config, "shift", default)
    if moved == default:
        return []
    return [
        f"Note: shift {moved} was set in the training tab. ACE-Step's trainer does not read it, and training does not "
        "depend on shift; it is a setting for generating."
    ]


def _decide(facts: ModelFacts, options: Mapping[str, Any]) -> Treatment:
    def unless_auto(name: str) -> Any:
        return None if options[name] == "auto" else options[name]

    return decide_treatment(
        facts,
        variant=unless_auto("variant"),
        timestep_mode=unless_auto("timestep_mode"),
        cfg_ratio=options["cfg_ratio"],
        shift=options["shift"],
        num_inference_steps=options["num_inference_steps"],
    )


def _statements(treatment: Treatment, options: Mapping[str, Any], sampler: str | None) -> list[str]:
    """What was decided, from what evidence, one statement a line."""
    decision = treatment.decision
    lines = [f"Model: {treatment.model_name or 'unnamed'}, variant {decision.variant} ({decision.evidence})"]
    if decision.note:
        lines.append(f"Note: {decision.note}; --variant decides.")
    if sampler is not None:
        lines.append(f"Timesteps: sampled by the plugin {sampler}")
    elif treatment.timestep_mode == "continuous":
        law = f"continuous, maximum of two logit-normal draws, mu {treatment.mu}, sigma {treatment.sigma}"
        lines.append(f"Timesteps: {law} (the model's own training law)")
    else:
        values = ", ".join(f"{t:.3g}" for t in treatment.schedule)
        source = "upstream's own sampler" if treatment.is_upstreams_own else "the schedule of shift 1"
        lines.append(f"Timesteps: discrete, uniform over {values} ({source})")
    if treatment.cfg_ratio > 0.0:
        lines.append(f"Condition dropout: {100 * treatment.cfg_ratio:.4g} % of the rows, in training only")
    elif options["cfg_ratio"] > 0.0:
        lines.append("Condition dropout: none (turbo's 8 steps are generated without guidance)")
    else:
        lines.append("Condition dropout: none (--cfg-ratio 0)")
    lines.append(
        f"To generate: shift {treatment.shift}, {treatment.num_inference_steps} steps, "
        f"CFG {guidance(treatment.variant)} (saved with the adapter; does not change training)"
    )
    return lines
