"""Many adapters on one frozen layer, one for each token of a batch (Chen et al. 2023, Punica)."""

import math
from contextlib import contextmanager
from threading import local

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Routing, checks, dora_norm, multi_lora, multi_lora_linear, multi_scale, route
from ..ops.dispatch import FLOATS
from ..ops.reference import accumulation
from .frozen import FrozenLinear

SCALES = "scale_in", "scale_out", "shift"  # buffers of layers whose slots can hold DoRA and IA3


class AdapterSlots(nn.Module):
    """L slots for adapters beside a base layer. A subclass sets in_features and out_features, has weight and bias, and
    calls `_hold`."""

    served: str | None = None
    merged = False

    def _hold(self, num_adapters, rank, alpha, scales, empty, device, dtype):
        """The parameters of the slots. Raises ValueError or TypeError naming the argument that does not fit."""
        alpha = rank if alpha is None else alpha
        self.num_adapters, self.rank = num_adapters, rank
        like = {"device": device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(num_adapters, rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(num_adapters, self.out_features, rank, **like))
        scaling = torch.full((num_adapters,), alpha / rank, device=device, dtype=accumulation(dtype))
        self.register_buffer("scaling", scaling)
        self.register_buffer("ranks", torch.full((num_adapters,), rank, device=device))
        sizes = {"scale_in": self.in_features, "scale_out": self.out_features, "shift": self.out_features}
        for name in SCALES:
            rows = torch.zeros(num_adapters, sizes[name], device=device, dtype=scaling.dtype) if scales else None
            self.register_buffer(name, rows if name != "shift" or self.bias is not None else None)
        if empty:
            self._reset_scales(slice(None))
            for tensor in (self.lora_A, self.lora_B, self.scaling, self.ranks):
                tensor.detach().zero_()
        else:
            self.reset_parameters()

    @property
    def scales(self) -> bool:
        """Whether slots can hold DoRA and IA3 adapters."""
        return self.scale_out is not None

    @property
    def norm_is_known(self) -> bool:
        """Whether the base layer has a weight [N, K] of floats, as a DoRA adapter needs."""
        weight, shape = self.weight, (self.out_features, self.in_features)
        return type(weight) is nn.Parameter and weight.dtype in FLOATS and weight.shape == shape

    def _reset_scales(self, slots):
        for name in SCALES:
            rows = getattr(self, name)
            rows is None or rows[slots].fill_(name != "shift")

    def reset_parameters(self) -> None:
        """Draw every lora_A anew and set every lora_B to zero: the layer computes what its base computes."""
        for lora_A in self.lora_A:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self._reset_scales(slice(None))

    def load_adapter(
        self, slot: int, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor | None = None
    ) -> None:
        """Put a LoRA adapter into a slot: lora_A [r', K] and lora_B [N, r'] with r' in [1, r], of any float dtype; with
        magnitude [N] a DoRA adapter, whose norm is formed here: load it anew where the base's weight has changed.

        They are copied, in the dtype and to the device of the slots; what the slot held is gone. Other threads may call
        the layer meanwhile with other slots. Raises ValueError or TypeError naming the argument that does not fit,
        RuntimeError while merged; the slot is then as it was.
        """
        op = f"{type(self).__name__}.load_adapter"
        self._need_unmerged("load_adapter() needs")
        self._need_slot(op, slot)
        for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            _need_values(op, name, factor)
        rank, features = lora_A.shape if lora_A.dim() == 2 else (0, 0)
        fits = 1 <= rank <= self.rank and features == self.in_features
        checks.need_value(fits, op, "lora_A", lora_A, f"of shape [r', {self.in_features}] with r' in [1, {self.rank}]")
        checks.shape(op, "lora_B", lora_B, (self.out_features, rank), "[N, r']")
        checks.number(op, "scaling", scaling)
        # Copies, since they may be parts of this slot.
        lora_A, lora_B = (given.detach().to(self.lora_A, copy=True) for given in (lora_A, lora_B))
        scale = None if magnitude is None else self._magnified(op, magnitude, lora_A, lora_B, float(scaling))
        with self._writing():
            self.unload(slot)
            if scale is not None:
                self.scale_out[slot] = scale
                if self.shift is not None:  # scale_out * (… + bias) + shift = scale_out * … + bias
                    self.shift[slot] = (1 - scale) * self.bias.detach()
            self.lora_A[slot, :rank] = lora_A
            self.lora_B[slot, :, :rank] = lora_B
            self.scaling[slot] = float(scaling)
            self.ranks[slot] = rank

    def load_ia3(self, slot: int, ia3_l: Tensor, feedforward: bool) -> None:
        """Put an IA3 adapter into a slot: ia3_l, of any float dtype, is [K] and scales the input if feedforward, else
        [N] and scales the output. Otherwise as `load_adapter`."""
        op = f"{type(self).__name__}.load_ia3"
        self._need_unmerged("load_ia3() needs")
        self._need_slot(op, slot)
        self._need_scales(op, "ia3_l")
        _need_values(op, "ia3_l", ia3_l)
        scale = self.scale_in if feedforward else self.scale_out
        checks.shape(op, "ia3_l", ia3_l, (scale.shape[1],), "[K]" if feedforward else "[N]")
        ia3_l = ia3_l.detach().to(scale, copy=True)
        with self._writing():
            self.unload(slot)
            scale[slot] = ia3_l

    def unload(self, slot: int) -> None:
        """Empty a slot: its tokens get the base alone, at no cost. Raises ValueError for a slot that is none,
        RuntimeError while merged."""
        self._need_unmerged("unload() needs")
        self._need_slot(f"{type(self).__name__}.unload", slot)
        with self._writing():
            for tensor in (self.lora_A, self.lora_B, self.scaling, self.ranks):
                tensor[slot] = 0
            self._reset_scales(slot)

    def _magnified(self, op, magnitude, lora_A, lora_B, scaling) -> Tensor:
        """magnitude / ||weight + scaling * lora_B lora_A|| of every row."""
        self._need_scales(op, "magnitude")
        _need_values(op, "magnitude", magnitude)
        checks.shape(op, "magnitude", magnitude, (self.out_features,), "[N]")
        needed = "None beside a layer that has no weight [N, K] of floats, whose norm a magnitude needs"
        checks.need_value(self.norm_is_known, op, "magnitude", magnitude, needed)
        norm = dora_norm(self.weight.detach(), lora_A, lora_B, scaling)
        return magnitude.detach().to(norm) / norm

    def _need_scales(self, op, argument):
        given = f"for a layer whose slots hold LoRA alone, {type(self).__name__}(scales=False)"
        checks.need(self.scales, op, argument, given, "for one made with scales=True")

    def _chosen(self, x, slots) -> Tensor | Routing | None:
        """The slots of the tokens of x, None for the base alone: those given, else those of the thread's block."""
        if slots is None and self.served is not None:
            slots = _current(x, self.served, self.num_adapters)
        return slots.flatten() if isinstance(slots, Tensor) else slots

    @contextmanager
    def _writing(self):
        """In which slots can be written: also, anywhere, those of a layer that was made in inference mode."""
        with torch.inference_mode(self.lora_A.is_inference()), torch.no_grad():
            yield

    def _need_slot(self, op, slot):
        fits = checks.whole(slot) and 0 <= slot < self.num_adapters
        checks.need_value(fits, op, "slot", slot, f"an integer in [0, {self.num_adapters})")

    def _need_unmerged(self, what):
        """A subclass into whose base adapters can be merged overrides it."""

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in ("scaling", *SCALES)}
        super()._apply(fn, recurse)
        for name, tensor in before.items():  # .bfloat16() and the like cast weights; these would lose digits
            if tensor is not None and getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self


class MultiLoRALinear(FrozenLinear, AdapterSlots):
    """y[t] = x[t] weight^T + bias + scaling[a] * x[t] lora_A[a]^T lora_B[a]^T with a = slots[t], or -1 for none.

    With scales, for DoRA (Liu et al. 2024, equation 5) and IA3 (Liu et al. 2022, section 3.3): y[t] is that of
    scale_in[a] * x[t], times scale_out[a], plus shift[a].

    Args:
        in_features, out_features, bias: K, N and whether the base has a bias, as in torch.nn.Linear.
        num_adapters: L, the number of slots.
        rank: r, the largest rank that a slot can hold.
        alpha: the scaling of a slot that has not been loaded is alpha / r. Default: r.
        device, dtype: of all parameters. adapter_dtype: of lora_A and lora_B, if another.
        scales: whether slots can hold DoRA and IA3 adapters, too, for a pass over x and one over y.

    Attributes: weight [N, K]; bias [N] or None; lora_A [L, r, K], Kaiming-uniform (a = sqrt(5)); lora_B [L, N, r],
    zero; scaling [L] and ranks [L], the true rank of every slot; scale_in [L, K], scale_out [L, N] and shift [L, N], of
    the dtype of sums, or None; served, the key of a model that `serve` put the layer into, or None. All factors train.
    `from_linear` adapts an existing layer; with empty=True its slots hold nothing, as after `unload`. Raises ValueError
    or TypeError naming the argument that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_adapters: int,
        rank: int,
        alpha: float | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        scales: bool = False,
    ):
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._adapt(linear, num_adapters, rank, alpha, adapter_dtype, scales=scales)

    def _adapt(self, linear, num_adapters, rank, alpha=None, adapter_dtype=None, empty=False, scales=False):
        _need_counts(type(self).__name__, num_adapters, rank, alpha)
        self._hold(num_adapters, rank, alpha, scales, empty, **self._take(linear, adapter_dtype))

    def forward(self, x: Tensor, slots: Tensor | Routing | None = None) -> Tensor:
        """x [..., K] -> y [..., N].

        slots: for each of the T tokens its slot in [-1, L), -1 for the base alone: [T] or x's leading dimensions,
        integer; or the Routing that `ops.route` made of them, which all layers of a step can share. None: those of
        the block of the served model that the thread is in; outside of any, the base alone or, while an adapter is
        merged, that adapter for all tokens; then nothing else is allowed.
        """
        slots = self._chosen(x, slots)
        if slots is None:
            return F.linear(x, self.weight, self.bias)
        self._need_unmerged("slots need")
        x = multi_scale(x, self.scale_in, slots) if self.scales else x
        y = multi_lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, slots, self.scaling, self.ranks)
        return multi_scale(y, self.scale_out, slots, self.shift) if self.scales else y

    @torch.inference_mode(False)
    def merge(self, slot: int) -> None:
        """weight + scaling[slot] * lora_B[slot] lora_A[slot], scaled as the slot says, summed in float32 and rounded
        once, takes the weight's place (and a bias the bias') until `unmerge`; the original is kept. Raises RuntimeError
        if already merged."""
        self._need_slot("MultiLoRALinear.merge", slot)
        rank = self.ranks[slot]
        weight, lora_A, lora_B = self._mergeable(self.lora_A[slot, :rank], self.lora_B[slot, :, :rank])
        weight, bias = weight + self.scaling[slot] * (lora_B @ lora_A), None
        if self.scales:
            weight = self.scale_out[slot][:, None] * weight * self.scale_in[slot]
            if self.bias is not None:
                bias = self.scale_out[slot] * self.bias.detach() + self.shift[slot]
        self._merge(weight, bias)

    def extra_repr(self) -> str:
        scales = ", scales=True" if self.scales else ""
        return f"{super().extra_repr()}, num_adapters={self.num_adapters}, rank={self.rank}{scales}"


class MultiLoRABranch(AdapterSlots):
    """y[t] = base_layer(x)[t] + scaling[a] * x[t] lora_A[a]^T lora_B[a]^T with a = slots[t], or -1 for none: beside a
    base layer of any kind, as a quantised one.

    Args:
        base_layer: the layer, which is called as it is and frozen; in_features and out_features are its K and N.
        num_adapters, rank, alpha: as in `MultiLoRALinear`.
        dtype: of lora_A and lora_B. Default: that of the layer's weight, float32 for one that is not of floats.
        device: default: that of the layer's tensors.
        empty: whether the slots hold nothing, as after `unload`.
        scales: whether slots can hold IA3 adapters, too, and DoRA's beside a weight of floats.

    Attributes: base_layer; weight and bias, the base layer's; the others of `MultiLoRALinear`. Nothing can be merged.
    Raises ValueError or TypeError naming the argument that does not fit.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        num_adapters: int,
        rank: int,
        alpha: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        empty: bool = False,
        scales: bool = False,
    ):
        op = "MultiLoRABranch"
        sizes = [getattr(base_layer, name, None) for name in ("in_features", "out_features")]
        needed = "a module with in_features and out_features"
        fits = isinstance(base_layer, nn.Module) and all(map(checks.whole, sizes))
        checks.need(fits, op, "base_layer", f"a {type(base_layer).__name__}", needed, TypeError)
        _need_counts(op, num_adapters, rank, alpha)
        weight = getattr(base_layer, "weight", None)
        if dtype is None:
            dtype = weight.dtype if isinstance(weight, Tensor) and weight.dtype in FLOATS else torch.float32
        needed = f"None or one of {', '.join(map(str, FLOATS))}"
        checks.need_value(dtype in FLOATS, op, "dtype", dtype, needed, TypeError)
        fits = dtype != torch.float64 or getattr(weight, "dtype", dtype) not in FLOATS or weight.dtype == dtype
        checks.need_value(fits, op, "dtype", dtype, "no wider than float32 and the layer's weight", TypeError)
        super().__init__()
        self.in_features, self.out_features = sizes
        self.base_layer = base_layer.requires_grad_(False)
        if device is None:
            device = next((t.device for t in (*base_layer.parameters(), *base_layer.buffers())), None)
        self._hold(num_adapters, rank, alpha, scales, empty, device, dtype)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor | None:
        return getattr(self.base_layer, "weight", None)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor, slots: Tensor | Routing | None = None) -> Tensor:
        """x [..., K] -> y [..., N]; slots as in `MultiLoRALinear.forward`."""
        slots = self._chosen(x, slots)
        scales = self.scales and slots is not None
        x = multi_scale(x, self.scale_in, slots) if scales else x
        y = self.base_layer(x)
        if slots is None:
            return y
        kind = type(self.base_layer).__name__
        checks.need(isinstance(y, Tensor), kind, "its output", f"a {type(y).__name__}", "a tensor", TypeError)
        y = y.clone()  # it may keep its output for its backward pass, or return a view
        y = multi_lora(y, x.to(y.dtype), self.lora_A, self.lora_B, slots, self.scaling, self.ranks)
        return multi_scale(y, self.scale_out, slots, self.shift) if scales else y

    def merge(self, slot: int) -> None:
        """Raises TypeError: the base layer's weight may be of a kind that cannot be summed."""
        needed = "nothing can be merged into its base layer; MultiLoRALinear can be merged"
        raise TypeError(f"MultiLoRABranch.merge: {needed}")

    def extra_repr(self) -> str:
        return f"num_adapters={self.num_adapters}, rank={self.rank}{', scales=True' if self.scales else ''}"


def _need_counts(op, num_adapters, rank, alpha):
    checks.count(op, "num_adapters", num_adapters)
    checks.count(op, "rank", rank)
    if alpha is not None:
        checks.number(op, "alpha", alpha)


def _need_values(op, argument, tensor):
    checks.floating(op, argument, tensor)
    checks.need_value(not tensor.is_meta, op, argument, tensor, "a tensor that has values")


# --- the batches of served models ------------------------------------------------------------------------------------


class Batch:
    """Slots of one batch, grouped once for every number of tokens that layers see.

    slots [S]: for each of S tokens, or for each of S rows of a batch [B, …, K], of which B may be a multiple, as
    `generate` repeats rows for beams; or a Routing of tokens. Raises as `ops.route` does.
    """

    def __init__(self, slots, num_adapters: int, device: torch.device):
        self.num_adapters, self.slots, self.routings = num_adapters, None, {}
        with torch.inference_mode(False):
            if isinstance(slots, Routing):
                fits = all(t.dim() == 1 and t.dtype == torch.int64 for t in slots)
                needed = f"a Routing among {num_adapters} adapters, as ops.route makes it"
                checks.need_value(fits and len(slots.segments) == num_adapters + 1, "slots", "slots", slots, needed)
                self.given = slots
            else:
                self.given = route(slots, num_adapters, device)  # which checks their values
                self.slots = torch.as_tensor(slots, dtype=torch.int64).clone()  # a list's stay on the host until needed

    def routing(self, x: Tensor) -> Routing:
        """That of the tokens of x [..., K]. Raises ValueError where they are neither those of the slots nor of rows."""
        count, tokens = len(self.given.order), math.prod(x.shape[:-1])
        key = tokens, x.device
        # Without rows, x is a batch that was seen before, its rows joined, as models of experts have it.
        rows = x.shape[0] if x.dim() > 2 else tokens if key in self.routings else 1
        fits = tokens == count or (self.slots is not None and count > 0 and rows % count == 0)
        if not fits:
            given = f"of {count} tokens or rows where x is of shape {list(x.shape)}"
            needed = "one for each token of x, or for each row of a batch of as many rows or a multiple"
            checks.need(
                False, "slots", "slots", given, f"{needed}; other layers can be excluded when serve() is called"
            )
        if key not in self.routings:
            self.routings[key] = self._grouped(tokens, count, x.device)
        return self.routings[key]

    def _grouped(self, tokens, count, device):
        with torch.inference_mode(False):  # else a later pass could not keep it for its backward pass
            if tokens == count:
                return Routing(*(tensor.to(device) for tensor in self.given))
            return route(self.slots.repeat_interleave(tokens // count).to(device), self.num_adapters)


class _Thread(local):
    """The batches of the blocks that a thread is in, by the key of the model."""

    def __init__(self):
        self.batches: dict[str, Batch] = {}


_thread = _Thread()


@contextmanager
def running(served: str, batch: Batch):
    """In which layers of the model with this key take the slots of `batch`, in this thread."""
    before = _thread.batches.get(served)
    _thread.batches[served] = batch
    try:
        yield
    finally:
        _thread.batches[served] = before


def _current(x: Tensor, served: str, num_adapters: int) -> Routing | None:
    if torch.compiler.is_compiling():
        return Routing(*torch.ops.pyfastpeft_layers.current_routing(x.detach(), served, num_adapters))
    batch = _thread.batches.get(served)
    return None if batch is None else batch.routing(x)


def _current_routing(x, served, num_adapters):
    routing = _current(x, served, num_adapters)
    if routing is not None:
        return routing.order.clone(), routing.segments.clone()  # a compiled graph may write into what it is given
    order, segments = _empty_routing(x, served, num_adapters)
    return torch.arange(len(order), out=order), segments.fill_(len(order))


def _empty_routing(x, served, num_adapters):
    sizes = math.prod(x.shape[:-1]), num_adapters + 1
    return tuple(x.new_empty(size, dtype=torch.int64) for size in sizes)


# One node of a compiled graph, which looks up the thread's block when it runs: torch.compile has no guards on values of
# threads. A captured CUDA graph would look it up once for all.
_OP = "pyfastpeft_layers::current_routing"
_SCHEMA = "(Tensor x, str served, int num_adapters) -> (Tensor order, Tensor segments)"
torch.library.define(_OP, _SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
torch.library.impl(_OP, "CompositeExplicitAutograd")(_current_routing)
torch.library.register_fake(_OP)(_empty_routing)
