"""Pages of docs/ that are computed."""
