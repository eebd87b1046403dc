"""An adapter's files: their layers, their facts about the training, inspection, and copies for other programs."""
