"""The small byte-level Llama that is trained where no model is given; loading a given one; training either."""

import time
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks import Misuse

from .texts import Part


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the 256 bytes, and one for the end of a text."""
    vocabulary = {symbol: token for token, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def small_llama(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of 1.7 million parameters, at random."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def load(path: str, length: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer. Raises Misuse where they do not load or do not fit."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path).float().eval()
    except (OSError, ValueError) as error:
        raise Misuse(f"--model {path} does not load as a causal language model: {_summary(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        known = set(tokenizer("text", add_special_tokens=False)["input_ids"]) - set(tokenizer.all_special_ids)
        why = "" if known else "its vocabulary is empty"  # what some of them are without their files
    except Exception as error:  # transformers raises whatever its tokenizers do
        why = _summary(error)
    if why:
        raise Misuse(f"--model {path} comes without a tokenizer that transformers can load: {why}")
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise Misuse(f"--model {path}: its tokenizer has {len(tokenizer)} tokens, its embeddings only {vocabulary}")
    longest = getattr(model.config, "max_position_embeddings", length)
    if longest < length:
        raise Misuse(f"--length is {length}; the model takes at most {longest} tokens")
    return model, tokenizer


def _summary(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# --- training --------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (Jordan et al. 2024), for matrices.

    torch.optim.Muon forms the products in bfloat16, for which many CPUs have no instructions; this one does not.
    """

    def __init__(self, matrices, lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(average, group["momentum"])
                tall = update.shape[0] > update.shape[1]
                update = update.T if tall else update
                update = update / (update.norm() + 1e-7)
                for _ in range(5):
                    gram = update @ update.T
                    update = 3.4445 * update + (2.0315 * gram @ gram - 4.775 * gram) @ update
                update = update.T if tall else update
                matrix.add_(update, alpha=-group["lr"] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5)


def base_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    inside = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95))]


def train(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batches: Iterator[Tensor],
    steps: int,
    seconds: float,
    label: str,
) -> list[float]:
    """Train for `steps` or `seconds`, whichever ends first, with a short warm-up and a linear decay; the loss of every
    step."""
    losses, start = [], time.perf_counter()
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    device = next(model.parameters()).device
    model.train()
    with progress(label) as bar:
        for step, ids in enumerate(batches):
            done = max(step / steps, (time.perf_counter() - start) / seconds)
            bar.update(min(done, 1) - bar.n)
            if done >= 1:
                break
            for group, peak in peaks:
                group["lr"] = peak * min(1, (step + 1) / 10) * max(0.05, 1 - done)
            ids = ids.to(device)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_((p for group, _ in peaks for p in group["params"]), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix_str(f"step {step + 1}, loss {losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses


def progress(label: str) -> tqdm:
    """A bar from 0 to 1; redrawn seldom where nobody watches."""
    bar = tqdm(total=1.0, desc=f"  {label}", bar_format="{desc}: {percentage:3.0f}%|{bar:24}| {elapsed} {postfix}")
    bar.mininterval = 0.1 if bar.fp.isatty() else 10
    return bar


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Part, rows: int) -> float:
    """Mean cross-entropy per token on the held-out rows, in nats."""
    device = next(model.parameters()).device
    losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in text.held_out.to(device).split(rows)]
    return sum(losses) / len(text.held_out)
