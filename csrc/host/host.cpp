// Host code of every serving step, on NumPy arrays.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "group_tokens.h"

namespace py = pybind11;
using Integers = py::array_t<int64_t, py::array::c_style>;

static std::pair<Integers, Integers> group(const Integers& slots, int64_t num_adapters) {
  if (slots.ndim() != 1) {
    throw py::value_error("group_tokens: slots has " + std::to_string(slots.ndim()) + " dimensions; it must have one");
  }
  if (num_adapters < 0) {
    throw py::value_error("group_tokens: num_adapters is " + std::to_string(num_adapters) + "; it must be at least 0");
  }
  Integers order(slots.size()), segments(num_adapters + 1);
  group_tokens(slots.data(), slots.size(), num_adapters, order.mutable_data(), segments.mutable_data());
  return {order, segments};
}

PYBIND11_MODULE(_host, m) {
  m.def("group_tokens", &group, py::arg("slots"), py::arg("num_adapters"),
        "(order [T], segments [L + 1]): the tokens sorted by slot, stably; adapter a's are "
        "order[segments[a] : segments[a + 1]].");
}
