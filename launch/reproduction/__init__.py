"""The paper's experiments as one list of runs: the plan, running it, and the results."""
