"""Writes a CSV file beside every adapter: the training loss by band of timesteps.

The loss jumps because the timesteps do. Within a band it can be compared: noisy steps with noisy steps.
"""

import csv

import click

from sidestep_plugin import hookimpl


@hookimpl
def acestep_options():
    return [click.Option(["--bands"], type=click.IntRange(1, 100), default=4, help="Bands of timesteps.")]


@hookimpl
def acestep_run_started(run):
    run.state["loss-bands"] = []
    return [f"Loss by timestep: {run.options['bands']} bands, in loss_by_timestep.csv beside every adapter"]


@hookimpl
def acestep_step_finished(step):
    if step.training and step.t is not None:
        # Keep tensors, not numbers: turning them into numbers would make every step wait for the GPU.
        step.run.state["loss-bands"].append((step.t.detach().float().mean(), step.loss.detach().float()))


@hookimpl
def acestep_adapter_saved(run, saved):
    bands = run.options["bands"]
    losses = [[] for _ in range(bands)]
    for t, loss in run.state["loss-bands"]:
        losses[min(int(float(t) * bands), bands - 1)].append(float(loss))
    with (saved.weights.parent / "loss_by_timestep.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["from_t", "to_t", "steps", "mean_loss"])
        for number, band in enumerate(losses):
            mean = sum(band) / len(band) if band else ""
            table.writerow([number / bands, (number + 1) / bands, len(band), mean])
