"""The figures on a GPU: against the base layer, PEFT, addmm_ and copying.

All run in the same rounds, as captured graphs that go through so many problems that none finds its tensors in the L2
cache. Each of our backends is measured; the best one counts, and the note names them all.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks import choose
from benchmarks.figures import Figure
from benchmarks.measure import Effort, Measurer, Result, ratios, short, spread
from benchmarks.providers import Provider, build_copy, build_one_launch, ours, providers
from benchmarks.shapes import IA3, Case, Lora, MultiLoraLinear, decode

TOKENS, RANK = 8192, 16
# K, N; forward over base; forward and backward over PEFT with 16-bit adapters, and over addmm
LAYERS = (
    (4096, 4096, 1.08, 1.25, 1.08),
    (4096, 14336, 1.04, 1.20, 1.06),
    (14336, 4096, 1.08, 1.12, 1.03),
    (8192, 8192, 1.05, 1.12, 1.03),
)


class Bench:
    """Measures cases until `seconds` are over. `entries` gets one for each result, as the suite makes them."""

    def __init__(self, device: str, tiny: bool, seconds: float, entries: list[dict]):
        self.device, self.entries, self.until = device, entries, time.monotonic() + seconds
        self.mode = "graph" if device == "cuda" else ""
        self.effort, self.shrink = (Effort(0.0, 3, 0.0), 64) if tiny else (Effort(1.5, 15), 1)
        self.measurer = Measurer(device, patience=30.0)  # nothing here takes long to compile; time is short

    def contest(self, case: Case, peers: tuple[str, ...], *contenders: Provider, weigh=False) -> dict[str, Result]:
        """The peers of that name and the contenders, by name."""
        entrants = [p for p in providers(case, self.device) if p.name in peers] + [*contenders]
        if time.monotonic() > self.until:
            found = {p.name: Result(case, p, f"{p.name} on {case.name}: time was up") for p in entrants}
        else:
            found = self.measurer(case, self.effort, entrants, weigh)
        for result in found.values():
            if result.seconds and found["base"].seconds and result.provider.build is not build_copy:
                self.entries.append(self.entry(result, found["base"]))
        missing = {name: Result(case, Provider(name, None), f"{name}: not installed") for name in peers}
        return missing | found

    def entry(self, result: Result, base: Result) -> dict:
        case, provider = result.case, result.provider
        info = short(result.summary(base)) | {"mode": case.mode}
        if provider.backend and provider.build is not build_one_launch:
            info["operands"] = choose.operands(case, provider.adapters)
        return {"group": case.name, "extra_info": info}

    def ours(self, case: Case, adapters: str = "16bit") -> list[Provider]:
        """Our backends but the reference, which is the fallback where there is no other."""
        return [provider for provider in ours(case, self.device, adapters) if provider.backend != "reference"]


def best(
    name: str,
    relation: str,
    limit: float,
    found: dict[str, Result],
    contenders: list[Provider],
    value: Callable[[Result], list[float]],
    against: tuple[str, ...] = ("base",),
) -> Figure:
    """The figure of the best of the contenders; value(result) gives it for every round, from what `against` names."""
    lacking = [found[peer].refused for peer in against if not found[peer].seconds]
    timed = [] if lacking else [p for p in contenders if found[p.name].seconds]
    values = {label(provider): value(found[provider.name]) for provider in timed}
    reasons = lacking or [found[provider.name].refused for provider in contenders]
    return choice(name, relation, limit, values, [reason for reason in reasons if reason])


def choice(name: str, relation: str, limit: float, values: dict[str, list[float]], reasons: list[str]) -> Figure:
    """The figure of the best of `values`, by name; `reasons` tell why others have none."""
    medians = {label: spread(each)["median"] for label, each in values.items()}
    order = sorted(medians, key=medians.get, reverse=relation == ">=")
    note = "; ".join([*(f"{label} {medians[label]:.3g}" for label in order), *(reason[:200] for reason in reasons)])
    return Figure(name, relation, limit, values[order[0]] if order else [], note=note, failed=not order)


def label(provider: Provider) -> str:
    return provider.name.rpartition("-")[0]


def layer(bench: Bench, K: int, N: int, over_base: float, over_peft: float, over_addmm: float) -> Iterator[Figure]:
    """Adapters of the base's dtype."""
    case = Lora(
        M=TOKENS // bench.shrink, K=K // bench.shrink, N=N // bench.shrink, rank=RANK, dtype="bf16", mode=bench.mode
    )
    peers = "base", "peft-16bit", "addmm-16bit"
    found = bench.contest(case, peers, *bench.ours(case))
    values = lambda result: ratios(result, found["base"])  # noqa: E731
    yield best(f"{case.name}: time over base", "<=", over_base, found, bench.ours(case), values)
    case = replace(case, backward=True)
    trained = bench.contest(case, peers, *bench.ours(case))
    for peer, limit in (("peft-16bit", over_peft), ("addmm-16bit", over_addmm)):
        name = f"{case.name}: speed over {peer.partition('-')[0]}, 16-bit adapters"
        yield best(name, ">=", limit, trained, bench.ours(case), faster_than(trained[peer]), (peer,))


def faster_than(peer: Result) -> Callable[[Result], list[float]]:
    return lambda result: ratios(peer, result)


def first_layer(bench: Bench) -> Iterator[Figure]:
    yield from layer(bench, *LAYERS[0])


def other_layers(bench: Bench) -> Iterator[Figure]:
    for each in LAYERS[1:]:
        yield from layer(bench, *each)


def default_adapters(bench: Bench) -> Iterator[Figure]:
    """PEFT's default: float32 adapters; and dropout, whose mask is not kept."""
    side, M = 4096 // bench.shrink, TOKENS // bench.shrink
    case = Lora(M=M, K=side, N=side, rank=RANK, dtype="bf16", backward=True, dropout=0.1, mode=bench.mode)
    contenders = bench.ours(case, "fp32")
    found = bench.contest(case, ("base", "peft-fp32"), *contenders, weigh=True)
    name = f"{case.name}: speed over peft, fp32 adapters"
    yield best(name, ">=", 1.8, found, contenders, faster_than(found["peft-fp32"]), ("peft-fp32",))
    kept = M * side * case.itemsize + M * RANK * 4 + 8
    name = f"{case.name}: bytes saved for backward, over x + M r + seed = {kept:,}"
    yield best(name, "<=", 1.0, found, contenders, lambda result: [result.saved_bytes / kept])


def decoding(bench: Bench) -> Iterator[Figure]:
    """One token each of 64 requests, of one adapter or of one each; the routing is made before."""
    shape = dict(K=4096 // bench.shrink, N=4096 // bench.shrink, dtype="bf16", mode=bench.mode)
    alone = Lora(M=64, rank=RANK, **shape)
    single = bench.contest(alone, ("base",), *bench.ours(alone))
    for adapters, limit in ((1, 1.15), (64, 1.55)):
        case = decode(64, shape["K"], shape["N"], adapters, RANK, MultiLoraLinear, dtype="bf16", mode=bench.mode)
        contenders = bench.ours(case)
        one_launch = [Provider("triton-one-launch-16bit", build_one_launch, "16bit", "triton")]
        if not any(provider.backend == "triton" for provider in contenders):
            one_launch = []
        found = bench.contest(case, ("base",), *contenders, *one_launch)
        named = [(label(p), found["base"], found[p.name]) for p in (*contenders, *one_launch)]
        if adapters == 1:
            named += [(f"lora_linear {label(p)}", single["base"], single[p.name]) for p in bench.ours(alone)]
        values = {name: ratios(mine, base) for name, base, mine in named if base.seconds and mine.seconds}
        reasons = [mine.refused or base.refused for _, base, mine in named if not (base.seconds and mine.seconds)]
        yield choice(f"{case.name}: time over base", "<=", limit, values, reasons)
        together = [p for p in (*contenders, *one_launch) if label(p) in ("cuda", "triton-one-launch")]
        if one_launch:
            name = f"{case.name}: time with one launch, over two"
            apart = found["triton-16bit"]
            yield best(name, "<=", 1.0, found, together, lambda r, apart=apart: ratios(r, apart), ("triton-16bit",))


def scaling(bench: Bench) -> Iterator[Figure]:
    """IA3 beside a narrow product, in which its own passes over the activations do not drown."""
    M, wide, narrow = (size // bench.shrink for size in (16384, 4096, 512))
    for feedforward in (True, False):
        for backward in (False, True):
            K, N = (wide, narrow) if feedforward else (narrow, wide)
            case = IA3(M=M, K=K, N=N, feedforward=feedforward, dtype="bf16", backward=backward, mode=bench.mode)
            found = bench.contest(case, ("base",), *bench.ours(case), Provider("copy", build_copy))
            base, copy = found["base"], found["copy"]

            def added(result, base=base, copy=copy):
                return [(a - b) / c for a, b, c in zip(result.seconds, base.seconds, copy.seconds)]

            name = f"{case.name}: time added to the product's, over copying as many bytes"
            yield best(name, "<=", round(1 / 0.85, 3), found, bench.ours(case), added, ("base", "copy"))


ALL = (first_layer, default_adapters, decoding, scaling, other_layers)


def measured(tiny: bool, seconds: float, entries: list[dict], device: str = "cuda") -> Iterator[Figure]:
    """All of them, the most important first. `tiny` only tries the code, at 1/64 of every side. After `seconds` no
    measurement begins."""
    bench = Bench(device, tiny, seconds, entries)
    try:
        for figures in ALL:
            yield from figures(bench)
    finally:
        bench.measurer.close()
