"""Who is measured: the problem of a case, and everybody who solves it.

Adapters are named after their dtype: "fp32" is PEFT's default whatever the base is, "16bit" is the base's own. All
providers of a case share x, weight and the adapters' values.
"""

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import DTYPES, IA3, Bottleneck, Case, Dora, Lora, LoraDelta, MultiLora, MultiLoraLinear
from pyfastpeft import ops
from pyfastpeft.ops import addmm, dispatch

SCALING = 2.0
OUR_ADDMM = "our-addmm"  # the name of our backend addmm, beside the peer of that name


class Call(NamedTuple):
    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]  # the tensors whose gradients are formed: x, then the adapter's; none: no backward pass


class Provider(NamedTuple):
    name: str
    build: Callable[["Problem", str | None], Call]
    adapters: str | None = None  # "fp32" or "16bit"; None: the base layer alone
    backend: str | None = None  # ours, forced

    def __call__(self, problem: "Problem") -> Call:
        return self.build(problem, self.adapters)


class Problem:
    """Random x [M, K], weight [N, K] and dy [M, N], scaled so that the output and its low-rank part are of order 1.
    Where the adapter part is alone, it is added to y [M, N]: in place, but by `formula` to y0 in a copy. On the meta
    device there are shapes alone."""

    def __init__(self, case: Case, device: str, seed: int = 0):
        self.case, self.device, self.dtype = case, device, DTYPES[case.dtype]
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
        self.x = self.random(case.M, case.K).requires_grad_(case.backward)
        self.weight = self.random(case.N, case.K) / case.K**0.5
        self.dy = self.random(case.M, case.N)
        if case.alone:
            self.y0 = self.random(case.M, case.N)
            self.y = self.y0.clone()
        values = [tensor.to(self.dtype) for tensor in self.make_adapters()]
        kinds = {"fp32": torch.float32} if case.dtype == "fp32" else {"fp32": torch.float32, "16bit": self.dtype}
        self.adapters = {
            kind: tuple(nn.Parameter(value.to(dtype), requires_grad=case.backward) for value in values)
            for kind, dtype in kinds.items()
        }

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).to(self.dtype)

    def leaves(self, adapters: str) -> tuple[Tensor, ...]:
        return self.x, *self.adapters[adapters]

    def make_adapters(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def formula(self, weight: Tensor, factor: Tensor | None, *leaves: Tensor) -> Tensor:
        """The op in plain PyTorch, in the dtypes of its arguments; `factor` [M, K] is dropout's."""
        raise NotImplementedError

    def base_output(self, weight: Tensor, x: Tensor) -> Tensor:
        """What `formula` adds to."""
        return self.y0.to(x.dtype, copy=True) if self.case.alone else F.linear(x, weight)

    def base(self) -> nn.Linear:
        linear = nn.Linear(self.case.K, self.case.N, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        return linear


class LoraProblem(Problem):
    def make_adapters(self):
        rank, K, N = self.case.rank, self.case.K, self.case.N
        return self.random(rank, K) / K**0.5, self.random(N, rank) / rank**0.5

    def formula(self, weight, factor, x, lora_A, lora_B):
        inner = x.to(lora_A.dtype) if factor is None else x.to(lora_A.dtype) * factor
        return (self.base_output(weight, x) + SCALING * F.linear(F.linear(inner, lora_A), lora_B)).to(x.dtype)


class DoraProblem(LoraProblem):
    """The magnitudes are about the norms of weight's rows. `formula` rounds what they scale to x's dtype, in which it
    is kept for their gradient."""

    def make_adapters(self):
        return *super().make_adapters(), (1 + 0.25 * self.random(self.case.N)).abs()

    def formula(self, weight, factor, x, lora_A, lora_B, magnitude):
        with torch.no_grad():
            norm = torch.linalg.vector_norm(weight + SCALING * (lora_B @ lora_A), dim=1)
        return (magnitude / norm * super().formula(weight, factor, x, lora_A, lora_B)).to(x.dtype)


class BottleneckProblem(Problem):
    def make_adapters(self):
        r, K, N = self.case.rank, self.case.K, self.case.N
        factors = self.random(r, K) / K**0.5, self.random(N, r) / r**0.5
        return factors[0], 0.5 * self.random(r), factors[1], 0.5 * self.random(N)

    def formula(self, weight, factor, x, down, down_bias, up, up_bias):
        residual = x if self.case.serial else self.base_output(weight, x)
        hidden = F.gelu(F.linear(x.to(down.dtype), down, down_bias))
        return (residual + F.linear(hidden, up, up_bias)).to(x.dtype)


class IA3Problem(Problem):
    def make_adapters(self):
        return (1 + 0.5 * self.random(self.case.K if self.case.feedforward else self.case.N),)

    def formula(self, weight, factor, x, ia3_l):
        if self.case.feedforward:
            return F.linear((x * ia3_l).to(x.dtype), weight)
        return (F.linear(x, weight) * ia3_l).to(x.dtype)


class MultiLoraProblem(Problem):
    def __init__(self, case, device, seed=0):
        super().__init__(case, device, seed)
        counts = torch.tensor(case.counts)
        order = torch.randperm(case.M // case.sequence, generator=torch.Generator().manual_seed(seed))
        sequences = torch.arange(len(counts)).repeat_interleave(counts).view(-1, case.sequence)
        self.slots = sequences[order].flatten().to(device)
        self.ranks = torch.tensor(case.ranks, device=device)
        self.scaling = 1 + torch.arange(len(counts), device=device) % 4 / 2

    def make_adapters(self):
        """lora_A [L, r, K] and lora_B [L, N, r], zero beyond every adapter's rank."""
        K, N, ranks = self.case.K, self.case.N, torch.tensor(self.case.ranks, device=self.device)
        used = torch.arange(max(self.case.ranks), device=self.device) < ranks[:, None]  # [L, r]
        lora_A = self.random(*used.shape, K) / K**0.5 * used[:, :, None]
        return lora_A, self.random(len(ranks), N, used.shape[1]) / max(self.case.ranks) ** 0.5 * used[:, None, :]

    def formula(self, weight, factor, x, lora_A, lora_B):
        y = self.base_output(weight, x)
        for a, scale in enumerate(self.scaling.tolist()):
            tokens = self.slots == a
            y[tokens] += (scale * F.linear(F.linear(x[tokens].to(lora_A.dtype), lora_A[a]), lora_B[a])).to(y.dtype)
        return y


PROBLEMS = {
    Lora: LoraProblem,
    LoraDelta: LoraProblem,
    Dora: DoraProblem,
    IA3: IA3Problem,
    Bottleneck: BottleneckProblem,
    MultiLora: MultiLoraProblem,
    MultiLoraLinear: MultiLoraProblem,
}


def problem(case: Case, device: str, seed: int = 0) -> Problem:
    return PROBLEMS[type(case)](case, device, seed)


# The frozen layer alone, and plain compositions of torch's own products.


def build_base(problem: Problem, _) -> Call:
    return Call(lambda: F.linear(problem.x, problem.weight), (problem.x,))


def base_output(problem: Problem) -> Tensor:
    """What adapters are added to in place; autograd sees no earlier call in y."""
    return problem.y.detach() if problem.case.alone else F.linear(problem.x, problem.weight)


def build_addmm(problem: LoraProblem, adapters: str) -> Call:
    """The low-rank product added in place."""
    x, lora_A, lora_B = leaves = problem.leaves(adapters)
    dropout = problem.case.dropout

    def forward():
        inner = F.dropout(x, dropout) if dropout else x
        return base_output(problem).addmm_(F.linear(inner, lora_A), lora_B.T, alpha=SCALING)

    return Call(forward, leaves)


def build_one_adapter_addmm(problem: MultiLoraProblem, adapters: str) -> Call:
    """One adapter for all tokens: no routing at all."""
    x, lora_A, lora_B = leaves = problem.leaves(adapters)
    rank, scale = problem.case.ranks[0], problem.scaling[0].item()
    shrink, expand = lora_A[0, :rank], lora_B[0, :, :rank].T
    return Call(lambda: base_output(problem).addmm_(F.linear(x, shrink), expand, alpha=scale), leaves)


def build_gather_bmm(problem: MultiLoraProblem, adapters: str) -> Call:
    """Every token's own copy of its adapter, padded to the largest rank; two batched products."""
    x, lora_A, lora_B = leaves = problem.leaves(adapters)

    def forward():
        s = torch.bmm(lora_A[problem.slots], x.unsqueeze(2)) * problem.scaling[problem.slots, None, None].to(x.dtype)
        y = base_output(problem)
        y.unsqueeze(2).baddbmm_(lora_B[problem.slots], s)
        return y

    return Call(forward, leaves)


def build_copy(problem: IA3Problem, _) -> Call:
    """Copies as many bytes as the passes of IA3 over activations read and write that are not passes of a product:
    forward 2 (one in, one out), backward 3 (two in, one out)."""
    case = problem.case
    elements = case.M * (case.K if case.feedforward else case.N) * (5 if case.backward else 2) // 2
    source = problem.random(elements)
    target = torch.empty_like(source)
    return Call(lambda: target.copy_(source), ())


# PEFT's own layers, made by get_peft_model on a model of one layer.


def peft_layer(base: nn.Linear, config, adapters: str, *others) -> nn.Module:
    from peft import get_peft_model

    holder = nn.Sequential(OrderedDict(linear=base))
    model = get_peft_model(holder, config, adapter_name="0", autocast_adapter_dtype=adapters == "fp32")
    for number, other in enumerate(others, start=1):
        model.add_adapter(str(number), other, autocast_adapter_dtype=adapters == "fp32")
    return holder.linear


def build_layer(problem: Problem, adapters: str) -> Call:
    layer, leaves = make_layer(problem, adapters)
    return Call(lambda: layer(problem.x), leaves)


def build_compile(problem: Problem, adapters: str) -> Call:
    layer, leaves = make_layer(problem, adapters)
    compiled = torch.compile(layer, dynamic=False)
    return Call(lambda: compiled(problem.x), leaves)


class UnfusedBottleneck(nn.Module):
    """A bottleneck adapter out of torch's modules, which PEFT has none of; `residual` is x if it is None."""

    def __init__(self, residual: Tensor | None, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor):
        super().__init__()
        self.residual = residual
        self.down, self.up = (nn.Linear(*factor.T.shape, device="meta") for factor in (down, up))
        self.down.weight, self.down.bias, self.up.weight, self.up.bias = down, down_bias, up, up_bias

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.residual is None else self.residual
        return (residual + self.up(F.gelu(self.down(x.to(self.down.weight.dtype))))).to(x.dtype)


def make_layer(problem: Problem, adapters: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if not isinstance(problem.case, Bottleneck):
        return make_peft(problem, adapters)
    residual = None if problem.case.serial else problem.y
    return UnfusedBottleneck(residual, *problem.adapters[adapters]), problem.leaves(adapters)


def make_peft(problem: Problem, adapters: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    from peft import IA3Config, LoraConfig

    case, leaves = problem.case, problem.leaves(adapters)
    if isinstance(case, IA3):
        config = IA3Config(target_modules=["linear"], feedforward_modules=["linear"] if case.feedforward else [])
        layer = peft_layer(problem.base(), config, adapters)
        vector = layer.ia3_l["0"]
        vector.data = leaves[1].detach().view(vector.shape)
        return layer, (problem.x, vector)
    options = dict(lora_alpha=SCALING * case.rank, lora_dropout=case.dropout, use_dora=isinstance(case, Dora))
    layer = peft_layer(problem.base(), LoraConfig(r=case.rank, target_modules=["linear"], **options), adapters)
    layer.lora_A["0"].weight, layer.lora_B["0"].weight, *magnitude = leaves[1:]
    if magnitude:
        (layer.lora_magnitude_vector["0"].weight,) = magnitude
    if case.alone:
        layer.base_layer = Given(problem.y)
    return layer, leaves


class Given(nn.Module):
    """Stands in for a base layer whose output is already there."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.y = y

    def forward(self, x: Tensor) -> Tensor:
        return self.y


def build_peft_mixed(problem: MultiLoraProblem, adapters: str) -> Call:
    """PEFT's forward with adapter_names. Where the base layer is not included, it is replaced by one that hands over y:
    PEFT's loop adds to y in place, so that what is left is the adapter part alone, with all of PEFT's own code around
    it."""
    from peft import LoraConfig

    x, lora_A, lora_B = leaves = problem.leaves(adapters)
    ranks, scaling = problem.case.ranks, problem.scaling.tolist()
    configs = [LoraConfig(r=r, lora_alpha=r * s, target_modules=["linear"]) for r, s in zip(ranks, scaling)]
    layer = peft_layer(problem.base(), configs[0], adapters, *configs[1:])
    for a, rank in enumerate(ranks):
        layer.lora_A[str(a)].weight = nn.Parameter(lora_A[a, :rank], requires_grad=False)
        layer.lora_B[str(a)].weight = nn.Parameter(lora_B[a, :, :rank].contiguous(), requires_grad=False)
    if problem.case.alone:
        layer.base_layer = Given(problem.y)
    layer.eval()
    names = [str(slot) for slot in problem.slots.tolist()]
    return Call(lambda: layer(x, adapter_names=names), leaves)


# Ours.


def build_ours(problem: Problem, adapters: str) -> Call:
    case, weight = problem.case, problem.weight
    x, *tensors = leaves = problem.leaves(adapters)
    if isinstance(case, IA3):
        return Call(lambda: ops.ia3_linear(x, weight, None, *tensors, case.feedforward), leaves)
    if isinstance(case, Bottleneck):
        residual = x if case.serial else problem.y
        return Call(lambda: ops.bottleneck(x, residual, *tensors, 1.0, "gelu"), leaves)
    if isinstance(case, LoraDelta):
        return Call(lambda: ops.lora_delta_(base_output(problem), x, *tensors, SCALING, case.dropout), leaves)
    if isinstance(case, Lora):
        op = ops.dora_linear if isinstance(case, Dora) else ops.lora_linear
        return Call(lambda: op(x, weight, None, *tensors, SCALING, case.dropout), leaves)
    scales = problem.scaling, problem.ranks if len(set(case.ranks)) > 1 else None
    if isinstance(case, MultiLoraLinear):
        routing = ops.route(problem.slots, len(case.counts))
        return Call(lambda: ops.multi_lora_linear(x, weight, None, *tensors, routing, *scales), leaves)
    return Call(lambda: ops.multi_lora(base_output(problem), x, *tensors, problem.slots, *scales), leaves)


def build_one_launch(problem: MultiLoraProblem, adapters: str) -> Call:
    """The same by the Triton kernel that shrinks and expands in one launch; the op takes it only where measured."""
    from pyfastpeft.kernels import blocks

    one_launch = {"half": [(blocks.ANY, blocks.entry(16, 64, 128, 4, 4))]}
    return under(mock.patch.dict(blocks.BLOCKS, multi_lora=one_launch), build_ours(problem, adapters))


def build_kept_mask(problem: LoraProblem, adapters: str) -> Call:
    """Dropout as the ops do it where no kernel is chosen to draw the mask: torch draws it, and keeps it."""
    return under(mock.patch.object(dispatch, "has_kernel", return_value=False), build_ours(problem, adapters))


def under(patch, call: Call) -> Call:
    """The call, whose forward pass runs in a context."""

    def forward():
        with patch:
            return call.forward()

    return Call(forward, call.leaves)


def backends(op: str, device: str) -> list[str]:
    """Our backends that serve an op on a device and are worth timing: on CPUs Triton is its interpreter, and addmm is
    among the peers."""
    rows = dispatch.TABLE[f"{op.removesuffix('_linear').removesuffix('_delta_')}_forward"]
    usable = [row.backend for row in rows if device in (row.devices or (device,))]
    return [name for name in usable if device == "cuda" or name not in ("triton", "addmm")]


def providers(case: Case, device: str) -> list[Provider]:
    """Everybody who can run a case on a device, the base layer first and ours last."""
    compiler = device == "cuda" or shutil.which(os.environ.get("CXX", "g++"))
    found = [Provider("base", build_base)]
    for adapters in ("fp32",) if case.dtype == "fp32" else ("fp32", "16bit"):
        peers = {}
        if isinstance(case, MultiLora):
            # PEFT's copies lists of token numbers to the device.
            if find_spec("peft") and case.mode != "graph" and not case.backward:
                peers["peft"] = build_peft_mixed
        elif name := layer_name(case):
            peers[name] = build_layer
            if compiler and case.compiled:
                peers["compile"] = build_compile
        if adapters == "16bit" or case.dtype == "fp32":  # torch's products take one dtype
            if isinstance(case, Lora) and not isinstance(case, Dora):
                peers["addmm"] = build_addmm
            if isinstance(case, MultiLora):
                peers["gather-bmm"] = build_gather_bmm
                if len(case.counts) == 1:
                    peers["addmm"] = build_one_adapter_addmm
        found += [Provider(f"{name}-{adapters}", build, adapters) for name, build in peers.items()]
        found += ours(case, device, adapters)
    return found


def layer_name(case: Case) -> str:
    """Whose layer computes what a case does; "" for nobody's."""
    if isinstance(case, Bottleneck):
        return "unfused"
    # With dropout, PEFT's DoRA drops the base layer's input, too.
    return "peft" if find_spec("peft") and not (isinstance(case, Dora) and case.dropout) else ""


def ours(case: Case, device: str, adapters: str) -> list[Provider]:
    """Our backends on a case, under adapters of one dtype."""
    names = backends(case.op, device)
    if isinstance(case, MultiLora) and case.mode == "graph":
        names.remove("reference")  # it reads the segments on the host, as addmm does where it cannot gather
        if case.backward or case.M * max(case.ranks) * (case.K + case.N) > addmm.GATHERED:
            names.remove("addmm")
    found = []
    for name in names:
        build = build_kept_mask if name == "addmm" and getattr(case, "dropout", 0.0) else build_ours
        found.append(Provider(f"{OUR_ADDMM if name == 'addmm' else name}-{adapters}", build, adapters, name))
    return found
