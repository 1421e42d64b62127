// Compiled without sanitizers: under -fsanitize=thread every fiber is a thread, and only barriers, exchanges and
// atomics put them in order, so that the sanitizer finds races of a kernel.
#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef EMULATOR_FINDS_RACES
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void* address, unsigned long bytes);
extern "C" void __tsan_write_range(void* address, unsigned long bytes);
#define RELEASE(address) __tsan_release(address)
#define ACQUIRE(address) __tsan_acquire(address)
#else
#define RELEASE(address)
#define ACQUIRE(address)
#endif

// Saves the callee's registers on the stack, leaves that at *from, goes on where `to` was left.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch, . - emulator_switch
)");

emulator::Triple threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kIdleRounds = 2000;

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;
};

struct Warp {
  uint32_t arrived = 0;
  // A lane may bring its next value while another has yet to fetch the result of the last one.
  alignas(16) char values[32][kValueBytes];
};

struct Block {
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
  uint32_t arrived = 0, generation = 0, alive = 0;
  size_t first = 0;  // of its threads
};

struct Thread {
  void* stack = nullptr;  // where it was left
  Block* block = nullptr;
  Triple place, block_place;
  unsigned number = 0;  // in its block
  bool done = true, spun = false;
  // It may go on when (*word & bits) != blocked.
  const uint32_t* word = nullptr;
  uint32_t bits = 0, blocked = 0;
  std::vector<Copy> asked;
  std::deque<std::vector<Copy>> copies;
  void* fiber = nullptr;
};

Thread* running;
void* main_stack;
void* main_fiber;
void (*kernel)(void*);
void* kernel_argument;
std::string failure;

void leave() {
#ifdef EMULATOR_FINDS_RACES
  __tsan_switch_to_fiber(main_fiber, 1);
#endif
  emulator_switch(&running->stack, main_stack);
}

void resume(Thread& thread) {
  running = &thread;
  thread.spun = false;
  threadIdx = thread.place;
  blockIdx = thread.block_place;
#ifdef EMULATOR_FINDS_RACES
  __tsan_switch_to_fiber(thread.fiber, 1);
#endif
  emulator_switch(&main_stack, thread.stack);
}

void wait_while(const uint32_t* word, uint32_t bits, uint32_t blocked) {
  running->word = word;
  running->bits = bits;
  running->blocked = blocked;
  while ((*word & bits) == blocked) leave();
  running->word = nullptr;
}

void pass_barrier(Block& block) {
  if (block.arrived && block.arrived == block.alive) {
    block.arrived = 0;
    ++block.generation;
  }
}

void enter() {
  kernel(kernel_argument);
  Thread& thread = *running;
  RELEASE(thread.block);
  thread.done = true;
  --thread.block->alive;
  pass_barrier(*thread.block);
  leave();
}

char* stack(size_t number) {
  static std::vector<char*> stacks;
  while (stacks.size() <= number) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("the emulator has no memory for stacks");
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[number];
}

void start(Thread& thread, size_t number, Block& block, unsigned t, Triple index, Triple size) {
  thread.block = &block;
  thread.number = t;
  thread.place = {t % size.x, t / size.x % size.y, t / size.x / size.y};
  thread.block_place = index;
  thread.done = false;
  thread.word = nullptr;
  thread.asked.clear();
  thread.copies.clear();
  auto* top = reinterpret_cast<void**>(stack(number) + kStack);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(enter);
  thread.stack = top - 8;
#ifdef EMULATOR_FINDS_RACES
  if (!thread.fiber) thread.fiber = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(thread.fiber, 1);
  ACQUIRE(&main_stack);
  __tsan_switch_to_fiber(main_fiber, 1);
#endif
}

std::string told(const Thread& thread) {
  const Triple &b = thread.block_place, &t = thread.place;
  return "thread (" + std::to_string(t.x) + ", " + std::to_string(t.y) + ", " + std::to_string(t.z) + ") of block (" +
         std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
}

[[noreturn]] void give_up(std::vector<Thread>& threads, const std::string& why) {
  for (Thread& thread : threads) thread.done = true;
  throw std::runtime_error(why);
}

}  // namespace

void* shared() { return running->block->shared.get(); }

void launch(Triple grid, Triple size, size_t shared_bytes, void (*body)(void*), void* argument) {
  size_t per_block = size_t(size.x) * size.y * size.z, total = size_t(grid.x) * grid.y * grid.z;
  if (!per_block || per_block > 1024 || !total || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > size_t(shared_limit()))
    throw std::runtime_error("a launch that no GPU takes: " + std::to_string(total) + " blocks of " +
                             std::to_string(per_block) + " threads, " + std::to_string(shared_bytes) + " bytes shared");
  blockDim = size;
  gridDim = grid;
  kernel = body;
  kernel_argument = argument;
  size_t resident = std::min<size_t>(total, multiprocessors() * kBlocksPerMultiprocessor), next = 0, live = 0;
  static std::vector<Thread> threads;  // kept, with their fibers
  if (threads.size() < resident * per_block) threads.resize(resident * per_block);
  std::vector<Block> blocks(resident);
#ifdef EMULATOR_FINDS_RACES
  main_fiber = __tsan_get_current_fiber();
  RELEASE(&main_stack);
#endif
  static uint32_t random = 1;  // the order in which blocks and threads run is another one every round
  for (int idle = 0; next < total || live;) {
    for (size_t b = 0; b < resident && next < total; ++b) {
      if (blocks[b].alive) continue;
      Triple index{unsigned(next % grid.x), unsigned(next / grid.x % grid.y), unsigned(next / grid.x / grid.y)};
      blocks[b].warps = std::vector<Warp>((per_block + 31) / 32);
      blocks[b].shared.reset(new char[shared_bytes]);
      std::memset(blocks[b].shared.get(), 0xff, shared_bytes);  // NaN in every float dtype
      blocks[b].alive = per_block;
      blocks[b].arrived = 0;
      blocks[b].first = b * per_block;
      for (unsigned t = 0; t < per_block; ++t)
        start(threads[b * per_block + t], b * per_block + t, blocks[b], t, index, size);
      ++next;
      ++live;
    }
    random = random * 1664525 + 1013904223;
    bool progress = false;
    for (size_t i = 0; i < resident; ++i) {
      Block& block = blocks[(i + (random >> 8)) % resident];
      if (!block.alive) continue;
      for (size_t j = 0; j < per_block; ++j) {
        Thread& thread = threads[block.first + (j + (random >> 20)) % per_block];
        if (thread.done || (thread.word && (*thread.word & thread.bits) == thread.blocked)) continue;
        resume(thread);
        if (!failure.empty()) give_up(threads, std::exchange(failure, {}));
        progress |= !thread.spun;
      }
      if (!block.alive) --live;
    }
    idle = progress ? 0 : idle + 1;
    if (idle > kIdleRounds) {
      std::string message = "the threads of a kernel wait for each other: ";
      for (Thread& thread : threads)
        if (!thread.done && message.size() < 400) message += told(thread) + (thread.word ? "; " : " (spins); ");
      give_up(threads, message);
    }
  }
#ifdef EMULATOR_FINDS_RACES
  for (size_t t = 0; t < resident * per_block; ++t) {
    __tsan_switch_to_fiber(threads[t].fiber, 1);
    RELEASE(&main_stack);
  }
  __tsan_switch_to_fiber(main_fiber, 1);
  ACQUIRE(&main_stack);
#endif
}

void barrier() {
  Block& block = *running->block;
  uint32_t generation = block.generation;
  RELEASE(&block);
  ++block.arrived;
  pass_barrier(block);
  wait_while(&block.generation, ~0u, generation);
  ACQUIRE(&block);
}

void spin() {
  running->spun = true;
  leave();
}

void exchange(uint32_t mask, void* value, size_t size, void (*resolve)(void*)) {
  unsigned lane = running->number % 32;
  Warp& warp = running->block->warps[running->number / 32];
  uint32_t mine = 1u << lane;
  if (!(mask & mine)) {
    failure = told(*running) + " is not in the mask of its own warp operation";
    leave();
  }
  std::memcpy(warp.values[lane], value, size);
  RELEASE(&warp);
  warp.arrived |= mine;
  if ((warp.arrived & mask) == mask) {
    ACQUIRE(&warp);
    alignas(16) char values[32 * kValueBytes];
    for (int i = 0; i < 32; ++i) std::memcpy(values + i * size, warp.values[i], size);
    resolve(values);
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) std::memcpy(warp.values[i], values + i * size, size);
    warp.arrived &= ~mask;
    RELEASE(&warp);
  } else {
    wait_while(&warp.arrived, mine, mine);
    ACQUIRE(&warp);
  }
  std::memcpy(value, warp.values[lane], size);
}

void need_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  failure = told(*running) + " moves " + std::to_string(bytes) + " bytes at an address that is no multiple of them";
  leave();
}

void copy_later(void* to, const void* from, size_t bytes, size_t valid) {
  need_aligned(to, bytes);
  need_aligned(from, bytes);
  running->asked.push_back({to, from, bytes, valid});
}

void commit_copies() {
  running->copies.push_back(std::move(running->asked));
  running->asked.clear();
}

void make_copies(size_t but_latest) {
  while (running->copies.size() > but_latest) {
    for (const Copy& copy : running->copies.front()) {
#ifdef EMULATOR_FINDS_RACES
      __tsan_read_range(const_cast<void*>(copy.from), copy.valid);
      __tsan_write_range(copy.to, copy.bytes);
#endif
      std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    }
    running->copies.pop_front();
  }
}

namespace {

int setting(const char* name, int otherwise) {
  const char* given = std::getenv(name);
  return given ? std::atoi(given) : otherwise;
}

}  // namespace

int multiprocessors() { return setting("PYFASTPEFT_EMULATED_SMS", 3); }
int capability() { return setting("PYFASTPEFT_EMULATED_CAPABILITY", 9); }
int shared_limit() { return (capability() == 9 ? 227 : 99) * 1024; }
int device() { return setting("PYFASTPEFT_EMULATED_DEVICE", 0); }
int capture() { return setting("PYFASTPEFT_EMULATED_CAPTURE", 0); }

}  // namespace emulator
