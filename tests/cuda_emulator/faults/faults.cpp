// Kernels with a fault each, and what the emulator says of them.
#include <cstdio>
#include <stdexcept>

#include "fibers.h"

static int flag;

static void never_reaches_the_barrier(void*) {
  if (threadIdx.x) return emulator::barrier();
  for (;;) emulator::spin();
}

static void is_not_in_its_own_mask(void*) {
  int value = 0;
  emulator::exchange(threadIdx.x == 3 ? 1u : ~0u, &value, sizeof value, [](void*) {});
}

static void leaves_before_a_warp_operation(void*) {
  int value = 0;
  if (threadIdx.x < 31) emulator::exchange(~0u, &value, sizeof value, [](void*) {});
}

static void waits_for_a_block_that_is_not_resident(void*) {
  if (blockIdx.x == 6) flag = 1;
  while (!flag) emulator::spin();
}

static void copies_from_between(void*) {
  static char bytes[48];
  emulator::copy_later(bytes, bytes + 17, 16, 8);
}

static void has_no_fault(void*) {
  if (blockIdx.x == 5) flag = 1;
  while (!flag) emulator::spin();
  if (threadIdx.x == 0) return;
  emulator::barrier();
}

int main() {
  for (auto kernel : {never_reaches_the_barrier, is_not_in_its_own_mask, leaves_before_a_warp_operation,
                      waits_for_a_block_that_is_not_resident, copies_from_between, has_no_fault}) {
    flag = 0;
    try {
      emulator::launch({7, 1, 1}, {32, 1, 1}, 0, kernel, nullptr);
      std::puts("ended");
    } catch (const std::runtime_error& error) {
      std::puts(error.what());
    }
  }
}
