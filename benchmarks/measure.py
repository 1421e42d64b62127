"""Checks providers against float64, then times those that are right in interleaved rounds, and weighs their memory."""

import collections
import copy
import gc
import importlib
import itertools
import math
import random
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.providers import Call, Problem, Provider, problem
from benchmarks.shapes import Case
from benchmarks.worker import Worker, WorkerLost, serve
from pyfastpeft import use_backend

# How much a relative error may exceed torch's own, in epsilons of the result's dtype: the tests' error rule. Rounding
# alone costs about 0.3; in float32 the order of summation adds to it.
TOLERANCE = {torch.float32: 8.0, torch.bfloat16: 0.3, torch.float16: 0.3}
SEED = 1234  # of dropout, in the check


@dataclass(frozen=True)
class Effort:
    seconds: float  # spent on the rounds of one case
    rounds: int  # at least
    slice: float = 0.002  # seconds that one timing takes at least; calls are repeated within it


EFFORT = {"tiny": Effort(0.0, 3, 0.0), "quick": Effort(2.0, 7), "full": Effort(6.0, 9)}
MOST_ROUNDS = 200


@dataclass
class Result:
    """What one provider did on one case. Either `refused` says why it was not timed, or `seconds` holds its rounds."""

    case: Case
    provider: Provider
    refused: str = ""
    seconds: list[float] = field(default_factory=list)  # per call
    errors: dict[str, float] = field(default_factory=dict)  # relative to float64, by tensor
    saved_bytes: int = 0
    peak_bytes: int = 0

    def summary(self, base: "Result") -> dict:
        """For the JSON: median and 20th to 80th percentile of seconds and of the ratio to base within every round."""
        adapters = self.provider.adapters
        itemsize = 4 if adapters == "fp32" else self.case.itemsize
        flop, traffic = self.case.work(itemsize) if adapters else self.case.base_work()
        median = statistics.median(self.seconds)
        return {
            "op": self.case.op,
            "dtype": self.case.dtype,
            "label": self.case.label,
            "provider": self.provider.name,
            "ours": self.provider.backend is not None,
            "rounds": len(self.seconds),
            "seconds": spread(self.seconds),
            "ratio_to_base": spread(ratios(self, base)),
            "gflop_per_s": flop / median / 1e9,
            "gb_per_s": traffic / median / 1e9,
            "saved_bytes": self.saved_bytes,
            "peak_bytes": self.peak_bytes,
            "errors": self.errors,
        }


def ratios(result: Result, other: Result) -> list[float]:
    return [a / b for a, b in zip(result.seconds, other.seconds)]


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
    }


def measure(
    case: Case,
    device: str,
    effort: Effort,
    contenders: list[Provider],
    weigh: bool = True,
    tell: Callable[[str], None] = lambda name: None,
) -> dict[str, Result]:
    """Results by provider name, with memory where `weigh`. tell(name) is called before a provider is run. A provider
    that raises is refused; where CUDA is of no use afterwards, the error is raised."""
    problems = [problem(case, device, seed) for seed in range(sets(case, device))]
    results = {provider.name: Result(case, provider) for provider in contenders}
    runs = {}
    with torch.set_grad_enabled(case.backward):
        for result in results.values():
            tell(result.provider.name)
            with forced(result.provider):
                try:
                    calls = [result.provider(each) for each in problems]
                    result.errors = check(problems[0], result.provider, calls[0])
                    once = [step(each, call) for each, call in zip(problems, calls)]
                    if weigh:
                        parameters = problems[0].weight, *calls[0].leaves[1:]
                        result.saved_bytes = saved_bytes(calls[0].forward, parameters)
                        result.peak_bytes = peak_bytes(once[0], device)
                    run = runner(once, case.mode)
                    finish(device)  # so that a fault shows here
                    runs[result.provider] = run
                except Exception as error:  # whatever one provider raises must not take the others with it
                    if not usable(device):
                        raise
                    if not isinstance(error, Wrong):  # whose message says it all
                        traceback.print_exc()
                    result.refused = f"{result.provider.name} on {case.name}: {type(error).__name__}: {error}"
        for provider, seconds in interleave(runs, effort, device, tell).items():
            results[provider.name].seconds = [each / len(problems) for each in seconds]
    torch.compiler.reset()
    return results


def short(value):
    """Numbers to four digits, in dicts of dicts: what is committed."""
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


class Measurer:
    """`measure` on one device. On CUDA it runs in a process of its own; where a provider hangs or ends that, the case
    is measured without it in a new one, and one that did so twice is not tried again on the same op.

    patience: seconds that a provider may take between two signs of life, compilation included.
    """

    def __init__(self, device: str, patience: float = 60.0):
        self.device, self.patience = device, patience
        self.worker = Worker(_serve)
        self.losses: dict[tuple[str, str], list[str]] = collections.defaultdict(list)

    def __call__(self, case: Case, effort: Effort, contenders: list[Provider], weigh: bool = True) -> dict[str, Result]:
        if self.device == "cpu":
            return measure(case, self.device, effort, contenders, weigh)
        refused: dict[str, str] = {}
        while True:
            for provider in contenders:
                if len(losses := self.losses[case.op, provider.name]) > 1:
                    refused.setdefault(provider.name, f"{provider.name} is not tried on {case.op} again: {losses[-1]}")
            left = [provider for provider in contenders if provider.name not in refused]
            try:
                found = self.worker.ask((case, self.device, effort, left, weigh), self.patience) if left else {}
                break
            except WorkerLost as lost:
                why = f"{lost.at} on {case.name}: {lost}"
                if lost.at is None:
                    refused |= {provider.name: f"no process that measures: {lost}" for provider in left}
                else:
                    refused[lost.at] = why
                    self.losses[case.op, lost.at].append(why)
        return {p.name: found.get(p.name) or Result(case, p, refused[p.name]) for p in contenders}

    def close(self) -> None:
        """End the process that measures."""
        self.worker.close()


def _serve(connection):
    if find_spec("peft"):
        importlib.import_module("peft")  # from a cold disk that takes longer than the patience with a provider
    serve(connection, lambda message, tell: measure(*message, tell))


def sets(case: Case, device: str) -> int:
    """How many problems one run goes through. On CUDA enough for their tensors to be evicted from the L2 cache before
    they are used again, those of a provider that leaves the weight alone, too; eagerly that is the host's time in any
    case, and PEFT's layers take long to make. On a CPU one, whose weight lies in the last-level cache or not for all
    providers alike."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    _, traffic = case.base_work()
    if case.mode == "graph":
        traffic = min(traffic, case.work(case.itemsize)[1])
    return max(8, math.ceil(3 * cache / traffic))


def finish(device: str) -> None:
    """Wait for what runs; what went wrong there is raised here."""
    if device == "cuda":
        torch.cuda.synchronize()


def usable(device: str) -> bool:
    """Whether this process can go on after an error: a fault ends CUDA in it, and a capture that broke off may leave
    the random numbers of its graph behind."""
    if device != "cuda":
        return True
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.rand(1, device=device)
        graph.replay()
        torch.rand(1, device=device)
        finish(device)
    except Exception:
        return False
    return True


def forced(provider: Provider):
    return use_backend(provider.backend) if provider.backend else nullcontext()


def step(problem: Problem, call: Call) -> Callable[[], object]:
    if problem.case.backward and call.leaves:
        return lambda: torch.autograd.grad(call.forward(), call.leaves, problem.dy)
    return call.forward


# --- correctness -----------------------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """A provider's error is larger than the rule allows."""


def check(problem: Problem, provider: Provider, call: Call) -> dict[str, float]:
    """Errors of the output and of every gradient, ||got - float64|| / ||float64||, none larger than that of plain
    PyTorch in the same dtypes plus TOLERANCE; else raises Wrong with the figures."""
    if provider.adapters is None:
        return {}
    factor = dropout_factor(problem, call) if getattr(problem.case, "dropout", 0.0) else None
    with poisoned() if provider.backend else nullcontext():
        if problem.case.alone:
            problem.y.copy_(problem.y0)
        torch.manual_seed(SEED)
        got = _with_gradients(problem, call)
    leaves = problem.leaves(provider.adapters)
    own = _plain(problem, problem.weight, factor, leaves, leaves[-1].dtype)
    exact = _plain(problem, problem.weight.double(), factor, [leaf.double() for leaf in leaves], torch.float64)
    names = ("output", "gradient of x", *(f"gradient {i} of the adapter" for i in range(len(leaves) - 1)))
    errors = {}
    for name, result, plain, reference in zip(names, got, own, exact):
        errors[name] = relative_error(result, reference)
        allowed = relative_error(plain, reference) + TOLERANCE[plain.dtype] * torch.finfo(plain.dtype).eps
        if not errors[name] <= allowed:  # NaN is wrong too
            raise Wrong(f"{name} has relative error {errors[name]:.3g}; torch's own plus tolerance is {allowed:.3g}")
    return errors


def relative_error(result: Tensor, reference: Tensor) -> float:
    return ((result.double().flatten() - reference.flatten()).norm() / reference.norm()).item()


def _with_gradients(problem: Problem, call: Call) -> tuple[Tensor, ...]:
    y = call.forward()
    if not problem.case.backward:
        return (y,)
    return y.detach(), *torch.autograd.grad(y, call.leaves, problem.dy.to(y.dtype))


def _plain(problem, weight, factor, leaves, dtype):
    leaves = tuple(leaf.detach().clone().requires_grad_(problem.case.backward) for leaf in leaves)
    factor = None if factor is None else factor.to(dtype)
    return _with_gradients(problem, Call(lambda: problem.formula(weight, factor, *leaves), leaves))


def dropout_factor(problem: Problem, call: Call) -> Tensor:
    """[M, K]: what a provider multiplies x by after manual_seed(SEED), seen from outside: with constant adapters, large
    against weight, and dy = 1, the gradient of x is large exactly where an element is kept."""
    p, (x, lora_A, lora_B, *_) = problem.case.dropout, call.leaves
    values = lora_A.detach().clone(), lora_B.detach().clone()
    with torch.no_grad():
        lora_A.fill_(64)
        lora_B.fill_(1 / len(lora_B))
    call.forward()  # compiles, where it must: that may draw random numbers
    torch.manual_seed(SEED)
    y = call.forward()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    with torch.no_grad():
        lora_A.copy_(values[0])
        lora_B.copy_(values[1])
    kept = (dx > dx.max() / 2).double()
    share, deviation = kept.mean().item(), math.sqrt(p * (1 - p) / kept.numel())
    if not abs(share - (1 - p)) <= 5 * deviation:
        raise Wrong(f"dropout keeps {share:.4f} of x; with p = {p} it must be {1 - p} within {5 * deviation:.1g}")
    return kept / (1 - p)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch allocates without a value holds NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# --- time ------------------------------------------------------------------------------------------------------------


def runner(once: list[Callable], mode: str) -> Callable[[], object]:
    """A function that runs every call once, in mode "graph" by replaying one captured graph."""

    def run():
        for call in once:
            call()

    if mode != "graph":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up off the capturing stream, as torch.cuda.graph asks
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def timed(run: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds per run: wall clock on a CPU, between two events on CUDA."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def interleave(
    runs: dict[Provider, Callable], effort: Effort, device: str, tell: Callable[[str], None] = lambda name: None
) -> dict[Provider, list[float]]:
    """Seconds per run, round by round. Every round times each run once, so that what disturbs the machine meets all;
    the order within a round is drawn anew, so that none always follows the same one through the caches."""
    seconds = {provider: [] for provider in runs}
    repeats, spent = {}, 0.0
    for provider, run in runs.items():
        tell(provider.name)
        with forced(provider):
            timed(run, 1, device)
            single = timed(run, 1, device)
        repeats[provider] = max(1, math.ceil(effort.slice / single))
        spent += single * repeats[provider]
    rounds = min(MOST_ROUNDS, max(effort.rounds, int(effort.seconds / spent))) if runs else 0
    order, shuffle = list(runs), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for provider in order:
                tell(provider.name)
                with forced(provider):
                    seconds[provider].append(timed(runs[provider], repeats[provider], device))
    finally:
        gc.enable()
    return seconds


# --- memory ----------------------------------------------------------------------------------------------------------


def twin(model: nn.Module) -> nn.Module:
    """A copy of the model with the very parameters of the model."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that `forward` keeps for its backward pass: each storage once, those of `parameters` left out."""
    storages = {}  # which stay alive meanwhile, so that none gets the address of another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(once: Callable[[], object], device: str) -> int:
    """Most bytes that one call holds above what was there before. CUDA: torch's own counter. CPU: the highest running
    sum of the allocations and releases that torch.profiler records; scratch that a library takes behind torch's back
    (oneDNN, MKL, a kernel's stack) is not in it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = once()
    del kept
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
