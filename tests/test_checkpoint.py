"""Adapters on disk: PEFT reads what is written here, and what PEFT writes is read here, to the same logits and bytes."""

import copy
import json
import os
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers import RobertaConfig, RobertaForQuestionAnswering, RobertaForSequenceClassification

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
answering = seeded(lambda: RobertaForQuestionAnswering(RobertaConfig(**SMALL)))
t5 = seeded(lambda: T5ForConditionalGeneration(T5Config(
    vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0,
)))  # fmt: skip


def logits(model):
    model = model.eval()
    kind = getattr(model, "config", None) or model.base_model.config
    inputs = {"input_ids": TOKENS}
    if kind.model_type == "t5":
        inputs["decoder_input_ids"] = TOKENS[:, :4]
    with torch.no_grad():
        out = model(**inputs)
    return out.start_logits if hasattr(out, "start_logits") else out.logits


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
    "lora-embedding": (llama, "LoraConfig", {**HALF, "target_modules": ["embed_tokens", "k_proj"]}),
    "lora-tied-embedding": (gpt2, "LoraConfig", {**HALF, "target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "rslora-patterns": (llama, "LoraConfig", {
        **HALF, "target_modules": [*QV, "down_proj"], "use_rslora": True, "lora_dropout": 0.1,
        "rank_pattern": {"v_proj": 2, "0.mlp.down_proj": 5}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
    }),
    "dora": (llama, "LoraConfig", {**HALF, "target_modules": QV, "use_dora": True}),
    "dora-conv1d": (gpt2, "LoraConfig", {**HALF, "target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "lora-bias-all": (roberta, "LoraConfig", {**HALF, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "lora-bias-own": (roberta, "LoraConfig", {
        **HALF, "target_modules": ["query", "value"], "bias": "lora_only", "modules_to_save": ["classifier"],
    }),
    "lora-head": (roberta, "LoraConfig", {**HALF, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "lora-answers": (answering, "LoraConfig", {**HALF, "target_modules": ["query"], "task_type": "QUESTION_ANS"}),
    "lora-modules-to-save": (llama, "LoraConfig", {
        **HALF, "target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"],
    }),
    "lora-encoder-decoder": (t5, "LoraConfig", {**HALF, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "ia3": (llama, "IA3Config", {
        "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"], "task_type": "CAUSAL_LM",
    }),
    "ia3-conv1d": (gpt2, "IA3Config", {
        "target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True,
    }),
    "ia3-head": (roberta, "IA3Config", {
        "target_modules": ["key", "intermediate.dense"], "feedforward_modules": [], "task_type": "SEQ_CLS",
    }),
    "adalora": (llama, "AdaLoraConfig", {
        "target_modules": QV, "init_r": 6, "target_r": 2, "lora_alpha": 20, "total_step": 100, "tinit": 3,
        "task_type": "CAUSAL_LM",
    }),
    "adalora-pruned": (llama, "AdaLoraConfig", {
        "target_modules": ["v_proj"], "init_r": 4, "target_r": 2, "lora_alpha": 20, "total_step": 100,
        "rank_pattern": {
            "model.layers.0.self_attn.v_proj.lora_E": [True, False, True, True],
            "model.layers.1.self_attn.v_proj.lora_E": [False, False, False, False],
        },
    }),
    "prefix": (llama, "PrefixTuningConfig", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    "prefix-projected": (gpt2, "PrefixTuningConfig", {
        "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 10, "task_type": "CAUSAL_LM",
    }),
    "prompt": (llama, "PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    "prompt-encoder-decoder": (t5, "PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM"}),
    "prompt-head": (roberta, "PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}),
}  # fmt: skip
OWN = {
    "bitfit": (roberta, methods.BitFitConfig, {"train_layer_norm": True, "task_type": "SEQ_CLS"}),
    "dylora": (llama, methods.DyLoraConfig, {**HALF, "target_modules": QV, "layers_to_transform": (-1,)}),
    "selective": (gpt2, methods.SelectiveConfig, {"layers_to_transform": [-1]}),
    "houlsby": (roberta, methods.BottleneckConfig, {"bottleneck_size": 5, "layer_norm": True, "scaling": "learned"}),
    "pfeiffer": (llama, methods.BottleneckConfig, {"bottleneck_size": 5, "placement": "pfeiffer"}),
}


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
    make, kind, options = {**CASES, **OWN}[case]
    kind = getattr(methods, kind) if isinstance(kind, str) else kind
    return randomise(pyfastpeft.adapt(make(), kind(**copy.deepcopy(options))))


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
    copies = ("embed_tokens.base_layer.weight", "wte.base_layer.weight", "original_module", "modules_to_save.default")
    needed = {key: tensor for key, tensor in theirs.items() if not any(copied in key for copied in copies)}
    assert_same_tensors(load_file(tmp_path / "ours" / TENSORS), needed)
    assert meaning(tmp_path / "ours") == meaning(tmp_path / "peft") | {
        "target_modules": meaning(tmp_path / "ours").get("target_modules"),
        **dict.fromkeys(["layers_to_transform", "exclude_modules"] if case == "lora-some-layers" else []),
    }


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_was_written_here_to_the_same_logits_and_bytes(case, tmp_path):
    ours = of_ours(case)
    expected = logits(ours)
    pyfastpeft.save_adapter(ours, tmp_path)
    stock = quietly(peft.PeftModel.from_pretrained, CASES[case][0](), tmp_path)
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)
    kept = peft.get_peft_model_state_dict(stock, save_embedding_layers=False)
    kept = {key: tensor for key, tensor in kept.items() if "original_module" not in key and ".default." not in key}
    assert_same_tensors(load_file(tmp_path / TENSORS), kept)


@pytest.mark.parametrize("case", [*CASES, *OWN])
def test_an_adapter_comes_back_as_it_was(case, tmp_path):
    ours = of_ours(case)
    make = {**CASES, **OWN}[case][0]
    plain = logits(make())
    assert not torch.allclose(logits(ours), plain, atol=1e-4)
    pyfastpeft.save_adapter(ours, tmp_path / "first")
    again = pyfastpeft.load_adapter(make(), tmp_path / "first", "again", is_trainable=True)
    assert torch.equal(logits(again), logits(ours)) or case == "adalora-pruned"
    torch.testing.assert_close(logits(again), logits(ours), rtol=1e-5, atol=1e-6)
    trained = methods.adapter_parameters(again, "again")
    assert {id(p) for p in again.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    pyfastpeft.save_adapter(again, tmp_path / "second", "again")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    pyfastpeft.unload(again)
    assert torch.equal(logits(again), plain)
