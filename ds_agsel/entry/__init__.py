"""What a user enters through: `initialize`, `install`, `run` and `check`."""
