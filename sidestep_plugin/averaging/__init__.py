"""A running mean of the adapter while it trains (``--average``)."""
