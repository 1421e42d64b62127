"""Adapters on disk: PEFT reads what is written here and the other way round, to the same logits and bytes."""

import copy
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaConfig,
    DebertaForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import pyfastpeft
from pyfastpeft import methods
from pyfastpeft.methods import checkpoint, files

CONFIG, TENSORS = checkpoint.CONFIG_FILE, checkpoint.TENSORS_FILE
TOKENS = torch.tensor([[5, 17, 42, 8, 23, 9, 31], [3, 50, 12, 60, 7, 7, 2]])
SMALL = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def seeded(make):
    def made():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model = make().eval()
            for parameter in model.parameters():  # biases and gains, which are zeros and ones, too
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        return model

    return made


llama = seeded(lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)))
gpt2 = seeded(lambda: GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=32, vocab_size=61)))
roberta = seeded(lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, num_labels=3)))
deberta = seeded(lambda: DebertaForSequenceClassification(DebertaConfig(**SMALL, num_labels=3)))
distilbert = seeded(lambda: DistilBertForSequenceClassification(DistilBertConfig(
    vocab_size=61, dim=24, hidden_dim=40, n_layers=2, n_heads=4, num_labels=3,
)))  # fmt: skip
answering = seeded(lambda: RobertaForQuestionAnswering(RobertaConfig(**SMALL)))
t5 = seeded(lambda: T5ForConditionalGeneration(T5Config(
    vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0,
)))  # fmt: skip

bart = seeded(lambda: BartForConditionalGeneration(BartConfig(
    vocab_size=61, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=40, decoder_ffn_dim=40, scale_embedding=True,
)))  # fmt: skip
gemma3 = seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=6)))


def logits(model):
    model = model.eval()
    kind = getattr(model, "config", None) or model.base_model.config
    inputs = {"input_ids": TOKENS}
    if kind.model_type == "t5":
        inputs["decoder_input_ids"] = TOKENS[:, :4]
    with torch.no_grad():
        out = model(**inputs)
    every = out.start_logits if hasattr(out, "start_logits") else out.logits
    return every[:, -TOKENS.shape[1] :]  # PEFT has the virtual tokens', too


def randomise(model):
    """Values for all that trains, far from what an adapter starts with."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def meaning(directory):
    """A stored config as PEFT understands it."""
    fields = peft.PeftConfig.from_pretrained(directory).to_dict()
    return {key: set(value) if isinstance(value, list) else value for key, value in fields.items()}


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).tolist()


def assert_same_tensors(given, expected):
    assert given.keys() == expected.keys()
    assert all(bits(given[key]) == bits(expected[key]) for key in expected)


QV = ["q_proj", "v_proj"]
HALF = {"r": 4, "lora_alpha": 10}
# name -> (model, PEFT's class, its options): each is also a config of ours, by the same names
CASES = {
    "lora": (llama, "LoraConfig", {**HALF, "target_modules": QV, "task_type": "CAUSAL_LM"}),
    "lora-regular-expression": (llama, "LoraConfig", {**HALF, "target_modules": r".*\.1\..*_proj"}),
    "lora-some-layers": (llama, "LoraConfig", {**HALF, "target_modules": QV, "layers_to_transform": [1]}),
    "lora-excluded": (llama, "LoraConfig", {**HALF, "target_modules": QV, "exclude_modules": ["0.self_attn.q_proj"]}),
    "lora-all-linear": (gpt2, "LoraConfig", {**HALF, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "lora-all-linear-beside-a-head": (  # of which PEFT names the layers among the targets, too
        roberta,
        "LoraConfig",
        {**HALF, "target_modules": "all-linear", "task_type": "SEQ_CLS"},
    ),
    "lora-embedding": (llama, "LoraConfig", {**HALF, "target_modules": ["embed_tokens", "k_proj"]}),
    "lora-scaled-embedding": (bart, "LoraConfig", {**HALF, "target_modules": ["embed_tokens", "k_proj"]}),
    "lora-embedding-scaled-by-a-tensor": (gemma3, "LoraConfig", {**HALF, "target_modules": ["embed_tokens"]}),
    "lora-tied-embedding": (
        gpt2,
        "LoraConfig",
        {**HALF, "target_modules": ["wte", "c_attn"], "fan_in_fan_out": True},
    ),
    "rslora-patterns": (
        llama,
        "LoraConfig",
        {
            **HALF,
            "target_modules": [*QV, "down_proj"],
            "use_rslora": True,
            "lora_dropout": 0.1,
            "rank_pattern": {"v_proj": 2, "0.mlp.down_proj": 5},
            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
        },
    ),
    "dora": (llama, "LoraConfig", {**HALF, "target_modules": QV, "use_dora": True}),
    "dora-conv1d": (
        gpt2,
        "LoraConfig",
        {**HALF, "target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True},
    ),
    "lora-bias-all": (
        roberta,
        "LoraConfig",
        {**HALF, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
    ),
    "lora-bias-all-of-this-name": (
        deberta,
        "LoraConfig",
        {**HALF, "target_modules": ["in_proj"], "bias": "all"},
    ),  # q_bias
    "lora-heads-by-their-ends": (  # pre_classifier, too
        distilbert,
        "LoraConfig",
        {**HALF, "target_modules": ["q_lin"], "bias": "all", "task_type": "SEQ_CLS"},
    ),
    "lora-bias-own": (
        roberta,
        "LoraConfig",
        {**HALF, "target_modules": ["query", "value"], "bias": "lora_only", "modules_to_save": ["classifier"]},
    ),
    "lora-head": (roberta, "LoraConfig", {**HALF, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "lora-answers": (answering, "LoraConfig", {**HALF, "target_modules": ["query"], "task_type": "QUESTION_ANS"}),
    "lora-modules-to-save": (
        llama,
        "LoraConfig",
        {**HALF, "target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "lora-encoder-decoder": (t5, "LoraConfig", {**HALF, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "ia3": (
        llama,
        "IA3Config",
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], "task_type": "CAUSAL_LM"},
    ),
    "ia3-conv1d": (
        gpt2,
        "IA3Config",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "ia3-head": (
        roberta,
        "IA3Config",
        {"target_modules": ["key", "intermediate.dense"], "feedforward_modules": [], "task_type": "SEQ_CLS"},
    ),
    "adalora": (
        llama,
        "AdaLoraConfig",
        {"target_modules": QV, "init_r": 6, "target_r": 2, "lora_alpha": 20, "total_step": 100, "tinit": 3},
    ),
    "adalora-pruned": (
        llama,
        "AdaLoraConfig",
        {
            "target_modules": QV,
            "init_r": 4,
            "target_r": 2,
            "lora_alpha": 20,
            "total_step": 100,
            "rank_pattern": {
                "model.layers.0.self_attn.v_proj.lora_E": [True, False, True, True],
                "model.layers.1.self_attn.v_proj.lora_E": [False, False, False, False],
                "model.layers.1.self_attn.q_proj.lora_E": [True, True, True, True],
            },
        },
    ),
    "prefix": (llama, "PrefixTuningConfig", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    "prefix-projected": (
        gpt2,
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 10, "task_type": "CAUSAL_LM"},
    ),
    "prompt": (llama, "PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    "prompt-encoder-decoder": (t5, "PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM"}),
    "prompt-head": (roberta, "PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}),
}
# What PEFT has no words for, and is to find all the same: targets by architecture, layers counted from the last.
BY_ARCHITECTURE = {
    "lora-by-architecture": (roberta, "LoraConfig", HALF),
    "lora-conv1d-by-architecture": (gpt2, "LoraConfig", HALF),
    "lora-last-layer": (llama, "LoraConfig", {**HALF, "layers_to_transform": -1}),
    "lora-exclude-by-architecture": (llama, "LoraConfig", {**HALF, "exclude_modules": r".*0\.self_attn\.v_proj"}),
    "ia3-by-architecture": (llama, "IA3Config", {}),
    "ia3-conv1d-by-architecture": (gpt2, "IA3Config", {}),
    "ia3-encoder-decoder-by-architecture": (t5, "IA3Config", {}),
    "ia3-some-layers": (
        llama,
        "IA3Config",
        {"target_modules": ["k_proj", "mlp.down_proj"], "feedforward_modules": ["down_proj"], "layers_to_transform": 0},
    ),
    "adalora-without-schedule": (llama, "AdaLoraConfig", {"init_r": 3, "target_r": 2}),
}
OWN = {
    "bitfit": (roberta, "BitFitConfig", {"train_layer_norm": True, "task_type": "SEQ_CLS"}),
    "dylora": (llama, "DyLoraConfig", {**HALF, "target_modules": QV, "layers_to_transform": (-1,)}),
    "selective": (gpt2, "SelectiveConfig", {"layers_to_transform": [-1]}),
    "houlsby": (roberta, "BottleneckConfig", {"bottleneck_size": 5, "layer_norm": True, "scaling": "learned"}),
    "pfeiffer": (llama, "BottleneckConfig", {"bottleneck_size": 5, "placement": "pfeiffer"}),
}
ALL = CASES | BY_ARCHITECTURE | OWN


def of_peft(case):
    make, kind, options = CASES[case]
    options = copy.deepcopy(options)
    pattern = options.pop("rank_pattern", None) if kind == "AdaLoraConfig" else None
    model = randomise(peft.get_peft_model(make(), getattr(peft, kind)(**options)))
    if pattern:  # as PEFT's allocator leaves them
        model.peft_config["default"].rank_pattern = {f"{key}.default": mask for key, mask in pattern.items()}
        for key, mask in pattern.items():
            path = key.removesuffix(".lora_E")
            model.get_submodule(f"base_model.model.{path}").lora_E["default"].data *= torch.tensor(mask)[:, None]
    return model


def of_ours(case):
    make, kind, options = ALL[case]
    return randomise(pyfastpeft.adapt(make(), getattr(methods, kind)(**copy.deepcopy(options))))


def quietly(action, *arguments, **options):
    """PEFT warns of what it does not find; here that is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|[Uu]nexpected).*")
        return action(*arguments, **options)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_wrote_is_read_to_the_same_logits_and_written_to_the_same_bytes(case, tmp_path):
    stock = of_peft(case)
    expected = logits(stock)
    stock.save_pretrained(tmp_path / "peft")
    ours = pyfastpeft.load_adapter(CASES[case][0](), tmp_path / "peft")
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in ours.parameters())

    pyfastpeft.save_adapter(ours, tmp_path / "ours")
    theirs = load_file(tmp_path / "peft" / TENSORS)
    copies = ("embed_tokens.base_layer.weight", "wte.base_layer.weight", "original_module", "modules_to_save.")
    needed = {key: tensor for key, tensor in theirs.items() if not any(copied in key for copied in copies)}
    assert_same_tensors(load_file(tmp_path / "ours" / TENSORS), needed)
    with safe_open(tmp_path / "ours" / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    expected = meaning(tmp_path / "peft")
    if case == "lora-some-layers":
        expected |= {"layers_to_transform": None, "target_modules": {"1.self_attn.q_proj", "1.self_attn.v_proj"}}
    assert meaning(tmp_path / "ours") == expected


@pytest.mark.parametrize("case", [*CASES, *BY_ARCHITECTURE])
def test_peft_reads_what_was_written_here_to_the_same_logits_and_bytes(case, tmp_path):
    ours = of_ours(case)
    expected = logits(ours)
    pyfastpeft.save_adapter(ours, tmp_path)
    stock = quietly(peft.PeftModel.from_pretrained, ALL[case][0](), tmp_path)
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)
    kept = peft.get_peft_model_state_dict(stock, save_embedding_layers=False)
    kept = {
        key: tensor
        for key, tensor in kept.items()
        if not re.search(r"original_module|\.(modules_to_save|default)\.", key)
    }
    assert_same_tensors(load_file(tmp_path / TENSORS), kept)


@pytest.mark.parametrize("case", ALL)
def test_an_adapter_comes_back_as_it_was(case, tmp_path):
    ours = of_ours(case)
    make = ALL[case][0]
    plain = logits(make())
    assert not torch.allclose(logits(ours), plain, atol=1e-4)
    pyfastpeft.save_adapter(ours, tmp_path / "first")
    again = pyfastpeft.load_adapter(make(), tmp_path / "first", "again", is_trainable=True)
    torch.testing.assert_close(logits(again), logits(ours), rtol=1e-5, atol=1e-6)
    trained = methods.adapter_parameters(again, "again")
    assert {id(p) for p in again.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    pyfastpeft.save_adapter(again, tmp_path / "second", "again")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    pyfastpeft.unload(again)
    assert torch.equal(logits(again), plain)


def test_json_is_written_as_peft_writes_it(tmp_path):
    pyfastpeft.save_adapter(of_ours("lora-by-architecture"), tmp_path)
    text = (tmp_path / CONFIG).read_text()
    fields = json.loads(text)
    assert text == json.dumps(fields, indent=2, sort_keys=True)
    assert fields["target_modules"] == ["query", "value"]
    assert fields["peft_type"] == "LORA"
    assert fields["inference_mode"] is True
    assert fields["auto_mapping"]["base_model_class"] == "RobertaForSequenceClassification"


def test_a_compiled_model_is_saved_as_the_model(tmp_path):
    model = of_ours("lora")
    pyfastpeft.save_adapter(model, tmp_path / "plain")
    pyfastpeft.save_adapter(torch.compile(model), tmp_path / "compiled")
    assert contents(tmp_path / "plain") == contents(tmp_path / "compiled")


@pytest.mark.parametrize("case", ["lora", "adalora-pruned"])
def test_layers_that_were_wrapped_are_saved_by_their_own_names(case, tmp_path):
    model = of_ours(case)
    pyfastpeft.save_adapter(model, tmp_path / "plain")
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer)
    pyfastpeft.save_adapter(model, tmp_path / "wrapped")
    assert contents(tmp_path / "plain") == contents(tmp_path / "wrapped")


LAYERS_COMPILED = ["lora-regular-expression", "rslora-patterns", "lora-embedding", "lora-modules-to-save"]
LAYERS_COMPILED += ["lora-bias-all", "ia3-by-architecture", "adalora-pruned", "bitfit", "selective", "pfeiffer"]


@pytest.mark.parametrize("kinds", [GradientCheckpointingLayer, (nn.Linear, nn.Embedding)])
@pytest.mark.parametrize("case", LAYERS_COMPILED)
def test_files_of_a_model_whose_layers_are_compiled_are_the_plain_ones(case, kinds, tmp_path):
    make, kind, options = ALL[case]
    plain = of_ours(case)
    pyfastpeft.save_adapter(plain, tmp_path / "plain")
    model = compiled_inside(make(), kinds)
    pyfastpeft.adapt(model, getattr(methods, kind)(**copy.deepcopy(options)), "other")
    assert methods.adapter_parameters(model, "other").keys() == methods.adapter_parameters(plain, "default").keys()
    pyfastpeft.load_adapter(model, tmp_path / "plain")
    if case == "rslora-patterns":
        torch.testing.assert_close(logits(model), logits(plain))
    pyfastpeft.save_adapter(model, tmp_path / "compiled")
    assert contents(tmp_path / "plain") == contents(tmp_path / "compiled")
    pyfastpeft.unload(model, merge=case == "rslora-patterns")


def test_all_linear_layers_of_a_model_whose_layers_are_compiled_are_all_but_the_head():
    plain, model = llama(), compiled_inside(llama(), (nn.Linear, nn.Embedding))
    for each in (plain, model):
        pyfastpeft.adapt(each, methods.LoraConfig(target_modules="all-linear"))
    assert [*methods.adapter_parameters(model, "default")] == [*methods.adapter_parameters(plain, "default")]


def compiled_inside(model, kinds):
    """The model, its modules of these kinds compiled one by one."""
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, kinds):
                setattr(parent, name, torch.compile(child, backend="eager"))
    return model


def test_parameters_that_layers_share_are_stored_for_each(tmp_path):
    model = of_ours("lora")
    parts = [layer.self_attn.q_proj.adapters["default"] for layer in model.model.layers]
    parts[1].lora_A = parts[0].lora_A
    pyfastpeft.save_adapter(model, tmp_path)
    assert torch.equal(logits(pyfastpeft.load_adapter(llama(), tmp_path)), logits(model))


def test_ends_of_names_mean_the_targets_alone(tmp_path):
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(5, 5)
            self.block = nn.ModuleDict({"lin": nn.Linear(5, 5), "out": nn.Linear(5, 5)})

        def forward(self, x):
            return self.block["out"](self.block["lin"](self.lin(x)))

    with torch.random.fork_rng(devices=[]):
        bases = [Tree()]
    bases += [copy.deepcopy(bases[0]) for _ in range(2)]
    chosen = methods.LoraConfig(r=2, target_modules=r"lin|block\.out", layers_to_transform=None)
    ours = randomise(pyfastpeft.adapt(bases[0], chosen))
    ours.pyfastpeft.configs["default"].target_modules = None  # as if found: `lin` is the end of another's path
    pyfastpeft.save_adapter(ours, tmp_path)
    x = torch.randn(3, 5)
    for other in (pyfastpeft.load_adapter(bases[1], tmp_path), peft.PeftModel.from_pretrained(bases[2], tmp_path)):
        torch.testing.assert_close(other(x), ours(x))


@pytest.mark.parametrize("target", [r".*self_attn.*", r".*(q_proj|mlp)"])
def test_patterns_that_mean_more_than_layers_are_written_by_name(target, tmp_path):
    """PEFT takes all modules that a pattern means, and has no adapter for a block."""
    ours = pyfastpeft.adapt(llama(), methods.LoraConfig(**HALF, target_modules=target, init_lora_weights=False))
    pyfastpeft.save_adapter(ours, tmp_path)
    for again in (pyfastpeft.load_adapter(llama(), tmp_path), peft.PeftModel.from_pretrained(llama(), tmp_path)):
        torch.testing.assert_close(logits(again), logits(ours))


@pytest.mark.parametrize("config", [methods.LoraConfig, methods.AdaLoraConfig, methods.IA3Config])
@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(5, 5),
        nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 5))),  # where "0" is the end of "1.0"
    ],
    ids=["root", "nested"],
)
def test_targets_without_names_of_their_own(model, config, tmp_path):
    model, again, x = copy.deepcopy(model), copy.deepcopy(model), torch.randn(3, 5)
    randomise(pyfastpeft.adapt(model, config(target_modules="all-linear")))
    pyfastpeft.save_adapter(model, tmp_path)
    assert not torch.allclose(again(x), model(x), atol=1e-3)
    assert torch.equal(pyfastpeft.load_adapter(again, tmp_path)(x), model(x))


@pytest.mark.parametrize("case", ["lora-head", "ia3", "bitfit"])
def test_sixteen_bit_models_keep_float32_adapters(case, tmp_path):
    make = ALL[case][0]
    ours = randomise(pyfastpeft.adapt(make().bfloat16(), getattr(methods, ALL[case][1])(**ALL[case][2])))
    pyfastpeft.save_adapter(ours, tmp_path)
    again = pyfastpeft.load_adapter(make().bfloat16(), tmp_path)
    assert torch.equal(logits(again), logits(ours))
    assert_same_tensors(
        *({k: p.detach() for k, p in methods.adapter_parameters(m, "default").items()} for m in (ours, again))
    )


def test_patterns_mean_the_same_after_they_were_sorted(tmp_path):
    patterns = {"rank_pattern": {"q_proj": 3, r".*0\..*_proj": 5}, "alpha_pattern": {"q_proj": 2, r".*_proj": 7}}
    config = methods.LoraConfig(**HALF, target_modules=QV, init_lora_weights=False, **patterns)
    ours = pyfastpeft.adapt(llama(), config)
    pyfastpeft.save_adapter(ours, tmp_path)
    for again in (pyfastpeft.load_adapter(llama(), tmp_path), peft.PeftModel.from_pretrained(llama(), tmp_path)):
        torch.testing.assert_close(logits(again), logits(ours), rtol=1e-5, atol=1e-5)


def test_several_adapters_are_kept_apart(tmp_path):
    model = of_ours("lora-head")
    pyfastpeft.save_adapter(model, tmp_path / "lora")
    of_ia3 = of_ours("ia3-head")
    pyfastpeft.save_adapter(of_ia3, tmp_path / "ia3")
    first, second = logits(model), logits(of_ia3)
    pyfastpeft.load_adapter(model, tmp_path / "ia3", "scales")
    assert torch.equal(logits(model), second)
    pyfastpeft.set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    pyfastpeft.save_adapter(model, tmp_path / "inactive", "scales")
    assert_same_tensors(load_file(tmp_path / "inactive" / TENSORS), load_file(tmp_path / "ia3" / TENSORS))


def test_what_is_stored_while_others_are_merged(tmp_path):
    """A parameter that one adapter replaced and another is merged into."""
    model = pyfastpeft.adapt(gpt2(), methods.SelectiveConfig(target_parameters=["c_attn.weight", "c_attn.bias"]), "own")
    randomise(model)
    for name, config in {"low": methods.LoraConfig(), "scale": methods.IA3Config()}.items():
        randomise(pyfastpeft.adapt(model, config, name))
    pyfastpeft.set_adapter(model, "own", "low", "scale")
    pyfastpeft.save_adapter(model, tmp_path / "before", "own")
    pyfastpeft.merge_adapter(model)
    pyfastpeft.save_adapter(model, tmp_path / "after", "own")
    assert_same_tensors(load_file(tmp_path / "after" / TENSORS), load_file(tmp_path / "before" / TENSORS))


def test_a_combination_of_adapters_is_read_by_peft(tmp_path):
    model = of_ours("lora-all-linear")
    pyfastpeft.adapt(model, methods.LoraConfig(r=3, target_modules=["c_attn"]), "other")
    randomise(model)
    pyfastpeft.add_weighted_adapter(model, ["default", "other"], [0.7, -0.4], "sum", "cat")
    pyfastpeft.set_adapter(model, "sum")
    pyfastpeft.save_adapter(model, tmp_path, "sum")
    stock = quietly(peft.PeftModel.from_pretrained, gpt2(), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)


def test_ranks_that_training_revived_are_stored(tmp_path):
    ours = pyfastpeft.adapt(
        llama(), methods.AdaLoraConfig(target_modules=["v_proj"], init_r=3, target_r=2, total_step=9)
    )
    randomise(ours)
    path = "model.layers.1.self_attn.v_proj"
    part = ours.get_submodule(path).adapters["default"]
    part.lora_E.data[1] = 0
    ours.pyfastpeft.configs["default"].rank_pattern = {f"{path}.lora_E": [True, False, False]}
    pyfastpeft.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["rank_pattern"] == {f"{path}.lora_E": [True, False, True]}
    for other in (pyfastpeft.load_adapter(llama(), tmp_path), peft.PeftModel.from_pretrained(llama(), tmp_path)):
        torch.testing.assert_close(logits(other), logits(ours), rtol=1e-5, atol=1e-5)


# --- what does not fit -----------------------------------------------------------------------------------------------


def state_of(model):
    classes = {path: type(module) for path, module in model.named_modules()}
    flags = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    known = copy.deepcopy(getattr(model, "pyfastpeft", None))
    hooks = {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()}
    return classes, flags, known, hooks


def refused(directory, match, error=ValueError, **options):
    """Loading raises, naming what is wrong; a plain and an adapted model are then as they were."""
    adapted = of_ours("ia3-head" if "classifier" in str(match) else "ia3")
    next(iter(methods.adapter_parameters(adapted, "default").values())).requires_grad_(False)
    for model, name in ((options.get("make", llama)(), "default"), (adapted, "new")):
        before, tensors, expected = state_of(model), copy.deepcopy(model.state_dict()), logits(model)
        with pytest.raises(error, match=match):
            pyfastpeft.load_adapter(model, directory, name, **{k: v for k, v in options.items() if k != "make"})
        assert state_of(model) == before
        assert_same_tensors(model.state_dict(), tensors)
        assert torch.equal(logits(model), expected)


@pytest.fixture
def saved(tmp_path):
    pyfastpeft.save_adapter(of_ours("lora"), tmp_path)
    return tmp_path


def change(directory, edit):
    tensors = load_file(directory / TENSORS)
    edit(tensors)
    save_file(tensors, directory / TENSORS, metadata={"format": "pt"})


def change_json(directory, **fields):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def test_missing_tensors_are_named(saved):
    change(saved, lambda tensors: tensors.pop(KEY))
    refused(saved, rf"{TENSORS} is without {KEY}")


def test_tensors_of_another_shape_are_named(saved):
    change(saved, lambda tensors: tensors.update({KEY: tensors[KEY].T.contiguous()}))
    refused(saved, rf"{KEY} of shape \[4, 12\]; it must be of shape \[12, 4\]")


def test_tensors_of_integers_are_named(saved):
    change(saved, lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int8)}))
    refused(saved, f"{KEY} of dtype I8", TypeError)


def test_unknown_tensors_are_an_error_or_a_warning(saved):
    change(saved, lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 24)}))
    refused(saved, r"holding base_model.model.lm_head.lora_A.weight.*strict=False")
    with pytest.warns(UserWarning, match=r"base_model.model.lm_head.lora_A.weight.*left out"):
        model = pyfastpeft.load_adapter(llama(), saved, strict=False)
    assert torch.equal(logits(model), logits(of_ours_again("lora")))


def of_ours_again(case):
    torch.manual_seed(0)
    return of_ours(case)


def test_tensors_of_the_base_must_be_those_of_the_model(saved):
    key = "base_model.model.model.embed_tokens.weight"
    change(saved, lambda tensors: tensors.update({key: llama().model.embed_tokens.weight.detach()}))
    pyfastpeft.load_adapter(llama(), saved)
    change(saved, lambda tensors: tensors.update({key: tensors[key] + 1}))
    refused(saved, f"holding {key}")


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_files_are_named(saved, cut):
    (saved / TENSORS).write_bytes((saved / TENSORS).read_bytes()[:cut])
    refused(saved, f"{TENSORS} is no whole safetensors file")


def test_pickles_are_not_read(saved):
    tensors = load_file(saved / TENSORS)
    torch.save(tensors, saved / "adapter_model.bin")
    (saved / TENSORS).unlink()
    refused(saved, r"adapter_model.bin is not read", FileNotFoundError)
    torch.save(tensors, saved / TENSORS)
    refused(saved, f"{TENSORS} is no whole safetensors file")


def test_missing_files_and_directories_are_named(saved):
    (saved / CONFIG).unlink()
    refused(saved, f"holds {TENSORS}; it must be a directory with {CONFIG}", FileNotFoundError)
    refused(saved / "nowhere", "nowhere", NotADirectoryError)
    refused(None, "directory is None .*; it must be a path", TypeError)
    with pytest.raises(TypeError, match=r"load_adapter: model is .*; it must be a torch.nn.Module"):
        pyfastpeft.load_adapter(saved, llama())


def test_another_base_model_is_refused_unless_told_otherwise(saved):
    def named():
        model = llama()
        model.config._name_or_path = "here/llama"
        return model

    change_json(saved, base_model_name_or_path="there/llama")
    refused_model = named()
    with pytest.raises(ValueError, match=r"'here/llama'; it must be 'there/llama'.*check_base_model=False"):
        pyfastpeft.load_adapter(refused_model, saved)
    assert not hasattr(refused_model, "pyfastpeft")
    pyfastpeft.load_adapter(refused_model, saved, check_base_model=False)
    change_json(saved, base_model_name_or_path="here/llama/")
    pyfastpeft.load_adapter(named(), saved)
    pyfastpeft.load_adapter(llama(), saved)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'.*LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"r": "4"}, "LoraConfig: r is '4'"),
        ({"r": 0}, "LoraConfig: r is 0"),
        ({"target_modules": 5}, "target_modules is 5"),
        ({"target_modules": ["q_prjo"]}, "q_prjo.*q_proj"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"((": 2}}, r"rank_pattern is '\(\(' .* a regular expression"),
        ({"layers_to_transform": [0], "layers_pattern": "(("}, r"layers_pattern is '\(\(' .* a regular expression"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5"),
        ({"task_type": "COOKING"}, "task_type is 'COOKING'"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"r": 8}, r"lora_A.weight of shape \[4, 24\]; it must be of shape \[8, 24\]"),
    ],
)
def test_fields_that_do_not_fit_are_named(saved, fields, match):
    change_json(saved, **fields)
    refused(saved, match, (ValueError, TypeError))


def test_ranks_that_do_not_fit_are_named(tmp_path):
    pyfastpeft.save_adapter(of_ours("adalora-pruned"), tmp_path)
    pattern = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
    key = "model.layers.0.self_attn.v_proj.lora_E"
    change_json(tmp_path, rank_pattern=pattern | {"model.layers.7.self_attn.v_proj.lora_E": [True] * 4})
    refused(tmp_path, "a rank_pattern for model.layers.7.self_attn.v_proj.lora_E")
    change_json(tmp_path, rank_pattern=pattern | {key: [True] * 4})
    refused(tmp_path, r"v_proj.lora_A of shape \[3, 24\]; it must be of shape \[4, 24\]")
    change_json(tmp_path, rank_pattern=pattern | {key: [True] * 5})
    refused(tmp_path, "of 5 ranks for 'model.layers.0.self_attn.v_proj'")
    change_json(tmp_path, rank_pattern=pattern | {key: [1, 0, 1, 1]})
    refused(tmp_path, "rank_pattern")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "query_key_value"]},
        {"modules_to_save": ["lm_head", "embed_out"]},
        {"exclude_modules": ["query_key_value", "norm"]},
        {"rank_pattern": {"down_proj": 4, "0.*q_proj": 3}, "alpha_pattern": {"query_key_value": 2}},
    ],
    ids=lambda options: "+".join(options),
)
def test_names_of_another_model_are_passed_over_where_the_tensors_fit(options, tmp_path):
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
    stock = peft.get_peft_model(llama(), config)
    randomise(stock)
    stock.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(pyfastpeft.load_adapter(llama(), tmp_path)), logits(stock))
    pyfastpeft.save_adapter(pyfastpeft.load_adapter(llama(), tmp_path), tmp_path)
    torch.testing.assert_close(logits(pyfastpeft.load_adapter(llama(), tmp_path)), logits(stock))
    with pytest.raises(ValueError, match="which means no"):  # what is misspelt is an error here
        pyfastpeft.adapt(llama(), config)


def test_names_that_the_tensors_need_are_not_passed_over(saved):
    change_json(saved, target_modules=["q_proj", "v_prjo"])
    refused(saved, "v_proj.lora_A.weight.*, for which neither the LORA adapter nor the model has a place")
    change_json(saved, target_modules=["q_proj", "v_proj", "k_proj", "query_key_value"])
    refused(saved, "without .*k_proj.lora_A.weight")


def test_fields_of_peft_that_are_not_set_are_passed_over(saved):
    unset = {"eva_config": None, "loftq_config": {}, "qalora_group_size": 16, "megatron_core": "megatron.core"}
    change_json(
        saved, **unset, peft_version="0.99", a_field_of_tomorrow=None, layers_to_transform=[], layers_pattern=[]
    )
    pyfastpeft.load_adapter(llama(), saved)


@pytest.mark.parametrize("init", ["orthogonal", "eva"])
def test_how_pefts_factors_were_drawn_does_not_matter(init, tmp_path):
    options = {"eva_config": peft.EvaConfig()} if init == "eva" else {}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init, **options)
    stock = peft.get_peft_model(llama(), config, low_cpu_mem_usage=init == "eva")
    for key, tensor in (factors := peft.get_peft_model_state_dict(stock)).items():
        factors[key] = torch.randn(tensor.shape)
    peft.set_peft_model_state_dict(stock, factors, low_cpu_mem_usage=init == "eva")
    stock.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(pyfastpeft.load_adapter(llama(), tmp_path)), logits(stock))


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ufffe"])
def test_what_is_no_json_is_named(saved, text):
    (saved / CONFIG).write_bytes(text.encode("utf-16"))
    refused(saved, CONFIG)


def test_a_name_that_the_model_has_is_refused(saved):
    model = of_ours("ia3")
    with pytest.raises(ValueError, match="'default', which the model has"):
        pyfastpeft.load_adapter(model, saved)
    assert list(model.pyfastpeft.configs) == ["default"]


def without(package, directory, code):
    """What `code` prints and complains of in a process that lacks a package."""
    lines = "import sys", f"sys.modules[{package!r}] = None", "import pyfastpeft, torch", code
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, cwd=directory, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, **PIPES)


PIPES = {"capture_output": True, "text": True, "check": False}


def test_files_of_peft_are_read_where_it_is_not_installed(tmp_path):
    torch.manual_seed(3)
    stock = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"], **HALF))
    randomise(stock).save_pretrained(tmp_path)
    x, plain = torch.ones(1, 4), stock.get_base_model()[0].base_layer
    save_file({"weight": plain.weight.detach(), "bias": plain.bias.detach()}, tmp_path / "base.safetensors")
    done = without(
        "peft",
        tmp_path,
        "from safetensors.torch import load_file\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "model[0].load_state_dict(load_file('base.safetensors'))\n"
        "print(pyfastpeft.load_adapter(model, '.')(torch.ones(1, 4)).tolist())",
    )
    assert not done.returncode, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), stock(x).detach())


def test_without_safetensors_the_error_says_so(saved):
    code = "pyfastpeft.load_adapter(torch.nn.Sequential(torch.nn.Linear(4, 4)), '.')"
    done = without("safetensors", saved, code)
    assert done.returncode
    assert "ImportError: adapters are stored as safetensors files: pip install safetensors" in done.stderr


# --- saving that fails -----------------------------------------------------------------------------------------------


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_save_that_fails_leaves_the_old_files_whole(saved, monkeypatch, call, at):
    before, calls, works = contents(saved), [], getattr(os, call)

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == at + 1:
            raise OSError(28, "No space left on device")
        return works(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, fails)
        with pytest.raises(OSError, match="No space left"):
            pyfastpeft.save_adapter(of_ours("ia3"), saved)
    assert len(calls) > at
    assert contents(saved) == before
    pyfastpeft.save_adapter(of_ours("ia3"), saved)
    assert sorted(contents(saved)) == [CONFIG, TENSORS]
    assert contents(saved) != before


def test_a_first_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        pyfastpeft.save_adapter(of_ours("lora"), tmp_path / "new")
    assert contents(tmp_path / "new") == {}


def test_a_model_without_memory_is_refused(saved):
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match=r"model is without memory for base_model.* on the meta device; it must be"):
        pyfastpeft.load_adapter(model, saved)
    assert not hasattr(model, "pyfastpeft")


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match="one of the model's adapters: default"):
        pyfastpeft.save_adapter(of_ours("lora"), tmp_path, "defualt")
    with pytest.raises(ValueError, match="save_adapter: model is a LlamaForCausalLM without adapters"):
        pyfastpeft.save_adapter(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is a .* on meta"):
        pyfastpeft.save_adapter(of_ours("lora").to("meta"), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        pyfastpeft.save_adapter(of_ours("lora"), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_stored_files_are_as_readable_as_any(tmp_path):
    (tmp_path / "any").write_text("")
    pyfastpeft.save_adapter(of_ours("lora"), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


# --- a real adapter --------------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("PYFASTPEFT_DATA", Path(__file__).parents[2] / "shared" / "data"))
MNLI = DATA / "roberta_mnli_lora" / "roberta_base_lora_mnli.bin"


@pytest.mark.skipif(not MNLI.is_file(), reason="needs the LoRA paper's RoBERTa adapter in $PYFASTPEFT_DATA")
def test_a_real_adapter_goes_through_both(tmp_path):
    """That of the LoRA paper's repository: r 8 and alpha 16 on query and value of RoBERTa-base, with the classifier."""
    published = torch.load(MNLI, weights_only=True, map_location="cpu")
    tensors = {f"base_model.model.{key}{'.weight' * ('.lora_' in key)}": tensor for key, tensor in published.items()}
    options = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    peft.LoraConfig(**options, modules_to_save=["classifier", "score"], inference_mode=True).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})

    base = RobertaForSequenceClassification(RobertaConfig(vocab_size=64, num_labels=3)).eval()
    merged = copy.deepcopy(base)
    for path in {key.rpartition(".")[0] for key in published if ".lora_" in key}:
        change = published[f"{path}.lora_B"] @ published[f"{path}.lora_A"]
        merged.get_submodule(path).weight.data += 16 / 8 * change
    merged.load_state_dict({key: tensor for key, tensor in published.items() if ".lora_" not in key}, strict=False)
    expected = logits(merged)

    ours = pyfastpeft.load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    factors = [p for key, p in methods.adapter_parameters(ours, "default").items() if "lora_" in key]
    assert sum(factor.numel() for factor in factors) == 294_912
    pyfastpeft.save_adapter(ours, tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "again" / TENSORS), tensors)
    stock = quietly(peft.PeftModel.from_pretrained, pyfastpeft.unload(ours), tmp_path / "again")
    torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-4)
