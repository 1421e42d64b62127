"""Native calls on the CPU: the same bits as the general path, which has all that is out of the ordinary."""

import functools
from contextlib import nullcontext, suppress

import pytest
import torch
from error_rule import DTYPES, MIXED, lora_inputs, multi_lora_inputs, poisoned_memory, random
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import SHAPES, dtypes, lora
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyfastpeft import ops
from pyfastpeft.ops import native_calls, reference

pytestmark = pytest.mark.usefixtures("two_threads", "on_backend")


def alike(run, tensors):
    """run(**tensors) by the general path, with gradients and without: the latter two in one native call."""

    def train():
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        out = run(**leaves)
        out.backward(torch.arange(out.numel()).reshape(out.shape).to(out.dtype) % 7 - 3)
        return [out.detach(), *(t.grad for t in leaves.values() if t.grad is not None)]

    with poisoned_memory():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native_calls, "mode", lambda *_: None)
            general = train()
        trained = train()
        before = {name: t.clone() for name, t in tensors.items()}
        with torch.no_grad():
            called = run(**tensors)
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())
    assert torch.equal(called, general[0])
    for ours, theirs in zip(trained, general):
        assert torch.equal(ours, theirs)


NATIVE_CALLS = (
    "lora_call",
    "lora_call_with_s",
    "lora_gradients",
    "lora_call_",
    "dora_call",
    "dora_gradients",
    "ia3_call",
    "ia3_gradients",
    "multi_lora_call",
    "multi_lora_call_",
)


@pytest.fixture
def worked(monkeypatch):
    """Whether every native call that was made did its work."""
    done = []
    for name in NATIVE_CALLS:

        def call(op, *args):
            result = op(*args)
            done.append(
                any(part is not None and part is not False for part in result)
                if type(result) is tuple
                else result is not None and result is not False
            )
            return result

        monkeypatch.setattr(native_calls, name, functools.partial(call, getattr(native_calls, name)))
    return done


@pytest.mark.parametrize("backend", ["cpu"])
@dtypes
@pytest.mark.parametrize("shape", [*SHAPES, ((2, 3), 20, 9, 4), ((0,), 5, 4, 2)])
def test_native_calls_give_the_same_bits(backend, dtype, adapter_dtype, shape, worked):
    inputs = {name: t.detach() for name, t in lora_inputs(*shape, dtype, adapter_dtype).items()}
    tokens = inputs["x"].shape[:-1].numel()
    alike(lora, inputs)
    alike(lambda bias, **rest: lora(**rest), inputs)
    magnitude = random(shape[2], dtype=adapter_dtype or dtype, grad=False)
    alike(functools.partial(ops.dora_linear, scaling=0.7), inputs | {"magnitude": magnitude})
    alike(lambda bias, **rest: ops.dora_linear(bias=None, scaling=0.7, **rest), inputs | {"magnitude": magnitude})
    y = random(*inputs["x"].shape[:-1], shape[2], dtype=dtype, grad=False)
    lora_A, lora_B = inputs["lora_A"], inputs["lora_B"]
    alike(
        lambda x, **ab: ops.lora_delta_(y.clone(), x, **ab, scaling=0.7),
        {"x": inputs["x"], "lora_A": lora_A, "lora_B": lora_B},
    )
    stacked = {"x": inputs["x"], "lora_A": torch.stack([lora_A, -lora_A]), "lora_B": torch.stack([lora_B, 2 * lora_B])}
    slots, scalings = torch.randint(-1, 2, (tokens,)), torch.randn(2, dtype=reference.accumulation(dtype))
    for ranks in (None, torch.tensor([shape[3] // 2, shape[3]])):
        for routing in (slots, ops.route(slots, 2)):
            for scaling in (scalings, 0.3):
                options = {"slots": routing, "scaling": scaling, "ranks": ranks}
                alike(lambda options=options, **t: ops.multi_lora(y.clone(), **t, **options), stacked)
                layer = functools.partial(ops.multi_lora_linear, **options, weight=inputs["weight"])
                alike(functools.partial(layer, bias=inputs["bias"]), stacked)
                alike(functools.partial(layer, bias=None), stacked)
    for feedforward in (False, True):
        vector = random(shape[1] if feedforward else shape[2], dtype=adapter_dtype or dtype, grad=False)
        scaled = {"x": inputs["x"], "weight": inputs["weight"], "ia3_l": vector}
        alike(functools.partial(ops.ia3_linear, feedforward=feedforward), scaled | {"bias": inputs["bias"]})
        alike(functools.partial(ops.ia3_linear, bias=None, feedforward=feedforward), scaled)
    assert worked == [tokens > 0] * (2 * 3 + 2 * 3 + 2 + 3 * 2 * 2 * 2 + 2 * 2 * 3)


@pytest.mark.parametrize("backend", ["cpu"])
@settings(max_examples=60)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (30, 70, 600, 9, 5))),
    dtypes=st.sampled_from(DTYPES + MIXED),
    gap=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_native_calls_give_the_same_bits_for_any_slots_and_strides_of_rows(backend, shape, dtypes, gap, seed):
    torch.manual_seed(seed)
    t, _, n, r, adapters = shape
    inputs = {name: tensor.detach() for name, tensor in multi_lora_inputs(*shape, *dtypes).items()}
    y = torch.zeros(t, n + gap, dtype=dtypes[0])[:, :n].copy_(inputs.pop("y"))
    slots, ranks = torch.randint(-1, adapters, (t,)), torch.randint(0, r + 1, (adapters,))
    general = ops.multi_lora(
        y.clone(), **inputs | {"x": inputs["x"].clone().requires_grad_()}, slots=slots, scaling=0.7, ranks=ranks
    )
    assert native_calls.multi_lora_call_(y, *inputs.values(), slots, None, None, 0.7, ranks)
    assert torch.equal(y, general)


def test_a_call_is_left_to_python_wherever_somebody_looks_on(worked):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    class Subclass(torch.Tensor):
        pass

    inputs = {name: t.detach() for name, t in lora_inputs(4, 8, 6, 2, torch.float32).items()}
    zeros, slots = torch.zeros(4, 6), torch.tensor([0, -1, 0, 0])

    def native_by(y=zeros, scaling=0.5, dropout_p=0.0, **changed):
        """Whether all six ops (True) or none (False) are done by their native calls."""
        x, weight, lora_A, lora_B, bias = (inputs | changed).values()
        worked.clear()
        with suppress(Exception):  # what the general path makes of it is for other tests
            ops.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p)
        with suppress(Exception):
            ops.lora_delta_(y, x, lora_A, lora_B, scaling, dropout_p)
        if dropout_p == 0:
            with suppress(Exception):
                ops.multi_lora(y, x, lora_A[None], lora_B[None], slots, scaling)
            with suppress(Exception):
                ops.multi_lora_linear(x, weight, bias, lora_A[None], lora_B[None], slots, scaling)
        if not changed.keys() - {"x"} and scaling == 0.5 and dropout_p == 0:
            with suppress(Exception):
                ops.ia3_linear(x, weight, bias, bias, False)
            with suppress(Exception):
                ops.dora_linear(x, weight, bias, lora_A, lora_B, bias, scaling)
        most = 6 - torch.is_autocast_enabled("cpu")  # DoRA's norm is that of the weight before it is cast
        assert sum(worked) in (0, most) or (torch.is_grad_enabled() and x.requires_grad)
        return any(worked)

    x = inputs["x"]
    assert native_by()
    with Mode():
        assert not native_by()
    with torch.autocast("cpu"):
        assert native_by()
        assert worked == [False, True] * 5 + [False]  # the op casts and calls itself without autocast
    with ops.use_backend("reference"):
        assert not native_by()
    with ops.use_backend("cpu"):
        assert native_by()
    with torch.autograd.forward_ad.dual_level():
        assert not native_by()
    with FakeTensorMode() as mode:
        assert not native_by(x=mode.from_tensor(x))
    for strange in (mode.from_tensor(x), x.as_subclass(Subclass), x.to("meta"), x.to_sparse(), None, [1.0], 1.0):
        assert not native_by(x=strange)
    for changed in (
        {"scaling": "high"},
        {"scaling": 1j},
        {"scaling": None},
        {"dropout_p": 0.1},
        {"lora_A": x[:2].int()},
    ):
        assert not native_by(**changed)
    trained = x.clone().requires_grad_()
    assert native_by(x=trained)
    assert worked == [True, True, True]  # forward passes of lora_linear, ia3_linear and dora_linear
    with torch.no_grad():
        assert native_by(x=trained)
    seen = []
    torch.vmap(lambda t: seen.append(native_by()) or t)(torch.zeros(2, 3))
    torch.func.grad(lambda t: seen.append(native_by()) or t.sum())(torch.zeros(2, 3))
    assert seen == [False, False]
    with torch.inference_mode():
        made = torch.zeros(4, 6)
        assert native_by(y=made)
    assert not native_calls.writable(made)
    assert not native_calls.writable(None)


@pytest.mark.parametrize("native", [True, False])
def test_inference_mode_forms_no_gradients_where_they_are_enabled(native):
    x, weight, lora_A, lora_B = random(4, 8, grad=False), random(6, 8), random(2, 8), random(6, 2)
    with torch.inference_mode(), torch.enable_grad(), nullcontext() if native else ops.use_backend("reference"):
        x = x.clone()
        for y in (
            ops.lora_linear(x, weight, None, lora_A, lora_B, 0.7),
            ops.dora_linear(x, weight, None, lora_A, lora_B, weight[:, 0], 0.7),
            ops.ia3_linear(x, weight, None, weight[:, 0], False),
            ops.multi_lora_linear(x, weight, None, lora_A[None], lora_B[None], torch.tensor([0, -1, 0, 0]), 0.7),
        ):
            assert not y.requires_grad


def test_an_output_that_is_the_negative_of_its_memory_is_written():
    x, lora_A, lora_B = random(4, 8, grad=False), random(2, 8, grad=False), random(6, 2, grad=False)
    slots = torch.tensor([0, -1, 0, 0])
    for op in (
        lambda y: ops.lora_delta_(y, x, lora_A, lora_B, 0.5),
        lambda y: ops.multi_lora(y, x, lora_A[None], lora_B[None], slots, 0.5),
    ):
        y = torch.randn(4, 6)
        negative = torch.complex(torch.zeros(4, 6), -y).conj().imag
        assert negative.is_neg()
        assert torch.equal(op(negative), op(y))
        assert torch.equal(negative, y)


def test_a_multi_lora_call_in_place_that_is_out_of_the_ordinary_writes_nothing():
    x, lora_A, lora_B = random(4, 8, grad=False), random(3, 2, 8, grad=False), random(3, 6, 2, grad=False)
    shared = torch.randn(8, 16)
    y, slots, ranks = torch.zeros(4, 6), torch.tensor([0, -1, 2, 1]), torch.tensor([2, 1, 0])
    plain = {"y": y, "x": x, "lora_A": lora_A, "lora_B": lora_B, "slots": slots, "segments": None}
    plain |= {"scalings": None, "scaling": 0.5, "ranks": ranks}
    for changed in (
        {"slots": torch.tensor([0, -2, 2, 1])},
        {"slots": torch.tensor([0, 3, 2, 1])},
        {"slots": slots.int()},
        {"slots": slots[:3]},
        {"slots": slots[:, None]},
        {"slots": slots.repeat_interleave(2)[::2]},
        {"slots": slots, "segments": torch.tensor([0, 1, 2, 4])},  # -1 is no token
        {"slots": torch.tensor([0, 1, 1, 3]), "segments": torch.tensor([0, 1, 2, 4])},
        {"slots": torch.arange(4), "segments": torch.tensor([0, 3, 2, 4])},
        {"slots": torch.arange(4), "segments": torch.tensor([0, 1, 2, 5])},
        {"slots": torch.arange(4), "segments": torch.tensor([-1, 1, 2, 4])},
        {"slots": torch.arange(4), "segments": torch.tensor([0, 1, 4])},
        {"slots": None},
        {"ranks": torch.tensor([2, 1, 3])},
        {"ranks": torch.tensor([2, -1, 0])},
        {"ranks": ranks.int()},
        {"ranks": ranks[:2]},
        {"scalings": torch.ones(3, dtype=torch.float64)},
        {"scalings": torch.ones(2)},
        {"y": torch.zeros(4, 5)},
        {"y": torch.zeros(3, 6)},
        {"y": torch.zeros(2, 2, 6)},
        {"y": torch.zeros(24)},
        {"y": torch.zeros(4, 6, dtype=torch.bfloat16)},
        {"y": torch.zeros(6, 4).T},
        {"y": torch.zeros(1, 6).expand(4, 6)},
        {"y": torch.zeros(9).as_strided((4, 6), (1, 1))},
        {"y": None},
        {"scaling": float("nan")},
        {"y": shared[:4, :6], "x": shared[:4, 5:13]},
        {"y": shared[:4, :6], "x": shared[2:6, 6:14]},
        {"y": shared.view(-1)[:24].view(4, 6), "lora_A": shared.view(-1)[23:71].view(3, 2, 8)},
        {"y": shared.view(-1)[35:59].view(4, 6), "lora_B": shared.view(-1)[:36].view(3, 6, 2)},
        {"x": torch.randn(8, 4).T},
        {"x": torch.randn(4, 7)},
        {"x": torch.zeros(4, 8, dtype=torch.int64), "y": torch.zeros(4, 6, dtype=torch.int64)},
        {"x": torch.tensor(1.0)},
        {"x": torch.zeros(0, 8), "y": torch.zeros(0, 6), "slots": slots[:0]},
        {"x": x.double(), "y": y.double()},
        {"lora_A": lora_A.bfloat16()},
        {"lora_A": lora_A.double(), "lora_B": lora_B.double()},
        {"lora_A": lora_A[0]},
        {"lora_A": lora_A[:2]},
        {"lora_A": torch.randn(3, 8, 2).mT},
        {"lora_A": lora_A.to("meta")},
        {"lora_A": lora_A.int(), "lora_B": lora_B.int()},
        {"lora_A": lora_A[:0], "lora_B": lora_B[:0]},
        {"lora_A": lora_A[:, :0], "lora_B": lora_B[:, :, :0]},
        {"lora_B": lora_B[:, :5]},
        {"lora_B": lora_B[0]},
        {"lora_B": lora_B[:, :, :1]},
    ):
        arguments = plain | changed
        before = arguments["y"] if arguments["y"] is None else arguments["y"].clone()
        assert native_calls.multi_lora_call_(**arguments) is False, changed
        assert before is None or torch.equal(arguments["y"], before)
    assert native_calls.multi_lora_call_(**plain)
    beside = plain | {"y": shared.view(-1)[:24].view(4, 6), "lora_A": shared.view(-1)[24:72].view(3, 2, 8)}
    assert native_calls.multi_lora_call_(**beside)


def test_a_multi_lora_call_that_is_out_of_the_ordinary_is_left_to_python():
    x, weight, bias = random(4, 8, grad=False), random(6, 8, grad=False), random(6, grad=False)
    lora_A, lora_B = random(3, 2, 8, grad=False), random(3, 6, 2, grad=False)
    plain = {"x": x, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B}
    plain |= {"slots": torch.tensor([0, -1, 2, 1]), "segments": None, "scalings": None, "scaling": 0.5, "ranks": None}
    for changed in (
        {"slots": torch.tensor([0, 3, 2, 1])},
        {"slots": torch.arange(4), "segments": torch.tensor([0, 3, 2, 4])},
        {"ranks": torch.tensor([2, 1, 3])},
        {"scalings": torch.ones(2)},
        {"scaling": float("inf")},
        {"x": torch.randn(8, 4).T},
        {"x": torch.randn(4, 7)},
        {"x": torch.tensor(1.0)},
        {"x": x[:0], "slots": torch.zeros(0, dtype=torch.int64)},
        {"x": x.double()},
        {"x": None},
        {"weight": weight[:5]},
        {"weight": weight[:, :7]},
        {"weight": weight[0]},
        {"weight": weight.bfloat16()},
        {"weight": weight.to("meta")},
        {"weight": None},
        {"bias": bias[:5]},
        {"bias": bias.double()},
        {"bias": random(12, grad=False)[::2]},
        {"lora_A": lora_A.bfloat16()},
        {"lora_A": torch.randn(3, 8, 2).mT},
        {"lora_B": lora_B[:, :5]},
    ):
        assert native_calls.multi_lora_call(**plain | changed) is None, changed
    assert native_calls.multi_lora_call(**plain).shape == (4, 6)
    assert native_calls.multi_lora_call(**plain | {"bias": None, "weight": random(8, 6, grad=False).T}).shape == (4, 6)


def test_a_lora_call_that_is_out_of_the_ordinary_is_left_to_python():
    x, weight, bias, lora_A, lora_B = (random(*s, grad=False) for s in ((4, 8), (6, 8), (6,), (2, 8), (6, 2)))
    plain = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "lora_A": lora_A,
        "lora_B": lora_B,
        "scaling": 0.5,
    }
    for changed in (
        {"weight": weight[:5]},
        {"weight": weight[:, :7]},
        {"weight": weight[0]},
        {"weight": weight[:0], "bias": bias[:0], "lora_B": lora_B[:0]},
        {"weight": weight.bfloat16()},
        {"weight": weight.to("meta")},
        {"weight": None},
        {"bias": bias[:5]},
        {"bias": bias[None]},
        {"bias": bias.half()},
        {"bias": bias.repeat_interleave(2)[::2]},
        {"lora_A": lora_A[:, :7]},
        {"lora_A": lora_A[:0], "lora_B": lora_B[:, :0]},
        {"lora_A": lora_A[None]},
        {"lora_A": torch.tensor(1.0)},
        {"lora_A": torch.randn(8, 2).T},
        {"lora_B": lora_B[:5]},
        {"lora_B": lora_B.half()},
        {"lora_A": lora_A.double(), "lora_B": lora_B.double()},
        {"x": x.double(), "weight": weight.double(), "bias": bias.double()},
        {"x": x[:0]},
        {"x": torch.randn(8, 4).T},
        {"scaling": float("nan")},
        {"scaling": float("-inf")},
    ):
        assert native_calls.lora_call(**plain | changed) is None, changed
        if not changed.keys() & {"weight", "bias"}:
            y = torch.zeros(*(plain | changed)["x"].shape[:-1], 6)
            in_place = {name: t for name, t in (plain | changed).items() if name not in ("weight", "bias")}
            assert native_calls.lora_call_(y, **in_place) is False
            assert not y.any()
    assert native_calls.lora_call(**plain | {"weight": torch.randn(8, 6).T}) is not None
    in_place = {"lora_A": lora_A, "lora_B": lora_B, "scaling": 0.5}
    for y in (torch.zeros(3, 6), torch.zeros(4, 5), torch.zeros(2, 2, 6), torch.zeros(4, 6).half(), x[:, :6], None):
        assert native_calls.lora_call_(y, x, **in_place) is False
    assert native_calls.lora_call_(torch.zeros(4, 6), x, **in_place)


def test_an_ia3_call_that_is_out_of_the_ordinary_is_left_to_python():
    x, weight, bias, inner, outer = (random(*s, grad=False) for s in ((4, 8), (6, 8), (6,), (8,), (6,)))
    plain = {"x": x, "weight": weight, "bias": bias, "ia3_l": outer, "feedforward": False, "keep_base": True}
    for changed in (
        {"weight": weight[:5]},
        {"weight": weight[:, :7]},
        {"weight": weight.bfloat16()},
        {"weight": weight.to("meta")},
        {"bias": bias[:5]},
        {"bias": bias.half()},
        {"ia3_l": inner},
        {"ia3_l": outer[:, None]},
        {"ia3_l": outer.double()},
        {"ia3_l": outer.int()},
        {"ia3_l": outer.to("meta")},
        {"ia3_l": outer.repeat_interleave(2)[::2]},
        {"ia3_l": None},
        {"feedforward": True},
        {"x": x.double(), "weight": weight.double(), "bias": bias.double()},
        {"x": x[:0]},
        {"x": torch.randn(8, 4).T},
    ):
        assert native_calls.ia3_call(**plain | changed) == (None, None), changed
    y, base = native_calls.ia3_call(**plain)
    assert torch.equal(y, base * outer)
    y, base = native_calls.ia3_call(**plain | {"ia3_l": inner, "feedforward": True, "keep_base": False})
    assert y is not None
    assert base is None
    dy = random(4, 6, grad=False)
    for strange in (dy[:0], torch.randn(6, 4).T, dy.expand(2, 4, 6), dy.to("meta")):
        assert native_calls.ia3_gradients(strange, None, weight, outer, False, strange, True, True) == (None, None)


def test_a_dora_call_that_is_out_of_the_ordinary_is_left_to_python():
    plain = {name: t.detach() for name, t in lora_inputs(4, 8, 6, 2, torch.float32).items()}
    x, weight, bias, lora_A, lora_B = (plain[name] for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    magnitude = torch.rand(6)
    plain |= {"magnitude": magnitude, "scaling": 0.5, "keep_unscaled": True}
    for changed in (
        {"weight": weight[:5]},
        {"weight": torch.randn(8, 6).T},
        {"weight": weight.bfloat16()},
        {"bias": bias[:5]},
        {"lora_A": lora_A[:1]},
        {"lora_A": lora_A.bfloat16()},
        {"lora_A": lora_A.to("meta")},
        {"lora_B": lora_B[:5]},
        {"magnitude": magnitude[:5]},
        {"magnitude": magnitude[:, None]},
        {"magnitude": magnitude.double()},
        {"magnitude": magnitude.int()},
        {"magnitude": magnitude.to("meta")},
        {"magnitude": magnitude.repeat_interleave(2)[::2]},
        {"magnitude": None},
        {"scaling": float("nan")},
        {"x": x[:0]},
        {"x": torch.randn(8, 4).T},
        {"x": x.double(), "weight": weight.double(), "bias": bias.double()},
    ):
        assert native_calls.dora_call(**plain | changed) == (None,) * 5, changed
    y, s, unscaled, scale, norm = native_calls.dora_call(**plain)
    assert torch.equal(y, unscaled * scale + bias)
    assert native_calls.dora_call(**plain | {"keep_unscaled": False})[2] is None
    dy, vectors, rest = random(4, 6, grad=False), (scale, norm), (0.5, 0.0, None, s)
    for strange in (dy[:0], torch.randn(6, 4).T, dy.expand(2, 4, 6), dy.to("meta")):
        given = strange, x, weight, lora_A, lora_B
        assert native_calls.lora_gradients(*given, *rest, True, True, True) == (None,) * 3
        assert native_calls.dora_gradients(*given, *vectors, *rest, unscaled, True, True, True, True) == (None,) * 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_native_call_is_traced_as_what_it_consists_of():
    inputs = {name: t.detach() for name, t in lora_inputs(4, 8, 6, 2, torch.float32).items()}
    lora_A, lora_B = inputs["lora_A"], inputs["lora_B"]

    def model(x):
        y = lora(**inputs | {"x": x})
        y = ops.multi_lora(ops.lora_delta_(y, x, lora_A, lora_B, 0.3), x, lora_A[None], lora_B[None], slots, 0.5)
        return ops.ia3_linear(x, inputs["weight"], inputs["bias"], y[0], False)

    slots, x = torch.tensor([0, -1, 0, 0]), random(4, 8, grad=False)
    traced = torch.jit.trace(model, inputs["x"], check_trace=False)
    assert torch.equal(traced(x), model(x))


def test_native_calls_compile_as_one_graph():
    inputs = [random(*s) for s in ((7, 8), (6, 8), (6,), (2, 8), (6, 2), (2, 2, 8), (2, 6, 2))]
    slots = torch.tensor([0, 1, -1, 1, 0, 0, 1])

    def model(x, weight, bias, lora_A, lora_B, many_A, many_B):
        y = ops.multi_lora(ops.lora_linear(x, weight, bias, lora_A, lora_B, 0.7), x, many_A, many_B, slots, 0.5)
        return ops.lora_delta_(y, x, lora_A, lora_B, 0.3)

    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(*inputs), model(*inputs))
