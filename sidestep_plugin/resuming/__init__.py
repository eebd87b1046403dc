"""Going on with a training: the place where it stands, what a checkpoint keeps of it, and putting that back."""
