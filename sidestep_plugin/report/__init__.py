"""What a training leaves to read: losses by epoch and by timestep."""
