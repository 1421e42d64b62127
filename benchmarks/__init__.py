"""Measures the ops against their peers: `python -m benchmarks`, `python -m benchmarks.figures`."""


class Misuse(Exception):
    """What was asked for cannot be done; the message says what was given and what is needed."""
