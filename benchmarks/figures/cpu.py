"""The figures on a CPU: against the base layer, PEFT, and reading the adapters once."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks import machine
from benchmarks.figures import Figure
from benchmarks.measure import Effort, Result, interleave, measure, ratios, saved_bytes, spread
from benchmarks.providers import Call, Problem, Provider, backends, problem, providers
from benchmarks.shapes import Case, Lora, decode


def contest(case: Case, effort: Effort, peers: tuple[str, ...], *others: Provider) -> dict[str, Result]:
    """The base, the named peers and ours, in interleaved rounds; ours under the names "ours-fp32" and "ours-16bit"."""
    backend = backends(case.op, "cpu")[0]
    entrants = [p for p in providers(case, "cpu") if p.name in ("base", *peers) or p.backend == backend]
    results = measure(case, "cpu", effort, [*entrants, *others], weigh=False)
    for result in results.values():
        if result.refused:
            raise SystemExit(result.refused)
    return {name.replace(backend, "ours"): result for name, result in results.items()}


def forward_fp32(effort: Effort, shrink: int) -> Iterator[Figure]:
    for side, limit in ((4096, 1.06), (1024, 1.15)):
        for M in (16, 128, 512):
            case = Lora(M=M, K=side // shrink, N=side // shrink)
            found = contest(case, effort, ("peft-fp32",))
            ours = found["ours-fp32"]
            yield Figure(f"{case.name}: time over base", "<=", limit, ratios(ours, found["base"]))
            yield Figure(f"{case.name}: time over PEFT", "<=", 1.0, ratios(ours, found["peft-fp32"]))


def forward_bf16(effort: Effort, shrink: int) -> Iterator[Figure]:
    for M, limit in ((16, 2.0), (64, 4.0), (256, 4.0)):
        case = Lora(M=M, K=4096 // shrink, N=4096 // shrink, dtype="bf16")
        if machine.fast_16bit():
            note = "for CPUs without AVX512-BF16 and AMX; this one has them: use --isa avx2"
            yield Figure(f"{case.name}: speed over PEFT", ">=", limit, [], note=note)
            continue
        found = contest(case, effort, ("peft-fp32", "peft-16bit"))
        for adapters in ("fp32", "16bit"):
            values = ratios(found[f"peft-{adapters}"], found[f"ours-{adapters}"])
            yield Figure(f"{case.name}: speed over PEFT, {adapters} adapters", ">=", limit, values)


def mixed_batch(effort: Effort, shrink: int) -> Iterator[Figure]:
    side = 4096 // shrink
    case = decode(64, side, side, adapters=64)
    # One call a timing: repeated within one, a shorter call would find its memory in the cache more often.
    found = contest(case, replace(effort, slice=0.0), ("peft-fp32",), *readers(case))
    ours = found["ours-fp32"]
    yield Figure(f"{case.name}: speed over PEFT's mixed batch", ">=", 12.0, ratios(found["peft-fp32"], ours))
    reading = [min(pair) for pair in zip(found["read by sum"].seconds, found["read by dot"].seconds)]
    values = [a / b for a, b in zip(ours.seconds, reading)]
    rate = adapter_bytes(case) / spread(reading)["median"] / 1e9
    yield Figure(
        f"{case.name}: time over reading the adapters once", "<=", 1.4, values, note=f"read at {rate:.1f} GB/s"
    )
    case = decode(64, side, side, adapters=1)
    found = contest(case, effort, ("addmm-fp32",))
    yield Figure(f"{case.name}: time over addmm", "<=", 1.0, ratios(found["ours-fp32"], found["addmm-fp32"]))


def adapter_bytes(case) -> int:
    return sum(case.ranks) * (case.K + case.N) * case.itemsize


def readers(case) -> list[Provider]:
    """What reading the adapters once takes: torch's threaded sum, and its dot product with itself, of another buffer
    of as many bytes, in the same rounds. The faster of the two counts in every round."""
    buffer = torch.randn(adapter_bytes(case) // case.itemsize)

    def build(read):
        return lambda problem, _: Call(read, (problem.x,))

    return [
        Provider("read by sum", build(buffer.sum)),
        Provider("read by dot", build(lambda: torch.dot(buffer, buffer))),
    ]


def saved(effort: Effort, shrink: int) -> Iterator[Figure]:
    side = 4096 // shrink
    case = Lora(M=512, K=side, N=side, dtype="bf16", backward=True, dropout=0.1)
    kept = {
        name: saved_bytes(call.forward, (problem.weight, *call.leaves[1:]))
        for name, (problem, call) in calls(case, "peft-fp32", "ours-fp32").items()
    }
    note = f"{kept['ours-fp32']:,} of {kept['peft-fp32']:,} bytes"
    values = [kept["ours-fp32"] / kept["peft-fp32"]]
    yield Figure(f"{case.name}, fp32 adapters: bytes saved for backward over PEFT's", "<=", 0.3, values, note=note)


def overhead(effort: Effort, shrink: int) -> Iterator[Figure]:
    case = Lora(M=1, K=64, N=64, backward=True)
    runs = {Provider(name, None): call.forward for name, (_, call) in calls(case, "base", "ours-fp32").items()}
    base, ours = interleave(runs, effort, "cpu").values()
    values = [(a - b) * 1e6 for a, b in zip(ours, base)]
    name = "lora_linear fp32 forward 64x64 M1 with gradients required: time above F.linear(x, weight)"
    yield Figure(name, "<=", 60.0, values, unit="us")


def calls(case: Case, *names: str) -> dict[str, tuple[Problem, Call]]:
    shared = problem(case, "cpu")
    own = backends(case.op, "cpu")[0]
    found = {p.name.replace(own, "ours"): p for p in providers(case, "cpu")}
    return {name: (shared, found[name](shared)) for name in names}


ALL = (forward_fp32, forward_bf16, mixed_batch, saved, overhead)


def measured(tiny: bool) -> Iterator[Figure]:
    """All of them, in turn; `tiny` tries the code only, at 1/64 of every side."""
    effort, shrink = (Effort(0.0, 3, 0.0), 64) if tiny else (Effort(8.0, 15), 1)
    for figures in ALL:
        yield from figures(effort, shrink)
