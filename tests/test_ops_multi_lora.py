"""An adapter for each token on every backend of this machine: multi_lora, multi_lora_linear, route."""

import functools

import pytest
import torch
from error_rule import (
    DTYPES,
    MIXED,
    assert_error_rule,
    multi_layer_inputs,
    multi_lora_inputs,
    poisoned_memory,
    random,
    unfused_multi_lora,
    unfused_multi_lora_linear,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import assert_multi_lora, assert_multi_lora_linear, backends, branch_backends, dtypes

from benchmarks.measure import saved_bytes
from pyfastpeft import ops

pytestmark = pytest.mark.usefixtures("two_threads", "on_backend")


# --- the error rule ---


@branch_backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 5, 3, 1, 1), (9, 33, 20, 4, 3), (64, 96, 130, 16, 5), (70, 40, 33, 3, 2)])
def test_multi_lora(backend, dtype, adapter_dtype, shape):
    slots = torch.randint(-1, shape[-1], (shape[0],))
    assert_multi_lora(multi_lora_inputs(*shape, dtype, adapter_dtype), slots, torch.randn(shape[-1]))


@branch_backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 5, 3, 1, 1), (9, 33, 20, 4, 3), (70, 40, 33, 3, 2)])
def test_multi_lora_linear(backend, dtype, adapter_dtype, shape):
    slots = torch.randint(-1, shape[-1], (shape[0],))
    ranks = torch.randint(0, shape[3] + 1, shape[-1:])
    assert_multi_lora_linear(multi_layer_inputs(*shape, dtype, adapter_dtype), slots, torch.randn(shape[-1]), ranks)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_under_many_adapters_trains_its_weight_and_bias(backend, dtype):
    slots = torch.randint(-1, 3, (2 * 3 * 5,))
    assert_multi_lora_linear(multi_layer_inputs((2, 3, 5), 24, 30, 4, 3, dtype, frozen=False), slots, torch.randn(3))
    assert_multi_lora_linear(multi_layer_inputs((30,), 24, 30, 4, 3, dtype, bias=False), slots, torch.randn(3))


@backends
@pytest.mark.parametrize("tokens", [12, 90])
@pytest.mark.parametrize("only", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_a_layer_under_many_adapters_forms_one_gradient_alone(backend, tokens, only):
    inputs = multi_layer_inputs(tokens, 20, 18, 4, 2, torch.float32)
    inputs = {name: t.detach().requires_grad_(name == only) for name, t in inputs.items()}
    assert_multi_lora_linear(inputs, torch.randint(-1, 2, (tokens,)), torch.randn(2))


@branch_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "r"), [(33, 8), (520, 24)])
def test_multi_lora_reads_no_rank_beyond_the_true_one(backend, dtype, k, r):
    inputs = multi_lora_inputs(20, k, 18, r, 4, dtype)
    ranks = torch.tensor([r, 3, 0, 1])
    slots = torch.randint(-1, 4, (20,), dtype=torch.int32)
    exact = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    for a, r in enumerate(ranks.tolist()):
        with torch.no_grad():
            inputs["lora_A"][a, r:] = float("nan")
            inputs["lora_B"][a, :, r:] = float("nan")
            exact["lora_A"][a, r:] = 0
            exact["lora_B"][a, :, r:] = 0

    def fused(y, x, lora_A, lora_B):
        hidden = {"lora_A": lora_A.clone(), "lora_B": lora_B.clone()}
        for a, r in enumerate(ranks.tolist()):
            hidden["lora_A"][a, r:] = float("nan")
            hidden["lora_B"][a, :, r:] = float("nan")
        return ops.multi_lora(y.clone(), x, **hidden, slots=slots, scaling=0.5, ranks=ranks)

    assert_error_rule(fused, functools.partial(unfused_multi_lora, slots=slots, scaling=[0.5] * 4, ranks=ranks), exact)
    y = ops.multi_lora(inputs["y"].clone(), inputs["x"], inputs["lora_A"], inputs["lora_B"], slots, 0.5, ranks)
    y.sum().backward()
    for a, r in enumerate(ranks.tolist()):
        assert not inputs["lora_A"].grad[a, r:].any()
        assert not inputs["lora_B"].grad[a, :, r:].any()
    assert torch.equal(y[slots == -1], inputs["y"][slots == -1])
    assert not inputs["x"].grad[(slots == -1) | (slots == 2)].any()
    assert all(torch.isfinite(t.grad).all() for t in inputs.values())


@branch_backends
def test_idle_adapters_get_zero_gradients_from_poisoned_memory(backend):
    inputs = multi_lora_inputs(6, 10, 12, 2, 5, torch.float32)
    slots = torch.tensor([3, 1, 3, -1, 1, 3])
    with poisoned_memory():
        ops.multi_lora(
            inputs["y"].clone(), inputs["x"], inputs["lora_A"], inputs["lora_B"], slots, 2.0
        ).sum().backward()
    for a in range(5):
        assert bool(inputs["lora_A"].grad[a].any()) == (a in (1, 3))
        assert bool(inputs["lora_B"].grad[a].any()) == (a in (1, 3))
    assert not inputs["x"].grad[3].any()


# --- shapes and strides ---


@branch_backends
@settings(max_examples=40)
@given(
    shape=st.tuples(*(st.integers(low, high) for low, high in ((1, 60), (8, 200), (8, 300), (1, 12), (1, 9)))),
    dtypes=st.sampled_from(DTYPES + MIXED),
    ranked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_multi_lora_takes_any_shape(backend, shape, dtypes, ranked, seed):
    torch.manual_seed(seed)
    t, _, _, r, num_adapters = shape
    ranks = torch.randint(0, r + 1, (num_adapters,)) if ranked else None
    slots = torch.randint(-1, num_adapters, (t,))
    assert_multi_lora(multi_lora_inputs(*shape, *dtypes), slots, torch.randn(num_adapters), ranks)


@backends
@pytest.mark.parametrize("trains", [("x",), ("lora_A",), ("lora_B",), ("x", "lora_A"), ("y", "lora_B")])
def test_multi_lora_forms_the_gradients_asked_for(backend, trains):
    inputs = multi_lora_inputs(12, 20, 18, 4, 3, torch.float32)
    inputs = {name: t.detach().requires_grad_(name in trains) for name, t in inputs.items()}
    assert_multi_lora(inputs, torch.randint(-1, 3, (12,)), torch.randn(3))


# --- gradients, registration, compilation ---


@backends
def test_two_runs_are_bit_identical(backend):
    def run():
        torch.manual_seed(2)
        inputs = multi_lora_inputs(40, 300, 260, 8, 6, torch.float32)
        out = ops.multi_lora(inputs["y"].clone(), inputs["x"], inputs["lora_A"], inputs["lora_B"], slots, 0.3)
        out.square().sum().backward()
        return [out, *(t.grad for t in inputs.values())]

    slots = torch.randint(-1, 6, (40,))
    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


# --- autocast, saved memory ---


@branch_backends
def test_autocast_of_a_layer_under_many_adapters(backend):
    inputs = multi_layer_inputs(6, 16, 12, 4, 3, torch.float32, frozen=False)
    options = {"slots": torch.tensor([0, -1, 2, 1, 1, 0]), "scaling": torch.tensor([0.5, -1.3, 0.4])}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.multi_lora_linear(**inputs, **options)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), unfused_multi_lora_linear(**inputs, **options), atol=0.03, rtol=0.03)
    out.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in inputs.values())


@branch_backends
def test_a_layer_under_many_adapters_keeps_x_s_and_a_routing(backend):
    inputs = multi_layer_inputs(64, 256, 128, 8, 3, torch.bfloat16, torch.float32)
    run = functools.partial(ops.multi_lora_linear, **inputs, slots=torch.arange(64) % 4 - 1, scaling=0.5)
    kept = saved_bytes(run, [inputs[name] for name in ("weight", "bias", "lora_A", "lora_B")])
    assert kept == 64 * 256 * 2 + 64 * 8 * 4 + (64 + 4) * 8 + 3 * 4


# --- 16-bit values, NaN and infinity ---


@branch_backends
def test_base_only_tokens_never_meet_a_nan_adapter(backend):
    x, y = random(5, 8, grad=False), random(5, 6, grad=False)
    slots = torch.tensor([-1, 0, -1, 1, -1])
    bad = torch.full((2, 3, 8), float("nan"))
    out = ops.multi_lora(y.clone(), x, bad, torch.ones(2, 6, 3), slots, 1.0)
    assert torch.equal(out[slots == -1], y[slots == -1])
    assert out[slots >= 0].isnan().all()


@branch_backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [6, 100])
def test_a_bad_adapter_reaches_its_own_tokens_alone(backend, value, tokens):
    inputs = {n: t.detach() for n, t in multi_layer_inputs(tokens, 24, 40, 4, 2, torch.bfloat16).items()}
    slots = torch.arange(tokens) % 3 - 1
    for bad in ("lora_A", "lora_B"):
        changed = inputs | {bad: inputs[bad].clone()}
        changed[bad][1, 0, 0] = value
        x, own = changed["x"].clone().requires_grad_(), slots == 1
        y = ops.multi_lora_linear(**changed | {"x": x}, slots=slots, scaling=0.5)
        y.sum().backward()
        reached, gradients = (~torch.isfinite(t) for t in (y, x.grad))
        assert reached[own].any(1).all()
        assert gradients[own].any(1).all()
        assert not reached[~own].any()
        assert not gradients[~own].any()


# --- routing ---


@backends
@settings(max_examples=30)
@given(slots=st.lists(st.integers(-1, 6), max_size=50))
def test_route_groups_tokens_stably(backend, slots):
    for given_slots in (slots, torch.tensor(slots, dtype=torch.int64), torch.tensor(slots, dtype=torch.int32)):
        routing = ops.route(given_slots, 7)
        bounds = routing.segments.tolist()
        assert sorted(routing.order.tolist()) == list(range(len(slots)))
        for a in range(7):
            tokens = routing.order[bounds[a] : bounds[a + 1]].tolist()
            assert tokens == [t for t, slot in enumerate(slots) if slot == a]


@backends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16])
def test_slots_of_narrow_integers(backend, dtype):
    slots = torch.tensor([0, 1, 2, 2], dtype=dtype)
    for given_slots in (slots, slots.numpy()):
        assert ops.route(given_slots, 200).order.tolist() == [0, 1, 2, 3]
        with pytest.raises(ValueError, match=r"slots is between 0 and 2; it must be in \[-1, 2\)"):
            ops.route(given_slots, 2)


@backends
def test_a_routing_serves_in_place_of_slots(backend):
    inputs = {n: t.detach() for n, t in multi_lora_inputs(9, 10, 12, 2, 3, torch.float32).items()}
    slots = torch.randint(-1, 3, (9,))
    y = inputs.pop("y")
    once = ops.multi_lora(y.clone(), **inputs, slots=slots, scaling=0.5)
    again = ops.multi_lora(y.clone(), **inputs, slots=ops.route(slots.tolist(), 3), scaling=0.5)
    assert torch.equal(once, again)


@pytest.mark.parametrize("capturing", [False, True])
def test_a_routing_from_the_host_waits_for_a_gpu_only_where_a_graph_would_keep_the_copy(monkeypatch, capturing):
    sent = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **options: sent.append((*args, options)) or tensor)
    ops.route([0, -1], 3, "cuda:1")
    assert sent == [(torch.device("cuda:1"), {"non_blocking": not capturing})] * 2


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_routing_made_by_hand_is_checked(backend):
    inputs = {n: t.detach() for n, t in multi_lora_inputs(4, 8, 6, 2, 1, torch.float32).items()}
    for order in ([0, 1, 2, 9], [0, 1, 1, 2], [-1, 0, 1, 2]):
        routing = ops.Routing(torch.tensor(order), torch.tensor([0, 4]))
        with pytest.raises(RuntimeError, match="order must be a permutation"):
            ops.multi_lora(**inputs, slots=routing, scaling=1.0)
