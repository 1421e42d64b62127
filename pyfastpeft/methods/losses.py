"""T-Few's losses, penalties on weight updates, and LoRA+'s learning-rate groups: small callables for a plain training
loop and for transformers.Trainer.

    Trainer(..., compute_loss_func=TFewLoss(num_choices=4, causal=True))
    regularize(model, L2SP(model, alpha=1e-2)); Trainer(model, ...)
    Trainer(..., optimizers=(torch.optim.AdamW(loraplus_groups(model, lr=1e-4, ratio=16)), None))
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layers import LoRALinear
from ..layers.parts import EmbeddingLoRAPart, LoRAPart
from ..ops.checks import floating, need, need_value, values_on

IGNORED = -100  # the label of a position that no loss counts


# --- T-Few (Liu et al. 2022, section 3.2) ----------------------------------------------------------------------------


def choice_scores(logits: Tensor, labels: Tensor, causal: bool = False) -> Tensor:
    """beta(x, y) = 1/T sum_t log p(y_t | x, y_<t): the length-normalised log-likelihood of every answer choice.

    Args:
        logits: [..., C, T, V], floating: for C choices of T tokens each. 16-bit logits are summed in float32.
        labels: [..., C, T], int64: the choices' tokens, and -100 where none counts (prompt, padding).
        causal: logits at t predict the label at t + 1, as decoder-only models of transformers give them.

    Returns [..., C]; -inf for a choice without tokens. Raises ValueError or TypeError naming the argument.
    """
    logits, labels = _aligned("choice_scores", logits, labels, causal)
    return _scores(logits, labels).masked_fill(~_present(labels), -torch.inf)


def rank_classification(
    logits: Tensor, labels: Tensor, choices: Tensor | None = None, causal: bool = False
) -> Tensor:  # [...] int64
    """The choice with the highest `choice_scores`; the first of equals. Arguments as in `tfew_loss`."""
    logits, labels, present, _ = _checked("rank_classification", logits, labels, None, choices, causal)
    return _scores(logits, labels).masked_fill(~present, -torch.inf).argmax(-1)


def unlikelihood_loss(
    logits: Tensor, labels: Tensor, answer: Tensor | int = 0, choices: Tensor | None = None, causal: bool = False
) -> Tensor:
    """L_UL = -sum_n sum_t log(1 - p(y_t^(n) | x, y_<t^(n))) / sum_n T^(n) over the wrong choices n; mean over examples,
    of which one without a wrong choice counts as 0. Arguments as in `tfew_loss`."""
    return _unlikelihood(*_checked("unlikelihood_loss", logits, labels, answer, choices, causal))


def length_normalized_loss(
    logits: Tensor, labels: Tensor, answer: Tensor | int = 0, choices: Tensor | None = None, causal: bool = False
) -> Tensor:
    """L_LN = -log(exp beta(x, y) / sum_n exp beta(x, y^(n))), where n runs over all choices, the answer y among them;
    mean over examples. Arguments as in `tfew_loss`."""
    logits, labels, present, answer = _checked("length_normalized_loss", logits, labels, answer, choices, causal)
    return _length_normalized(_scores(logits, labels), present, answer)


def tfew_loss(
    logits: Tensor, labels: Tensor, answer: Tensor | int = 0, choices: Tensor | None = None, causal: bool = False
) -> Tensor:
    """L = L_LM + L_UL + L_LN, where L_LM = -beta(x, y) of the answer y; each a mean over examples.

    Args:
        logits, labels, causal: as in `choice_scores`.
        answer: [...] int64, or one number for all: the place of the right choice.
        choices: [..., C] bool: which choices an example has. A choice without tokens does not count either way.

    Returns a scalar. Raises ValueError or TypeError naming the argument; values on a GPU are looked at only under
    PYFASTPEFT_CHECK=1, since that synchronises the device.
    """
    logits, labels, present, answer = _checked("tfew_loss", logits, labels, answer, choices, causal)
    scores = _scores(logits, labels)
    language = -scores.gather(-1, answer).mean()
    unlikelihood = _unlikelihood(logits, labels, present, answer)
    return language + unlikelihood + _length_normalized(scores, present, answer)


@dataclass
class TFewLoss:
    """`tfew_loss` as Trainer's compute_loss_func, on batches whose rows are choices: of every `num_choices` rows that
    follow one another the first is the right answer, and rows labelled -100 throughout fill up examples with fewer.

    Under gradient accumulation a batch counts by its share of the labels.
    """

    num_choices: int
    causal: bool = False

    def __call__(self, outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        rows = len(labels)
        given = f"{rows} rows"
        need(rows % self.num_choices == 0, "TFewLoss", "labels", given, f"of {self.num_choices} rows for each example")
        logits, choices = (each.unflatten(0, (-1, self.num_choices)) for each in (outputs.logits, labels))
        return tfew_loss(logits, choices, causal=self.causal) * _share(labels, num_items_in_batch, self.causal)


def _aligned(op: str, logits: Tensor, labels: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Checked logits and labels, the logits at t those of the label at t."""
    floating(op, "logits", logits)
    need_value(logits.dim() >= 3 and logits.shape[-1] >= 2, op, "logits", logits, "of shape [..., C, T, V] with V >= 2")
    matches = isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]
    matches = matches and labels.dtype == torch.int64 and labels.device == logits.device
    shape = list(logits.shape[:-1])
    need_value(matches, op, "labels", labels, f"a torch.int64 tensor of shape [..., C, T] = {shape} on {logits.device}")
    if values_on(labels.device):
        known = (labels == IGNORED) | ((labels >= 0) & (labels < logits.shape[-1]))
        need(bool(known.all()), op, "labels", f"{labels[~known][:1].tolist()} somewhere", "token ids below V, or -100")
    if causal:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    return logits.float() if logits.dtype.itemsize == 2 else logits, labels


def _checked(op, logits, labels, answer, choices, causal) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits and labels aligned, which choices are present [..., C], and the answer's place [..., 1]."""
    logits, labels = _aligned(op, logits, labels, causal)
    present, lead = _present(labels), labels.shape[:-2]
    if choices is not None:
        matches = isinstance(choices, Tensor) and choices.dtype == torch.bool
        matches = matches and choices.shape == present.shape and choices.device == labels.device
        need_value(matches, op, "choices", choices, f"a torch.bool tensor of shape [..., C] = {list(present.shape)}")
        present = present & choices
    if answer is None:
        return logits, labels, present, answer
    if isinstance(answer, int):
        answer = torch.full(lead, answer, device=labels.device)
    matches = isinstance(answer, Tensor) and answer.shape == lead
    matches = matches and answer.dtype == torch.int64 and answer.device == labels.device
    need_value(matches, op, "answer", answer, f"a torch.int64 tensor of shape [...] = {list(lead)} on {labels.device}")
    if values_on(answer.device):
        inside = bool(((answer >= 0) & (answer < present.shape[-1])).all())
        needed = f"in 0 ... {present.shape[-1] - 1}, the places of the choices"
        need_value(inside, op, "answer", answer.tolist(), needed)
        there = bool(present.gather(-1, answer[..., None]).all())
        need(there, op, "answer", "a choice that is absent or has no tokens", "a choice with tokens")
    return logits, labels, present, answer[..., None]


def _present(labels: Tensor) -> Tensor:
    return (labels != IGNORED).any(-1)


def _scores(logits: Tensor, labels: Tensor) -> Tensor:
    """[..., C]: the mean log-likelihood of each choice's tokens; 0 for a choice without tokens."""
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return -loss.view(labels.shape).sum(-1) / (labels != IGNORED).sum(-1).clamp(min=1)


def _unlikelihood(logits: Tensor, labels: Tensor, present: Tensor, answer: Tensor) -> Tensor:
    wrong = present.scatter(-1, answer, False)[..., None] & (labels != IGNORED)
    # log(1 - p_y) = log sum_{v != y} exp z_v - log sum_v exp z_v: finite and exact however close p_y is to 1.
    others = logits.scatter(-1, labels.clamp(min=0)[..., None], -torch.inf).logsumexp(-1)
    log_not = (others - logits.logsumexp(-1)).masked_fill(~wrong, 0)
    return -(log_not.sum((-2, -1)) / wrong.sum((-2, -1)).clamp(min=1)).mean()


def _length_normalized(scores: Tensor, present: Tensor, answer: Tensor) -> Tensor:
    return -scores.masked_fill(~present, -torch.inf).log_softmax(-1).gather(-1, answer).mean()


# --- penalties on the weights' update --------------------------------------------------------------------------------


class L2SP:
    """alpha/2 sum ||w - w0||^2 + beta/2 sum ||v||^2 (Li et al. 2018, L2-SP): towards the pretrained weights.

    w0 is a copy of every parameter that requires grad when this is made, so make it before training; v are those among
    them that have no pretrained value, `new`: names of parameters or of modules that hold them ("classifier").
    Calling it gives the penalty, a scalar. Raises ValueError where nothing requires grad or `new` names nothing.
    """

    def __init__(self, model: nn.Module, alpha: float, beta: float = 0.0, new: Collection[str] = ()):
        self.alpha, self.beta = alpha, beta
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        need(bool(trainable), "L2SP", "model", "without parameters that require grad", "one that trains")
        fresh = set()
        for each in new:
            named = {name for name in trainable if f"{name}.".startswith(f"{each}.")}
            needed = "the name of a trainable parameter or of a module that holds some"
            need_value(bool(named), "L2SP", "new", each, needed)
            fresh |= named
        self.new = [p for name, p in trainable.items() if name in fresh]
        self.pretrained = [(p, p.detach().clone()) for name, p in trainable.items() if name not in fresh]

    def __call__(self) -> Tensor:
        near = sum((p - start.to(p.device)).square().sum() for p, start in self.pretrained)
        return self.alpha / 2 * near + self.beta / 2 * sum(p.square().sum() for p in self.new)


def low_rank_norm_squared(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """||s B A||_F^2 = s^2 sum_ij (B^T B)_ij (A A^T)_ij, from two [r, r] products: BA [N, K] is never formed.

    lora_A [r, K], lora_B [N, r]; summed in float32 for 16-bit factors. Raises ValueError naming the argument.
    """
    fits = lora_A.dim() == lora_B.dim() == 2 and lora_A.shape[0] == lora_B.shape[1]
    needed = f"of shape [N, r] to lora_A [r, K] = {list(lora_A.shape)}"
    need_value(fits, "low_rank_norm_squared", "lora_B", lora_B, needed)
    lora_A, lora_B = (each.float() if each.dtype.itemsize == 2 else each for each in (lora_A, lora_B))
    return scaling**2 * ((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).sum()


def low_rank_penalty(model: nn.Module) -> Tensor:
    """sum ||s B A||_F^2 over the layers with trainable low-rank adapters: for AdaLoRA of s B diag(E) A, for DyLoRA of
    the ranks in use, for DoRA without the magnitude. Raises ValueError where there is none."""
    norms = []
    for module in model.modules():
        if isinstance(module, (LoRALinear, LoRAPart)) and module.lora_A.requires_grad:
            plain = module.lora_A, module.lora_B, module.scaling
            norms.append(low_rank_norm_squared(*(module.factors() if isinstance(module, LoRAPart) else plain)))
    need(bool(norms), "low_rank_penalty", "model", "without trainable lora_A and lora_B", "one that trains some")
    return torch.stack(norms).sum()


def regularize(model: nn.Module, penalty: Callable[[], Tensor]) -> RemovableHandle:
    """Add `penalty()` to the loss that `model` returns in training mode, from now until `.remove()` of the result.

    For models of transformers, which return a loss for labels, in a plain loop and in Trainer; under Trainer's gradient
    accumulation a batch takes its share, so that a step adds the penalty once. Without a loss to add to the forward
    pass raises RuntimeError: where the loss is formed elsewhere, as by compute_loss_func or for label_smoothing_factor,
    add `penalty()` in the former.
    """

    def add(module: nn.Module, args, kwargs: dict, output):
        if module.training and torch.is_grad_enabled():
            has = getattr(output, "loss", None) is not None
            given = "without a loss, as in Trainer with label_smoothing_factor or compute_loss_func"
            needed = "one with a loss: give the model labels, or add the penalty where the loss is formed"
            needed += " (and AdapterCallback orthogonality=False)"
            need(has, "regularize", "output", given, needed, RuntimeError)
            causal = getattr(module, "loss_type", None) == "ForCausalLM"
            share = _share(kwargs.get("labels"), kwargs.get("num_items_in_batch"), causal)
            output.loss = output.loss + share * penalty()
        return output

    return model.register_forward_hook(add, with_kwargs=True)


def _share(labels: Tensor | None, num_items: Tensor | int | None, causal: bool) -> Tensor | float:
    """Part of a step's counted labels that this batch holds; `num_items` is what Trainer counts over the step."""
    if num_items is None:
        return 1.0
    return (labels[..., 1:] if causal else labels).ne(IGNORED).sum() / num_items


# --- LoRA+ -----------------------------------------------------------------------------------------------------------


def loraplus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict]:
    """Parameter groups for any torch optimizer: B learns `ratio` times as fast as A (Hayou et al. 2024, LoRA+).

    As in PEFT, lora_B and vectors (biases, DoRA's magnitudes) take ratio * lr, both factors of LoRA on an embedding
    embedding_lr, the rest lr. Vectors are not decayed. Raises ValueError where nothing trains, or no B does.
    """
    for name, given in {"lr": lr, "ratio": ratio}.items():
        need_value(given > 0, "loraplus_groups", name, given, "> 0")
    of_embeddings = {id(p) for m in model.modules() if isinstance(m, EmbeddingLoRAPart) for p in m.parameters()}
    rates = {"A": lr, "B": ratio * lr, "embedding": embedding_lr}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    found = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = "lora_B" in name or "lora_embedding_B" in name
            embedded = "lora_embedding_" in name or id(parameter) in of_embeddings
            kind = "embedding" if embedded else "B" if factor or parameter.dim() == 1 else "A"
            groups.setdefault((kind, parameter.dim() > 1), []).append(parameter)
            found |= factor
    need(found, "loraplus_groups", "model", "without a trainable lora_B", "one whose low-rank adapters train")
    return [
        {"params": parameters, "lr": rates[kind], "weight_decay": weight_decay if decays else 0.0}
        for (kind, decays), parameters in groups.items()
    ]
