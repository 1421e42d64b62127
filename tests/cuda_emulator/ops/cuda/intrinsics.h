// Stands for csrc/ops/cuda/intrinsics.h, which says what these do.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace pyfastpeft {

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared());
}

template <class T>
uint32_t pack(float low, float high) {
  T pair[] = {T(low), T(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
}

template <class T>
float2 unpack(uint32_t bits) {
  T pair[2];
  std::memcpy(static_cast<void*>(pair), &bits, 4);
  return {float(pair[0]), float(pair[1])};
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    float d[4];
    uint32_t a[4], b[2];
  } mine;
  std::copy_n(d, 4, mine.d);
  std::copy_n(a, 4, mine.a);
  std::copy_n(b, 2, mine.b);
  emulator::exchange(~0u, &mine, sizeof mine, [](void* all) {
    auto* lanes = static_cast<Fragments*>(all);
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        float2 pair = unpack<T>(lanes[lane].a[i]);
        left[g + i % 2 * 8][2 * t + i / 2 * 8] = pair.x;
        left[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = pair.y;
      }
      for (int i = 0; i < 2; ++i) {
        float2 pair = unpack<T>(lanes[lane].b[i]);
        right[2 * t + 8 * i][g] = pair.x;
        right[2 * t + 8 * i + 1][g] = pair.y;
      }
    }
    for (int m = 0; m < 16; ++m) {
      float row[8] = {};
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) row[n] += left[m][k] * right[k][n];
      for (int n = 0; n < 8; ++n) lanes[m % 8 * 4 + n / 2].d[m / 8 * 2 + n % 2] += row[n];
    }
  });
  std::copy_n(mine.d, 4, d);
}

inline uint32_t tf32(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::isfinite(value) ? (bits + 0x1000) & ~0x1fffu : bits;
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    float d[4];
    uint32_t a[4], b[2];
  } mine;
  std::copy_n(d, 4, mine.d);
  std::copy_n(a, 4, mine.a);
  std::copy_n(b, 2, mine.b);
  emulator::exchange(~0u, &mine, sizeof mine, [](void* all) {
    auto* lanes = static_cast<Fragments*>(all);
    auto number = [](uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); };
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        float sum = 0;
        for (int k = 0; k < 8; ++k)
          sum += number(lanes[m % 8 * 4 + k % 4].a[m / 8 + k / 4 * 2]) * number(lanes[n * 4 + k % 4].b[k / 4]);
        lanes[m % 8 * 4 + n / 2].d[m / 8 * 2 + n % 2] += sum;
      }
  });
  std::copy_n(mine.d, 4, d);
}

template <bool transposed>
void load_matrices(uint32_t (&r)[4], const void* row) {
  struct Row {
    const void* row;
    uint32_t r[4];
  } mine{row, {}};
  emulator::need_aligned(row, 16);
  emulator::exchange(~0u, &mine, sizeof mine, [](void* all) {
    auto* lanes = static_cast<Row*>(all);
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(elements[i], lanes[8 * matrix + i].row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        int i = lane / 4, j = 2 * (lane % 4);
        uint16_t first = transposed ? elements[j][i] : elements[i][j];
        uint16_t second = transposed ? elements[j + 1][i] : elements[i][j + 1];
        lanes[lane].r[matrix] = first | uint32_t(second) << 16;
      }
    }
  });
  std::copy_n(mine.r, 4, r);
}
inline void ldmatrix(uint32_t (&r)[4], const void* row) { load_matrices<false>(r, row); }
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) { load_matrices<true>(r, row); }

inline void copy_async(void* shared, const void* global, int valid = 16) {
  emulator::copy_later(shared, global, 16, valid);
}
inline void copy_async_word(void* shared, const void* global, bool valid) {
  emulator::copy_later(shared, global, 4, valid ? 4 : 0);
}
inline void commit_async() { emulator::commit_copies(); }
template <int pending>
void wait_async() {
  emulator::make_copies(pending);
}

inline void store16(void* global, uint4 words) {
  emulator::need_aligned(global, 16);
  *static_cast<uint4*>(global) = words;
}

inline int add_release(int* count, int value) { return __atomic_fetch_add(count, value, __ATOMIC_ACQ_REL); }
inline int load_acquire(const int* count) {
  emulator::spin();
  return __atomic_load_n(count, __ATOMIC_ACQUIRE);
}

}  // namespace pyfastpeft
