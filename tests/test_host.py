"""The host module's counting sort and its NumPy stand-in, against the reference."""

import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyfastpeft.ops import host, reference, route


@pytest.fixture(params=["pybind11", "numpy"], scope="module")
def group_tokens(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(host, "AVAILABLE", False)
        elif not host.AVAILABLE:
            (pytest.fail if os.environ["PYFASTPEFT_REQUIRE_NATIVE"] == "1" else pytest.skip)(host.WHY_NOT)
        yield host.group_tokens


def expected(slots, num_adapters):
    order = torch.empty(len(slots), dtype=torch.int64)
    segments = torch.empty(num_adapters + 1, dtype=torch.int64)
    reference.group_tokens(torch.tensor(slots, dtype=torch.int64), order, segments)
    return order.tolist(), segments.tolist()


def check(group_tokens, slots, num_adapters):
    order, segments = group_tokens(slots, num_adapters)
    assert order.dtype == segments.dtype == np.int64
    assert (order.tolist(), segments.tolist()) == expected(slots.tolist(), num_adapters)


@given(st.data())
def test_equals_the_reference(group_tokens, data):
    num_adapters = data.draw(st.integers(1, 40))
    slots = data.draw(st.lists(st.integers(-1, num_adapters - 1), max_size=80))
    dtype = data.draw(st.sampled_from([np.int64, np.int32, np.int8]))
    check(group_tokens, np.array(slots, dtype), num_adapters)


def test_strided_slots(group_tokens):
    check(group_tokens, np.random.default_rng(0).integers(-1, 5, (60, 3))[::-2, 1], 5)


def test_many_tokens_keep_their_order_within_a_slot(group_tokens):
    slots = np.random.default_rng(0).integers(-1, 7, 100_003)
    order, segments = group_tokens(slots, 7)
    assert np.array_equal(np.sort(order), np.arange(len(slots)))
    for adapter, (start, end) in enumerate(pairwise(segments)):
        assert np.array_equal(order[start:end], np.flatnonzero(slots == adapter))


def test_slots_out_of_range_belong_to_no_adapter():
    host_module = pytest.importorskip("pyfastpeft._host")
    order, segments = host_module.group_tokens(np.array([7, -3, 0, 2, -1, 0, 9]), 3)
    assert segments.tolist() == [2, 4, 4, 5]
    assert order.tolist() == [1, 4, 2, 5, 3, 0, 6]


@pytest.mark.parametrize(
    ("slots", "num_adapters", "error", "message"),
    [
        (np.zeros((2, 3), np.int64), 4, ValueError, "slots has 2 dimensions"),
        (np.zeros(2, np.int64), -1, ValueError, "num_adapters is -1"),
        (np.zeros(2), 4, TypeError, "slots"),
    ],
)
def test_bad_arguments_are_refused(slots, num_adapters, error, message):
    host_module = pytest.importorskip("pyfastpeft._host")
    with pytest.raises(error, match=message):
        host_module.group_tokens(slots, num_adapters)


def test_routing_of_a_list_is_that_of_a_tensor(group_tokens):
    slots = [3, -1, 0, 3, 2, -1, 0]
    for given_list, given_tensor in zip(route(slots, 4), route(torch.tensor(slots), 4)):
        assert torch.equal(given_list, given_tensor)
