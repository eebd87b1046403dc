"""Everything that knows ACE-Step's trainer: where it is, where we attach, what stands there, starting a training."""
