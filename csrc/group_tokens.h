#pragma once

#include <algorithm>
#include <cstdint>

// A stable counting sort of tokens by slot: adapter a's tokens are order[segments[a] .. segments[a + 1]).
// Tokens of a slot < 0 stand before segments[0], those of a slot >= num_adapters after segments[num_adapters];
// both keep the order that they came in.
inline void group_tokens(const int64_t* slots,  // [T]
                         int64_t tokens,        // T
                         int64_t num_adapters,  // L
                         int64_t* order,        // out [T]
                         int64_t* segments) {   // out [L + 1]
  std::fill_n(segments, num_adapters + 1, 0);
  int64_t below = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    if (slots[t] < 0) {
      ++below;
    } else if (slots[t] < num_adapters) {
      ++segments[slots[t]];
    }
  }
  int64_t end = below;
  for (int64_t a = 0; a < num_adapters; ++a) {
    end = segments[a] += end;
  }
  segments[num_adapters] = end;
  // Filling every group from its end turns the ends in `segments` into starts.
  int64_t above = tokens;
  for (int64_t t = tokens; t-- > 0;) {
    int64_t& position = slots[t] < 0 ? below : slots[t] < num_adapters ? segments[slots[t]] : above;
    order[--position] = t;
  }
}
