"""The programs of the repository: training, evaluation, benchmarks and the paper's experiments."""
