"""Several GPUs: one process for each, each with its share of the songs."""
