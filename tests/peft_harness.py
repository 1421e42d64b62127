"""The differential harness: an accelerated model against stock PEFT, both measured by their distance from stock PEFT
in float64, in the output and in the gradient of every parameter and of the input."""

import copy
from collections import Counter
from contextlib import contextmanager, nullcontext

import torch
from error_rule import TOLERANCE, poisoned_memory
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pyfastpeft
from pyfastpeft.ops import dispatch, native_calls, reference

BACKENDS = [name for name in ("reference", "cpu") if any(row.backend == name for row in dispatch.TABLE["lora_forward"])]
HIDDEN = 24
NAMES = ("red", "green", "blue")
CHAIN = 8  # a model chains the roundings of many ops: this many times the tolerance of one


# --- models ----------------------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 40, "vocab_size": 61}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)
    )


def gpt2() -> GPT2LMHeadModel:
    drop = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=32, vocab_size=61, **drop))


class MLP(nn.Module):
    """Odd widths, one layer with a bias and one without, and an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, HIDDEN)
        self.up = nn.Linear(HIDDEN, 37)
        self.down = nn.Linear(37, 19, bias=False)

    def forward(self, input_ids=None, inputs_embeds=None):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return self.down(torch.tanh(self.up(x)))


LAYERS = {  # model -> its adapted linear layers, by name
    llama: ["q_proj", "v_proj", "down_proj"],
    gpt2: ["c_attn", "c_fc"],
    MLP: ["up", "down"],
}
FEEDFORWARD = {llama: ["down_proj"], gpt2: ["c_fc"], MLP: ["down"]}


def lora_config(make, **options) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 10, "target_modules": LAYERS[make], "fan_in_fan_out": make is gpt2}
    return LoraConfig(**{**defaults, **options})


def ia3_config(make) -> IA3Config:
    return IA3Config(target_modules=LAYERS[make], feedforward_modules=FEEDFORWARD[make], fan_in_fan_out=make is gpt2)


def adapted(make, *configs, dtype=torch.float32, random=True, **options):
    """A model with one adapter for each config, named as in NAMES and randomised; the first is active."""
    model = get_peft_model(make().to(dtype), configs[0], adapter_name=NAMES[0], **options)
    for name, config in zip(NAMES[1:], configs[1:]):
        model.add_adapter(name, config)
    if random:
        randomise(model)
    return model.eval()


def randomise(model) -> None:
    """Random values, all distinct, for every parameter of every adapter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
            elif "ia3_l" in name:
                parameter.normal_(mean=1.0, std=0.3)


# --- running ---------------------------------------------------------------------------------------------------------


@contextmanager
def rows_replaced(wrap):
    """Every row of the dispatch table runs `wrap(op, function)` instead of its function; native calls, which
    go past the table (test_ops_native_calls.py holds them to the same bits), are off."""
    before = {op: list(rows) for op, rows in dispatch.TABLE.items()}
    for op, rows in before.items():
        dispatch.TABLE[op] = [row._replace(function=wrap(op, row.function)) for row in rows]
    call, native_calls.mode = native_calls.mode, lambda *_: None
    try:
        yield
    finally:
        native_calls.mode = call
        dispatch.TABLE.update(before)


@contextmanager
def recorded():
    """Yields a list to which every raw op that runs, on whatever backend, adds its name and arguments."""
    calls = []

    def wrap(op, function):
        def call(*args):
            calls.append((op, args))
            return function(*args)

        return call

    with rows_replaced(wrap):
        yield calls


def measure(model, inputs, cotangent, autocast=None, **options) -> dict[str, torch.Tensor | None]:
    """The output and the gradients of the input and of every trainable parameter."""
    dtype = next(model.parameters()).dtype
    x = inputs.detach().to(dtype, copy=True).requires_grad_()
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        out = model(inputs_embeds=x, **options)
    out = out if isinstance(out, torch.Tensor) else out.logits
    out.backward(cotangent[..., : out.shape[-1]].to(out.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"output": out.detach(), "input": x.grad, **gradients}


class ReplayedDropout(nn.Module):
    """Drops what the fused kernels dropped: the mask of the next seed, in order of the layers."""

    def __init__(self, seeds):
        super().__init__()
        self.seeds = seeds

    def forward(self, x):
        p, seed = next(self.seeds)
        rows = x.reshape(-1, x.shape[-1])
        return (rows * reference.dropout_factor(seed, p, *rows.shape, rows.dtype)).view_as(x)


def replay_dropout(model, calls) -> None:
    seeds = iter([(args[6], args[7]) for op, args in calls if op == "lora_forward"])
    for layer in model.modules():
        if isinstance(layer, lora.Linear):
            for name in layer.lora_dropout:
                layer.lora_dropout[name] = ReplayedDropout(seeds)


def assert_error_rule(got, stock, exact, tolerance: float) -> None:
    """The error of `got` is at most that of `stock` and a tolerance, both measured against `exact`."""
    assert got.keys() == stock.keys() == exact.keys()
    for name, value in got.items():
        assert (value is None) == (stock[name] is None), f"{name}: one has a gradient, the other none"
        if value is None:
            continue
        assert value.shape == stock[name].shape, f"{name}: shape {value.shape}, PEFT's is {stock[name].shape}"
        assert value.dtype == stock[name].dtype, f"{name}: dtype {value.dtype}, PEFT's is {stock[name].dtype}"
        truth = exact[name].double()
        error, allowed = ((t.double() - truth).norm().item() for t in (value, stock[name]))
        allowed += tolerance * truth.norm().item()
        assert error <= allowed, f"{name}: error {error:.3g}, PEFT's and tolerance {allowed:.3g}, of {truth.norm():.3g}"


def by_layers(calls) -> dict[str, int]:
    """How often every raw op ran, an op on a group of layers counted as the op on each of them."""
    counted = Counter()
    for op, args in calls:
        group = op.startswith("lora_group")
        counted[op.replace("lora_group", "lora")] += len(args[2 if op.endswith("backward") else 1]) if group else 1
    return dict(counted)


def differential(stock, ran: dict[str, int], batch=(3, 5), autocast=None, train=False, count=by_layers, **options):
    """Measure an accelerated copy of `stock`, `stock` itself and a float64 copy; raise AssertionError unless the error
    rule holds and exactly the raw ops of `ran` ran."""
    ours, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    for model in (ours, stock, exact):
        model.train(train)
    pyfastpeft.accelerate(ours)
    inputs, cotangent = torch.randn(*batch, HIDDEN), torch.randn(*batch, 61)
    with recorded() as calls, poisoned_memory():
        got = measure(ours, inputs, cotangent, autocast, **options)
    counted = count(calls)
    assert counted == ran, f"fused path missed: raw ops {counted} ran instead of {ran}"
    if train:
        replay_dropout(stock, calls)
        replay_dropout(exact, calls)
    want = measure(stock, inputs, cotangent, autocast, **options)
    truth = measure(exact, inputs.to(want["input"].dtype), cotangent.to(want["output"].dtype), **options)
    dtype = want["output"].dtype
    assert_error_rule(got, want, truth, CHAIN * TOLERANCE[dtype] * torch.finfo(dtype).eps)
