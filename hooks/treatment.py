"""Decides once per run how its model is trained, refuses what cannot be done, and says what was decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import click

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.options import FiniteFloat, WholeNumber, option
from sidestep_plugin.run import ModelFacts, Run
from sidestep_plugin.text import counted
from sidestep_plugin.timesteps.treatment import CFG_RATIO, PLUGIN, Treatment, decide_treatment, other_sampler
from sidestep_plugin.variants import VARIANTS, guidance


@hookimpl
def acestep_options() -> list[click.Option]:
    """The options about how the model is trained."""
    modes = click.Choice(["auto", "discrete", "continuous"])
    return [
        option(
            "--variant",
            "turbo, base or sft; auto: config.json and folder name.",
            click.Choice(["auto", *VARIANTS]),
            "KIND",
            "auto",
        ),
        option("--timestep-mode", "auto (as the model was trained), discrete or continuous.", modes, "MODE", "auto"),
        option(
            "--cfg-ratio", "Condition dropout for base and sft, from 0 to 1.", FiniteFloat(0.0, 1.0), "X", CFG_RATIO
        ),
        option(
            "--shift",
            "For generating, saved only.  [default: turbo 3.0, base and sft 1.0]",
            FiniteFloat(0.0, min_open=True),
            "X",
        ),
        option(
            "--num-inference-steps",
            "For generating, saved only.  [default: turbo 8, base and sft 50]",
            WholeNumber(min=1),
            "N",
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
            f"{treatment.model_name or 'The model'} has no null_condition_emb, which condition dropout needs in place "
            "of dropped conditions. Complete the model's weights, or train without dropout: --cfg-ratio 0."
        )
    run.state[PLUGIN] = treatment
    return [*_statements(treatment, run.options, other_sampler(run)), *_dead_slider(run.training_config)]


def _dead_slider(config: Any) -> list[str]:
    """A line for whoever moved the shift slider of the app's training tab. Upstream's trainer never reads it."""
    entries = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    default = next((entry.default for entry in entries if entry.name == "shift"), None)
    moved = getattr(config, "shift", default)
    if moved == default:
        return []
    return [
        f"Note: shift {moved} was set in the training tab. ACE-Step's trainer does not read it, and training does not "
        "depend on it: shift is a setting for generating."
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
    """What was decided and why, one statement per line."""
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
        source = "ACE-Step's own sampler" if treatment.is_upstreams_own else "the schedule of shift 1"
        lines.append(f"Timesteps: discrete, uniform over {values} ({source})")
    if treatment.cfg_ratio > 0.0:
        lines.append(f"Condition dropout: {100 * treatment.cfg_ratio:.4g} % of the rows, in training only")
    elif options["cfg_ratio"] > 0.0:
        lines.append("Condition dropout: none (turbo's 8 steps are generated without guidance)")
    else:
        lines.append("Condition dropout: none (--cfg-ratio 0)")
    lines.append(
        f"To generate: shift {treatment.shift}, {counted(treatment.num_inference_steps, 'step')}, "
        f"CFG {guidance(treatment.variant)} (saved with the adapter; does not change training)"
    )
    return lines
