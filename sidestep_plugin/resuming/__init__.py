"""Resuming: recording where a training is, what a checkpoint stores, restoring it; one training per output folder."""
