"""Adapts a transformer with fused kernels, checks and measures it against PEFT, and reports: `python -m demo`."""

import os

# At every barrier libgomp's threads spin for about a millisecond before they sleep; where other programs use the same
# cores, a training step with its hundreds of barriers then takes seconds. libgomp reads this when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
