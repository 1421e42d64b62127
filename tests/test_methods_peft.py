"""Adapters trained here and in PEFT from the same tensors, on the same data: the same losses and weights."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

import peft
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_harness import rows_replaced
from tiny_models import COMMON, MODELS, VOCABULARY, gpt2, llama, randomise

from pyfastpeft import (
    LoraConfig,
    accelerate,
    adapt,
    adapter_parameters,
    add_weighted_adapter,
    count_parameters,
    merge_adapter,
    unload,
)
from pyfastpeft.layers.adapted import carriers
from pyfastpeft.layers.parts import AdaLoRAPart, DoRAPart, EmbeddingLoRAPart, IA3Part

STEPS = 50
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
# Of the losses, in epsilons: 50 steps of AdamW carry the rounding of each on to the next; it comes to about 20.
TOLERANCE = 200


pytestmark = pytest.mark.usefixtures("one_thread")


def models(make):
    if make is llama:
        return (
            llama(attention_bias=True, mlp_bias=True, initializer_range=0.1),
            ["q_proj", "v_proj"],
            ["down_proj"],
            "embed_tokens",
        )
    return gpt2(initializer_range=0.1), ["c_attn"], ["mlp.c_proj"], "wte"


CASES = {
    "lora": lambda t, f, e: peft.LoraConfig(r=4, lora_alpha=10, target_modules=t),
    "rslora": lambda t, f, e: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=t, bias="lora_only"),
    "bias": lambda t, f, e: peft.LoraConfig(r=2, lora_alpha=6, target_modules=t, bias="all"),
    "patterns": lambda t, f, e: peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=t + f, layers_to_transform=[1],
        rank_pattern={f[0]: 2, f"1.*{t[0]}": 7}, alpha_pattern={t[0]: 3},
    ),
    "all-linear": lambda t, f, e: peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"),
    "embeddings": lambda t, f, e: peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*t, e]),
    "head": lambda t, f, e: peft.LoraConfig(r=4, lora_alpha=6, target_modules=t, modules_to_save=["lm_head"]),
    "dora": lambda t, f, e: peft.LoraConfig(r=4, lora_alpha=10, target_modules=t + f, use_dora=True),
    "ia3": lambda t, f, e: peft.IA3Config(target_modules=t + f, feedforward_modules=f),
    "ia3 by architecture": lambda t, f, e: peft.IA3Config(),
    "adalora": lambda t, f, e: peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=10, target_modules=t, total_step=99),
}  # fmt: skip


def pair(make, case, dtype=torch.float32):
    """(ours, PEFT's): one random model with one random adapter."""
    base, *named = models(make)
    base = base.to(dtype)
    config = CASES[case](*named)
    theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).to(dtype)
    ours = adapt(base, config)
    for path, parameter in theirs.named_parameters():
        if "ranknum" in path:  # where PEFT casts it, it trains
            parameter.requires_grad_(False)
    randomise(theirs)
    copied = set(copy_adapter(theirs, ours))
    assert copied == {id(p) for p in ours.parameters() if p.requires_grad}
    assert sum(p.requires_grad for p in theirs.parameters()) == len(copied)
    return ours.train(), theirs.train()


@torch.no_grad()
def copy_adapter(theirs, ours, name="default"):
    """PEFT's tensors into ours; yields the id of each."""
    for path, module in carriers(ours):
        source = theirs.get_base_model().get_submodule(path)
        own = {}
        if name in getattr(module, "adapters", {}):
            part = module.adapters[name]
            if isinstance(part, IA3Part):
                own = {"ia3_l": source.ia3_l[name].flatten()}
            elif isinstance(part, EmbeddingLoRAPart):
                own = {"lora_A": source.lora_embedding_A[name], "lora_B": source.lora_embedding_B[name]}
            elif isinstance(part, AdaLoRAPart):
                own = {key: getattr(source, key)[name] for key in ("lora_A", "lora_E", "lora_B")}
            else:
                own = {key: getattr(source, key)[name].weight for key in ("lora_A", "lora_B")}
            if isinstance(part, DoRAPart):
                own["magnitude"] = source.lora_magnitude_vector[name].weight
            own = {parameter: own[key] for key, parameter in part.named_parameters()}
        if name in getattr(module, "replaced", {}):
            saved = getattr(source, "modules_to_save", None)
            source = saved[name] if saved else getattr(source, "base_layer", source)
            trained = module.replaced[name].trained(module)
            own |= {parameter: getattr(source, key) for key, parameter in trained.items()}
        for parameter, value in own.items():
            parameter.copy_(value)
            yield id(parameter)


def curve(model, steps, optimizer):
    """Losses of training steps on data that is the same every time."""
    torch.manual_seed(3)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    losses = []
    batches = torch.randint(VOCABULARY, (5, 2, 9))
    for step in range(steps):
        ids = batches[step % len(batches)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def compare(ours, theirs, steps=STEPS, optimizer=ADAMW):
    # Around AdaLoRA's model PEFT adds a regulariser to the loss.
    found, expected = curve(ours, steps, optimizer), curve(theirs.get_base_model(), steps, optimizer)
    dtype = found.dtype
    assert steps < STEPS or expected[-5:].mean() < expected[:5].mean()
    error = ((found - expected) / expected).abs().max().item()
    allowed = TOLERANCE * torch.finfo(dtype).eps
    assert error <= allowed, f"losses differ by {error:.3g} of them; {allowed:.3g} is allowed"


def compare_weights(ours, theirs):
    """After steps of plain gradient descent, to which, other than to AdamW, a gradient's length matters."""
    compare(ours, theirs, 3, partial(torch.optim.SGD, lr=0.1))
    trained = adapter_parameters(ours, "default")
    found = {path: parameter.detach().clone() for path, parameter in trained.items()}
    list(copy_adapter(theirs, ours))
    for path, parameter in trained.items():
        torch.testing.assert_close(found[path], parameter.detach(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_losses(make, case):
    compare(*pair(make, case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_weights_after_training_and_merging(make, case):
    """In float64, where nothing but a wrong formula makes a difference."""
    ours, theirs = pair(make, case, torch.float64)
    compare_weights(ours, theirs)
    ids = torch.randint(VOCABULARY, (2, 9))
    before = ours.eval()(input_ids=ids).logits
    plain = {key: value.clone() for key, value in unload(ours, merge=True).state_dict().items()}
    merged = theirs.merge_and_unload().eval()
    expected = merged.state_dict()
    tied = {"lm_head.weight"} if make is gpt2 and case == "embeddings" else set()
    assert plain.keys() == expected.keys()
    for key, value in plain.items():
        if key not in tied:
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours(input_ids=ids).logits, before)


BUGS = {
    "scaling 1 % off": ("lora_forward", lambda function, args: function(*args[:5], 1.01 * args[5], *args[6:])),
    "no gradient of A": ("lora_backward", lambda function, args: (function(*args), args[10].zero_())),
    "half of dX": ("lora_backward", lambda function, args: (function(*args), args[9] is None or args[9].mul_(0.5))),
    "IA3 upside down": ("ia3_forward", lambda function, args: function(*args[:3], 1 / args[3], *args[4:])),
    "DoRA's magnitude stays": ("dora_backward", lambda function, args: (function(*args), args[-1].zero_())),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_shows(bug):
    op, wrong = BUGS[bug]
    ours, theirs = pair(llama, op.split("_")[0])
    with (
        rows_replaced(lambda name, f: (lambda *args: wrong(f, args)) if name == op else f),
        pytest.raises(AssertionError, match="losses differ by"),
    ):
        compare(ours, theirs)


@pytest.mark.parametrize("argument", [9, 10, 11], ids=["dX", "dA", "dB"])
def test_a_gradient_one_per_cent_off_shows(argument):
    def wrap(name, function):
        def call(*args):
            function(*args)
            if name == "lora_backward" and args[argument] is not None:
                args[argument].mul_(1.01)

        return call if name == "lora_backward" else function

    ours, theirs = pair(llama, "lora", torch.float64)
    with rows_replaced(wrap), pytest.raises(AssertionError, match=r"losses differ by|not close"):
        compare_weights(ours, theirs)


@pytest.mark.parametrize(("kind", "ranks"), [("cat", (3, 5)), ("svd", (3, 5)), ("linear", (4, 4))])
@pytest.mark.parametrize("weights", [[0.7, 1.5], [0.7, -1.5]])
def test_weighted_sums(kind, ranks, weights):
    base = llama()
    configs = [peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj", "down_proj"]) for r in ranks]
    theirs = peft.get_peft_model(copy.deepcopy(base), configs[0], adapter_name="a")
    theirs.add_adapter("b", configs[1])
    for parameter in theirs.parameters():
        parameter.requires_grad_(True)
    randomise(theirs)
    base.load_state_dict(copy.deepcopy(theirs).unload().state_dict())
    ours = adapt(adapt(base, configs[0], "a"), configs[1], "b")
    assert len([*copy_adapter(theirs, ours, "a"), *copy_adapter(theirs, ours, "b")]) == 16
    theirs.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=kind)
    add_weighted_adapter(ours, ["a", "b"], weights, "sum", kind)
    for path, module in carriers(ours):
        source = theirs.get_base_model().get_submodule(path)
        lora_A, lora_B, scaling = module.adapters["sum"].factors()
        torch.testing.assert_close(scaling * lora_B @ lora_A, source.get_delta_weight("sum"), rtol=1e-4, atol=1e-5)
    ids = torch.randint(VOCABULARY, (2, 9))
    merge_adapter(ours, "sum")
    theirs.set_adapter("sum")
    torch.testing.assert_close(ours.eval()(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("tree", "vit")])
@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "AdaLoraConfig"])
def test_without_targets_a_config_of_peft_means_those_of_peft(kind, name):
    base = MODELS[name].make()
    config = getattr(peft, kind)(**{"total_step": 9} if kind == "AdaLoraConfig" else {})
    try:
        theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).base_model.model
    except ValueError:  # it knows none for this model
        theirs = None
    ours = carriers(adapt(base, config))
    if theirs is None:
        assert ours
    else:
        wrapped = [(path, m) for path, m in theirs.named_modules() if isinstance(m, BaseTunerLayer)]
        assert [path for path, _ in ours] == [path for path, _ in wrapped]
        for (_, one), (_, two) in zip(ours, wrapped):
            assert getattr(one.adapters["default"], "feedforward", None) == getattr(two, "is_feedforward", None)


@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"modules_to_save": ["cls"]}, {"modules_to_save": ["decoder", "word_embeddings"]}]
)
def test_tied_parameters_are_copied_as_often(options):
    base = transformers.BertForMaskedLM(transformers.BertConfig(**COMMON))
    config = peft.LoraConfig(target_modules=["query"], **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    assert count_parameters(adapt(base, config))[0] == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (lambda: peft.LoraConfig(layer_replication=[[0, 1], [0, 2]]), ValueError, "'layer_replication': "),
        (lambda: peft.LoraConfig(lora_bias=True), ValueError, "'lora_bias': True"),
        (lambda: peft.LoraConfig(ensure_weight_tying=True), ValueError, "'ensure_weight_tying': True"),
        (lambda: peft.LoraConfig(trainable_token_indices=[1]), ValueError, r"'trainable_token_indices': \[1\]"),
        (lambda: peft.LoraConfig(target_parameters=["w"]), ValueError, r"'target_parameters': \['w'\]"),
        (lambda: peft.LoraConfig(init_lora_weights="pissa"), ValueError, "init_lora_weights is 'pissa'"),
        (lambda: peft.LoHaConfig(), TypeError, "config is LoHaConfig.*it must be one of LoraConfig"),
    ],
)
def test_configs_that_only_peft_has(config, error, message):
    model = llama()
    with pytest.raises(error, match=message):
        adapt(model, config())
    assert not carriers(model)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_model_that_peft_adapted_is_refused(accelerated):
    """The layers that PEFT has wrapped are no targets any more, and its own lora_A is a linear layer."""
    model = llama()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    trained = [path for path, parameter in wrapped.named_parameters() if parameter.requires_grad]
    if accelerated:
        accelerate(wrapped)
    for each in (wrapped, model):
        for targets in (None, "all-linear"):
            with pytest.raises(ValueError, match=r"adapt: model is one with .* modules of PEFT's.*accelerate is for"):
                adapt(each, LoraConfig(target_modules=targets))
    assert trained == [path for path, parameter in wrapped.named_parameters() if parameter.requires_grad]


def test_two_processes(tmp_path):
    """DistributedDataParallel over gloo: loss and gradients of half the batch each are those of the whole."""
    worker = Path(__file__).with_name("distributed_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen([sys.executable, str(worker), str(tmp_path), str(rank)], env=environment) for rank in range(2)
    ]
    try:
        assert [process.wait(240) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    halves = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    whole = torch.load(tmp_path / "whole.pt")
    for step, expected in enumerate(whole):
        mean = (halves[0][step]["loss"] + halves[1][step]["loss"]) / 2
        torch.testing.assert_close(mean, expected["loss"])
        for half in halves:
            assert half[step]["gradients"].keys() == expected["gradients"].keys() != set()
            for path, gradient in half[step]["gradients"].items():
                torch.testing.assert_close(gradient, expected["gradients"][path], rtol=1e-5, atol=1e-6)
