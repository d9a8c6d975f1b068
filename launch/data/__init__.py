"""Training and test data: sources, columns, chat templates, tokens and batches."""
