// The threads of a launch as fibers: what a kernel needs of its surroundings, one after the other on one CPU thread.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

struct Triple {
  unsigned x = 1, y = 1, z = 1;
};

// Runs body(argument) once for every thread of the grid. Raises std::runtime_error if the threads wait for each other.
void launch(Triple grid, Triple block, size_t shared, void (*body)(void*), void* argument);

// The block's dynamic shared memory.
void* shared();

// Waits for all threads of the block that have not ended.
void barrier();

// Lets others run; for loops that wait for memory to change.
void spin();

// Waits for the lanes of `mask`, the caller's among them. Each brings a value of `size` bytes and takes away what
// resolve(values) makes of it, where values[i] is lane i's.
void exchange(uint32_t mask, void* value, size_t size, void (*resolve)(void* values));

// Ends the launch with a fault of the running thread, unless the address is a multiple of so many bytes.
void need_aligned(const void* address, size_t bytes);

// The copies that the running thread has asked for; they are made as late as they may be. Both addresses are multiples
// of `bytes`.
void copy_later(void* to, const void* from, size_t bytes, size_t valid);
void commit_copies();
void make_copies(size_t but_latest);

// How many blocks of a launch run at once: PYFASTPEFT_EMULATED_SMS (3) times 2.
int multiprocessors();
// The device's major compute capability: PYFASTPEFT_EMULATED_CAPABILITY (9).
int capability();
// Bytes of dynamic shared memory that a block may have: those of sm_90, else of sm_86, as few as on sm_89 and sm_120.
int shared_limit();
// The current device: PYFASTPEFT_EMULATED_DEVICE (0). All have the same memory.
int device();
// The capture that all streams take part in, which runs what it captures: PYFASTPEFT_EMULATED_CAPTURE (0: none).
int capture();
constexpr int kBlocksPerMultiprocessor = 2;

constexpr size_t kValueBytes = 64;

}  // namespace emulator

// Where the running fiber stands.
extern emulator::Triple threadIdx, blockIdx, blockDim, gridDim;
