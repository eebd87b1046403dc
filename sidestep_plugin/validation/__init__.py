"""Validation: held-out songs at fixed timesteps with fixed noise, and comparing adapters on them."""
