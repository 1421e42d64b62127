// Tasks that threads share out among themselves.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace pyfastpeft {

// Tasks that one worker does in a row: none for count 0.
struct Run {
  int64_t begin, count;
};

// The tasks 0 .. n, n a multiple of `run`, in one range for each worker.
class Tasks {
 public:
  Tasks(int64_t n, int64_t run, int64_t workers) : run_(run), workers_(workers), ranges_(new Range[workers]) {
    for (int64_t i = 0; i < workers; ++i)
      ranges_[i].left = pack(i * (n / run) / workers * run, (i + 1) * (n / run) / workers * run);
  }

  // The worker's next tasks: the first that are left of its own, else the last of the worker with most left; `run` of them,
  // but one by one where no more than these are left there.
  Run take(int64_t worker) {
    for (int64_t from = worker; from >= 0; from = fullest()) {
      std::atomic<uint64_t>& left = ranges_[from].left;
      for (uint64_t seen = left; begin(seen) < end(seen);) {
        int64_t count = end(seen) - begin(seen) > run_ ? run_ : 1;
        bool own = from == worker;
        uint64_t then = own ? pack(begin(seen) + count, end(seen)) : pack(begin(seen), end(seen) - count);
        if (left.compare_exchange_weak(seen, then)) return {own ? begin(seen) : end(seen) - count, count};
      }
    }
    return {};
  }

  // The first task that is left of the worker's own, or -1.
  int64_t upcoming(int64_t worker) const {
    uint64_t seen = ranges_[worker].left;
    return begin(seen) < end(seen) ? begin(seen) : -1;
  }

 private:
  struct alignas(64) Range {
    std::atomic<uint64_t> left;
  };

  static uint64_t pack(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }
  static int64_t begin(uint64_t range) { return range >> 32; }
  static int64_t end(uint64_t range) { return range & 0xffffffff; }

  int64_t fullest() const {
    int64_t most = 0, found = -1;
    for (int64_t i = 0; i < workers_; ++i) {
      uint64_t seen = ranges_[i].left;
      if (begin(seen) < end(seen) && end(seen) - begin(seen) > most) most = end(seen) - begin(seen), found = i;
    }
    return found;
  }

  int64_t run_, workers_;
  std::unique_ptr<Range[]> ranges_;
};

// f(take, upcoming) on all threads, or in this one alone: take() gives it its next of n tasks, by runs as above, whoever is
// done first taking over what others have left; upcoming() is the task that it will most likely get after them, or -1.
template <class F>
void share_out(int64_t n, int64_t run, bool alone, const F& f) {
  int64_t workers = alone ? 1 : std::min<int64_t>(n / run, torch::stable::get_num_threads());
  Tasks tasks(n, run, workers);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      f([&] { return tasks.take(worker); }, [&] { return tasks.upcoming(worker); });
  });
}

}  // namespace pyfastpeft
