"""Bottleneck adapters against the AdapterHub library: equal outputs with equal weights, then CPU time per step.

    pip install adapters    # in an environment of its own: it pins an older transformers
    python -m benchmarks.adapterhub [--layers 6] [--steps 15]

Llama is left out where parallel: there AdapterHub's branch reads the residual stream before its norm, not the
sub-layer's input. Pfeiffer's is AdapterHub's with `original_ln_before=False`.
"""

import argparse
import copy
import random
import time

import adapters
import torch
import transformers

import pyfastpeft
from benchmarks.measure import spread

RANK, HIDDEN = 64, 768
CONFIGS = {
    "houlsby": (adapters.DoubleSeqBnConfig, {}),
    "pfeiffer": (adapters.SeqBnConfig, {"original_ln_before": False}),
    "parallel": (adapters.ParBnConfig, {}),
}
SIZES = {"hidden_size": HIDDEN, "num_attention_heads": 12, "vocab_size": 8000}
MODELS = {
    "llama": lambda n: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_hidden_layers=n, intermediate_size=2048)
    ),
    "bert": lambda n: transformers.BertForMaskedLM(
        transformers.BertConfig(**SIZES, num_hidden_layers=n, intermediate_size=3072)
    ),
}
CASES = [(model, placement) for model in MODELS for placement in CONFIGS if (model, placement) != ("llama", "parallel")]


def pair(model: str, placement: str, layers: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One model adapted by AdapterHub and by pyfastpeft, with the same random adapters."""
    theirs = MODELS[model](layers)
    ours = copy.deepcopy(theirs)
    config, options = CONFIGS[placement]
    adapters.init(theirs)
    options = {"reduction_factor": HIDDEN // RANK, "non_linearity": "gelu", "scaling": 1.5, **options}
    theirs.add_adapter("bench", config=config(**options))
    theirs.train_adapter("bench")
    config = pyfastpeft.BottleneckConfig(placement=placement, bottleneck_size=RANK, activation="gelu", scaling=1.5)
    pyfastpeft.adapt(ours, config)
    modules = [m for m in theirs.modules() if type(m).__name__ in ("Adapter", "ParallelAdapter")]
    parts = [m for m in ours.modules() if hasattr(m, "up_bias")]
    assert len(modules) == len(parts)
    with torch.no_grad():
        for module, part in zip(modules, parts):
            down, up = module.adapter_down[0], module.adapter_up
            for tensor in (down.weight, down.bias, up.weight, up.bias):
                tensor.normal_(std=0.05)
            part.down.copy_(down.weight)
            part.down_bias.copy_(down.bias)
            part.up.copy_(up.weight)
            part.up_bias.copy_(module.scaling * up.bias)  # which AdapterHub scales, too
    return theirs, ours


def check(theirs, ours, ids) -> float:
    """The largest difference of the logits; AssertionError if it is more than rounding."""
    with torch.no_grad():
        expected, logits = (model.eval()(input_ids=ids).logits for model in (theirs, ours))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    return (logits - expected).abs().max().item()


def step(model, optimizer, ids) -> float:
    """CPU seconds of one training step."""
    start = time.process_time()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each model, interleaved (default: 15)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(3, SIZES["vocab_size"], (4, 128))
    print(f"adapters {adapters.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    print(
        f"{options.layers} layers, batch 4 x 128, {options.steps} steps of each; ratio: median (20th-80th percentile)"
    )
    print("model  placement  max difference  CPU time per step: AdapterHub's, ours, its over ours")
    for name, placement in CASES:
        models = pair(name, placement, options.layers)
        difference = check(*models, ids)
        trained = [(m, torch.optim.AdamW(p for p in m.parameters() if p.requires_grad)) for m in models]
        rounds = []
        for _ in range(options.steps + 1):  # the first warms up
            order = random.sample((0, 1), 2)
            seconds = {index: step(*trained[index], ids) for index in order}
            rounds.append((seconds[0], seconds[1], seconds[0] / seconds[1]))
        theirs, ours, ratio = (spread(column) for column in zip(*rounds[1:]))
        found = f"{ratio['median']:.3f} ({ratio['p20']:.3f}-{ratio['p80']:.3f})"
        print(
            f"{name:6} {placement:9} {difference:15.1e} {theirs['median']:8.3f} s {ours['median']:8.3f} s  {found}",
            flush=True,
        )


if __name__ == "__main__":
    main()
