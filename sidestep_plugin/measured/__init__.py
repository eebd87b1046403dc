"""What was measured on GPUs, one JSON file a card in `cards/`, and what follows from it. Without files, nothing does.

``python -m sidestep_plugin.gpu_report`` writes such files.
"""
