"""An option of the plugin's own: ``--noise 0.1`` on the command line, ``run.options["noise"]`` in the hooks."""

import click

from sidestep_plugin import hookimpl
from sidestep_plugin.options import FiniteFloat


@hookimpl
def acestep_options():
    return [click.Option(["--noise"], type=FiniteFloat(0.0, 1.0), default=0.0, help="Noise on the conditions.")]


@hookimpl
def acestep_run_started(run):
    return [f"Noise on the conditions: {run.options['noise']}"]
