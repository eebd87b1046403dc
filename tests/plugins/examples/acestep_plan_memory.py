"""Keeps the feed-forward weights of the base model in bf16, and says how much that saved."""

from sidestep_plugin import hookimpl
from sidestep_plugin.run import MemoryPlan


@hookimpl
def engine_plan_memory(decoder, autocast):
    if autocast is None:  # the weights would meet activations in fp32
        return None
    names = [name for name, weight in decoder.named_parameters() if ".mlp." in name and not weight.requires_grad]

    def outcome(saved):
        return [] if saved is None else [f"Feed-forward weights in bf16: {saved / 2**20:.0f} MiB less"]

    return MemoryPlan(kept=frozenset(names), outcome=outcome)
