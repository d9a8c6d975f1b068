"""Present a run to people: monitor scalars, logs, a page and a terminal view. Training works without it."""
