"""Does it help? An experiment: see ``__main__.py`` for the question, the predictions and how to run it."""
