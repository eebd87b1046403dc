"""``acestep-train``, also as ``python -m sidestep_plugin``: what torchrun and ``--devices`` start."""

from sidestep_plugin import signals


def main() -> None:
    """Entry point of the console script. The first thing it does is to take Ctrl-C over: imports take a while."""
    signals.take_over(signals.leave)
    from sidestep_plugin.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
