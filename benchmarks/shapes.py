"""What is measured: cases, their useful work, and the sizes of the suite.

Useful work counts what the formula needs, whoever computes it, so that GFLOP/s and GB/s compare providers: a product of
[a, b] and [b, c] is 2abc FLOP; a pass (forward or backward) reads every operand once and writes every result once.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise, product, zip_longest
from math import ceil

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = ("tiny", "quick", "full")


@dataclass(frozen=True, kw_only=True)
class Case:
    """x [M, K] through weight [N, K]: one group of the report, on which all providers run in turn."""

    M: int
    K: int
    N: int
    dtype: str = "fp32"
    backward: bool = False  # gradients of x and of the adapter; weight is frozen
    mode: str = ""  # on CUDA "eager", or "graph": timed as a captured graph
    compiled: bool = True  # whether torch.compile of a peer is timed, too, which takes seconds to compile

    op = ""
    detail = ""
    alone = False  # whether the adapter part alone is computed, beside an output y [M, N] of the base layer

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype} {self.label}"

    @property
    def label(self) -> str:
        """What distinguishes cases of one op and dtype."""
        run = "forward+backward" if self.backward else "forward"
        shape = f"{self.K}x{self.N} M{self.M}"
        return " ".join(filter(None, (run, shape, self.detail, self.mode)))

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def base_work(self) -> tuple[int, int]:
        """(FLOP, bytes) of the base layer: y = x weight^T;  dx = dy weight."""
        passes = 1 + self.backward
        traffic = self.M * self.K + self.N * self.K + self.M * self.N
        return passes * 2 * self.M * self.N * self.K, passes * self.itemsize * traffic

    def alone_traffic(self) -> int:
        """Bytes of activations of an adapter part alone: x, y and the new y; backward: dy, x and dx."""
        elements = self.K + 2 * self.N + self.backward * (self.N + 2 * self.K)
        return self.M * elements * self.itemsize


@dataclass(frozen=True, kw_only=True)
class Lora(Case):
    rank: int = 16
    dropout: float = 0.0

    op = "lora_linear"

    @property
    def detail(self) -> str:
        return f"r{self.rank}" + (f" dropout {self.dropout}" if self.dropout else "")

    def work(self, adapter_itemsize: int) -> tuple[int, int]:
        """Base, s = x A^T and s B^T; backward: ds, dB, dA (which reads x once more) and ds A."""
        flop, traffic = self.base_work()
        parameters = self.rank * (self.K + self.N)
        flop += (6 if self.backward else 2) * self.M * parameters
        traffic += (3 if self.backward else 1) * parameters * adapter_itemsize
        return flop, traffic + self.backward * self.M * self.K * self.itemsize


@dataclass(frozen=True, kw_only=True)
class LoraDelta(Lora):
    """The low-rank branch alone: y += scaling x A^T B^T in place. `base` is the layer that it is added to."""

    op = "lora_delta_"
    alone = True

    def work(self, adapter_itemsize: int) -> tuple[int, int]:
        """s = x A^T and s B^T; backward: ds, dB, dA and ds A."""
        passes, parameters = 3 if self.backward else 1, self.rank * (self.K + self.N)
        return passes * 2 * self.M * parameters, self.alone_traffic() + passes * parameters * adapter_itemsize


@dataclass(frozen=True, kw_only=True)
class Dora(Lora):
    op = "dora_linear"

    def work(self, adapter_itemsize: int) -> tuple[int, int]:
        """LoRA's; the squares of weight and weight A^T, which the norm needs; the product by the scale. Backward: the
        products by the scale and by the unscaled output, which forward writes, and a sum."""
        flop, traffic = super().work(adapter_itemsize)
        flop += 2 * self.N * self.K * (1 + self.rank) + (4 if self.backward else 1) * self.M * self.N
        traffic += (3 if self.backward else 1) * self.N * adapter_itemsize
        return flop, traffic + self.backward * 2 * self.M * self.N * self.itemsize


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Case):
    """residual + gelu(x down^T + down_bias) up^T + up_bias, with down [r, K] and up [N, r]. `base` is the layer that
    it comes after (serial: the residual is x) or stands beside (parallel: that layer's output)."""

    rank: int = 64
    serial: bool = True

    op = "bottleneck"
    alone = True

    @property
    def detail(self) -> str:
        return f"r{self.rank} {'serial' if self.serial else 'parallel'}"

    def work(self, adapter_itemsize: int) -> tuple[int, int]:
        """s = x down^T and the product by up; backward: those of ds, dup, ddown and dx. A residual that is x is read
        with it."""
        passes, factors = 3 if self.backward else 1, self.rank * (self.K + self.N)
        traffic = self.alone_traffic() - self.serial * self.M * self.N * self.itemsize
        parameters = factors + self.rank + self.N
        return passes * 2 * self.M * factors, traffic + passes * parameters * adapter_itemsize


@dataclass(frozen=True, kw_only=True)
class IA3(Case):
    feedforward: bool

    op = "ia3_linear"

    @property
    def detail(self) -> str:
        return "feedforward" if self.feedforward else "output"

    def work(self, adapter_itemsize: int) -> tuple[int, int]:
        """Base and one product by l; backward: the products by l and by x (or the unscaled output, which forward
        writes), and a sum."""
        flop, traffic = self.base_work()
        scaled = self.K if self.feedforward else self.N
        flop += (4 if self.backward else 1) * self.M * scaled
        traffic += (3 if self.backward else 1) * scaled * adapter_itemsize
        kept = (1 if self.feedforward else 2) * self.M * scaled * self.itemsize
        return flop, traffic + self.backward * kept


@dataclass(frozen=True, kw_only=True)
class MultiLora(Case):
    """The adapter part alone: y += scaling x A^T B^T in place. `base` is the layer that it is added to."""

    counts: tuple[int, ...]  # tokens of every adapter
    ranks: tuple[int, ...]  # [len(counts)]
    mix: str = ""
    sequence: int = 1  # tokens of an adapter that stand together; such sequences stand in a random order

    op = "multi_lora"
    alone = True

    @property
    def detail(self) -> str:
        ranks = sorted(set(self.ranks))
        together = f"sequences of {self.sequence}" if self.sequence > 1 else ""
        return " ".join(filter(None, (f"r{','.join(map(str, ranks))} L{len(self.counts)}", self.mix, together)))

    def work(self, adapter_itemsize: int) -> tuple[int, int]:
        """s = x A^T and y += s B^T at every token's own rank; backward: ds, dB, dA and ds A. A pass reads every adapter
        once."""
        flop, parameters = self.branch_work()
        return flop, self.alone_traffic() + parameters * adapter_itemsize

    def branch_work(self) -> tuple[int, int]:
        """FLOP, and how many elements of adapters and their gradients are read or written."""
        features, passes = self.K + self.N, 3 if self.backward else 1
        flop = passes * sum(2 * count * rank * features for count, rank in zip(self.counts, self.ranks))
        return flop, passes * sum(self.ranks) * features


@dataclass(frozen=True, kw_only=True)
class MultiLoraLinear(MultiLora):
    """The base layer included; tokens are routed beforehand, as a model routes once for all its layers."""

    op = "multi_lora_linear"
    alone = False

    def work(self, adapter_itemsize: int) -> tuple[int, int]:
        """Base, s = x A^T and s B^T; backward: ds, dB, dA (which reads x once more) and ds A."""
        (flop, traffic), (branch, parameters) = self.base_work(), self.branch_work()
        traffic += parameters * adapter_itemsize + self.backward * self.M * self.K * self.itemsize
        return flop + branch, traffic


def popularity(mix: str, tokens: int) -> tuple[int, ...]:
    """Tokens of every adapter in Punica's mixes (Chen et al. 2023, section 7): each its own adapter (distinct), about
    sqrt(tokens) adapters alike (uniform) or each 1.5 times as popular as the next (skewed), one for all (identical)."""
    if mix == "distinct":
        return (1,) * tokens
    adapters = 1 if mix == "identical" else ceil(tokens**0.5)
    ratio = 1.5 if mix == "skewed" else 1.0
    weights = [ratio**-i for i in range(adapters)]
    edges = [round(tokens * sum(weights[:i]) / sum(weights)) for i in range(adapters + 1)]
    return tuple(high - low for low, high in pairwise(edges))


def mixes(M: int, K: int, N: int, **options) -> list[MultiLora]:
    """The four popularity mixes of M tokens, with mixed ranks 8, 16, 32 and 64."""
    cases = []
    for mix in ("distinct", "uniform", "skewed", "identical"):
        counts = popularity(mix, M)
        ranks = tuple(8 << i % 4 for i in range(len(counts)))
        cases.append(MultiLora(M=M, K=K, N=N, counts=counts, ranks=ranks, mix=mix, **options))
    return cases


def decode(M: int, K: int, N: int, adapters: int, rank: int = 16, kind: type = MultiLora, **options) -> MultiLora:
    """M tokens shared evenly by `adapters` of one rank."""
    return kind(M=M, K=K, N=N, counts=(M // adapters,) * adapters, ranks=(rank,) * adapters, **options)


def lora_cases(size: str, device: str) -> list[Lora]:
    if size == "tiny":
        shapes = [dict(M=3, dtype="fp32"), dict(M=5, dtype="bf16", backward=True, dropout=0.1)]
        return [Lora(K=64, N=48, rank=4, **shape) for shape in shapes]
    if device == "cuda":
        sides = [(4096, 4096)] if size == "quick" else [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)]
        tokens = (1, 32, 128, 512, 2048) if size == "quick" else (1, 32, 128, 512, 2048, 8192)
        forward = [*product(sides, tokens, ("bf16",))]
        training = [*product(sides, (2048,) if size == "quick" else (2048, 8192), ("bf16",))]
    elif size == "quick":
        forward = [*product([(1024, 1024), (4096, 4096)], (16, 128), ("fp32", "bf16"))]
        training = [*product([(1024, 1024)], (128,), ("fp32", "bf16"))]
    else:
        sides = [(1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008)]
        forward = [*product(sides, (1, 16, 128, 512), ("fp32", "bf16"))]
        training = [*product([(1024, 1024), (4096, 4096)], (128, 512), ("fp32",))]
        training += [*product([(1024, 1024)], (128, 512), ("bf16",))]  # stock bf16 gradients take seconds a call above
    cases = [Lora(M=M, K=K, N=N, dtype=dtype) for (K, N), M, dtype in forward]
    if size == "full":
        cases += [Lora(M=M, K=4096, N=4096, dtype=cases[0].dtype, rank=64) for M in (16, 128, 2048)]
    for ((K, N), M, dtype), dropout in product(training, (0.0, 0.1)):
        cases.append(Lora(M=M, K=K, N=N, dtype=dtype, backward=True, dropout=dropout))
    return cases


def ia3_cases(size: str, device: str) -> list[IA3]:
    if size == "tiny":
        return [IA3(M=3, K=64, N=48, feedforward=True, backward=True)]
    return [
        IA3(feedforward=feedforward, **shape)
        for shape, feedforward in product(linear_shapes(size, device, ("fp32", "bf16")), (True, False))
    ]


def lora_delta_cases(size: str, device: str) -> list[LoraDelta]:
    if size == "tiny":
        shapes = [dict(M=3), dict(M=5, dtype="bf16", backward=True, dropout=0.1)]
        return [LoraDelta(K=64, N=48, rank=4, **shape) for shape in shapes]
    return with_dropout([LoraDelta(**shape) for shape in linear_shapes(size, device)], device)


def dora_cases(size: str, device: str) -> list[Dora]:
    if size == "tiny":
        return [Dora(M=3, K=64, N=48, rank=4), Dora(M=5, K=64, N=48, rank=4, dtype="bf16", backward=True)]
    return with_dropout([Dora(**shape) for shape in linear_shapes(size, device)], device)


def bottleneck_cases(size: str, device: str) -> list[Bottleneck]:
    if size == "tiny":
        training = Bottleneck(M=5, K=48, N=48, rank=4, dtype="bf16", backward=True)
        return [Bottleneck(M=3, K=64, N=48, rank=4, serial=False), training]
    shapes = product(linear_shapes(size, device), (True,) if size == "quick" else (True, False))
    return [Bottleneck(serial=serial, **shape) for shape, serial in shapes]


def linear_shapes(size: str, device: str, quick_dtypes: tuple[str, ...] = ("fp32",)) -> list[dict]:
    """M, K, N, dtype and backward of ops that go with any linear layer."""
    if device == "cuda":
        quick = (32, False), (2048, False), (2048, True)
        runs = quick if size == "quick" else product((32, 2048, 8192), (False, True))
        side, dtypes = 4096, ("bf16",)
    else:
        runs = product((128,) if size == "quick" else (16, 128, 512), (False, True))
        side, dtypes = 1024, quick_dtypes if size == "quick" else ("fp32", "bf16")
    return [dict(M=M, K=side, N=side, dtype=dtype, backward=b) for (M, b), dtype in product(runs, dtypes)]


def with_dropout(cases: list[Lora], device: str) -> list[Lora]:
    """On CUDA, training with dropout, too: what draws the mask there is chosen by its time."""
    return cases + [replace(case, dropout=0.1) for case in cases if case.backward and device == "cuda"]


def multi_lora_cases(size: str, device: str) -> list[MultiLora]:
    if size == "tiny":
        return [*mixes(5, 64, 48), decode(6, 64, 48, 3, 4, backward=True, sequence=2)]
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16") if size == "full" else ("fp32",)
    wide = (64, 4096, 11008) if size == "full" or device == "cuda" else (32, 1024, 2752)
    cases = []
    for dtype in dtypes:
        cases += mixes(*wide, dtype=dtype)
        cases += [decode(64, 4096, 4096, adapters, dtype=dtype) for adapters in (1, 8, 64)]
    if device == "cuda":
        cases.append(decode(2048, 4096, 4096, 8, dtype="bf16", backward=True, sequence=256))
    return cases


def multi_lora_linear_cases(size: str, device: str) -> list[MultiLora]:
    """Decode; prefill and training, where tokens of a sequence stand together and fill blocks of 256; prefill of many
    adapters' tokens in any order. On a CPU the op is its two halves, which the other cases time."""
    case = partial(decode, kind=MultiLoraLinear)
    if size == "tiny":
        return [case(6, 64, 48, 3, 4), case(6, 64, 48, 3, 4, dtype="bf16", backward=True, sequence=2)]
    if device == "cpu":
        return []
    cases = [case(64, 4096, 4096, adapters, dtype="bf16") for adapters in (1, 8, 64)]
    cases += [case(256, 4096, 4096, adapters, dtype="bf16") for adapters in (8, 64)]
    for tokens, backward in product((2048,) if size == "quick" else (2048, 8192), (False, True)):
        cases.append(case(tokens, 4096, 4096, 8, dtype="bf16", backward=backward, sequence=256))
    return [*cases, case(2048, 4096, 4096, 64, dtype="bf16")]


CASES = {
    "lora_linear": lora_cases,
    "multi_lora": multi_lora_cases,
    "multi_lora_linear": multi_lora_linear_cases,
    "ia3_linear": ia3_cases,
    "lora_delta_": lora_delta_cases,
    "dora_linear": dora_cases,
    "bottleneck": bottleneck_cases,
}


def cases(op: str, size: str, device: str) -> list[Case]:
    """The cases of an op in one size of the suite; on CUDA each of them as a captured graph and eagerly. In the quick
    size there, only the first of them eagerly, and torch.compile in lora_linear's training alone."""
    found = CASES[op](size, device)
    if device != "cuda":
        return found
    graphs, eager = ([replace(case, mode=mode) for case in found] for mode in ("graph", "eager"))
    if size == "quick":
        found = [replace(case, compiled=case.backward and op == "lora_linear") for case in graphs]
        return [*found, replace(eager[0], compiled=False)]
    return graphs + eager


def all_cases(size: str, device: str) -> list[Case]:
    """The cases of all ops, one op after the other. On CUDA, where `make gpu` may have no time for all, the ops take
    turns, graphs before what runs eagerly, training first: two turns of the quick size have every kind of operands."""
    found = [cases(op, size, device) for op in CASES]
    if device != "cuda":
        return [*chain(*found)]
    turns = zip_longest(*(sorted(reversed(own), key=lambda case: case.mode == "eager") for own in found))
    return [case for turn in turns for case in turn if case]
