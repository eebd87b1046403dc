"""Measures this machine's GPU in minutes: ``python -m sidestep_plugin.gpu_report``. The result is a JSON file to share.

It is part of the product, because whoever has a GPU has `pip install`; it is no command, because it is run once a card.
"""
