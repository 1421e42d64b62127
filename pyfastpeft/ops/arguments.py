"""What the ops do to their arguments on the way in: rows, autocast, seeds."""

from collections.abc import Callable
from functools import wraps
from itertools import pairwise

import torch
from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """[..., F] as [M, F] with unit stride in F; copies only where the strides leave no other way."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def shaped(rows: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """[M, F] as [..., F]: a gradient that an op wrote as rows. The op is given no view of it: where a graph's op writes
    into a view, torch's compiler may read what was there before."""
    return None if rows is None else rows.view(shape)


def writable_rows(y: Tensor) -> Tensor:
    """y [..., N] itself where rows [M, N] are a view of it, else a copy, which has to be copied back.

    While compiling it is always a copy: torch's graphs lose gradients where a Function writes into a view.
    """
    if torch.compiler.is_compiling():
        return y.clone(memory_format=torch.contiguous_format)
    return y if _viewable_as_rows(y) else y.contiguous()


def _viewable_as_rows(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    lead = [(n, s) for n, s in zip(tensor.shape[:-1], tensor.stride()[:-1]) if n != 1]
    mergeable = all(s0 == n1 * s1 for (_, s0), (n1, s1) in pairwise(lead))
    return mergeable and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1)


def autocasting(x: Tensor) -> bool:
    """Whether torch.autocast is on for x's device."""
    device = x.device.type
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)  # which torch 2.10 cannot compile
    return known and torch.is_autocast_enabled(device)


def cast_for_autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as torch.autocast hands them to a matmul: cast to its dtype, unless float64 or not floating."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others)
    )


def autocast_off(x: Tensor) -> torch.autocast:
    """A context in which the kernels' own matmuls keep the dtypes they are given."""
    return torch.autocast(x.device.type, enabled=False)


def first_order(backward: Callable) -> Callable:
    """A backward pass that refuses to be differentiated, when it is called: torch's once_differentiable refuses later,
    and to those alone who go back as far; torch.autograd.grad to something else finds zero, and says nothing. It
    refuses many gradients at a time, too."""

    @wraps(backward)
    def run(ctx, *dys):
        if not torch.compiler.is_compiling():
            remedy = 'or the forward pass be run under pyfastpeft.use_backend("autograd")'
            if torch.is_grad_enabled():
                refused = "gradients of pyfastpeft's kernels cannot be differentiated: create_graph must be False"
                raise RuntimeError(f"{refused}, {remedy}")
            if torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(dys[0]):
                refused = "pyfastpeft's kernels form one gradient at a time: is_grads_batched (vectorize) must be False"
                raise RuntimeError(f"{refused}, {remedy}")
        return backward(ctx, *dys)

    return run


def without_autocast(backward: Callable) -> Callable:
    """A backward pass that keeps its dtypes also when it is called under autocast."""

    @wraps(backward)
    def run(ctx, dy, *more):
        if not autocasting(dy):
            return backward(ctx, dy, *more)
        with autocast_off(dy):
            return backward(ctx, dy, *more)

    return run


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see an op on these."""
    graph = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
    # In inference mode gradients may be enabled, and are not formed.
    return graph and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())


def written(tensor: Tensor) -> None:
    """Tell autograd that `tensor` was written in place, so that nobody goes back through what it held."""
    if not (torch.compiler.is_compiling() or tensor.is_inference()):
        torch.autograd.graph.increment_version(tensor)


def zero(*gradients: Tensor | None) -> None:
    """What no token reaches."""
    for gradient in gradients:
        gradient is None or gradient.zero_()


def masked(x: Tensor, p: float) -> Tensor:
    """x with a share p of its elements zeroed by torch's generator, for ops whose masks no kernel draws: `dropout_seed`
    would take torch's own operations a hundred passes. What is kept is not scaled by 1 / (1 - p)."""
    return x * torch.empty_like(x).bernoulli_(1 - p)


def dropout_seed(x: Tensor, p: float) -> Tensor | None:
    """[1] int64 on x's device from torch's generator, so that manual_seed and checkpointing hold; None where p = 0."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device) if p > 0 else None
