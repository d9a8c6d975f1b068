"""A training run: options, set-up, loop, checkpoints and summary."""
