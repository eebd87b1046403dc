"""One training from the command line: everything is checked, cheapest first, before the model is loaded."""
