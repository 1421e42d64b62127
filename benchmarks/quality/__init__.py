"""What every method reaches on real data with the same seeds, data order and budget: python -m benchmarks.quality."""
