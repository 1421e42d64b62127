"""Adapts a transformer with fused kernels, checks and measures it against PEFT, and reports: `python -m demo`."""
