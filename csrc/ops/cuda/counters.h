// Counters by which the blocks of one launch wait for each other.
#pragma once
#include <cuda_runtime.h>

#include "ops/checks.h"

namespace pyfastpeft {

constexpr int kCounters = 132;

// kCounters counters on the current device that are zero, for a launch on `stream`; the launch leaves them zero.
// Launches on one stream share theirs, since they follow each other. Those of a capture have others, since its graph may
// be replayed on any stream, and share them, since what one stream captures stays in order and CUDA runs an instance of
// a graph once at a time. (Torch makes one instance; two would share the rest of the graph's memory as well.) Where none
// are left for another, `own` becomes a tensor beside t that holds them, and is cleared each time.
int* counters(const Tensor& t, cudaStream_t stream, OptionalTensor& own);

}  // namespace pyfastpeft
