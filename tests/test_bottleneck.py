"""Bottleneck adapters: the layer, its places in models of every family, and what a model with them still does."""

import copy
import math
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from error_rule import assert_error_rule, random, unfused_bottleneck
from torch import nn
from torch.func import functional_call

import pyfastpeft
from pyfastpeft import BottleneckConfig
from pyfastpeft.layers import Bottleneck

transformers = pytest.importorskip("transformers")

K, N, R = 13, 9, 6
PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]

# --- the layer ---


def unfused(scaling, activation):
    """The formula as a function of what the layer's parameters are called."""

    def formula(x, down, up, residual=None, down_bias=None, up_bias=None, **rest):
        norm = rest.get("norm.weight"), rest.get("norm.bias")
        seen = x if norm[0] is None else F.layer_norm(x.to(norm[0].dtype), x.shape[-1:], *norm).to(x.dtype)
        factor = rest.get("scaling", scaling)
        return unfused_bottleneck(
            seen, x if residual is None else residual, down, down_bias, up, up_bias, factor, activation
        )

    return formula


def randomised(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(random(*parameter.shape, dtype=parameter.dtype) + name.endswith("norm.weight"))
    return module


OPTIONS = [
    {"scaling": 1.7},
    {"scaling": "learned", "activation": "gelu"},
    {"layer_norm": True, "bias": False, "scaling": 0.6, "activation": "tanh"},
    {"layer_norm": True, "scaling": "learned", "activation": "silu"},
]
# Behind a norm in float32 the rule says nothing of bfloat16: that rounds what comes before it.
CASES = [(options, dtype, dtype) for options in OPTIONS for dtype in (torch.float64, torch.float32)]
CASES += [(options, torch.bfloat16, torch.float32) for options in OPTIONS[:2]]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("options", "dtype", "adapter_dtype"), CASES)
def test_forward_and_gradients(options, dtype, adapter_dtype, parallel):
    layer = randomised(Bottleneck(K, R, N if parallel else K, **options, dtype=adapter_dtype))
    inputs = {"x": random(5, 3, K, dtype=dtype)} | ({"residual": random(5, 3, N, dtype=dtype)} if parallel else {})
    parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}

    def fused(x, residual=None, **parameters):
        return functional_call(layer, parameters, (x, residual))

    formula = unfused(options["scaling"], options.get("activation", "relu"))
    assert_error_rule(fused, formula, inputs | parameters, seed=2)


def test_initial_values():
    layer = Bottleneck(400, 300, 200, scaling="learned", layer_norm=True)
    bound = 1 / math.sqrt(400)  # Kaiming-uniform with a = sqrt(5)
    assert 0.99 * bound < layer.down.abs().max() <= bound
    assert layer.down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not layer.up.any()
    assert not layer.up_bias.any()
    assert not layer.down_bias.any()
    assert layer.scaling.tolist() == [1.0]
    x = torch.randn(4, 50)
    torch.testing.assert_close(Bottleneck(50, 8)(x), x, rtol=0, atol=0)
    assert not torch.allclose(Bottleneck(50, 8, init_weights=False)(x), x)


def test_representation():
    assert repr(Bottleneck(K, R, N, "gelu", 0.5)) == (
        "Bottleneck(in_features=13, bottleneck_size=6, out_features=9, activation=gelu, scaling=0.5)"
    )


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: Bottleneck(0, 2), ValueError, "in_features is 0"),
        (lambda: Bottleneck(K, 2.5), ValueError, "bottleneck_size is 2.5"),
        (lambda: Bottleneck(K, 2, -1), ValueError, "out_features is -1"),
        (lambda: Bottleneck(K, 2, scaling=float("nan")), ValueError, "scaling is nan .* a finite number"),
        (lambda: Bottleneck(K, 2, scaling="trained"), TypeError, "scaling is 'trained' .* a finite number"),
        (lambda: Bottleneck(K, 2, activation="swish"), ValueError, "activation is 'swish' .* one of relu"),
        (lambda: Bottleneck(K, 2)(torch.ones(2, K + 1)), ValueError, "down is"),
        (lambda: Bottleneck(K, 2, N)(torch.ones(2, K)), ValueError, "residual is"),
    ],
)
def test_errors_of_the_layer_name_the_argument(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


# --- models ---

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = {"feed_forward_proj": "gated-gelu"}


def build(family, **options):
    """A small float64 model without dropout; its normalisation has random gains."""
    t = transformers
    short = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    still = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    bert = SIZES | WORDS | still | options
    model = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **WORDS, num_key_value_heads=2, **options)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**short, **WORDS, **options)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**SIZES, **WORDS, ffn_dim=48, word_embed_proj_dim=32, dropout=0, **options)
        ),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES, **WORDS, **options)),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**bert)),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**bert)),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(
                dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=64, dropout=0, attention_dropout=0, **options
            )
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, vocab_size=64, dropout_rate=0,
                decoder_start_token_id=0, **options,
            )
        ),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SIZES, **still, image_size=16, patch_size=4)),
    }[family]().double()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def batch(family):
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    ids = {"input_ids": torch.randint(3, 60, (2, 7))}
    return ids | ({"decoder_input_ids": torch.randint(3, 60, (2, 5))} if family == "t5" else {})


def changed(model, name="default", seed=1):
    """The model with random values in all that an adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pyfastpeft.adapter_parameters(model, name).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(family, placement="parallel", seed=1, **options):
    model = build(family)
    pyfastpeft.adapt(model, BottleneckConfig(placement=placement, bottleneck_size=5, **options))
    return changed(model, seed=seed)


# Of each family: the attention sub-layers' last layers, the feed-forward's last and its first, in layer 1; and how many
# attention and feed-forward sub-layers the model has. {} stands for the layer's index.
PLACES = {
    "llama": (["model.layers.{}.self_attn.o_proj"], ["model.layers.{}.mlp.down_proj"], ["model.layers.{}.mlp.up_proj"]),
    "gpt2": (["transformer.h.{}.attn.c_proj"], ["transformer.h.{}.mlp.c_proj"], ["transformer.h.{}.mlp.c_fc"]),
    "opt": (
        ["model.decoder.layers.{}.self_attn.out_proj"],
        ["model.decoder.layers.{}.fc2"],
        ["model.decoder.layers.{}.fc1"],
    ),
    "gpt_neox": (
        ["gpt_neox.layers.{}.attention.dense"],
        ["gpt_neox.layers.{}.mlp.dense_4h_to_h"],
        ["gpt_neox.layers.{}.mlp.dense_h_to_4h"],
    ),
    "bert": (
        ["bert.encoder.layer.{}.attention.output.dense"],
        ["bert.encoder.layer.{}.output.dense"],
        ["bert.encoder.layer.{}.intermediate.dense"],
    ),
    "roberta": (
        ["roberta.encoder.layer.{}.attention.output.dense"],
        ["roberta.encoder.layer.{}.output.dense"],
        ["roberta.encoder.layer.{}.intermediate.dense"],
    ),
    "distilbert": (
        ["distilbert.transformer.layer.{}.attention.out_lin"],
        ["distilbert.transformer.layer.{}.ffn.lin2"],
        ["distilbert.transformer.layer.{}.ffn.lin1"],
    ),
    "t5": (
        [
            "encoder.block.{}.layer.0.SelfAttention.o",
            "decoder.block.{}.layer.0.SelfAttention.o",
            "decoder.block.{}.layer.1.EncDecAttention.o",
        ],
        ["encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"],
        ["encoder.block.{}.layer.1.DenseReluDense.wi", "decoder.block.{}.layer.2.DenseReluDense.wi"],
    ),
    "vit": (["vit.layers.{}.attention.o_proj"], ["vit.layers.{}.mlp.fc2"], ["vit.layers.{}.mlp.fc1"]),
}
FAMILIES = list(PLACES)


def places(family, placement):
    """The paths of the layers to whose outputs an adapter is added -> those whose inputs it reads, None: the former."""
    attention, last, first = ([path.format(i) for i in range(2) for path in paths] for paths in PLACES[family])
    if placement == "parallel":
        return dict(zip(last, first))
    return dict.fromkeys(last + (attention if placement == "houlsby" else []))


def branches(model, name="default"):
    """The branches of a model in order: the parameters of each."""
    parameters = pyfastpeft.adapter_parameters(model, name)
    found = {}
    for path, parameter in parameters.items():
        owner, dot, own = path.rpartition(".norm.") if ".norm." in path else path.rpartition(".")
        found.setdefault(owner, {})[f"norm.{own}" if dot == ".norm." else own] = parameter
    return found


def computed_by_hooks(plain, family, placement, found, scaling, activation):
    """`plain` with the branches written in plain torch, as hooks."""
    where = places(family, placement)
    # A branch beside a sub-layer that is a module is held there; one in a chain, at its end.
    order = {path: next(key for key in found if path == key or path.startswith(f"{key}.")) for path in where}
    assert len(set(order.values())) == len(found) == len(where)
    inputs = {}
    for last, first in where.items():
        branch = unfused(scaling, activation)

        def keep(module, args, last=last):
            inputs[last] = args[0]

        def add(module, args, y, last=last, branch=branch):
            x = inputs[last] if placement == "parallel" else y
            return branch(x, residual=y, **found[order[last]])

        if first is not None:
            plain.get_submodule(first).register_forward_pre_hook(keep)
        plain.get_submodule(last).register_forward_hook(add)
    return plain


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_formula_in_the_right_places(family, placement):
    plain, inputs = build(family), batch(family)
    model = copy.deepcopy(plain)
    layer_norm, scaling = family in ("llama", "bert", "t5"), 1.6 if family in ("gpt2", "bert", "t5") else "learned"
    options = {"bottleneck_size": 5, "layer_norm": layer_norm, "scaling": scaling, "activation": "gelu"}
    with torch.no_grad():
        before = model(**inputs).logits
    pyfastpeft.adapt(model, BottleneckConfig(placement=placement, **options))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, before)
    own = branches(changed(model))
    reference = {path: {n: p.detach().clone().requires_grad_() for n, p in held.items()} for path, held in own.items()}
    computed_by_hooks(plain, family, placement, reference, options["scaling"], "gelu")
    expected, logits = plain(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(logits, before, rtol=1e-2)
    direction = torch.randn_like(logits)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    for path, held in own.items():
        for name, parameter in held.items():
            torch.testing.assert_close(parameter.grad, reference[path][name].grad)
            assert parameter.grad.any()
    assert {p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n} == {False}


def test_gated_t5_and_chosen_layers():
    model = build("t5", **GATED)
    pyfastpeft.adapt(model, BottleneckConfig(placement="parallel", layers_to_transform=[-1]))
    path = "block.1.layer.{}.DenseReluDense"
    assert list(branches(model)) == [f"{stack}.{path.format(i)}" for stack, i in (("encoder", 1), ("decoder", 2))]
    model = build("bert")
    pyfastpeft.adapt(model, BottleneckConfig(placement="parallel", layers_to_transform=1))
    assert [path for path, module in model.named_modules() if hasattr(module, "adapters")] == [
        "bert.encoder.layer.1.intermediate.dense",
        "bert.encoder.layer.1.output.dense",
    ]


# --- what a model with adapters still does ---


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_generation_with_a_cache_is_generation_without(family, placement):
    model = adapted(family, placement)
    ids = torch.randint(3, 60, (2, 6))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=use, **options)
        for use in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.logits, uncached.logits)


def gradients(model, inputs, call=None):
    model.zero_grad()
    (model if call is None else call)(**inputs).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("family", "placement"), [("llama", "houlsby"), ("llama", "parallel"), ("bert", "parallel")])
def test_gradient_checkpointing(family, placement, reentrant):
    model, inputs = adapted(family, placement).train(), batch(family)
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(model, inputs), expected)
    copy.deepcopy(model)  # nothing of the graph is left in it


@pytest.mark.parametrize(("family", "placement"), [("llama", "houlsby"), ("llama", "parallel"), ("bert", "parallel")])
def test_compiles_to_one_graph(family, placement):
    torch._dynamo.reset()
    model, inputs = adapted(family, placement, scaling="learned", layer_norm=True), batch(family)
    expected = gradients(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, inputs, compiled), expected)


# Where the hand-over in a chain meets checkpointing, dynamo asks to be told that it may not happen again in backward.
@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_compiles_with_checkpointing(family):
    torch._dynamo.reset()
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = family == "bert"
    model, inputs = adapted(family).train(), batch(family)
    model.config.use_cache = False
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, inputs, compiled), expected)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_autocast(family):
    model, inputs = adapted(family).float(), batch(family)
    exact = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
        logits.float().square().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).norm() < 0.05 * exact.norm()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_float32_adapters_on_a_bfloat16_base(placement):
    plain, inputs = build("bert").bfloat16(), batch("bert")
    model = copy.deepcopy(plain)
    config = BottleneckConfig(
        placement=placement, bottleneck_size=5, scaling=1.5, layer_norm=True, train_layer_norm=True
    )
    changed(pyfastpeft.adapt(model, config))
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".adapters." in n)
    logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    exact = model.double()(**inputs).logits
    assert (logits - exact).norm() < 0.05 * exact.norm()
    small = pyfastpeft.adapt(plain, BottleneckConfig(placement=placement), autocast_adapter_dtype=False)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


def test_the_models_norms_train_and_come_back():
    model, inputs = build("bert"), batch("bert")
    before, state = model(**inputs).logits, copy.deepcopy(model.state_dict())
    pyfastpeft.adapt(model, BottleneckConfig(bottleneck_size=5, train_layer_norm=True, layers_to_transform=[0]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".adapters." not in name}
    layer = "bert.encoder.layer.0"
    norms = [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    assert trained == {f"{norm}.{name}" for norm in norms for name in ("weight", "bias")}
    changed(model)
    model(**inputs).logits.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with pyfastpeft.disable_adapter(model):
        torch.testing.assert_close(model(**inputs).logits, before)
    pyfastpeft.unload(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    everywhere = pyfastpeft.adapt(model, BottleneckConfig(bottleneck_size=5, train_layer_norm=True))
    assert sum("LayerNorm" in n for n in pyfastpeft.adapter_parameters(everywhere, "default")) == 2 * 5


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_several_adapters(family):
    model, inputs = build(family), batch(family)
    before = model(**inputs).logits
    alone = {}
    for seed, name in enumerate(("a", "b")):
        pyfastpeft.adapt(model, BottleneckConfig(placement="parallel", bottleneck_size=3 + seed), name)
        alone[name] = changed(model, name, seed)(**inputs).logits
    pyfastpeft.set_adapter(model, "a", "b")
    both = model(**inputs).logits
    # Branches beside one sub-layer add up: their ranks can be put side by side.
    joint = pyfastpeft.adapt(copy.deepcopy(model), BottleneckConfig(placement="parallel", bottleneck_size=7), "joint")
    parts = [branches(joint, name) for name in ("a", "b", "joint")]
    with torch.no_grad():
        for a, b, whole in zip(*(part.values() for part in parts)):
            for name, dim in (("down", 0), ("down_bias", 0), ("up", 1)):
                whole[name].copy_(torch.cat([a[name], b[name]], dim))
            whole["up_bias"].copy_(a["up_bias"] + b["up_bias"])
    torch.testing.assert_close(both, joint(**inputs).logits)
    for name in ("a", "b"):
        pyfastpeft.set_adapter(model, name)
        torch.testing.assert_close(model(**inputs).logits, alone[name])
    assert not torch.allclose(both, alone["a"])
    pyfastpeft.delete_adapter(model, "b")
    pyfastpeft.set_adapter(model, "a")
    torch.testing.assert_close(model(**inputs).logits, alone["a"])
    pyfastpeft.unload(model)
    torch.testing.assert_close(model(**inputs).logits, before)
    assert not any(hasattr(module, "adapters") or "Adapted" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_state_and_copies(family, placement):
    model, inputs = adapted(family, placement, scaling="learned", layer_norm=True), batch(family)
    logits = model(**inputs).logits
    twin = adapted(family, placement, seed=2, scaling="learned", layer_norm=True)
    assert not torch.allclose(twin(**inputs).logits, logits)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(**inputs).logits, logits)
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(**inputs).logits, logits)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(**inputs).logits, logits)
    pyfastpeft.set_adapter(changed(other))
    torch.testing.assert_close(model(**inputs).logits, logits)
    assert other.pyfastpeft.active == ()


def test_chunked_feed_forward():
    inputs = batch("bert")
    model = adapted("bert")
    expected = gradients(model, inputs)
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    torch.testing.assert_close(gradients(model, inputs), expected)


def test_they_cannot_be_merged():
    for placement, kind in (("houlsby", "SerialPart"), ("parallel", "ParallelPart")):
        with pytest.raises(TypeError, match=f"'default', whose {kind} in .* is no change of a weight"):
            pyfastpeft.merge_adapter(adapted("llama", placement))


def _train_in_two_processes(rank, results, address):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(adapted("bert"))
    ids = torch.arange(3, 31).view(4, 7)
    model(input_ids=ids[2 * rank : 2 * rank + 2]).logits.square().mean().backward()
    results.put((rank, {n: p.grad.numpy() for n, p in model.module.named_parameters() if p.requires_grad}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results, address = context.Queue(), f"file://{tmp_path}/rendezvous"
    processes = [context.Process(target=_train_in_two_processes, args=(i, results, address)) for i in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    torch.manual_seed(0)
    model = adapted("bert")
    model(input_ids=torch.arange(3, 31).view(4, 7)).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for rank in (0, 1):
                torch.testing.assert_close(torch.from_numpy(found[rank][name]), parameter.grad)


# --- any other module tree ---


class Block(nn.Module):
    """With a chain first -> middle -> last, a norm, and inner modules that return tuples."""

    def __init__(self, middle=torch.relu):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(K, 7), nn.Linear(7, N), nn.LayerNorm(N)
        self.pair, self.items = Pair(), nn.ModuleList([nn.Linear(N, N)])
        self.words, self.middle = nn.Embedding(10, K), middle
        self.attention = nn.MultiheadAttention(N, 3, batch_first=True)

    def forward(self, x):
        y = self.norm(self.last(self.middle(self.first(x))))
        y = y + self.attention(y, y, y)[0]
        return self.items[0](self.pair(y, 2.0)[0])


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(N, 4), nn.Linear(4, N)

    def forward(self, hidden, scale):
        return self.outer(self.inner(hidden).tanh()) * scale, "more"


def on_block(target, placement="houlsby", **options):
    """(plain, adapted, branch): a block, its adapted copy, and the formula of the one branch."""
    plain = Block().double()
    model = copy.deepcopy(plain)
    config = BottleneckConfig(
        placement=placement, target_modules=target, bottleneck_size=3, scaling=1.3, init_weights=False, **options
    )
    changed(pyfastpeft.adapt(model, config))
    (held,) = branches(model).values()

    def branch(x, y):
        return unfused(1.3, "relu")(x, residual=y, **held)

    return plain, model, branch


def test_after_any_module():
    x = torch.randn(2, 4, K, dtype=torch.float64)
    plain, model, branch = on_block(["norm"])
    plain.norm.register_forward_hook(lambda module, args, y: branch(y, y))
    torch.testing.assert_close(model(x), plain(x))
    for name in ("pair", "attention"):
        plain, model, branch = on_block([name])
        module = plain.get_submodule(name)
        module.register_forward_hook(lambda module, args, y, branch=branch: (branch(y[0], y[0]), *y[1:]))
        torch.testing.assert_close(model(x), plain(x))
    assert model.pair(torch.zeros(2, N, dtype=torch.float64), 1.0)[1] == "more"


def test_beside_any_module():
    x = torch.randn(2, 4, K, dtype=torch.float64)
    plain, model, branch = on_block(["first"], "parallel")
    plain.first.register_forward_hook(lambda module, args, y: branch(args[0], y))
    torch.testing.assert_close(model(x), plain(x))
    plain, model, branch = on_block(["pair"], "parallel")
    plain.pair.register_forward_hook(lambda module, args, y: (branch(args[0], y[0]), *y[1:]))
    expected = plain(x)
    torch.testing.assert_close(model(x), expected)
    y = torch.randn(2, N, dtype=torch.float64)
    torch.testing.assert_close(model.pair(hidden=y, scale=1.5)[0], model.pair(y, 1.5)[0])


def test_beside_a_chain():
    x = torch.randn(2, 4, K, dtype=torch.float64)
    plain, model, branch = on_block(["last"], "parallel", input_modules=["first"])
    plain.last.register_forward_hook(lambda module, args, y: branch(x, y))
    torch.testing.assert_close(model(x), plain(x))
    assert sum(p.numel() for p in pyfastpeft.adapter_parameters(model, "default").values()) == 3 * K + 3 + N * 3 + N
    with pytest.raises(RuntimeError, match="x is missing; it must be that of the chain's first layer"):
        model.last(torch.ones(2, 7, dtype=torch.float64))
    last = model.last.adapters["default"]
    first = model.first.adapters["default"]
    again = pickle.loads(pickle.dumps((first, last)))
    assert again[0].passage is again[1].passage is not last.passage


def test_threads_share_a_model_and_not_their_inputs():
    """Both are inside the chain at the same time."""
    barrier = threading.Barrier(2, timeout=30)
    _, model, _ = on_block(["last"], "parallel", input_modules=["first"])
    xs, results = torch.randn(2, 3, K, dtype=torch.float64), [None, None]
    expected = [model(x) for x in xs]

    def meet(x):
        barrier.wait()
        return torch.relu(x)

    def run(i):
        results[i] = model(xs[i])

    model.middle = meet
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["frist"]}, ValueError, "close to it are .*first"),
        ({"target_modules": ["items"]}, ValueError, "holding 'items'"),
        ({"target_modules": ["attention.out_proj"]}, ValueError, "holding 'attention.out_proj'"),
        ({"target_modules": ["words"], "placement": "parallel"}, ValueError, "meaning 'words'; .* read vectors"),
        ({"target_modules": ["last", "norm"], "input_modules": ["first"]}, ValueError, "one for each of"),
        ({"target_modules": ["last"], "input_modules": ["last"]}, ValueError, "others than the target modules"),
        ({"target_modules": ["last"], "input_modules": ["frist"]}, ValueError, "input_modules is holding 'frist'"),
        ({}, ValueError, "target_modules is None for a model of type Block"),
    ],
)
def test_errors_of_targets_leave_the_model_as_it_was(options, error, message):
    if "input_modules" in options:
        options = options | {"placement": "parallel"}
    model = Block()
    state = set(model.state_dict())
    with pytest.raises(error, match=message):
        pyfastpeft.adapt(model, BottleneckConfig(**options))
    assert set(model.state_dict()) == state
    assert type(model.first) is nn.Linear


def test_a_module_without_known_widths_or_norms_is_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Linear(K, N))
    with pytest.raises(TypeError, match="meaning '0', a Dropout; it must be of modules that hold linear layers"):
        pyfastpeft.adapt(model, BottleneckConfig(target_modules=["0"]))

    class Packed(nn.Identity):
        """As torch's quantised layers."""

        def weight(self):
            return torch.ones(N)

    with pytest.raises(TypeError, match="meaning '0', a Packed; it must be of modules that hold linear layers"):
        pyfastpeft.adapt(nn.Sequential(Packed()), BottleneckConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="train_layer_norm is True for a model without"):
        pyfastpeft.adapt(model, BottleneckConfig(target_modules=["1"], train_layer_norm=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "serial"}, "placement is 'serial'"),
        ({"bottleneck_size": 0}, "bottleneck_size is 0"),
        ({"activation": "swish"}, "activation is 'swish'"),
        ({"scaling": "fixed"}, "scaling is 'fixed'"),
        ({"scaling": True}, "scaling is True"),
        ({"input_modules": ["fc1"]}, "input_modules is"),
        ({"input_modules": ["fc1"], "placement": "parallel"}, "input_modules is"),
    ],
)
def test_errors_of_the_config_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**options)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, mask):
        return self.inner(x) * mask


class Masks(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Masked()

    def forward(self, x):
        return self.block(mask=torch.ones(4), x=x)


def test_arguments_by_name_in_any_order():
    model, x = Masks(), torch.randn(3, 4)
    plain = model(x)
    config = BottleneckConfig(placement="parallel", target_modules=["block"], bottleneck_size=2)
    changed(pyfastpeft.adapt(model, config))
    branch = model.block.adapters["default"]
    torch.testing.assert_close(model(x), branch(x, plain))
    assert not torch.allclose(model(x), plain, atol=1e-3)
