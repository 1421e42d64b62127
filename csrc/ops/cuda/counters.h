// Counters by which the blocks of one launch wait for each other.
#pragma once
#include <cuda_runtime.h>

namespace pyfastpeft {

constexpr int kCounters = 132;

// kCounters counters on the current device that are zero, for a launch on `stream`; the launch leaves them zero. Launches
// on one stream share theirs, since they follow each other; one that is captured into a graph gets its own, for the graph
// may be replayed on any stream. Null where none are left for another captured launch.
int* counters(cudaStream_t stream);

}  // namespace pyfastpeft
