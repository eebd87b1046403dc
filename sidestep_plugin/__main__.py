"""``python -m sidestep_plugin`` is ``acestep-train``: what torchrun starts, and what ``--devices`` starts itself."""

from sidestep_plugin.cli import main

if __name__ == "__main__":
    main()
