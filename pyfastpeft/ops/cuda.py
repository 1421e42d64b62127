"""What the CUDA C++ kernels of csrc/ops/cuda take: one function for every op that has one, with the raw op's arguments,
which returns what it lacks, "" where it takes them. Nothing here looks at a value on a device."""
