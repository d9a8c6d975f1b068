"""Where the optimizer states of a block are."""
