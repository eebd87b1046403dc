"""The mathematics of timesteps, and which model is trained at which. Nothing here draws a random number."""
