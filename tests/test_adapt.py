"""The life of adapters in models of every architecture: found, injected, run, switched, merged, taken off again."""

import copy
import pickle
import re
import warnings
from abc import ABC
from contextlib import nullcontext
from typing import Generic, TypeVar

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils.parametrize import remove_parametrizations
from torch.testing._internal.two_tensor import TwoTensor

pytest.importorskip("transformers")

import transformers as tf
from tiny_models import (
    COMMON,
    GROUPED,
    HIDDEN,
    INNER,
    MODELS,
    VOCABULARY,
    Block,
    bart,
    gpt2,
    inputs,
    llama,
    loss,
    output,
    randomise,
    t5,
    tree,
)

from pyfastpeft import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    DyLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SelectiveConfig,
    adapt,
    adapter_parameters,
    add_weighted_adapter,
    count_parameters,
    delete_adapter,
    disable_adapter,
    load_adapter,
    merge_adapter,
    merged_adapters,
    save_adapter,
    save_training_state,
    set_adapter,
    unload,
    unmerge_adapter,
)
from pyfastpeft.layers import LoRALinear
from pyfastpeft.layers.adapted import BaseLinear, carriers

pytestmark = pytest.mark.usefixtures("one_thread")

TREE = {"target_modules": ["up", "down"]}


def config_for(method, name):
    """A config of a method that changes the model `name`, with a scaling other than 1 where it has one."""
    targets = TREE if name == "tree" else {}
    lora = {"r": 4, "lora_alpha": 10, **targets}
    return {
        "lora": lambda: LoraConfig(**lora),
        "rslora with biases": lambda: LoraConfig(**lora, use_rslora=True, bias="all", init_lora_weights="gaussian"),
        "dora": lambda: LoraConfig(**lora, use_dora=True),
        "adalora": lambda: AdaLoraConfig(**targets, init_r=5, target_r=2, lora_alpha=10, total_step=9),
        "dylora": lambda: DyLoraConfig(**lora),
        "ia3": lambda: IA3Config(**targets, feedforward_modules=["down"] if targets else None),
        "bitfit": lambda: BitFitConfig(add_missing=True, train_layer_norm=True),
        "selective": lambda: SelectiveConfig(target_parameters=r".*\b1\..*"),
        "bottleneck": lambda: BottleneckConfig(bottleneck_size=4, activation="tanh", **targets),
    }[method]()


METHODS = ("lora", "rslora with biases", "dora", "adalora", "dylora", "ia3", "bitfit", "selective", "bottleneck")
MERGED = METHODS[:-1]


def adapted(name, *methods, names=("default", "other", "third")):
    """(model, inputs): in evaluation mode, every adapter randomised, the last one active."""
    model = MODELS[name].make().eval()
    given = inputs(model)
    for method, adapter in zip(methods, names):
        adapt(model, config_for(method, name) if isinstance(method, str) else method, adapter)
        randomise(model)
    return model, given


def snapshot(model):
    """All that `unload` has to restore."""
    values = {key: value.clone() for key, value in model.state_dict().items()}
    shape = [(path, type(module), sorted(module.__dict__)) for path, module in model.named_modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    parameters = [(path, p, p.requires_grad) for path, p in model.named_parameters(remove_duplicate=False)]
    return values, shape, hooks, parameters


def assert_same(now, before):
    assert now[0].keys() == before[0].keys()
    assert all(torch.equal(value, before[0][key]) for key, value in now[0].items())
    assert now[1:3] == before[1:3]
    for (path, parameter, trains), (was, old, trained) in zip(now[3], before[3], strict=True):
        assert (path, trains) == (was, trained)
        assert parameter is old, path


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- one adapter in every architecture ---


EVERYWHERE = ("lora", "ia3", "bitfit")  # the others meet the same layers in fewer models
ELSEWHERE = ("llama", "gpt2", "bert", "tree")


@pytest.mark.parametrize(
    ("kin", "model", "config"),
    [
        ("bert", tf.XLMRobertaModel, tf.XLMRobertaConfig),
        ("bert", tf.ElectraModel, tf.ElectraConfig),
        ("t5", tf.MT5Model, tf.MT5Config),
        ("t5", tf.UMT5Model, tf.UMT5Config),
        ("bart", tf.MBartModel, tf.MBartConfig),
        ("bart", tf.PegasusModel, tf.PegasusConfig),
        ("bart", tf.MarianModel, tf.MarianConfig),
        ("bart", tf.M2M100Model, tf.M2M100Config),
        ("bart", tf.WhisperModel, tf.WhisperConfig),
    ],
)
def test_targets_in_models_that_are_built_alike(kin, model, config):
    sizes = MODELS[kin].make().config.to_diff_dict()
    del sizes["model_type"]
    for method in (LoraConfig(), IA3Config(), BottleneckConfig()):
        kindred = (MODELS[kin].make().base_model, model(config(**sizes)))
        first, second = ([path for path, _ in carriers(adapt(made, method))] for made in kindred)
        assert first == second != []


HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
SEES = {key: COMMON[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
Q_V, LANGUAGE = r"layers\.\d\.self_attn\.[qv]_proj", r"model\.language_model\.layers\."
# model_type -> (its config, what LoRA adapts, how many modules that are, and how many IA3 does; whether it has experts)
IN_TYPES = {
    "ministral": (HEADS, Q_V, 4, 6, False),
    "ministral3": (HEADS, Q_V, 4, 6, False),
    "mixtral": ({**GROUPED, "num_local_experts": 2}, Q_V, 4, 4, True),
    "qwen2_moe": ({**GROUPED, **EXPERTS}, Q_V, 4, 6, True),
    "qwen3_moe": ({**HEADS, **EXPERTS, "mlp_only_layers": [0]}, Q_V, 4, 5, True),
    "qwen3_5_text": (
        {**HEADS, "num_hidden_layers": 4}, r"layers\.([012]\.linear_attn\.in_proj_qkv|3\.self_attn\.[qv]_proj)", 5, 9,
        False,
    ),
    "gemma3": ({"text_config": HEADS, "vision_config": SEES}, LANGUAGE, 4, 6, False),
    "gemma4": ({"text_config": HEADS, "vision_config": SEES}, LANGUAGE, 4, 6, False),
    "gemma4_text": (HEADS, Q_V, 4, 6, False),
    "llama4": (
        {
            "text_config": {**HEADS, "num_local_experts": 2, "interleave_moe_layer_step": 2},
            "vision_config": SEES,
        },
        "layers", 8, 10, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_TYPES)
def test_targets_in_types_that_vary(kind):
    sizes, lora, adapted, scaled, experts = IN_TYPES[kind]
    config = tf.AutoConfig.for_model(kind, **sizes)
    auto = tf.AutoModelForImageTextToText if "vision_config" in sizes else tf.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    assert model.config.model_type == kind
    found = [path for path, _ in carriers(adapt(model, LoraConfig(), "a"))]
    assert len(found) == adapted
    assert all(re.search(lora, path) for path in found)
    adapt(model, IA3Config(), "b")
    assert sum("b" in module.adapters for _, module in carriers(model)) == scaled
    if experts:
        with pytest.raises(ValueError, match=r"target_modules is None for a .*, which has experts"):
            adapt(model, BottleneckConfig(), "c")
    else:
        adapt(model, BottleneckConfig(), "c")
        layers = getattr(config, "text_config", config).num_hidden_layers
        assert sum("c" in module.adapters for _, module in carriers(model)) == 2 * layers


@pytest.mark.parametrize(
    ("name", "method"), [(n, m) for n in MODELS for m in METHODS if m in EVERYWHERE or n in ELSEWHERE]
)
def test_life_of_an_adapter(name, method):
    model = MODELS[name].make().eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    given, before = inputs(model), snapshot(model)
    plain = output(model, given).detach()
    config = config_for(method, name)
    assert adapt(model, config) is model
    close(output(model, given), plain)

    trained = adapter_parameters(model, "default")
    assert {id(p) for p in trained.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert count_parameters(model)[0] == sum(p.numel() for p in trained.values()) > 0
    randomise(model)
    changed = output(model, given).detach()
    assert (changed - plain).norm() > 1e-3 * plain.norm()
    loss(model, given).backward()
    for path, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, path
        # Keys that are all shifted alike change no attention.
        assert parameter.grad is None or parameter.grad.abs().max() > 0 or method in ("bitfit", "rslora with biases")

    with disable_adapter(model):
        assert torch.equal(output(model, given), plain)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before[0].items())
    assert torch.equal(output(model, given), changed)
    twin = copy.deepcopy(model)
    randomise(twin)
    assert not torch.equal(output(twin, given), changed)
    assert torch.equal(output(model, given), changed)
    close(output(unload(twin), given), plain, 0)

    if method in MERGED:
        kept = {key: value.clone() for key, value in model.state_dict().items()}
        merge_adapter(model)
        assert bool(merged_adapters(model)) == (method not in ("bitfit", "selective"))
        close(output(model, given), changed)
        unmerge_adapter(model)
        assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
        twin = unload(copy.deepcopy(model), merge=True)
        assert not carriers(twin)
        close(output(twin, given), changed)
    else:
        with pytest.raises(TypeError, match="is no change of a weight"):
            merge_adapter(model)
    assert torch.equal(output(model, given), changed)
    assert unload(model) is model
    assert_same(snapshot(model), before)
    assert torch.equal(output(model, given), plain)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "tree"])
def test_targets_by_architecture(name):
    known = MODELS[name]

    def found(config):
        model = known.make()
        paths = [path for path, _ in carriers(adapt(model, config))]
        delete_adapter(model, "default")
        assert not carriers(model)
        return paths

    lora = found(LoraConfig())
    assert len(lora) == known.each
    assert all(path.endswith(known.lora) for path in lora)
    scaled = found(IA3Config())
    assert len(scaled) == known.scaled
    assert all(path.endswith(known.ia3 + known.feedforward) for path in scaled)
    every = found(LoraConfig(target_modules="all-linear"))
    assert len(every) == known.linear
    assert not any("head" in path or "embed" in path or "shared" in path for path in every)
    model = adapt(known.make(), IA3Config())
    inner = [path for path, module in carriers(model) if module.adapters["default"].feedforward]
    assert inner == [path for path in scaled if path.endswith(known.feedforward)]
    assert len(inner) == known.scaled - sum(path.endswith(known.ia3) for path in scaled) >= 2
    if known.biased:
        assert len(found(BitFitConfig())) == known.biased
    else:
        with pytest.raises(ValueError, match="no module has a bias; it must be one with biases; add_missing=True"):
            adapt(known.make(), BitFitConfig())


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "tree"])
def test_bottlenecks_in_every_architecture(name, placement):
    model, given = adapted(name, BottleneckConfig(bottleneck_size=3, activation="tanh", placement=placement))
    loss(model, given).backward()
    assert all(p.grad.abs().max() > 0 for p in adapter_parameters(model, "default").values())


# --- which modules are meant ---


def paths_of(model, **options):
    adapted = adapt(model, LoraConfig(**options))
    return [path for path, module in carriers(adapted) if "adapters" in module._modules]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["up"]}, ["1.up", "2.up"]),
        ({"target_modules": ["1.up", "3"]}, ["1.up", "3"]),
        ({"target_modules": r"\d\.(up|down)"}, ["1.up", "1.down", "2.up", "2.down"]),
        ({"target_modules": "all-linear"}, ["1.up", "1.down", "2.up", "2.down", "3"]),
        ({"target_modules": "all-linear", "exclude_modules": ["3", "1.up"]}, ["1.down", "2.up", "2.down"]),
        ({"target_modules": "all-linear", "exclude_modules": r"[23].*"}, ["1.up", "1.down"]),
        ({"target_modules": "all-linear", "modules_to_save": ["2"]}, ["1.up", "1.down", "3"]),
        ({"target_modules": ["up", "down"], "layers_to_transform": -1}, ["2.up", "2.down"]),
        ({"target_modules": ["up"], "layers_to_transform": [1, -1]}, ["1.up", "2.up"]),
        ({"target_modules": ["up", "3"], "layers_to_transform": 1}, ["1.up", "3"]),
    ],
)
def test_targets_by_name(options, expected):
    assert paths_of(tree(), **options) == expected


@pytest.mark.parametrize("other", [lambda: nn.Conv2d(3, 8, 4), lambda: nn.MultiheadAttention(8, 2)])
def test_other_layers_that_are_meant_are_told_of(other):
    """PEFT adapts them; they can be excluded as there."""
    model = nn.ModuleDict({"embed": nn.ModuleDict({"proj": other()}), "attn": nn.ModuleDict(), "fc": Block()})
    model["attn"]["proj"] = nn.Linear(8, 8)
    for target in (["proj", "up"], r".*\.(proj|up)"):
        with pytest.warns(UserWarning, match="LoraConfig: target_modules also means 'embed.proj', a (Conv|Multi)"):
            assert paths_of(copy.deepcopy(model), target_modules=target) == ["attn.proj", "fc.up"]
        for exclude in (["embed.proj", "fc.up"], r"embed.*|fc\.up"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                named = {"target_modules": target, "exclude_modules": exclude}
                assert paths_of(copy.deepcopy(model), **named) == ["attn.proj"]


def test_layers_of_a_transformer():
    model = llama(num_hidden_layers=4)
    paths = paths_of(model, target_modules=["q_proj"], layers_to_transform=[0, -1])
    assert paths == ["model.layers.0.self_attn.q_proj", "model.layers.3.self_attn.q_proj"]
    paths = paths_of(gpt2(), target_modules=["c_attn"], layers_to_transform=[-1], layers_pattern="h")
    assert paths == ["transformer.h.1.attn.c_attn"]
    model = adapt(gpt2(), SelectiveConfig(layers_to_transform=[-1]))
    assert all(path.startswith("transformer.h.1.") for path, _ in carriers(model))
    assert count_parameters(model)[0] == sum(p.numel() for p in gpt2().transformer.h[1].parameters())


def test_ranks_and_alphas_by_pattern():
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["up", "down"],
        rank_pattern={"2.up": 5, "down": 4}, alpha_pattern={r"\d.down": 2},
    )  # fmt: skip
    model = adapt(tree(), config)
    parts = {path: module.adapters["default"] for path, module in carriers(model)}
    found = {path: (len(part.lora_A), part.lora_B.shape[1], part.scaling) for path, part in parts.items()}
    assert found == {"1.up": (3, 3, 2), "1.down": (4, 4, 0.5), "2.up": (5, 5, 6 / 5), "2.down": (4, 4, 0.5)}
    model = adapt(tree(), LoraConfig(r=4, lora_alpha=6, target_modules=["up"], use_rslora=True))
    assert model[1].up.adapters["default"].scaling == 3


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 2), ("all", 5)])
def test_biases_beside_lora(bias, count):
    model, given = adapted("tree", LoraConfig(target_modules=["up", "down"], bias=bias))
    assert sum(path.endswith("bias") for path in adapter_parameters(model, "default")) == count
    loss(model, given).backward()
    assert all(p.grad is not None for p in adapter_parameters(model, "default").values())


def test_modules_to_save():
    model = MODELS["roberta"].make().eval()
    given, plain = inputs(model), copy.deepcopy(model)
    adapt(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", bias="all"))
    heads = {path for path in adapter_parameters(model, "default") if path.startswith("classifier")}
    assert heads == {f"classifier.{n}.{kind}" for n in ("dense", "out_proj") for kind in ("weight", "bias")}
    adapt(model, BitFitConfig(task_type="SEQ_CLS"), "other")
    assert heads <= set(adapter_parameters(model, "other"))
    with torch.no_grad():
        model.classifier.out_proj.weight.mul_(2)
    assert torch.equal(model.classifier.out_proj.weight, 2 * plain.classifier.out_proj.weight)
    set_adapter(model, "default")
    assert torch.equal(model.classifier.out_proj.weight, plain.classifier.out_proj.weight)
    loss(model, given).backward()
    assert model.classifier.out_proj.weight.grad.abs().max() > 0
    assert torch.equal(output(unload(model), given), output(plain, given))
    model, given = adapted("tree", LoraConfig(target_modules=["up"], modules_to_save=["3", "0"]))
    assert {"0.weight", "3.weight", "3.bias"} < set(adapter_parameters(model, "default"))
    loss(model, given).backward()
    assert model[0].weight.grad.abs().max() > 0


# --- embeddings, tied weights, layers of other kinds ---


@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_embeddings_and_tied_weights(make, tmp_path):
    model = make(**({} if make is t5 else {"tie_word_embeddings": True})).eval()
    given, before = inputs(model), snapshot(model)
    head, table = (
        model.get_output_embeddings().weight,
        (model.encoder.embed_tokens if make is t5 else model.get_input_embeddings()),
    )
    tied = head is table.weight
    plain = output(model, given)
    name = next(path for path, module in model.named_modules() if module is table)
    adapt(model, LoraConfig(target_modules=[name], r=4, lora_alpha=10))
    close(output(model, given), plain)
    randomise(model)
    ids = given["input_ids"]
    part = table.adapters["default"]
    close(table(ids), head[ids] + 2.5 * part.lora_A.T[ids] @ part.lora_B.T if tied else table(ids))
    changed = output(model, given)
    assert not torch.allclose(changed, plain, atol=1e-3)
    loss(model, given).backward()
    assert all(p.grad.abs().max() > 0 for p in adapter_parameters(model, "default").values())
    merge_adapter(model)
    assert torch.equal(model.get_output_embeddings().weight, before[0]["lm_head.weight"])
    close(output(model, given), changed)
    unmerge_adapter(model)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    twin = unload(copy.deepcopy(model), merge=True)
    assert torch.equal(twin.get_output_embeddings().weight, head)
    close(output(twin, given), changed)
    if make is not t5:
        assert twin.config.tie_word_embeddings is False
        twin.save_pretrained(tmp_path)
        assert torch.equal(output(type(twin).from_pretrained(tmp_path), given), output(twin, given))
    unload(model)
    assert_same(snapshot(model), before)
    assert model.config.tie_word_embeddings == tied


def test_embeddings_of_bounded_rows():
    """Bounded is the row of the table alone, not the sum that would be merged into it."""
    model, words = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5)), torch.arange(7)
    adapt(model, LoraConfig(target_modules=["0"], r=2))
    randomise(model)
    part, changed = model[0].adapters["default"], model(words)
    delta = part.scaling * (part.lora_B @ part.lora_A).T
    close(changed, nn.functional.embedding(words, model[0].weight.detach().clone(), max_norm=0.5) + delta)
    with pytest.raises(TypeError, match=r"in '0', an AdaptedEmbedding; it must be of ordinary weights"):
        merge_adapter(model)
    close(model(words), changed)


def test_embeddings_that_scale():
    """BART's multiply what they look up, and what is added to it."""
    model = bart(scale_embedding=True).eval()
    given, table = inputs(model), model.get_decoder().embed_tokens
    kind, plain = type(table), output(model, given)
    adapt(model, LoraConfig(target_modules=["embed_tokens"], r=4, lora_alpha=10))
    randomise(model)
    ids, part = given["input_ids"], table.adapters["default"]
    close(table(ids), (table.weight[ids] + 2.5 * part.lora_A.T[ids] @ part.lora_B.T) * HIDDEN**0.5)
    changed = output(model, given)
    assert not torch.allclose(changed, plain, atol=1e-3)
    add_weighted_adapter(model, ["default"], [1.0], "same")
    set_adapter(model, "same")
    close(output(model, given), changed)
    merge_adapter(model)
    close(output(model, given), changed)
    unload(model)
    assert type(table) is kind
    assert torch.equal(output(model, given), plain)


def marian():
    sizes = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 1, "decoder_layers": 1}
    tokens = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return tf.MarianMTModel(tf.MarianConfig(**sizes, **tokens, max_position_embeddings=32))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (marian, LoraConfig(target_modules=["lm_head"])),
        (marian, LoraConfig(target_modules=["embed_tokens"])),
        (t5, SelectiveConfig(target_parameters=["embed_tokens.weight"])),
        (bart, LoraConfig(target_modules=["decoder.embed_tokens"])),
        (bart, SelectiveConfig(target_parameters=["embed_tokens.weight"])),
    ],
)
def test_weights_that_were_tied_beside_one_that_changes(make, config, tmp_path):
    """Stored once, they would not be found by their other names in a model without ties."""
    model = make().eval()
    given = inputs(model)
    plain = output(model, given)
    adapt(model, config)
    randomise(model)
    changed = output(model, given)
    assert not torch.allclose(changed, plain, atol=1e-3)
    unload(model, merge=True).save_pretrained(tmp_path)
    close(output(model, given), changed)
    assert torch.equal(output(type(model).from_pretrained(tmp_path).eval(), given), output(model, given))


@pytest.mark.parametrize("make", [t5, bart, marian])
def test_tables_that_nothing_calls(make, tmp_path):
    model = make().eval()
    given, before = inputs(model), snapshot(model)
    for config in (
        LoraConfig(target_modules=["shared"]),
        LoraConfig(modules_to_save=["shared"]),
        SelectiveConfig(target_parameters=["shared.weight"]),
    ):
        with pytest.raises(
            ValueError, match=r"config is one that changes '(model\.)?shared', .* one that names \['\S*en"
        ):
            adapt(model, config)
        assert_same(snapshot(model), before)
    adapt(model, LoraConfig(target_modules=["shared", "embed_tokens"]))  # one of those that are called is there
    unload(model)
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(make().eval(), peft.LoraConfig(target_modules=["shared"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "adapter")
    plain = output(model, given)
    with pytest.warns(UserWarning, match="'(model.)?shared', .* no effect"):
        load_adapter(model, tmp_path / "adapter")
    assert torch.equal(output(model, given), plain)
    unload(model, merge=True).save_pretrained(tmp_path)
    assert torch.equal(output(type(model).from_pretrained(tmp_path).eval(), given), plain)


STATES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2}
JAMBA = {**GROUPED, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
CONVOLUTION = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
CONVOLUTION |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}


@pytest.mark.parametrize(
    ("kind", "sizes", "uncalled"),
    [
        ("MambaForCausalLM", STATES, "dt_proj"),
        ("FalconMambaForCausalLM", STATES, "dt_proj"),
        ("JambaForCausalLM", JAMBA, "dt_proj"),
        ("WavLMForCTC", {**COMMON, **CONVOLUTION}, "q_proj"),
        ("MobileBertForMaskedLM", {**COMMON, "embedding_size": 16}, "predictions.dense"),
        ("LayoutLMv3ForTokenClassification", {**COMMON, "coordinate_size": 4, "shape_size": 8}, "rel_pos_x_bias"),
        ("DebertaForTokenClassification", {**COMMON, "relative_attention": True, "pos_att_type": []}, "rel_embeddings"),
    ],
)
def test_layers_whose_weights_alone_are_read(kind, sizes, uncalled):
    """An adapter beside them would have no effect before it is merged, and one after it."""
    kind = getattr(tf, kind)
    model = kind(kind.config_class(**sizes)).eval()
    given = (
        {"input_values": torch.randn(2, 60)} if "WavLM" in kind.__name__ else {"input_ids": torch.arange(14).view(2, 7)}
    )
    plain, before = output(model, given), snapshot(model)
    for config in (LoraConfig(target_modules=[uncalled]), IA3Config(target_modules=[uncalled], feedforward_modules=[])):
        with pytest.raises(
            TypeError, match=rf"holding \['{uncalled}'\].*a (Linear|Embedding); it must be of linear layers.* called"
        ):
            adapt(model, config)
    with pytest.raises(ValueError, match=rf"holding '{uncalled}', which means nothing"):
        adapt(model, BottleneckConfig(target_modules=[uncalled]))
    assert_same(snapshot(model), before)
    adapt(model, LoraConfig(target_modules="all-linear", r=4))
    randomise(model)
    changed = output(model, given)
    assert not torch.allclose(changed, plain, atol=1e-3)
    model(**given).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter_parameters(model, "default").values())
    close(output(unload(model, merge=True), given), changed)


class BiasedAttention(nn.Module):
    """As in timm's BEiT, EVA and Swin V2."""

    def __init__(self, qkv_bias_separate=False, biased=True):
        super().__init__()
        self.qkv, self.qkv_bias_separate = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), qkv_bias_separate
        self.q_bias, self.proj = nn.Parameter(torch.zeros(HIDDEN)) if biased else None, nn.Linear(HIDDEN, HIDDEN)


def test_queries_keys_and_values_of_timm():
    for options in ({"qkv_bias_separate": True}, {"biased": False}):
        assert paths_of(BiasedAttention(**options), target_modules="all-linear") == ["qkv", "proj"]
    assert paths_of(BiasedAttention(), target_modules="all-linear") == ["proj"]
    with pytest.raises(TypeError, match=r"holding \['qkv'\].*a Linear; it must be of linear layers.* called"):
        adapt(BiasedAttention(), LoraConfig(target_modules=["qkv", "proj"]))


def test_adapters_of_pefts_on_layers_whose_weights_alone_are_read(tmp_path):
    """There, too, they have no effect, but are merged."""
    peft = pytest.importorskip("peft")
    model = tf.JambaForCausalLM(tf.JambaConfig(**JAMBA)).eval()
    config = peft.LoraConfig(target_modules=["dt_proj", "in_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"dt_proj.lora_A.weight, .* or loaded with strict=False"):
        load_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="dt_proj.* left out"):
        load_adapter(model, tmp_path, strict=False)
    given = {"input_ids": torch.arange(14).view(2, 7)}
    close(output(model, given), output(theirs, given))


def test_models_that_ask_whether_weights_are_tied():
    """UMT5 scales what its head reads if its config says that the head is tied."""
    sizes = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = tf.UMT5ForConditionalGeneration(tf.UMT5Config(**sizes, decoder_start_token_id=0)).eval()
    if hasattr(model.config, "scale_decoder_outputs"):
        pytest.skip("since transformers 5.24 the config says so by itself")
    given = inputs(model)
    adapt(model, LoraConfig(target_modules=["lm_head"]))
    randomise(model)
    changed = output(model, given)
    for merged in (False, True):
        with pytest.raises(TypeError, match=r"unload: merge is True where one of two tied weights of a UMT5For"):
            unload(model, merge=True)
        close(output(model, given), changed)
        assert bool(merged_adapters(model)) == merged
        if not merged:
            merge_adapter(model)


class Wrapper(nn.Module):
    """As people write it: a head of their own on a model of transformers, whose config it shows."""

    def __init__(self):
        super().__init__()
        self.inner = gpt2().transformer
        self.config, self.head = self.inner.config, nn.Linear(HIDDEN, 3)

    def forward(self, input_ids):
        return self.head(self.inner(input_ids).last_hidden_state[:, -1])


def flava():
    configs = {"text_config": COMMON, "image_config": COMMON | {"image_size": 16}, "multimodal_config": COMMON}
    return tf.FlavaModel(tf.FlavaConfig(**configs, hidden_size=HIDDEN, projection_dim=8))


@pytest.mark.parametrize("make", [Wrapper, flava])
def test_models_without_a_table_whose_config_ties_it_to_the_head(make):
    model = make().eval()
    assert model.config.tie_word_embeddings
    given, before = {"input_ids": torch.tensor([[3, 5, 2]])}, snapshot(model)

    def computed():
        out = model(**given)
        return (out if isinstance(out, torch.Tensor) else out.text_embeddings).detach()

    plain = computed()
    adapt(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    changed = computed()
    assert not torch.allclose(changed, plain, atol=1e-3)
    copied = copy.deepcopy(model)
    unload(model)
    assert torch.equal(computed(), plain)
    assert_same(snapshot(model), before)
    model = unload(copied, merge=True)
    close(computed(), changed)


def test_merged_models_move():
    """What is put back are the very parameters of before: tied to others, or an adapter's own that trains."""
    model = gpt2()
    adapt(model, LoraConfig(target_modules=["wte", "c_attn"], bias="lora_only"))
    trained = adapter_parameters(model, "default")
    merge_adapter(model)
    model.double()
    unmerge_adapter(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    now = adapter_parameters(model, "default")
    assert all(now[key] is parameter for key, parameter in trained.items())
    assert {(p.dtype, p.requires_grad) for p in now.values()} == {(torch.float64, True)}


@pytest.mark.parametrize("call", [merge_adapter, lambda model: unload(model, merge=True)])
def test_what_is_merged_in_inference_mode_passes_gradients_on(call):
    model, given = adapted("gpt2", LoraConfig(target_modules=["wte", "c_attn"], init_lora_weights=False))
    gradients = []
    for context in (torch.inference_mode(), torch.no_grad()):
        merged = copy.deepcopy(model)
        with context:
            call(merged)
        positions = merged.transformer.wpe.weight.requires_grad_(True)
        loss(merged, given).backward()
        gradients.append(positions.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("target", [".*", ["wte.weight"]])
def test_tied_parameters_that_are_chosen(target, tmp_path):
    model = gpt2().eval()
    given, before, size = inputs(model), snapshot(model), count_parameters(model)[1]
    adapt(model, SelectiveConfig(target_parameters=target))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    both, table_size = target == ".*", table.weight.numel()
    assert (table.weight is head.weight) == both
    assert count_parameters(model) == ((size, 2 * size) if both else (table_size, size + table_size))
    randomise(model)
    changed = output(model, given)
    twin = unload(copy.deepcopy(model), merge=True)
    assert (twin.get_input_embeddings().weight is twin.get_output_embeddings().weight) == both
    assert twin.config.tie_word_embeddings == both
    assert torch.equal(output(twin, given), changed)
    unload(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    "config",
    [
        BitFitConfig(),
        LoraConfig(bias="all"),
        LoraConfig(modules_to_save=["cls"]),
        BottleneckConfig(train_layer_norm=True, layers_to_transform=[0]),
    ],
    ids=["bitfit", "bias", "saved", "norms"],
)
def test_tied_biases_share_a_copy(config):
    """As the parameters of the model do: BERT's head for masked words has one bias by two names."""
    model = tf.BertForMaskedLM(tf.BertConfig(**COMMON)).eval()
    model.bert.encoder.layer[0].output.LayerNorm.weight = model.bert.encoder.layer[0].attention.output.LayerNorm.weight
    given, before = inputs(model), snapshot(model)
    names = {p: path for path, p in model.named_parameters()}
    tied = [(path, names[p]) for path, p in model.named_parameters(remove_duplicate=False) if names[p] != path]
    assert len(tied) == 3
    adapt(model, config)
    found = adapter_parameters(model, "default")
    shared = [found[path] is found[other] for path, other in tied if {path, other} <= found.keys()]
    assert shared
    assert all(shared)
    loss(model, given).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    unload(model)
    assert_same(snapshot(model), before)


class Doubling(nn.Linear):
    """As a quantised layer: it computes something else than its weight's product, and keeps the result for backward."""

    def forward(self, x):
        return torch.tanh(2 * super().forward(x))


class Renamed(nn.Linear):
    """Another name, and nothing else."""


class Viewing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        return dy


class Views(nn.Linear):
    def forward(self, x):
        return Viewing.apply(super().forward(x))


class Abstract(ABC, nn.Linear):
    """In memory as ABC wants it, not as nn.Linear does."""


class Typed(Generic[TypeVar("T")], Block):
    """As `Abstract`, and no matrix."""


def test_classes_with_another_first_base_than_module():
    layer, block = nn.Sequential(Abstract(HIDDEN, HIDDEN), Typed())
    model, x = nn.Sequential(layer, block), torch.randn(3, HIDDEN)
    before = model(x)
    adapt(model, LoraConfig(target_modules=["0"], r=2), "lora")
    adapt(model, BottleneckConfig(target_modules=["1"], placement="parallel", bottleneck_size=2), "bottleneck")
    set_adapter(model, "lora", "bottleneck")
    randomise(model)
    y = model(x)
    close(block(Abstract.forward(layer, x) + layer.adapters["lora"].beside(torch.zeros_like(x), x, None)), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    unload(model)
    assert torch.equal(model(x), before)
    assert [type(module) for module in model] == [Abstract, Typed]


def test_dora_on_layers_that_compute_their_own_base():
    """As PEFT: what the layer computes without its bias takes the place of x W^T."""
    peft = pytest.importorskip("peft")
    layer, x = Doubling(6, 5), torch.randn(3, 6)
    model, config = nn.Sequential(layer), {"target_modules": ["0"], "r": 2, "lora_alpha": 6, "use_dora": True}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    adapt(model, LoraConfig(**config))
    randomise(model)
    part, theirs_too = layer.adapters["default"], theirs.base_model.model[0]
    with torch.no_grad():
        theirs_too.lora_A["default"].weight.copy_(part.lora_A)
        theirs_too.lora_B["default"].weight.copy_(part.lora_B)
        theirs_too.lora_magnitude_vector["default"].weight.copy_(part.magnitude)
    y, y_theirs = model(x), theirs(x)
    close(y, y_theirs)
    y.square().sum().backward()
    y_theirs.square().sum().backward()
    close(part.lora_A.grad, theirs_too.lora_A["default"].weight.grad)
    close(part.magnitude.grad, theirs_too.lora_magnitude_vector["default"].weight.grad)


def test_copies_of_parameters_that_cannot_train():
    """Quantised ones: whole numbers, or a class of tensors that is no sharded one."""
    for kind, weight in (("Parameter of torch.int8", torch.ones(5, 6).to(torch.int8)), ("TwoTensor", None)):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5))
        weight = TwoTensor(torch.ones(5, 6), torch.ones(5, 6)) if weight is None else weight
        model[0].weight = nn.Parameter(weight, requires_grad=False)
        for config in (
            SelectiveConfig(target_parameters=["0.weight"]),
            LoraConfig(target_modules=["1"], modules_to_save=["0"]),
        ):
            with pytest.raises(TypeError, match=rf"{kind}.* as '0\.weight'; .* one with ordinary floating"):
                adapt(model, config)
            assert not carriers(model)


def test_missing_biases_beside_a_weight_that_makes_no_other_tensors():
    class Weight(torch.Tensor):
        def new_zeros(self, *size, **options):
            raise NotImplementedError

    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    model[0].weight = nn.Parameter(torch.randn(5, 6).as_subclass(Weight))
    adapt(model, BitFitConfig(add_missing=True))
    assert type(model[0].bias) is nn.Parameter
    assert model[0].bias.shape == (5,)


@pytest.mark.parametrize("kind", [Doubling, Views])
def test_layers_that_compute_their_own_base(kind):
    layer = kind(6, 5)
    model, x = nn.Sequential(layer), torch.randn(3, 6, requires_grad=True)
    adapt(model, LoraConfig(target_modules=["0"], r=2, lora_alpha=6))
    randomise(model)
    assert isinstance(layer, kind)
    part, y = layer.adapters["default"], model(x)
    close(y, kind.forward(layer, x) + 3 * x @ part.lora_A.T @ part.lora_B.T)
    y.square().sum().backward()
    assert part.lora_A.grad.abs().max() > 0
    with pytest.raises(
        TypeError, match=rf"Parameter of torch.float32 in '0', an Adapted{kind.__name__}; it must be of"
    ):
        merge_adapter(model)
    unload(model)
    assert type(layer) is kind


class Router(nn.Linear):
    """As Llama 4's: what it returns is not its product."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), logits


def test_a_layer_that_returns_several_tensors():
    model, x = nn.ModuleList([Router(6, 5)]), torch.randn(3, 6)
    adapt(model, LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(TypeError, match=r"Router: its output is a tuple; it must be a tensor, or .* exclude_modules"):
        model[0](x)


def test_a_subclass_of_linear_that_computes_what_linear_does():
    model, x = nn.Sequential(Renamed(6, 5)), torch.randn(3, 6)
    adapt(model, LoraConfig(target_modules=["0"], r=2))
    randomise(model)
    y = model(x)
    merge_adapter(model)
    close(model(x), y)


@pytest.mark.parametrize("name", ["gpt2", "llama", "tree"])
def test_pickle(name):
    model, given = adapted(name, "rslora with biases")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(output(again, given), output(model, given))
    unload(again)
    assert type(again) is type(model)
    assert not carriers(again)


def test_layers_that_torch_itself_bypasses():
    """nn.TransformerEncoderLayer in evaluation hands the weights of its layers to one kernel."""
    layer = nn.TransformerEncoderLayer(HIDDEN, 4, INNER, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    x, padding = torch.randn(3, 5, HIDDEN), torch.arange(5) >= torch.tensor([[5], [4], [3]])
    before = snapshot(model)
    adapt(model, LoraConfig(target_modules=["linear1", "linear2"], r=2))
    randomise(model)
    with_gradients = model(x)
    assert with_gradients.requires_grad
    masked = model(x, src_key_padding_mask=padding)[~padding]
    with torch.no_grad():
        close(model(x), with_gradients)
        close(model(x, src_key_padding_mask=padding)[:, :5][~padding], masked)
    unload(model)
    assert_same(snapshot(model), before)
    with pytest.raises(
        TypeError, match=r"a NonDynamicallyQuantizableLinear; it must be of linear layers.* that are called"
    ):
        adapt(model, LoraConfig(target_modules=["out_proj"]))
    biases = adapter_parameters(adapt(model, BitFitConfig()), "default")
    assert {f"layers.0.self_attn.{name}" for name in ("in_proj_bias", "out_proj.bias")} < set(biases)


def test_biases_of_a_recurrent_layer():
    model, x = nn.GRU(4, 3), torch.randn(5, 2, 4)
    plain = model(x)[0]
    adapt(model, BitFitConfig())
    randomise(model)
    changed = model(x)[0]
    assert not torch.allclose(changed, plain, atol=1e-3)
    changed.sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model, "default").values())
    assert torch.equal(unload(model)(x)[0], plain)


def test_forwards_that_were_replaced():
    """accelerate's hooks keep the forward of the class before; anything else would silently pass adapters by."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tree().eval()
    given = inputs(model)
    for module in (model[1].up, model[2].down):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))
    plain = output(model, given)
    adapt(model, LoraConfig(target_modules=["up", "down"], r=2))
    randomise(model)
    changed = output(model, given)
    for module in (model[1].up, model[2].down):
        hooks.remove_hook_from_module(module)
    assert not torch.allclose(changed, plain, atol=1e-3)
    close(output(model, given), changed)
    assert torch.equal(output(unload(model), given), plain)
    model[1].up.forward = lambda x: x
    with pytest.raises(TypeError, match=r"attach: '1.up' is a Linear whose forward is replaced by .*lambda"):
        adapt(model, LoraConfig(target_modules=["up"]))
    assert not carriers(model)


def test_models_that_accelerate_offloads():
    """Adapters of what is brought to a device only while it runs are there all the time."""
    accelerate = pytest.importorskip("accelerate")
    ids, whole, model = torch.randint(3, VOCABULARY, (2, 7)), llama(), llama()
    model.load_state_dict(whole.state_dict())
    accelerate.cpu_offload(model, torch.device("cpu"))
    configs = (
        lambda: LoraConfig(target_modules=["q_proj", "embed_tokens"]),
        lambda: IA3Config(),
        lambda: BottleneckConfig(bottleneck_size=2, placement="parallel"),
        lambda: PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        lambda: PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    )
    for config in configs:
        for each in (whole, model):
            torch.manual_seed(1)
            randomise(adapt(each, config()))
            each(ids, labels=ids).loss.backward()
        found = adapter_parameters(model, "default")
        for path, parameter in adapter_parameters(whole, "default").items():
            close(found[path].grad, parameter.grad)
        unload(whole), unload(model)
    close(model(ids).logits, whole(ids).logits, 0)
    for config, needed in (
        (LoraConfig(use_dora=True), "weight is a Parameter of torch.float32 on meta; .* or offloaded"),
        (SelectiveConfig(target_parameters=["q_proj.weight"]), "offloads the parameters of .*q_proj', of which"),
    ):
        with pytest.raises(TypeError, match=needed):
            adapt(model, config)
    adapt(model, LoraConfig())
    with pytest.raises(TypeError, match=r"model is one that offloads the weight of .*q_proj"):
        merge_adapter(model)
    copies = adapt(llama(), SelectiveConfig(target_parameters=["q_proj.weight"]))
    accelerate.cpu_offload(copies, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"accelerate offloads, with copies of parameters of \['model.*q_proj'"):
        set_adapter(copies)


# --- several adapters ---


def test_switching():
    model, given = adapted("llama", "lora", "ia3", "bitfit")
    alone = {}
    for name in ("default", "other", "third"):
        set_adapter(model, name)
        alone[name] = output(model, given)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == {id(p) for p in adapter_parameters(model, name).values()}
    set_adapter(model)
    plain = output(model, given)
    assert count_parameters(model)[0] == 0
    assert len({t.detach().numpy().tobytes() for t in (plain, *alone.values())}) == 4
    set_adapter(model, "other", "default")
    with disable_adapter(model):
        assert torch.equal(output(model, given), plain)
        with disable_adapter(model):
            assert torch.equal(output(model, given), plain)
    assert model.pyfastpeft.active == ("other", "default")
    delete_adapter(model, "other")
    assert model.pyfastpeft.active == ("default",)
    close(output(model, given), alone["default"], 0)
    set_adapter(model, "third")
    close(output(model, given), alone["third"], 0)
    assert list(model.pyfastpeft.configs) == ["default", "third"]


def test_calls_while_adapters_are_disabled():
    """What makes no adapter run leaves them off; what does holds afterwards, too."""
    model, given = adapted("gpt2", "lora", "rslora with biases", "lora")
    alone = {}
    for name in ("default", "other"):
        set_adapter(model, name)
        alone[name] = output(model, given)
    set_adapter(model)
    plain = output(model, given)
    set_adapter(model, "default")
    with disable_adapter(model):
        delete_adapter(model, "third")
        add_weighted_adapter(model, ["default"], [1.0], "sum")
        with pytest.raises(ValueError, match="layers_to_transform is holding 9"):
            adapt(model, LoraConfig(layers_to_transform=[9]), "fourth")
        assert torch.equal(output(model, given), plain)
    close(output(model, given), alone["default"], 0)
    with disable_adapter(model):
        set_adapter(model, "other")
    close(output(model, given), alone["other"], 0)
    with disable_adapter(model):
        merge_adapter(model)
    close(output(model, given), alone["other"])
    with disable_adapter(model):
        set_adapter(model, "default")
    close(output(model, given), alone["default"], 0)
    assert torch.equal(output(unload(model), given), plain)


@pytest.mark.parametrize("config", [BottleneckConfig(bottleneck_size=2, target_modules=["c_attn"]), BitFitConfig()])
def test_another_adapter_of_the_name_of_a_merged_one_is_not_merged(config):
    model, _ = adapted("gpt2", "lora")
    merge_adapter(model)
    with disable_adapter(model):
        delete_adapter(model, "default")
        adapt(model, config)
    assert not merged_adapters(model)
    assert model.pyfastpeft.active == ("default",)


def test_what_was_frozen_by_hand_stays_so_when_others_come_and_go():
    model, _ = adapted("tree", "ia3", "lora")
    frozen = adapter_parameters(model, "other")["1.up.lora_A"].requires_grad_(False)
    add_weighted_adapter(model, ["other"], [1.0], "sum")
    delete_adapter(model, "default")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter_parameters(model, "other").values()} - {id(frozen)}


PAIRS = [
    ("lora", "lora"), ("lora", "dora"), ("dora", "lora"), ("lora", "ia3"), ("ia3", "lora"), ("ia3", "ia3"),
    ("lora", "bitfit"), ("ia3", "bitfit"), ("selective", "lora"), ("adalora", "dylora"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["tree", "gpt2"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_two_together(pair, name):
    """The formula: y = l_out * ((W + sum of changes) (l_in * x) + b), whatever the order; merged and not."""
    model, given = adapted(name, *pair)
    module = dict(model.named_modules())["1.up" if name == "tree" else "transformer.h.1.attn.c_attn"]
    x = torch.randn(4, HIDDEN)
    alone = []
    for adapter in ("default", "other"):
        set_adapter(model, adapter)
        alone.append(module(x).detach())
    set_adapter(model)
    plain = module(x).detach()
    set_adapter(model, "default", "other")
    y = module(x)
    bias = alone[1] - plain if "bitfit" in pair else torch.zeros_like(plain)
    if pair == ("ia3", "bitfit"):
        expected = (plain + bias) * (alone[0] / plain)
    elif pair == ("selective", "lora"):
        part = module.adapters["other"]
        expected = alone[0] + 2.5 * x @ part.lora_A.T @ part.lora_B.T
    elif pair == ("ia3", "ia3"):
        expected = alone[0] * alone[1] / plain
    elif "ia3" in pair:
        scaled, changed = alone if pair[0] == "ia3" else alone[::-1]
        expected = changed * scaled / plain
    else:
        expected = alone[0] + alone[1] - plain
    close(y, expected, 2e-4)
    loss(model, given).backward()
    for adapter in ("default", "other"):
        assert all(p.grad is not None for p in adapter_parameters(model, adapter).values())
    whole = output(model, given)
    merge_adapter(model)
    close(module(x), y)
    close(output(model, given), whole)
    with disable_adapter(model):
        close(module(x), plain, 0)
    close(module(x), y)
    unmerge_adapter(model)
    assert torch.equal(module(x), y)
    set_adapter(model, "other", "default")
    close(output(model, given), whole, 2e-4)
    close(output(unload(copy.deepcopy(model), merge=True), given), whole, 2e-4)
    delete_adapter(model, "default")
    close(module(x), alone[1], 0)
    delete_adapter(model, "other")
    assert torch.equal(module(x), plain)


def test_an_adapter_starts_from_the_model_and_not_from_another_adapter():
    model, given = adapted("bert", BitFitConfig(task_type="SEQ_CLS"))
    with disable_adapter(model):
        plain = output(model, given)
    adapt(model, BitFitConfig(task_type="SEQ_CLS"), "other")
    torch.testing.assert_close(output(model, given), plain)  # whoever's product it is


def test_adapters_that_replace_one_parameter():
    model, given = adapted("bert", "bitfit", "selective")
    changed = output(model, given)
    with pytest.raises(ValueError, match=r"set_adapter: names is .*'default', 'other'.* which all replace \{'bias'\}"):
        set_adapter(model, "default", "other")
    assert model.pyfastpeft.active == ("other",)
    assert torch.equal(output(model, given), changed)


def test_a_state_dict_belongs_to_the_adapter_that_ran():
    """What replaces a parameter has its name; read into a model in which another adapter runs it would be exchanged."""
    model, given = adapted("gpt2", "bitfit", "bitfit")
    changed, state = output(model, given), copy.deepcopy(model.state_dict())
    other, _ = adapted("gpt2", "bitfit", "bitfit")
    for names in ((), ("default",)):
        set_adapter(other, *names)
        with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*original_bias"):
            other.load_state_dict(state)
    set_adapter(other, "other")
    other.load_state_dict(state)
    assert torch.equal(output(other, given), changed)


def test_weights_of_which_nothing_can_be_made():
    """They are refused before anything is changed."""
    complex_ = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64))
    lazy, before = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)), snapshot(complex_)
    for kind in (LoraConfig, IA3Config, BottleneckConfig):
        with pytest.raises(TypeError, match=r"model is one with a weight of torch.complex64 in a target; it must be"):
            adapt(complex_, kind(target_modules="all-linear"))
        assert_same(snapshot(complex_), before)
    for config in (LoraConfig(target_modules=["0"]), IA3Config(target_modules=["1"]), BitFitConfig()):
        with pytest.raises(ValueError, match=r"\['1.weight', '1.bias'\] without a shape yet; it must be run once"):
            adapt(lazy, config)
        assert not carriers(lazy)
        assert lazy[0].weight.requires_grad
    x = torch.randn(3, 4)
    plain = lazy(x)
    torch.testing.assert_close(adapt(lazy, LoraConfig(target_modules=["1"]))(x), plain)


def test_models_are_adapted_before_they_are_wrapped():
    model = nn.DataParallel(tree())
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"model is a DataParallel, .*; it must be its module, adapted before"):
        adapt(model, LoraConfig(**TREE))
    assert_same(snapshot(model), before)
    adapt(model.module, LoraConfig(**TREE))


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shard", [fully_shard, FullyShardedDataParallel])
def test_models_that_fsdp_shards(shard, mesh, tmp_path):
    """Adapted before, they train; what FSDP would undo, or what is a part of what is to be saved, is an error."""
    plain, ids = tree(), torch.randint(VOCABULARY, (2, 7))
    whole = adapt(copy.deepcopy(plain), LoraConfig(**TREE), "lora")
    adapt(whole, SelectiveConfig(target_parameters=["1.up.weight"]), "copies")
    set_adapter(whole, "lora", "copies")
    randomise(whole)
    options = {"mesh": mesh} if shard is fully_shard else {"use_orig_params": True, "device_id": torch.device("cpu")}
    model, bare = shard(copy.deepcopy(whole), **options), shard(copy.deepcopy(plain), **options)
    close(model(ids), whole(ids))
    if shard is fully_shard:
        model.reshard()
    needed = "it must be whole, as after unshard" if shard is fully_shard else "must be in .*summon_full_params"
    with pytest.raises((TypeError, RuntimeError), match=needed):
        save_adapter(model, tmp_path / "adapter", "lora")
    for call, message in (
        (lambda: adapt(bare, LoraConfig(**TREE)), "adapt: .* FSDP shards, .*; it must be adapted before"),
        (lambda: add_weighted_adapter(model, ["lora"], [1.0], "sum"), "add_weighted_adapter: .* FSDP shards"),
        (lambda: merge_adapter(model), "merge_adapter: .* FSDP shards, which puts back"),
        (lambda: save_training_state(tmp_path, model, name="lora"), "save_training_state: .* FSDP shards"),
        (lambda: disable_adapter(model).__enter__(), r"disable_adapter: .* FSDP shards .*1.up'\] to exchange"),
        (lambda: set_adapter(model, "lora"), "set_adapter: .* FSDP shards .* to exchange; .* one that does not"),
        (lambda: unload(model), "unload: .* FSDP shards .* to exchange"),
    ):
        with pytest.raises((TypeError, RuntimeError), match=message):
            call()
    set_adapter(model, "copies", "lora")  # exchanges nothing
    with FullyShardedDataParallel.summon_full_params(model) if shard is not fully_shard else nullcontext():
        if shard is fully_shard:
            model.unshard()
        save_adapter(model, tmp_path / "adapter", "lora")
    set_adapter(whole, "lora")
    close(load_adapter(plain, tmp_path / "adapter")(ids), whole(ids))


def test_tensor_parallel_models(mesh):
    """Beside weights that are DTensors nothing is adapted; copies of them, and missing biases, train."""
    plan = {"1.up": ColwiseParallel(), "1.down": RowwiseParallel()}
    model, ids = parallelize_module(tree(), mesh, plan), torch.randint(VOCABULARY, (2, 7))
    with pytest.raises(TypeError, match=r"model is one whose '1.up' has a DTensor as its weight; .* whole weights"):
        adapt(model, LoraConfig(target_modules=["up"]))
    assert not carriers(model)
    adapt(model, BitFitConfig(add_missing=True))
    model(ids).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_dora_needs_an_ordinary_weight():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(TypeError, match=r"'0', whose weight is a Tensor of torch.float32 on cpu; it must be False"):
        adapt(model, LoraConfig(target_modules=["0"], use_dora=True))
    model = nn.Sequential(nn.Linear(4, 3).to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"True with '0', whose weight is a Parameter of torch.float8_e4m3fn"):
        adapt(model, LoraConfig(target_modules=["0"], use_dora=True))


def test_a_failed_injection_leaves_the_model_as_it_was():
    model, given = adapted("bert", "bitfit", "lora")
    set_adapter(model, "default", "other")
    before, changed = snapshot(model), output(model, given)
    for config in (
        LoraConfig(target_modules=["query", "LayerNorm"], bias="all"),
        LoraConfig(target_modules=["query"], modules_to_save=["clasifier"]),
        LoraConfig(target_modules=["word_embeddings", "query"], use_dora=True),
    ):
        with pytest.raises((ValueError, TypeError)):
            adapt(model, config, "third")
        assert list(model.pyfastpeft.configs) == ["default", "other"]
        assert_same(snapshot(model), before)
        assert torch.equal(output(model, given), changed)


def test_inference_mode():
    model, given = adapted("llama", "lora", LoraConfig(inference_mode=True, init_lora_weights=False))
    assert count_parameters(model)[0] == 0
    assert not loss(model, given).requires_grad
    set_adapter(model, "other", "default")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter_parameters(model, "default").values()}


def test_dropout_follows_the_mode_of_the_model():
    model, given = adapted("llama", LoraConfig(lora_dropout=0.5, init_lora_weights=False))
    assert torch.equal(output(model, given), output(model, given))
    model.train()
    first = output(model, given)
    assert not torch.equal(first, output(model, given))
    add_weighted_adapter(model.eval(), ["default"], [1.0], "sum", "cat")
    set_adapter(model, "sum")
    assert torch.equal(output(model, given), output(model, given))
    model.train()
    assert not torch.equal(output(model, given), output(model, given))
    for module in model.modules():  # as TRL's disable_dropout
        if isinstance(module, nn.Dropout):
            module.p = 0
    assert torch.equal(output(model, given), output(model.eval(), given))


def test_a_config_belongs_to_one_model():
    config, model = LoraConfig(target_modules=["up"]), tree()
    adapt(model, config)
    assert model.pyfastpeft.configs["default"] == config
    model.pyfastpeft.configs["default"].rank_pattern["up"] = 3
    assert config.rank_pattern == {}


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["lm_head"]), LoraConfig(modules_to_save=["lm_head"])])
def test_layers_that_were_replaced_are_told_of(config, tmp_path):
    """transformers makes a new head when embeddings are resized."""
    model, given = adapted("llama", "lora", config)
    model.resize_token_embeddings(VOCABULARY + 3)
    gone = re.escape(
        "model is one whose ['lm_head'] were replaced or removed after `adapt`, so that what 'other' had there"
    )
    for call in (
        lambda: save_adapter(model, tmp_path / "other", "other"),
        lambda: save_training_state(tmp_path / "state", model, name="other"),
        lambda: set_adapter(model, "other"),
        lambda: merge_adapter(model),
        lambda: unload(model, merge=True),
        lambda: adapter_parameters(model, "other"),
        lambda: add_weighted_adapter(model, ["default", "other"], [1.0, 1.0], "sum"),
    ):
        with pytest.raises(RuntimeError, match=gone):
            call()
    assert not any(tmp_path.iterdir())
    with disable_adapter(model):
        plain = output(model, given)
    set_adapter(model, "default")
    save_adapter(model, tmp_path, "default")
    delete_adapter(model, "other")
    assert torch.equal(output(unload(model), given), plain)


def test_layers_that_were_removed_are_told_of(tmp_path):
    model, _ = adapted("llama", "lora")
    model.model.layers = model.model.layers[:1]
    gone = (
        r"one whose \['model.layers.1.self_attn.q_proj', .*\] were replaced or removed after `adapt`, so that what 'def"
    )
    with pytest.raises(RuntimeError, match=gone):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_parameters_that_were_parametrized_are_told_of(normed, tmp_path):
    model, given = adapted("tree", LoraConfig(target_modules=["up"], modules_to_save=["1.down"]))
    with disable_adapter(model):
        plain = output(model, given)
    expected = output(model, given)
    normed(model[1].down)
    message = re.escape("model is one whose ['1.down.weight'], of which an adapter has copies, were parametrized after")
    for call in (
        lambda: adapt(model, LoraConfig(target_modules=["up"]), "other"),
        lambda: save_adapter(model, tmp_path),
        lambda: set_adapter(model),
        lambda: set_adapter(model, "default"),
        lambda: adapter_parameters(model, "default"),
        lambda: delete_adapter(model, "default"),
        lambda: unload(model),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    old = normed is nn.utils.weight_norm
    nn.utils.remove_weight_norm(model[1].down) if old else remove_parametrizations(model[1].down, "weight")
    set_adapter(model, "default")
    close(output(model, given), expected)
    save_adapter(model, tmp_path)
    close(output(unload(model), given), plain)


@pytest.mark.parametrize(("copied", "tied"), [("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")])
def test_weights_that_were_tied_are_told_of(copied, tied, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[copied])
    model = adapt(tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON, tie_word_embeddings=True)), config)
    save_adapter(model, tmp_path)
    model.tie_weights()
    message = re.escape(f"one whose ['{tied}.weight'] were tied after `adapt` to what 'default' trains; it must be")
    for call in (
        lambda: save_adapter(model, tmp_path),
        lambda: merge_adapter(model),
        lambda: set_adapter(model, "default"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_everything_needs_an_unmerged_model():
    model, _ = adapted("tree", "lora", "ia3", LoraConfig(target_modules=["up"]))
    merge_adapter(model, "default", "other")
    assert merged_adapters(model) == ("default", "other")
    assert model.pyfastpeft.active == ("default", "other")
    for call in (
        lambda: adapt(model, IA3Config(target_modules=["up"]), "fourth"),
        lambda: set_adapter(model, "default"),
        lambda: delete_adapter(model, "third"),
        lambda: merge_adapter(model),
        lambda: add_weighted_adapter(model, ["default"], [1.0], "fourth"),
    ):
        with pytest.raises(RuntimeError, match=r"model is merged with .*unmerged: call unmerge_adapter first"):
            call()
    unmerge_adapter(model)
    unmerge_adapter(model)
    delete_adapter(model, "third")


@pytest.mark.parametrize("name", ["tree", "gpt2"])
def test_a_state_dict_meets_no_merged_weights(name, tmp_path):
    """An adapter would be added twice; and what unmerging brings back would replace what was loaded."""
    (model, given), (other, _) = adapted(name, "lora", "ia3"), adapted(name, "lora", "ia3")
    for each in (model, other):
        set_adapter(each, "default", "other")
    keys, plain, before = list(model.state_dict()), other.state_dict(), snapshot(other)
    merge_adapter(model)
    changed, state = output(model, given), model.state_dict()
    marks = {f"{path}.weight_is_merged" for path, module in carriers(model)}
    assert set(state) == {*keys, *marks}
    for each in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        with pytest.raises(RuntimeError, match=r"load_state_dict: state_dict is one with merged weights for the layer"):
            each.load_state_dict(state, strict=False)
        assert_same(snapshot(other), before)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for held in (plain, state):
            with pytest.raises(RuntimeError, match=r"weights for the merged layer .* unmerge it first"):
                each.load_state_dict(held, strict=False)
        assert torch.equal(output(each, given), changed)
    path = next(iter(marks)).rpartition(".")[0]
    with pytest.raises(RuntimeError, match="merged layer ''"):
        model.get_submodule(path).load_state_dict(other.get_submodule(path).state_dict())
    if name == "gpt2":
        model.save_pretrained(tmp_path)
        assert torch.equal(output(type(model).from_pretrained(tmp_path).eval(), given), changed)
    unmerge_adapter(model)
    assert list(model.state_dict()) == keys
    model.load_state_dict(plain)
    assert torch.equal(output(model, given), output(other, given))
    assert not unload(model)._load_state_dict_pre_hooks


# --- weighted sums ---


def change(module, name):
    """The change of the weight [N, K], in float64."""
    lora_A, lora_B, scaling = module.adapters[name].factors()
    return scaling * lora_B.detach().double() @ lora_A.detach().double()


WEIGHTS = [0.7, -1.5]


def two_loras(ranks=(3, 5), targets=(("c_attn", "wte"), ("c_attn", "c_fc"))):
    model = gpt2().eval()
    for name, r, target in zip("ab", ranks, targets):
        adapt(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(target), use_rslora=name == "b"), name)
        randomise(model)
    return model


def sums(model):
    for path, module in carriers(model):
        parts = [(name, weight) for name, weight in zip("ab", WEIGHTS) if name in module.adapters]
        yield path, module, sum(weight * change(module, name) for name, weight in parts)


def test_concatenated_sum():
    model = two_loras()
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "sum", "cat")
    assert model.pyfastpeft.active == ("b",)
    assert len(list(sums(model))) == 5
    for path, module, dense in sums(model):
        close(change(module, "sum"), dense, 1e-6)
        rank = {"attn.c_attn": 8, "mlp.c_fc": 5}.get(".".join(path.split(".")[-2:]), 3)
        assert len(module.adapters["sum"].lora_A) == rank
    fresh = gpt2()
    adapt(fresh, model.pyfastpeft.configs["sum"])
    shapes = {path: p.shape for path, p in adapter_parameters(fresh, "default").items()}
    assert shapes == {path: p.shape for path, p in adapter_parameters(model, "sum").items()}


@pytest.mark.parametrize("rank", [None, 2, 8])
def test_sum_of_a_chosen_rank(rank):
    model = two_loras()
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "sum", rank=rank)
    for _, module, dense in sums(model):
        left, values, right = torch.linalg.svd(dense, full_matrices=False)
        r = len(module.adapters["sum"].lora_A)
        assert r <= (rank or 5)
        close(change(module, "sum"), left[:, :r] * values[:r] @ right[:r], 1e-6)
        if rank == 8:
            close(change(module, "sum"), dense, 1e-6)


def test_sum_of_factors():
    model = two_loras(ranks=(4, 4))
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "sum", "linear")
    for _, module, _ in sums(model):
        held = [(module.adapters[n], w) for n, w in zip("ab", WEIGHTS) if n in module.adapters]
        roots = [abs(w * part.scaling) ** 0.5 for part, w in held]
        lora_A = sum(root * w / abs(w) * part.lora_A for root, (part, w) in zip(roots, held))
        lora_B = sum(root * part.lora_B for root, (part, _) in zip(roots, held))
        close(change(module, "sum"), (lora_B @ lora_A).double(), 1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"names": []}, ValueError, r"names is \[\] \(list\); it must be of at least one adapter"),
        ({"names": ["a", "z"]}, ValueError, r"name is 'z' \(str\); it must be one of the model's adapters: a, b"),
        ({"names": ["a", "a"]}, ValueError, "names is .* it must be distinct"),
        ({"names": "ab"}, TypeError, r"names is 'ab' \(str\); it must be a list of names"),
        ({"names": ["a", "head"]}, TypeError, "names is holding 'head', of LORA; it must be of LoRA adapters"),
        ({"names": ["a", "ia3"]}, TypeError, "names is holding 'ia3', of IA3; it must be of LoRA adapters"),
        ({"weights": 1.0}, ValueError, "weights is 1.0 .* one finite number for each of 2 adapters"),
        ({"weights": [1.0]}, ValueError, "weights is .* one finite number for each of 2 adapters"),
        ({"weights": [1.0, float("nan")]}, ValueError, "weights is .* one finite number for each of 2 adapters"),
        ({"weights": [1.0, "2"]}, ValueError, "weights is .* one finite number for each of 2 adapters"),
        ({"name": "a"}, ValueError, "name is 'a', which the model has; it must be new"),
        ({"name": "a.b"}, ValueError, "name is 'a.b' .* without dots"),
        ({"combination_type": "ties"}, ValueError, "combination_type is 'ties' .* one of svd, cat, linear"),
        ({"combination_type": "linear"}, ValueError, r"names is of ranks \[3, 5\]; it must be of one rank"),
        ({"rank": 0}, ValueError, "rank is 0 .* an integer >= 1"),
        ({"rank": "4"}, ValueError, r"rank is '4' \(str\); it must be an integer >= 1"),
        ({"rank": 4, "combination_type": "cat"}, ValueError, 'rank is 4 .* None, except with "svd"'),
    ],
)
def test_bad_sums(change, error, message):
    model = two_loras()
    adapt(model, IA3Config(), "ia3")
    adapt(model, LoraConfig(modules_to_save=["lm_head"]), "head")
    with pytest.raises(error, match=message):
        add_weighted_adapter(model, **{"names": ["a", "b"], "weights": WEIGHTS, "name": "sum", **change})
    assert list(model.pyfastpeft.configs) == ["a", "b", "ia3", "head"]


# --- dtypes, compilation, checkpointing ---


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adalora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_of_adapters(method, dtype):
    model = adapt(tree().to(dtype), config_for(method, "tree"))
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    assert {p.dtype for p in adapter_parameters(model, "default").values()} == {wide}
    given = inputs(model)
    assert output(model, given).dtype == dtype
    loss(model, given).backward()
    model = adapt(tree().to(dtype), config_for(method, "tree"), autocast_adapter_dtype=False)
    assert {p.dtype for p in adapter_parameters(model, "default").values()} == {dtype}


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bitfit"])
def test_bfloat16_against_float32(method):
    """A bf16 model with float32 adapters is as far from its float32 twin as bf16 rounding takes it."""
    model, given = adapted("llama", method)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    adapters = {path: p for path, p in adapter_parameters(model, "default").items()}
    for path, parameter in adapter_parameters(narrow, "default").items():
        if "adapters" in path:
            parameter.data = adapters[path].detach().clone()
    rounded = copy.deepcopy(narrow).float()
    results = {}
    for key, each in {"bf16": narrow, "float32": rounded}.items():
        loss(each, given).backward()
        results[key] = torch.cat([p.grad.float().flatten() for p in adapter_parameters(each, "default").values()])
    assert (results["bf16"] - results["float32"]).norm() < 0.05 * results["float32"].norm()
    with torch.autocast("cpu", torch.bfloat16):
        out = output(model, given)
    exact = output(model, given)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bitfit", "bottleneck"])
def test_gradient_checkpointing(method, reentrant):
    model, given = adapted("llama", method)
    model.train()

    def gradients():
        model.zero_grad()
        value = loss(model, given)
        value.backward()
        return [value.detach(), *(p.grad for p in adapter_parameters(model, "default").values())]

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(map(torch.equal, gradients(), plain))


def test_gradient_checkpointing_with_dropout():
    model, given = adapted("llama", LoraConfig(lora_dropout=0.4, init_lora_weights=False))
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(5)
        loss(model, given).backward()
        found.append([p.grad for p in adapter_parameters(model, "default").values()])
    assert all(map(torch.equal, *found))


COMPILED = ["lora", "dora", "ia3", "bitfit", "bottleneck"]


@pytest.mark.parametrize(
    ("method", "compiler"),
    [(method, "aot_eager") for method in COMPILED]
    + [pytest.param(method, "inductor", marks=pytest.mark.slow) for method in METHODS],
)
def test_compiled(method, compiler):
    model = adapt(llama(num_hidden_layers=2 if method == "selective" else 1), config_for(method, "llama"))
    randomise(model)
    given = inputs(model)

    def results(run):
        model.zero_grad()
        value = run(**given).loss
        value.backward()
        return [value.detach(), *(p.grad for p in adapter_parameters(model, "default").values())]

    eager = results(model)
    try:
        compiled = results(torch.compile(model, fullgraph=True, backend=compiler))
    finally:
        torch.compiler.reset()
    for got, expected in zip(compiled, eager):
        close(got, expected)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_compiled_model_sees_merging(method):
    model, given = adapted("tree", method)
    compiled = torch.compile(model, backend="eager")
    try:
        for change in (lambda _: None, merge_adapter, unmerge_adapter):
            change(model)
            close(output(compiled, given), output(model, given))
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_exported(merged, strict):
    model = gpt2().eval()
    ids = {"input_ids": inputs(model)["input_ids"], "use_cache": False}
    adapt(model, LoraConfig(bias="lora_only"))
    randomise(model)
    expected = output(model, ids)
    if merged:
        merge_adapter(model)
    exported = torch.export.export(model, (), ids, strict=strict).module()
    close(output(exported, ids), expected)


def test_a_compiled_model_is_adapted_as_the_model():
    model = tree()
    model[1].up.weight.requires_grad_(False)
    compiled = torch.compile(model, backend="eager")
    before = snapshot(model)
    config = LoraConfig(target_modules=r"1\.up", rank_pattern={"1.up": 3})
    assert adapt(compiled, config, "a") is compiled
    assert [path for path, _ in carriers(compiled)] == ["1.up"]
    add_weighted_adapter(compiled, ["a"], [1.0], "b")
    assert model.pyfastpeft.configs["b"].target_modules == ["1.up"]
    unload(compiled)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit", "dora", "bottleneck"])
def test_generation(method):
    """With a cache and left padding as without either."""
    model, _ = adapted("llama", method)
    prompts = [torch.randint(3, 61, (n,)) for n in (7, 4)]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.zeros(2, 7, dtype=torch.long)
    for row, prompt in zip(ids, prompts):
        row[-len(prompt) :] = prompt
    together = model.generate(ids, attention_mask=(ids > 0).long(), **options)
    for row, prompt in zip(together, prompts):
        current = prompt[None]
        for _ in range(6):
            current = torch.cat([current, model(current).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(row[-6:], current[0, -6:])
        alone = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), use_cache=False, **options)
        assert torch.equal(alone, current)


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(r=0), "LoraConfig: r is 0 .* an integer >= 1"),
        (lambda: LoraConfig(r=True), "r is True"),
        (lambda: LoraConfig(lora_alpha="8"), "lora_alpha is '8' .* a finite number"),
        (lambda: LoraConfig(lora_alpha=float("nan")), "lora_alpha is nan"),
        (lambda: LoraConfig(lora_dropout=1.0), "lora_dropout is 1.0 .* a probability"),
        (lambda: LoraConfig(bias="some"), "bias is 'some'"),
        (lambda: LoraConfig(use_dora="yes"), "use_dora is 'yes' .* True or False"),
        (lambda: LoraConfig(use_rslora=None), "use_rslora is None"),
        (lambda: LoraConfig(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (lambda: LoraConfig(rank_pattern={"q": 0}), "rank_pattern is .* a dict of integers >= 1"),
        (lambda: LoraConfig(alpha_pattern={"q": None}), "alpha_pattern is .* a dict of numbers"),
        (lambda: LoraConfig(target_modules=3), "target_modules is 3 .* a list of names, a regular expression, or None"),
        (lambda: LoraConfig(target_modules=["q", 3]), "target_modules is"),
        (lambda: LoraConfig(target_modules=""), "target_modules is ''"),
        (lambda: LoraConfig(exclude_modules=[None]), "exclude_modules is"),
        (lambda: LoraConfig(layers_to_transform="1"), "layers_to_transform is '1' .* an integer, a list of integers"),
        (lambda: LoraConfig(layers_to_transform=[1.5]), "layers_to_transform is"),
        (lambda: LoraConfig(modules_to_save="classifier"), "modules_to_save is 'classifier' .* a list of names"),
        (lambda: LoraConfig(task_type="CLM"), "task_type is 'CLM' .* one of SEQ_CLS"),
        (lambda: LoraConfig(inference_mode=1), "inference_mode is 1 .* True or False"),
        (lambda: IA3Config(feedforward_modules=[1]), "feedforward_modules is"),
        (lambda: IA3Config(init_ia3_weights="ones"), "init_ia3_weights is 'ones'"),
        (lambda: LoraConfig(fan_in_fan_out="x"), "fan_in_fan_out is 'x' .* True or False"),
        (lambda: IA3Config(fan_in_fan_out=None), "fan_in_fan_out is None .* True or False"),
        (lambda: LoraConfig(init_lora_weights=1), r"init_lora_weights is 1 \(int\); .* True, False or \"gaussian\""),
        (lambda: AdaLoraConfig(init_r=2, target_r=3), "target_r is 3 .* no more than init_r, 2"),
        (lambda: AdaLoraConfig(tinit=-1), "tinit is -1 .* an integer >= 0"),
        (lambda: AdaLoraConfig(tinit=5, tfinal=5, total_step=10), "total_step is 10 .* more than tinit"),
        (lambda: AdaLoraConfig(beta1=1.0), "beta1 is 1.0"),
        (lambda: AdaLoraConfig(orth_reg_weight=-1), "orth_reg_weight is -1"),
        (lambda: DyLoraConfig(r=2, min_rank=3), "min_rank is 3 .* no more than r, 2"),
        (lambda: DyLoraConfig(frozen=2), "frozen is 2"),
        (lambda: BottleneckConfig(placement="middle"), "placement is 'middle'"),
        (lambda: BottleneckConfig(activation="swish"), "activation is 'swish'"),
        (lambda: BottleneckConfig(scaling=float("inf")), "scaling is inf"),
        (lambda: BitFitConfig(add_missing="all"), "add_missing is 'all'"),
        (lambda: SelectiveConfig(), "target_parameters is None .* given, or layers_to_transform"),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rank_that_adalora_does_not_use_is_warned_of_once():
    with pytest.warns(UserWarning, match="r is 4, which AdaLoRA does not use; the initial rank is init_r, 12") as seen:
        AdaLoraConfig(r=4)
    assert [warning.filename for warning in seen] == [__file__]
    peft = pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="`r` is not used in AdaLora"):
        theirs = peft.AdaLoraConfig(r=4, total_step=10, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(llama(), theirs)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (LoraConfig(target_modules=["q_porj"]), ValueError, r"holding 'q_porj', .*close to it are \['.*q_proj'"),
        (LoraConfig(target_modules=["xyzzy"]), ValueError, r"among \['down_proj', 'embed_tokens', .*'q_proj'"),
        (LoraConfig(target_modules="q_proj"), ValueError, r"means nothing.*a list, as \['q_proj'\], if it is a name"),
        (LoraConfig(target_modules="q_porj"), ValueError, "'q_porj', which means nothing.*close to it are"),
        (LoraConfig(target_modules="(q_proj"), ValueError, r"'\(q_proj' \(missing .* a regular expression"),
        (LoraConfig(target_modules=["norm"]), TypeError, r"\['norm'\], which means 'model.norm', a LlamaRMSNorm"),
        (
            LoraConfig(target_modules=["mlp"]),
            TypeError,
            "which means 'model.layers.0.mlp', a LlamaMLP; it must be of lin",
        ),
        (
            LoraConfig(target_modules=["q_proj"], exclude_modules=["k_porj"]),
            ValueError,
            "exclude_modules is .*'k_porj'",
        ),
        (LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]), ValueError, "which leaves nothing"),
        (LoraConfig(target_modules=["q_proj"], rank_pattern={"k_proj": 2}), ValueError, "rank_pattern is .*'k_proj'"),
        (LoraConfig(alpha_pattern={"q_prj": 2}), ValueError, "holding 'q_prj', .* close to it .*'q_proj'"),
        (LoraConfig(target_modules=["q_proj"], alpha_pattern={"k": 2}), ValueError, "alpha_pattern is holding 'k'"),
        (LoraConfig(modules_to_save=["scores"]), ValueError, "modules_to_save is holding 'scores'"),
        (LoraConfig(layers_to_transform=2), ValueError, r"layers_to_transform is holding 2; .* in \[-2, 2\)"),
        (LoraConfig(layers_to_transform=-3), ValueError, "layers_to_transform is holding -3"),
        (LoraConfig(layers_to_transform=0, layers_pattern="blocks"), ValueError, "layers_pattern is 'blocks'"),
        (LoraConfig(target_modules=["embed_tokens"], use_dora=True), ValueError, "use_dora is True with the embedding"),
        (IA3Config(target_modules=["embed_tokens"]), TypeError, "meaning 'model.embed_tokens'"),
        (
            IA3Config(target_modules=["k_proj"], feedforward_modules=["up_proj"]),
            ValueError,
            "feedforward_modules is hol",
        ),
        (DyLoraConfig(target_modules=["embed_tokens"]), TypeError, "meaning 'model.embed_tokens'; .*of linear layers"),
        (AdaLoraConfig(target_modules=["embed_tokens"]), TypeError, "meaning 'model.embed_tokens'; .*of linear layers"),
        (SelectiveConfig(target_parameters=["q_proj.wieght"]), ValueError, "close to it are .*q_proj.weight"),
        (SelectiveConfig(target_parameters=["q_proj.bias"]), ValueError, "holding 'q_proj.bias', which means nothing"),
        (BitFitConfig(target_modules=["q_porj"], add_missing=True), ValueError, "'q_porj'.*close to it are"),
        ({"r": 8}, TypeError, "adapt: config is .*; it must be one of LoraConfig"),
        (None, TypeError, "adapt: config is None"),
    ],
)
def test_bad_targets(config, error, message):
    model = llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        adapt(model, config)
    assert_same(snapshot(model), before)


def test_parameters_of_one_name_are_refused_before_they_train():
    """A bottleneck's norm and a copy of the layer's own would be stored as one tensor."""
    model = tree()
    before, config = snapshot(model), BottleneckConfig(target_modules=["1"], layer_norm=True, train_layer_norm=True)
    with pytest.raises(ValueError, match=r"two parameters called \['1.norm.bias', '1.norm.weight'\]"):
        adapt(model, config)
    assert_same(snapshot(model), before)
    adapt(model, BottleneckConfig(target_modules=["1"], layer_norm=True))


def test_all_linear_in_a_model_without_linear_layers():
    model = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"a Sequential in which 'all-linear' means nothing; .* linear layers"):
        adapt(model, LoraConfig(target_modules="all-linear"))


def test_bad_calls():
    model = tree()
    for call in (set_adapter, delete_adapter, merge_adapter):
        with pytest.raises(
            ValueError, match=f"{call.__name__}: model is a Sequential without adapters; it must be adapted"
        ):
            call(model, "default")
    with pytest.raises(ValueError, match="target_modules is None for a model of type Sequential; it must be given"):
        adapt(model, LoraConfig())
    with pytest.raises(TypeError, match=r"model is .*; it must be a torch.nn.Module"):
        adapt("llama", LoraConfig())
    for name, message in {"": "non-empty", "a.b": "without dots", "keys": "no use for", 3: "non-empty string"}.items():
        with pytest.raises(ValueError, match=f"adapt: name is .*{message}"):
            adapt(model, LoraConfig(target_modules=["up"]), name)
    assert not hasattr(model, "pyfastpeft")
    for call in (count_parameters, merged_adapters):
        with pytest.raises(TypeError, match=rf"{call.__name__}: model is .*; it must be a torch.nn.Module"):
            call("llama")
    adapt(model, LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match=r"adapter_parameters: name is 'defualt' .* one of .*: default"):
        adapter_parameters(model, "defualt")
    with pytest.raises(TypeError, match=r"names is None .* a list of names"):
        add_weighted_adapter(model, None, [1.0], "sum")
    with pytest.raises(ValueError, match="name is 'default', which the model has; it must be new, or deleted first"):
        adapt(model, IA3Config(target_modules=["up"]))
    set_adapter(model)
    for call in (merge_adapter, lambda model: unload(model, merge=True)):
        with pytest.raises(ValueError, match=r"names is empty, and no adapter is active; it must be of \['default'\]"):
            call(model)
    set_adapter(model, "default")
    for names in (["other"], [["default"]], ["default", "default"]):
        with pytest.raises(ValueError, match=r"set_adapter: names? is "):
            set_adapter(model, *names)
    with pytest.raises(ValueError, match=re.escape("one whose ['0.1.up', '0.2.up'] were adapted in another model")):
        adapt(nn.Sequential(model), LoraConfig(target_modules=["up"]))
    holder = nn.Module()
    holder.up = Block()
    holder.up.up.adapters = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"attach: 'up.up' is a Linear with \['adapters'\] of its own"):
        adapt(holder, LoraConfig(target_modules=["up.up"]))


class Gated(nn.Linear):
    """What it calls as adapters do would be taken for theirs."""

    active = merged = True

    def merge(self, x):
        return 2 * x

    def forward(self, x):
        return super().forward(self.merge(x) if self.active else x)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LoraConfig(target_modules=["0"]), r"\['active', 'merge', 'merged'\]"),
        (BitFitConfig(), r"\['active'\]"),
        (BottleneckConfig(target_modules=["0"]), r"\['active', 'merge', 'merged'\]"),
    ],
)
def test_names_that_adapters_need_are_free(config, names):
    model = nn.Sequential(Gated(3, 3))
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"attach: '0' is a Gated with {names} of its own; it must be without"):
        adapt(model, config)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("name", ["tree", "gpt2"])
def test_layers_take_their_input_by_name(name):
    """As torch's and transformers' own do."""
    model, _ = adapted(name, "lora")
    module = dict(model.named_modules())["1.up" if name == "tree" else "transformer.h.1.attn.c_attn"]
    x = torch.randn(4, HIDDEN)
    assert torch.equal(module(**{"input" if name == "tree" else "x": x}), module(x))


class Scaled(nn.Linear):
    def forward(self, x, scale):
        return scale * super().forward(x)


def test_layers_with_several_arguments_by_name_in_any_order():
    model, x = nn.Sequential(Scaled(6, 5)), torch.randn(3, 6)
    adapt(model, LoraConfig(target_modules=["0"], r=2))
    randomise(model)
    assert torch.equal(model[0](scale=2.0, x=x), model[0](x, 2.0))


def test_merged_rounding():
    """float32 sums, rounded once: no element of a bf16 weight is off by more than half a unit in its last place."""
    layer = nn.Linear(16, 8).to(torch.bfloat16)
    model = adapt(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=3, lora_alpha=7))
    randomise(model)
    exact = layer.weight.detach().double() + change(layer, "default")
    merge_adapter(model)
    error = (layer.weight.double() - exact).abs()
    assert (error <= exact.abs() * 2.0**-8 * 1.0001).all()


# --- linear layers that carry nothing ---


def base_layers(model):
    return {path for path, module in model.named_modules() if type(module) is BaseLinear}


@pytest.fixture
def everywhere(monkeypatch):
    """As on a CPU on which our own product is the faster one."""
    monkeypatch.setattr("pyfastpeft.methods.inject.prefers_own_linear", lambda weight: True)


def test_layers_that_carry_nothing_run_our_product_while_adapters_run(everywhere):
    model = MODELS["llama"].make().eval()
    linear = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    targets = {path for path in linear if path.endswith(("q_proj", "v_proj"))}
    given, before = inputs(model), snapshot(model)
    adapt(model, config_for("lora", "llama"))
    assert base_layers(model) == linear - targets
    with disable_adapter(model):
        assert not base_layers(model)
        with disable_adapter(model):
            pass
        assert not base_layers(model)
    assert base_layers(model) == linear - targets
    adapt(model, LoraConfig(r=2, target_modules=["k_proj"]), "other")
    assert base_layers(model) == {path for path in linear - targets if not path.endswith("k_proj")}
    set_adapter(model)
    assert not base_layers(model)
    set_adapter(model, "default")
    delete_adapter(model, "other")
    assert base_layers(model) == linear - targets
    with pytest.raises(ValueError, match="target_modules"):
        adapt(model, LoraConfig(target_modules=["k_proj", "nowhere"]), "other")
    assert base_layers(model) == linear - targets
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert base_layers(twin) == linear - targets
        assert torch.equal(output(twin, given), output(model, given))
    head, layer = model.lm_head, model.model.layers[0].mlp.up_proj
    assert torch.equal(head(input=torch.ones(2, HIDDEN)), head(torch.ones(2, HIDDEN)))
    LoRALinear.from_linear(layer, rank=2)
    was = layer.forward
    layer.forward = lambda x: was(x)
    with torch.autocast("cpu", torch.bfloat16), disable_adapter(model):
        assert not base_layers(model)
    assert base_layers(model) == linear - targets - {"model.layers.0.mlp.up_proj"}
    del layer.forward
    set_adapter(model, "default")
    assert base_layers(model) == linear - targets
    with disable_adapter(model):
        assert_same(snapshot(unload(model)), before)
    assert_same(snapshot(model), before)


def test_layers_with_a_forward_or_a_weight_of_their_own_kind_stay_as_they_are(everywhere):
    class Weight(nn.Parameter):
        pass

    model = MODELS["llama"].make()
    layer = model.model.layers[0]
    layer.self_attn.o_proj.forward = lambda x: x
    layer.mlp.up_proj.weight = Weight(layer.mlp.up_proj.weight.detach())
    adapt(model, config_for("lora", "llama"))
    assert not base_layers(model) & {"model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"}
    assert "model.layers.0.mlp.gate_proj" in base_layers(model)


@pytest.mark.parametrize("method", ["lora", "bitfit", "selective"])
def test_training_is_the_same_by_our_product(method, monkeypatch):
    found = []
    for own in (False, True):
        torch.manual_seed(0)
        monkeypatch.setattr("pyfastpeft.methods.inject.prefers_own_linear", lambda weight, own=own: own)
        model, given = adapted("bert", method)
        assert bool(base_layers(model)) == own
        loss(model, given).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:
            assert (gradient - found[1][name]).norm() <= 1e-4 * gradient.norm() + 1e-9, name
