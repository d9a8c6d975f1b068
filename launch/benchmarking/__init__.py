"""Benchmarks of a step's time and memory."""
