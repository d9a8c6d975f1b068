"""The paper's experiments as one list of runs: what to run, running it, and what came of it."""
