"""Measures the ops against their peers: `python -m benchmarks`, `python -m benchmarks.figures`."""
