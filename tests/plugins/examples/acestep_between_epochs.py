"""Says how large the adapter has become, and logs it for TensorBoard."""

from sidestep_plugin import hookimpl
from sidestep_plugin.run import EpochNews


@hookimpl
def acestep_between_epochs(run, epoch):
    weights = [weight for weight in run.model.decoder.parameters() if weight.requires_grad]
    size = sum(float(weight.detach().float().square().sum()) for weight in weights) ** 0.5
    return EpochNews(lines=(f"After epoch {epoch}: norm of the adapter {size:.4f}",), logged={"adapter norm": size})
