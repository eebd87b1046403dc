"""What stands in the trainer while plugins are attached: one file a seam, each a function that makes the wrapper."""
