"""LoRALinear, IA3Linear and MultiLoRALinear: their formulas, merging, sharing, state and errors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from error_rule import assert_error_rule, poisoned_memory, unfused_ia3, unfused_lora, unfused_multi_lora
from torch import nn
from torch.func import functional_call

from pyfastpeft import ops
from pyfastpeft.layers import Bottleneck, IA3Linear, LoRALinear, MultiLoRABranch, MultiLoRALinear
from pyfastpeft.ops.reference import dropout_factor

K, N, L, R = 13, 9, 4, 6
SLOTS = torch.tensor([2, -1, 0, 2, 3, 0, -1, 1])
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def make(kind, **options):
    """A layer of every kind with random adapters."""
    layer = {
        "lora": lambda: LoRALinear(K, N, R, alpha=15, **options),
        "ia3": lambda: IA3Linear(K, N, feedforward=False, **options),
        "ia3 feedforward": lambda: IA3Linear(K, N, feedforward=True, **options),
        "multi_lora": lambda: MultiLoRALinear(K, N, L, R, alpha=15, **options),
        "scales": lambda: MultiLoRALinear(K, N, L, R, alpha=15, scales=True, **options),
    }[kind]()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("lora", "ia3")):
                parameter.normal_()
    if kind == "scales":  # slot 3 has LoRA
        layer.load_ia3(0, torch.randn(N), False)
        layer.load_adapter(1, torch.randn(3, K), torch.randn(N, 3), 0.5, torch.rand(N) + 0.5)
        layer.load_ia3(2, torch.randn(K), True)
    return layer


KINDS = ["lora", "ia3", "ia3 feedforward", "multi_lora", "scales"]


def call(layer, x):
    return layer(x, SLOTS) if isinstance(layer, MultiLoRALinear) else layer(x)


def formula(layer):
    """The unfused formula, as a function of x and of the layer's parameters."""
    if isinstance(layer, LoRALinear):
        return lambda x, weight, bias, lora_A, lora_B: unfused_lora(x, weight, bias, lora_A, lora_B, layer.scaling)
    if isinstance(layer, IA3Linear):
        return lambda x, weight, bias, ia3_l: unfused_ia3(x, weight, bias, ia3_l, layer.feedforward)
    if not layer.scales:
        return lambda x, weight, bias, lora_A, lora_B: unfused_multi_lora(
            F.linear(x, weight, bias), x, lora_A, lora_B, SLOTS, layer.scaling, layer.ranks
        )

    def scaled(x, weight, bias, lora_A, lora_B):
        # The last row is that of slot -1.
        scale_in, scale_out, shift = (
            F.pad(rows, (0, 0, 0, 1), value=value)[SLOTS].to(x.dtype)
            for rows, value in ((layer.scale_in, 1), (layer.scale_out, 1), (layer.shift, 0))
        )
        x = x * scale_in
        y = unfused_multi_lora(F.linear(x, weight, bias), x, lora_A, lora_B, SLOTS, layer.scaling, layer.ranks)
        return y * scale_out + shift

    return scaled


# --- formulas ---


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [*((dtype, None) for dtype in DTYPES), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients(kind, dtype, adapter_dtype):
    layer = make(kind, dtype=dtype, adapter_dtype=adapter_dtype)
    assert layer.weight.dtype == dtype
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {adapter_dtype or dtype}
    x = torch.randn(len(SLOTS), K, dtype=dtype, requires_grad=True)
    parameters = {name: p.detach().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}

    def fused(x, **parameters):
        return functional_call(layer, parameters, (x,) if isinstance(layer, (LoRALinear, IA3Linear)) else (x, SLOTS))

    assert_error_rule(fused, formula(layer), {"x": x, **parameters})


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_layer_computes_what_its_base_computes(kind):
    layer = make(kind)
    layer.reset_parameters()
    x = torch.randn(len(SLOTS), K)
    torch.testing.assert_close(call(layer, x), F.linear(x, layer.weight, layer.bias))


def test_initial_values():
    layer = LoRALinear(400, 300, 8)
    bound = 1 / math.sqrt(400)  # Kaiming-uniform with a = sqrt(5)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.abs().max() > 0.99 * bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not layer.lora_B.any()
    multi = MultiLoRALinear(400, 300, 3, 8)
    assert not multi.lora_B.any()
    assert multi.ranks.tolist() == [8, 8, 8]
    for lora_A in multi.lora_A:
        assert lora_A.abs().max() <= bound
        assert lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not torch.equal(multi.lora_A[0], multi.lora_A[1])
    assert (IA3Linear(4, 3).ia3_l == torch.ones(3)).all()
    assert (IA3Linear(4, 3, feedforward=True).ia3_l == torch.ones(4)).all()


def test_scaling():
    assert LoRALinear(K, N, 4).scaling == 1
    assert LoRALinear(K, N, 4, alpha=10).scaling == 2.5
    assert LoRALinear(K, N, 4, alpha=10, use_rslora=True).scaling == 5
    assert MultiLoRALinear(K, N, L, 4, alpha=10).scaling.tolist() == [2.5] * L


def test_dropout_in_training_mode_alone(monkeypatch):
    layer = make("lora", dropout_p=0.4)
    x = torch.randn(7, K)
    seeds = []
    seed = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: seeds.append(seed(*args, **kwargs)) or seeds[-1])
    dropped = layer(x)
    [drawn] = seeds
    masked = x * dropout_factor(drawn, 0.4, 7, K, x.dtype)
    branch = layer.scaling * masked @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(dropped, F.linear(x, layer.weight, layer.bias) + branch)
    layer.eval()
    x = x.requires_grad_(False)
    torch.testing.assert_close(layer(x), unfused_lora(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, 2.5))
    assert len(seeds) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_trains(kind):
    layer = make(kind)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(layer.state_dict())
    call(layer, torch.randn(len(SLOTS), K)).square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == ({"ia3_l"} if "ia3" in kind else {"lora_A", "lora_B"})


# --- from_linear ---


@pytest.mark.parametrize(
    "adapt",
    [
        lambda linear: LoRALinear.from_linear(linear, 3, alpha=6, dropout_p=0.1, use_rslora=True),
        lambda linear: IA3Linear.from_linear(linear, feedforward=True),
        lambda linear: MultiLoRALinear.from_linear(linear, 5, 3),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_the_weight(adapt, bias):
    linear = nn.Linear(K, N, bias=bias, dtype=torch.float64).eval()
    layer = adapt(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not any(p.requires_grad for p in linear.parameters())
    assert not layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    x = torch.randn(2, 3, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))


def test_from_linear_takes_the_weight_of_a_conv1d_as_a_view():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K)
    nn.init.normal_(conv.bias)
    layer = MultiLoRALinear.from_linear(conv, L, R)
    assert layer.weight.shape == (N, K)
    assert layer.weight.data_ptr() == conv.weight.data_ptr()
    assert not any(p.requires_grad for p in conv.parameters())
    layer.load_adapter(1, torch.randn(2, K), torch.randn(N, 2), 0.5)
    x = torch.randn(len(SLOTS), K)
    for each in (layer, LoRALinear.from_linear(conv, 2), IA3Linear.from_linear(conv)):
        torch.testing.assert_close(each(x), conv(x))
    expected = conv(x)
    rows = SLOTS == 1
    expected[rows] += 0.5 * x[rows] @ layer.lora_A[1, :2].T @ layer.lora_B[1, :, :2].T
    out = layer(x, SLOTS)
    torch.testing.assert_close(out[rows], expected[rows])
    torch.testing.assert_close(out[SLOTS == -1], expected[SLOTS == -1])


class Foreign(nn.Linear):
    """A layer that computes something of its own, whose output is a view of what it keeps for its backward pass."""

    def forward(self, x):
        return super().forward(x).sigmoid()[..., :]


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [*((dtype, None) for dtype in DTYPES), (torch.bfloat16, torch.float32)]
)
def test_a_branch_is_added_to_what_a_layer_of_any_kind_computes(dtype, adapter_dtype):
    torch.manual_seed(5)
    base = Foreign(K, N).to(dtype)
    layer = MultiLoRABranch(base, L, R, alpha=15, dtype=adapter_dtype)
    assert layer.lora_A.dtype == (adapter_dtype or dtype)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    with torch.no_grad():
        layer.lora_B.normal_()
    layer.load_adapter(1, torch.randn(2, K), torch.randn(N, 2), 0.5)
    x = torch.randn(len(SLOTS), K).to(dtype).requires_grad_()
    inputs = {"x": x, "weight": base.weight, "bias": base.bias} | dict(lora_A=layer.lora_A, lora_B=layer.lora_B)
    inputs = {name: t.detach().clone().requires_grad_(name not in ("weight", "bias")) for name, t in inputs.items()}

    def ours(x, weight, bias, lora_A, lora_B):
        given = {"base_layer.weight": weight, "base_layer.bias": bias, "lora_A": lora_A, "lora_B": lora_B}
        return functional_call(layer, given, (x, SLOTS))

    def unfused(x, weight, bias, lora_A, lora_B):
        y = F.linear(x, weight, bias).sigmoid()
        return unfused_multi_lora(y, x, lora_A, lora_B, SLOTS, layer.scaling, layer.ranks)

    assert_error_rule(ours, unfused, inputs)
    assert torch.equal(layer(x), base(x))
    layer.unload(2)
    torch.testing.assert_close(layer(x, SLOTS)[SLOTS == 2], base(x)[SLOTS == 2])


def test_what_a_branch_cannot_stand_beside():
    class Packed(nn.Linear):
        def __init__(self):
            super().__init__(K, N)
            self.weight = nn.Parameter(torch.ones(N, K, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x, None

    assert MultiLoRABranch(Packed(), 1, 1).lora_A.dtype == torch.float32
    with pytest.raises(TypeError, match="Packed: its output is a tuple; it must be a tensor"):
        MultiLoRABranch(Packed(), 1, 1)(torch.ones(2, K), torch.zeros(2, dtype=torch.int64))
    for given, options, message in (
        (nn.ReLU(), {}, "base_layer is a ReLU; it must be a module with in_features and out_features"),
        (torch.ones(N, K), {}, "base_layer is a Tensor"),
        (nn.Linear(K, N), {"rank": 0}, "rank is 0"),
        (nn.Linear(K, N), {"num_adapters": True}, "num_adapters is True"),
        (nn.Linear(K, N), {"alpha": "1"}, "alpha is '1'"),
        (nn.Linear(K, N), {"dtype": torch.int8}, "dtype is torch.int8"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"MultiLoRABranch: {message}"):
            MultiLoRABranch(given, **({"num_adapters": 2, "rank": 2} | options))
        assert all(p.requires_grad for p in given.parameters()) if isinstance(given, nn.Module) else True


@pytest.mark.parametrize("kind", [LoRALinear, IA3Linear, MultiLoRALinear])
def test_from_linear_refuses_what_is_not_exactly_a_linear_layer(kind):
    class Quantised(nn.Linear):
        pass

    options = {LoRALinear: (2,), IA3Linear: (), MultiLoRALinear: (2, 2)}[kind]
    for linear, name in ((Quantised(K, N), "Quantised"), (nn.Conv1d(K, N, 1), "Conv1d"), (torch.ones(2, 2), "Tensor")):
        with pytest.raises(TypeError, match=rf"linear is a {name}; it must be exactly a torch\.nn\.Linear"):
            kind.from_linear(linear, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "dropout": 0.1}, r"got an unexpected .* 'dropout'; its arguments are \(linear, rank"),
        ({}, "missing a required argument: 'rank'"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2, "adapter_dtype": torch.int32}, "adapter_dtype is"),
    ],
)
def test_a_refused_from_linear_leaves_the_linear_layer_as_it_was(options, message):
    linear = nn.Linear(K, N)
    with pytest.raises((TypeError, ValueError), match=rf"LoRALinear(\.from_linear)?: {message}"):
        LoRALinear.from_linear(linear, **options)
    assert linear.weight.requires_grad


# --- merging ---


def merge(layer):
    return layer.merge(2) if isinstance(layer, MultiLoRALinear) else layer.merge()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_rounds_once_and_unmerge_restores_every_bit(kind, dtype):
    layer = make(kind, dtype=dtype, adapter_dtype=torch.float32 if dtype == torch.bfloat16 else None)
    weight, bias = layer.weight, layer.bias
    bits = weight.clone(), bias.clone()
    exact, shift = weight.double(), bias.double()
    if kind == "lora":
        exact = exact + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    elif kind == "multi_lora":
        exact = exact + layer.scaling[2].double() * layer.lora_B[2].double() @ layer.lora_A[2].double()
    elif kind == "scales":
        exact = exact * layer.scale_in[2].double()
    elif kind == "ia3":
        exact, shift = exact * layer.ia3_l.double()[:, None], shift * layer.ia3_l.double()
    else:
        exact = exact * layer.ia3_l.double()
    merge(layer)
    assert layer.merged
    assert layer.weight.dtype == dtype
    # One rounding of a float32 sum is at most half a unit in the last place off, and a little for the sum.
    unit = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps
    assert ((layer.weight.double() - exact).abs() <= unit * (exact.abs() + 1)).all()
    assert ((layer.bias.double() - shift).abs() <= unit * (shift.abs() + 1)).all()
    x = torch.randn(5, K, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(weight, bits[0])  # whoever shares the original is not touched
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, bits[0])
    assert torch.equal(layer.bias, bits[1])
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_merging_twice_or_unmerging_too_often_is_an_error(kind):
    layer = make(kind)
    with pytest.raises(RuntimeError, match=r"unmerge\(\) needs a merged adapter"):
        layer.unmerge()
    merge(layer)
    with pytest.raises(RuntimeError, match="needs an unmerged weight; call unmerge"):
        merge(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_in_inference_mode_passes_gradients_on(kind):
    layer, x = make(kind), torch.randn(5, K, requires_grad=True)
    with torch.inference_mode():
        merge(layer)
    layer(x).backward(cotangent := torch.randn(5, N))
    torch.testing.assert_close(x.grad, cotangent @ layer.weight)


def test_merged_layers_move_and_copy():
    layer = make("lora", dtype=torch.float64)
    original = layer.weight.clone()
    layer.merge()
    twin = copy.deepcopy(layer).float()
    twin.unmerge()
    assert torch.equal(twin.weight, original.float())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_meets_no_merged_weights(kind):
    layer, other = make(kind), make(kind)
    plain = copy.deepcopy(other.state_dict())
    merge(layer)
    state = copy.deepcopy(layer.state_dict())
    assert state.keys() - plain.keys() == {"weight_is_merged"}
    with pytest.raises(RuntimeError, match=r"state_dict is one with merged weights for the layer '1'"):
        nn.Sequential(nn.Identity(), other).load_state_dict(nn.Sequential(nn.Identity(), layer).state_dict())
    for held in (plain, state):
        with pytest.raises(RuntimeError, match="state_dict is one with weights for the merged layer ''; it must be"):
            layer.load_state_dict(held, strict=False)
    for module, held in ((layer, state), (other, plain)):
        assert all(torch.equal(tensor, held[name]) for name, tensor in module.state_dict().items())
    layer.unmerge()
    layer.load_state_dict(plain)
    x = torch.randn(len(SLOTS), K)
    assert torch.equal(call(layer, x), call(other, x))


# --- MultiLoRALinear ---


def test_loading_adapters_of_smaller_rank():
    layer = make("multi_lora", dtype=torch.float32)
    x = torch.randn(len(SLOTS), K)
    lora_A, lora_B = torch.randn(2, K), torch.randn(N, 2)
    before = layer(x, SLOTS)
    with poisoned_memory():
        layer.load_adapter(2, lora_A.bfloat16(), lora_B.bfloat16(), 0.7)
    assert layer.ranks.tolist() == [R, R, 2, R]
    expected = before.clone()
    rows = SLOTS == 2
    own = LoRALinear.from_linear(nn.Linear(K, N), 2)
    own.weight, own.bias, own.scaling = layer.weight, layer.bias, 0.7
    own.lora_A.data, own.lora_B.data = lora_A.bfloat16().float(), lora_B.bfloat16().float()
    expected[rows] = own(x[rows])
    torch.testing.assert_close(layer(x, SLOTS), expected)
    assert not torch.allclose(expected, before)
    layer.merge(2)
    torch.testing.assert_close(layer(x[rows]), expected[rows])


def test_unloaded_slots_give_the_base():
    layer = make("multi_lora")
    x = torch.randn(len(SLOTS), K)
    with torch.no_grad():
        layer.lora_A[1].fill_(float("nan"))
    for slot in range(L):
        layer.unload(slot)
    torch.testing.assert_close(layer(x, SLOTS), layer(x))
    assert layer.ranks.tolist() == [0] * L


def test_slots_in_all_their_forms():
    layer = make("multi_lora")
    x = torch.randn(2, 4, K)
    expected = layer(x, SLOTS)
    assert torch.equal(layer(x, SLOTS.view(2, 4)), expected)
    assert torch.equal(layer(x, ops.route(SLOTS, L)), expected)
    torch.testing.assert_close(layer(x, torch.full((8,), -1)), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.merge(0)
    with pytest.raises(RuntimeError, match="slots need an unmerged weight"):
        layer(x, SLOTS)


def test_scaling_and_ranks_are_saved_and_keep_their_digits():
    layer = make("multi_lora")
    layer.load_adapter(1, torch.randn(3, K), torch.randn(N, 3), 0.1)
    twin = MultiLoRALinear(K, N, L, R)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(len(SLOTS), K)
    assert torch.equal(twin(x, SLOTS), layer(x, SLOTS))
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert layer.scaling[1] == torch.tensor(0.1)
    layer = make("scales")
    twin = MultiLoRALinear(K, N, L, R, scales=True)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x, SLOTS), layer(x, SLOTS))
    layer.bfloat16()
    assert all(torch.equal(getattr(layer, name), getattr(twin, name)) for name in ("scale_in", "scale_out", "shift"))


def of_slot(layer, slot, x, adapter):
    """What an adapter alone makes of x: (lora_A, lora_B, magnitude), (ia3_l, feedforward) or None."""
    weight, bias = layer.weight, layer.bias
    if adapter is None:
        return F.linear(x, weight, bias)
    if len(adapter) == 2:
        return unfused_ia3(x, weight, bias, *adapter)
    changed = weight + 0.7 * adapter[1] @ adapter[0]
    return F.linear(x, adapter[2][:, None] * changed / changed.norm(dim=1, keepdim=True), bias)


@pytest.mark.parametrize("bias", [True, False])
def test_slots_of_dora_and_ia3(bias):
    layer = MultiLoRALinear.from_linear(nn.Linear(K, N, bias), L, R, scales=True, empty=True)
    dora, x = (torch.randn(3, K), torch.randn(N, 3), torch.rand(N) + 0.5), torch.randn(len(SLOTS), K)
    adapters = [(torch.randn(N), False), dora, (torch.randn(K), True), None]
    for slot, adapter in enumerate(adapters[:3]):
        with poisoned_memory():
            if len(adapter) == 2:
                layer.load_ia3(slot, *adapter)
            else:
                layer.load_adapter(slot, *adapter[:2], 0.7, adapter[2])
    expected = [of_slot(layer, slot, row, adapters[slot]) for slot, row in zip(SLOTS, x)]
    for given in (SLOTS, SLOTS.int(), ops.route(SLOTS, L), ops.Routing(*ops.route(SLOTS, L))):
        torch.testing.assert_close(layer(x, given), torch.stack(expected))
    for slot in range(L):
        alone = layer(x, torch.full_like(SLOTS, slot))
        layer.merge(slot)
        torch.testing.assert_close(layer(x), alone)
        layer.unmerge()
    layer.load_adapter(2, *dora[:2], 0.5)  # nothing is left of what slots held
    layer.unload(0)
    expected = F.linear(x[SLOTS == 2], layer.weight + 0.5 * dora[1] @ dora[0], layer.bias)
    torch.testing.assert_close(layer(x, SLOTS)[SLOTS == 2], expected)
    torch.testing.assert_close(layer(x, SLOTS)[SLOTS == 0], layer(x)[SLOTS == 0])


def test_a_branch_with_scales():
    layer, x = MultiLoRABranch(Foreign(K, N), L, R, scales=True, empty=True), torch.randn(len(SLOTS), K)
    base, inner, outer = layer.base_layer, torch.randn(K), torch.randn(N)
    layer.load_ia3(0, inner, True)
    layer.load_ia3(2, outer, False)
    layer.load_adapter(3, *(dora := (torch.randn(2, K), torch.randn(N, 2))), 0.5, torch.ones(N))
    scale = 1 / (base.weight + 0.5 * dora[1] @ dora[0]).norm(dim=1)
    expected = base(torch.where((SLOTS == 0)[:, None], x * inner, x)) * torch.where((SLOTS == 2)[:, None], outer, 1)
    expected[4] = scale * (expected[4] + 0.5 * dora[1] @ dora[0] @ x[4] - base.bias) + base.bias
    torch.testing.assert_close(layer(x, SLOTS), expected)
    with pytest.raises(TypeError, match="merge: nothing can be merged into its base layer"):
        layer.merge(0)


# --- errors and representation ---


def multi(scales=False):
    return MultiLoRALinear(K, N, L, R, scales=scales)


def magnified(layer, magnitude):
    layer.load_adapter(0, torch.ones(2, K), torch.ones(N, 2), 1.0, magnitude)


class Int8(nn.Linear):
    def __init__(self):
        super().__init__(K, N)
        self.weight = nn.Parameter(torch.ones(N, K, dtype=torch.int8), requires_grad=False)


BAD = [
    (lambda: LoRALinear(K, N, 0), ValueError, "rank is 0"),
    (lambda: LoRALinear(K, N, 2.5), ValueError, "rank is 2.5"),
    (lambda: LoRALinear(K, N, True), ValueError, "rank is True"),
    (lambda: Bottleneck(K, 2)(None), TypeError, "x is None"),
    (lambda: Bottleneck(K, 2, activation=["relu"]), ValueError, r"activation is .*; it must be one of"),
    (lambda: LoRALinear(K, N, 2, dropout_p=1.0), ValueError, "dropout_p is 1.0"),
    (lambda: LoRALinear(K, N, 2, alpha="16"), TypeError, r"alpha is '16' \(str\); it must be a finite number"),
    (lambda: LoRALinear(K, N, "4"), ValueError, r"rank is '4' \(str\); it must be an integer >= 1"),
    (lambda: LoRALinear(K, N, 2, alpha=math.nan), ValueError, "alpha is nan .* a finite number"),
    (lambda: MultiLoRALinear(K, N, 2, 2, alpha=math.inf), ValueError, "alpha is inf .* a finite number"),
    (lambda: LoRALinear(K, N, 2, adapter_dtype=torch.int32), TypeError, r"adapter_dtype is torch.int32 \(dtype\)"),
    (lambda: IA3Linear(K, N, adapter_dtype="float32"), TypeError, r"adapter_dtype is 'float32' \(str\); .*float16"),
    (lambda: LoRALinear(K, N, 2, adapter_dtype=torch.float64), TypeError, "adapter_dtype is torch.float64 .* no wider"),
    (lambda: MultiLoRABranch(nn.Linear(K, N), 2, 2, dtype=torch.float64), TypeError, "dtype is torch.float64 .* wider"),
    (lambda: MultiLoRALinear(K, N, 0, 2), ValueError, "num_adapters is 0"),
    (lambda: MultiLoRALinear(K, N, "2", 2), ValueError, r"num_adapters is '2' \(str\)"),
    (lambda: MultiLoRALinear(K, N, 2, -1), ValueError, "rank is -1"),
    (lambda: LoRALinear(K, N, 2)(torch.randn(3, K + 1)), ValueError, "x is"),
    (lambda: multi()(torch.randn(3, K), torch.tensor([0, 1])), ValueError, r"slots is .* shape \[2\]"),
    (lambda: multi()(torch.randn(2, K), torch.tensor([0, L])), ValueError, f"slots is between 0 and {L}"),
    (lambda: multi().load_adapter(L, torch.ones(2, K), torch.ones(N, 2), 1.0), ValueError, f"slot is {L}"),
    (lambda: multi().load_adapter(0, torch.ones(R + 1, K), torch.ones(N, R + 1), 1.0), ValueError, "lora_A is"),
    (lambda: multi().load_adapter(0, torch.tensor(1.0), torch.ones(N, 2), 1.0), ValueError, "lora_A is"),
    (lambda: multi().load_adapter(0, torch.ones(2, K - 1), torch.ones(N, 2), 1.0), ValueError, "lora_A is"),
    (lambda: multi().load_adapter(0, torch.ones(2, K), torch.ones(N, 3), 1.0), ValueError, "lora_B is"),
    (lambda: multi().load_adapter(0, torch.ones(2, K).int(), torch.ones(N, 2), 1.0), TypeError, "lora_A is"),
    (lambda: multi().load_adapter(0, torch.ones(2, K), torch.ones(N, 2), None), TypeError, "scaling is None"),
    (lambda: multi().load_adapter(0, torch.ones(2, K), torch.ones(N, 2), math.inf), ValueError, "scaling is inf"),
    (lambda: magnified(multi(), torch.ones(N)), ValueError, r"magnitude is .*scales=False.* made with scales=True"),
    (lambda: magnified(multi(True), torch.ones(K)), ValueError, r"magnitude is .* of shape \[N\] = \[9\]"),
    (lambda: magnified(multi(True), [1.0]), TypeError, r"magnitude is \[1.0\]"),
    (
        lambda: magnified(MultiLoRABranch(Int8(), 2, 2, scales=True), torch.ones(N)),
        *(ValueError, "magnitude is .* must be None beside a layer that has no weight"),
    ),
    (lambda: multi().load_ia3(0, torch.ones(N), False), ValueError, r"ia3_l is .*scales=False.* made with scales=True"),
    (lambda: multi(True).load_ia3(0, torch.ones(N), True), ValueError, r"ia3_l is .* of shape \[K\] = \[13\]"),
    (lambda: multi(True).load_ia3(0, torch.ones(K), False), ValueError, r"ia3_l is .* of shape \[N\] = \[9\]"),
    (lambda: multi(True).load_ia3(L, torch.ones(N), False), ValueError, f"slot is {L}"),
    (lambda: multi(True)(torch.randn(3, K), torch.tensor([0, 1])), ValueError, r"slots is .* shape \[2\]"),
    (lambda: multi(True)(torch.randn(2, K), torch.tensor([0, L])), ValueError, f"slots is between 0 and {L}"),
    (lambda: multi(True)(torch.randn(2, K), torch.ones(2)), TypeError, "slots is .* an integer tensor"),
    (lambda: multi(True)(torch.randn(2, K), [0, 1]), TypeError, r"slots is \[0, 1\].* a tensor of T integers"),
    (lambda: multi(True)(torch.randn(2, K), ops.route([0], L)), ValueError, r"slots.order \[T\] is"),
    (lambda: multi().unload(-1), ValueError, "slot is -1"),
    (lambda: multi().unload(False), ValueError, "slot is False"),
    (lambda: multi().merge("a"), ValueError, r"slot is 'a' \(str\); it must be an integer"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_errors_name_the_argument(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_a_refused_adapter_leaves_the_slot_as_it_was():
    layer = make("multi_lora")
    before = copy.deepcopy(layer.state_dict())
    lora_A, lora_B = torch.ones(2, K), torch.ones(N, 2)
    for wrong in (
        {"lora_B": torch.ones(N + 1, 2)},
        {"lora_A": lora_A.to("meta")},
        {"lora_B": lora_B.to("meta")},
        {"scaling": math.nan},
    ):
        with pytest.raises(ValueError, match=f"load_adapter: {next(iter(wrong))} is"):
            layer.load_adapter(0, **{"lora_A": lora_A, "lora_B": lora_B, "scaling": 1.0} | wrong)
    layer.merge(1)
    for call in (lambda: layer.load_adapter(0, lora_A, lora_B, 1.0), lambda: layer.unload(0)):
        with pytest.raises(RuntimeError, match=r"load\w*\(\) needs an unmerged weight; call unmerge\(\) first"):
            call()
    layer.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_slot_takes_a_part_of_what_it_holds():
    layer = make("multi_lora")
    lora_A, lora_B = layer.lora_A[0, 1:4].clone(), layer.lora_B[0, :, 1:4].clone()
    layer.load_adapter(0, layer.lora_A[0, 1:4], layer.lora_B[0, :, 1:4], 1.0)
    assert torch.equal(layer.lora_A[0, :3], lora_A)
    assert torch.equal(layer.lora_B[0, :, :3], lora_B)
    assert not layer.lora_A[0, 3:].any()


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("loaded", [True, False])
def test_slots_are_loaded_in_inference_mode_and_outside(made, loaded):
    with torch.inference_mode(made):
        layer = make("multi_lora", dtype=torch.float32)
    with torch.inference_mode(loaded):
        lora_A, lora_B = torch.randn(2, K), torch.randn(N, 2)
        layer.load_adapter(0, lora_A, lora_B, 0.5)
        layer.unload(1)
    assert layer.ranks.tolist() == [2, 0, R, R]
    with torch.inference_mode():
        x, slots = torch.randn(2, K), torch.tensor([0, 1])
        expected = layer(x) + torch.tensor([0.5, 0.0])[:, None] * (x @ lora_A.T @ lora_B.T)
        torch.testing.assert_close(layer(x, slots), expected)


def test_representation():
    assert repr(make("lora", dropout_p=0.1)) == (
        "LoRALinear(in_features=13, out_features=9, bias=True, rank=6, scaling=2.5, dropout_p=0.1)"
    )
    assert repr(make("ia3", bias=False)) == "IA3Linear(in_features=13, out_features=9, bias=False, feedforward=False)"
    assert repr(make("multi_lora")) == (
        "MultiLoRALinear(in_features=13, out_features=9, bias=True, num_adapters=4, rank=6)"
    )
    assert repr(make("scales")).endswith(", num_adapters=4, rank=6, scales=True)")


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    layer = make(kind)
    x = torch.randn(len(SLOTS), K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x, SLOTS) if isinstance(layer, MultiLoRALinear) else compiled(x)
    torch.testing.assert_close(out, call(layer, x))
