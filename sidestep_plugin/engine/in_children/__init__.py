"""A folder that ``acestep-train run`` puts on ``$PYTHONPATH``: every Python started from there finds the plugins."""
