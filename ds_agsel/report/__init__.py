"""What a run did, for people: monitor scalars, logs, a page and a terminal view. Training needs none of it."""
