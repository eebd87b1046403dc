"""From songs to tensors: audio and texts become songs to train on, with conditions as the model is generated with."""
