"""``acestep-train``, also as ``python -m sidestep_plugin``: what torchrun and ``--devices`` start."""

import os
import signal


def main() -> None:
    """Entry point of the console script. The first thing it does is to take Ctrl-C over: imports take a while."""
    untouched = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if untouched:  # the import of what takes all signals over takes a while, too
        signal.signal(signal.SIGINT, _leave)
    from sidestep_plugin import signals

    if untouched:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.take_over(signals.leave)
    from sidestep_plugin.cli import main as command_line

    command_line()


def _leave(*_: object) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
