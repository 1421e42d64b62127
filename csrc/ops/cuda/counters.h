// Counters by which the blocks of one launch wait for each other.
#pragma once
#include <cuda_runtime.h>

#include "ops/checks.h"

namespace pyfastpeft {

constexpr int kCounters = 132;

// kCounters counters on the current device that are zero, for a launch on `stream`; the launch leaves them zero.
// Launches on one stream share theirs, since they follow each other; one that is captured into a graph gets its own,
// for the graph may be replayed on any stream. Where none are left for another, `own` becomes a tensor beside t that
// holds them, and is cleared each time.
int* counters(const Tensor& t, cudaStream_t stream, OptionalTensor& own);

}  // namespace pyfastpeft
