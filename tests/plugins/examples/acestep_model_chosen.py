"""Refuses a model by its folder's name and config.json, before minutes of loading."""

from sidestep_plugin import Refusal, hookimpl


@hookimpl
def acestep_model_chosen(facts):
    if "xl" in facts.name:
        raise Refusal(f"{facts.name} does not fit on the card in this machine. Choose a standard model.")
