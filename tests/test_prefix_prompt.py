"""Prefix and prompt tuning: equal to PEFT where PEFT is right, and right where PEFT is not."""

import copy
import functools
import itertools
import pickle
from functools import partial
from threading import Barrier, Thread

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding

from pyfastpeft.layers import PrefixEncoder, PromptEmbedding
from pyfastpeft.methods import (
    BottleneckConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    adapt,
    adapter_parameters,
    delete_adapter,
    disable_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
)
from pyfastpeft.methods.prompt import nearest_words

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

VIRTUAL, VOCABULARY, TOKENS = 4, 99, 12
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDE, "intermediate_size": 64, "num_key_value_heads": 2}
SLIDING = {**GROUPED, "head_dim": 16, "sliding_window": 8}
ENCODER = {**WIDE, "intermediate_size": 64, "max_position_embeddings": 64}
KINDS = ("prefix", "projection", "prompt")
FAMILIES = {
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "gemma2": ("Gemma2", SLIDING),
    "gemma3": ("Gemma3", SLIDING),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPT", {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoX", {**WIDE, "intermediate_size": 64}),
}


def decoder(family, implementation="sdpa", **options):
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}{'Text' * (name == 'Gemma3')}Config")(**{**sizes, **options})
    kind = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    return build(kind, config, implementation)


def build(kind, config, implementation="sdpa"):
    torch.manual_seed(0)
    config._attn_implementation = implementation
    return kind(config).eval()


def bert():
    return build(transformers.BertForSequenceClassification, transformers.BertConfig(**ENCODER))


def roberta():
    return build(transformers.RobertaForSequenceClassification, transformers.RobertaConfig(**ENCODER))


def distilbert():
    sizes = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4}
    return build(transformers.DistilBertForSequenceClassification, transformers.DistilBertConfig(**sizes))


def t5(layers=3, implementation="sdpa"):
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": layers, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    return build(transformers.T5ForConditionalGeneration, config, implementation)


def bart(layers=3, implementation="sdpa", encoder_layers=None, **options):
    sizes = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes |= {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": encoder_layers or layers,
        "decoder_layers": layers,
    }
    config = transformers.BartConfig(**sizes | options, init_std=0.3)
    return build(transformers.BartForConditionalGeneration, config, implementation)


def m2m100(layers=3, implementation="sdpa", name="M2M100", **options):
    side = {"layers": layers, "attention_heads": 4, "ffn_dim": 64, "layerdrop": 0.0}
    sides = {f"{which}_{name}": value for which in ("encoder", "decoder") for name, value in side.items()}
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "init_std": 0.3}
    config = getattr(transformers, f"{name}Config")(**sides, **sizes, **options)
    return build(getattr(transformers, f"{name}ForConditionalGeneration"), config, implementation)


def nllb_moe(layers=3, _=None):  # which has no sdpa
    return m2m100(layers, "eager", "NllbMoe", num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2)


def vit():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return build(transformers.ViTForImageClassification, transformers.ViTConfig(**sizes, image_size=32, patch_size=8))


def with_a_config():
    """Of one's own, with a model of transformers inside, whose config it shows."""
    model = nn.Sequential(vit())
    model.config = model[0].config
    return model


def whisper():
    sides = {"encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_layers": 3, "decoder_layers": 2}
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 8}
    config = transformers.WhisperConfig(**sides, **sizes, pad_token_id=0, init_std=0.3)
    return build(transformers.WhisperForAudioClassification, config)


def wav2vec2():
    sizes = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 4}
    sizes |= {"num_conv_pos_embedding_groups": 2, "intermediate_size": 64, "initializer_range": 0.3}
    config = transformers.Wav2Vec2Config(**WIDE | {"num_hidden_layers": 3}, **sizes)
    return build(transformers.Wav2Vec2ForSequenceClassification, config)


def deepseek():
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    widths = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(**WIDE, **experts, **widths, moe_intermediate_size=16)
    return build(transformers.DeepseekV3ForCausalLM, config)


def peft_config(kind, task):
    if kind == "prompt":
        return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL)
    projection = {"prefix_projection": kind == "projection", "encoder_hidden_size": 24}
    return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL, **projection)


def pair(make, kind, task="CAUSAL_LM"):
    """The same model and seed, adapted by us and by PEFT."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(make(), peft_config(kind, task)).eval()
    torch.manual_seed(1)
    return adapt(make(), peft_config(kind, task)), theirs


def adapted(make, kind, name="default"):
    if kind == "prompt":
        return adapt(make(), PromptTuningConfig(num_virtual_tokens=VIRTUAL), name)
    projection = {"prefix_projection": kind == "projection", "encoder_hidden_size": 24}
    return adapt(make(), PrefixTuningConfig(num_virtual_tokens=VIRTUAL, **projection), name)


def batch(padding=0, rows=3):
    """Ids, and a mask that hides `padding` tokens of the first row: on the left, or, if negative, on the right."""
    ids = torch.randint(3, VOCABULARY, (rows, TOKENS))
    mask = torch.ones_like(ids)
    mask[0, slice(padding) if padding >= 0 else slice(padding, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def part_of(model, name="default"):
    return model.adapters[name]


# --- the same numbers as PEFT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, "llama, eager", "mistral, eager"])
def test_decoders_compute_what_peft_computes(family, kind):
    family, _, implementation = family.partition(", ")
    implementation = "eager" if implementation or family == "gemma2" else "sdpa"  # Gemma 2 has no sdpa
    ours, theirs = pair(lambda: decoder(family, implementation), kind)
    inputs = batch(padding=5)
    out, expected = (model(**inputs, labels=inputs["input_ids"]) for model in (ours, theirs))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], expected.logits[:, -TOKENS:][real])
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.logits.shape == (*inputs["input_ids"].shape, VOCABULARY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [bert, roberta])
def test_encoders_compute_what_peft_computes(make, kind):
    ours, theirs = pair(make, kind, "SEQ_CLS")
    inputs = batch(padding=-4)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    inputs["labels"] = torch.tensor([0, 1, 1])
    out, expected = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [t5, bart, m2m100, nllb_moe])
def test_encoder_decoders_compute_what_peft_computes(make, implementation, kind):
    layers = 3 if implementation == "eager" else 4
    ours, theirs = pair(lambda: make(layers, implementation), kind, "SEQ_2_SEQ_LM")
    inputs = batch(padding=-4)
    labels = torch.randint(2, VOCABULARY, (3, 7))
    out, expected = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss)
    words = ours.generate(**inputs, max_new_tokens=4)
    assert torch.equal(words, theirs.generate(**inputs, max_new_tokens=4))
    assert torch.equal(words, ours.generate(**inputs, max_new_tokens=4, use_cache=False))


@pytest.mark.parametrize("kind", ["UMT5EncoderModel", "UMT5ForTokenClassification"])
def test_encoders_whose_config_tells_of_a_decoder(kind, tmp_path):
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    make = partial(build, getattr(transformers, kind), transformers.UMT5Config(**sizes))
    model, inputs = adapted(make, "prompt"), batch(padding=-4)
    assert model.config.is_encoder_decoder
    assert model(**inputs)[0].shape[:2] == inputs["input_ids"].shape
    assert len(part_of(model).weight) == VIRTUAL
    task = "FEATURE_EXTRACTION" if kind == "UMT5EncoderModel" else "TOKEN_CLS"
    theirs = peft.get_peft_model(make(), peft_config("prompt", task)).eval()
    theirs.save_pretrained(tmp_path)
    output = load_adapter(make(), tmp_path)(**inputs)[0]
    torch.testing.assert_close(output, theirs(**inputs)[0][:, -TOKENS:])
    if kind == "UMT5ForTokenClassification":
        assert model(**inputs, labels=inputs["input_ids"] % 2).loss.isfinite()
    set_adapter(adapt(model, PrefixTuningConfig(num_virtual_tokens=VIRTUAL), "prefix"), "prefix")
    model(**inputs)[0].square().sum().backward()
    assert all(row.grad.any() for row in part_of(model, "prefix").rows)


@pytest.mark.parametrize("make", [whisper, wav2vec2])
def test_encoders_of_audio(make, monkeypatch):
    """Their frames stay where they are; Whisper has positions for no more, and its config tells of a decoder, too."""
    model, frames = make(), torch.randn(2, 8, 16) if make is whisper else torch.randn(2, 60)
    plain = model(frames).logits
    adapt(model, PrefixTuningConfig(num_virtual_tokens=VIRTUAL))
    output = model(frames).logits
    assert not torch.allclose(output, plain, atol=1e-3)
    output.sum().backward()
    rows = part_of(model).rows
    assert len(rows) == 3
    assert all(row.grad.any() for row in rows)

    def attention(self, hidden_states, *_, **__):
        prefix = next(remaining).view(VIRTUAL, 2, 32).expand(2, -1, -1, -1).unbind(2)
        key, value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        key, value = (torch.cat(pair, 1).unflatten(2, (4, 8)) for pair in zip(prefix, (key, value)))
        query = self.q_proj(hidden_states).unflatten(2, (4, 8))
        weights = (torch.einsum("bthd,bshd->bhts", query, key) / 8**0.5).softmax(-1)
        return self.out_proj(torch.einsum("bhts,bshd->bthd", weights, value).flatten(2)), None

    remaining = iter(list(rows))
    layer = next(module for module in model.modules() if hasattr(module, "q_proj"))
    monkeypatch.setattr(type(layer), "forward", attention)
    with disable_adapter(model):
        torch.testing.assert_close(model(frames).logits, output)


class Positions(M2M100SinusoidalPositionalEmbedding):
    """With the argument's name since transformers 5.24."""

    def forward(self, input_ids=None, inputs_embeds=None, cache_length=0):
        return super().forward(input_ids, inputs_embeds, cache_length)


@pytest.mark.parametrize("kind", [M2M100SinusoidalPositionalEmbedding, Positions])
def test_positions_that_a_model_counts_itself(kind):
    """M2M100's, of inputs_embeds and of ids with padding."""
    base, inputs = m2m100(), batch()
    base.get_decoder().embed_positions.__class__ = kind
    model = adapted(lambda: base, "prefix")
    ids, decoder = inputs["input_ids"], model.get_decoder()
    expected = model(**inputs, decoder_input_ids=ids).logits
    words = decoder.embed_tokens(ids)
    torch.testing.assert_close(model(**inputs, decoder_inputs_embeds=words).logits, expected)
    ids[0, :3] = model.config.pad_token_id
    shifted = decoder.embed_positions(ids), decoder.embed_positions(ids, None, 2)
    with disable_adapter(model):
        plain = [decoder.embed_positions(ids, None, past) for past in (VIRTUAL, VIRTUAL + 2)]
    assert all(map(torch.equal, shifted, plain))


def test_a_decoder_of_another_depth_than_the_encoder():
    model = adapted(lambda: bart(3, encoder_layers=2, decoder_attention_heads=2), "prefix")
    assert len(part_of(model).rows) == 3
    assert (part_of(model).num_heads, part_of(model).head_dim) == (2, 16)
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert part_of(model).rows[0].grad.abs().max() > 0


def test_attention_that_is_narrower_than_the_model():
    sizes = {"embedding_size": 16, "intra_bottleneck_size": 16, "initializer_range": 0.1}
    make = partial(
        build, transformers.MobileBertForSequenceClassification, transformers.MobileBertConfig(**ENCODER, **sizes)
    )
    model, inputs = adapted(make, "prefix"), batch(padding=-4)
    assert (part_of(model).num_heads, part_of(model).head_dim) == (4, 4)
    output = model(**inputs).logits
    output.sum().backward()
    assert all(row.grad.any() for row in part_of(model).rows)
    with disable_adapter(model):
        assert not torch.allclose(model(**inputs).logits, output, atol=1e-3)


@pytest.mark.parametrize("kind", ["prefix", "projection"])
def test_rows_that_peft_counts_by_a_deeper_encoder(kind, tmp_path):
    make = partial(bart, 2, encoder_layers=5)
    theirs = peft.get_peft_model(make(), peft_config(kind, "SEQ_2_SEQ_LM")).eval()
    theirs.save_pretrained(tmp_path)
    ours, inputs = load_adapter(make(), tmp_path), batch(padding=-4)
    inputs["decoder_input_ids"] = inputs["input_ids"]
    expected = theirs(**inputs).logits
    assert len(part_of(ours).rows) == 5
    torch.testing.assert_close(ours(**inputs).logits, expected)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**inputs).logits, expected)
    torch.testing.assert_close(load_adapter(make(), tmp_path / "ours")(**inputs).logits, expected)
    with pytest.raises(ValueError, match="num_layers is 1"):
        adapt(make(), PrefixTuningConfig(num_layers=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [t5, bart])
def test_encoder_decoders_without_a_head_have_one_set_of_rows(make, kind, tmp_path):
    """PEFT's prefix is right but for its cache, in which a layer that reads the encoder finds the decoder's tokens."""
    kind_of_model = transformers.T5Model if make is t5 else transformers.BartModel
    bare = partial(build, kind_of_model, make().config)
    ours, theirs = pair(bare, kind, "FEATURE_EXTRACTION")
    inputs = batch(padding=-4 if kind == "prompt" else 0)
    inputs["decoder_input_ids"] = inputs["input_ids"]
    assert part_of(ours).prompt_embeddings().shape == theirs.get_prompt_embedding_to_save("default").shape
    if kind != "prompt":
        rows, cache = theirs.get_prompt, transformers.EncoderDecoderCache
        theirs.get_prompt = lambda *args: cache(rows(*args), transformers.DynamicCache())
    expected = theirs(**inputs)[0]
    torch.testing.assert_close(ours(**inputs)[0], expected)
    ours(**inputs)[0].square().sum().backward()
    assert all(p.grad.abs().amax() > 0 for p in adapter_parameters(ours, "default").values())
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(load_adapter(bare(), tmp_path)(**inputs)[0], expected)
    save_adapter(ours, tmp_path / "ours")
    config = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert (config.num_transformer_submodules, config.task_type) == (1, "FEATURE_EXTRACTION")
    assert len(part_of(adapted(bare, kind)).prompt_embeddings()) == VIRTUAL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_curve_is_pefts(family, kind):
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    ours, theirs = pair(lambda: decoder(family, initializer_range=0.3, **options), kind)
    curves = []
    for model in (ours, theirs):
        trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.003 if kind == "projection" else 0.05)
        torch.manual_seed(2)
        steps = [batch(rows=2) for _ in range(50)]
        curve = []
        for inputs in steps:
            inputs["input_ids"] %= 7  # something to learn
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    assert curves[1][-10:].mean() < 0.97 * curves[1][:10].mean()
    torch.testing.assert_close(*curves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda: decoder("llama"), t5], ids=["llama", "t5"])
def test_rows_go_to_peft_and_back(make, kind):
    ours, theirs = pair(make, kind, "CAUSAL_LM" if make is not t5 else "SEQ_2_SEQ_LM")
    stored = peft.get_peft_model_state_dict(theirs)["prompt_embeddings"]
    assert torch.equal(part_of(ours).prompt_embeddings(), stored)

    config = peft_config(kind, "CAUSAL_LM" if make is not t5 else "SEQ_2_SEQ_LM")
    config.inference_mode = True
    loaded = adapt(make(), config)
    part_of(loaded).load_prompt_embeddings(stored)
    inputs = batch(padding=0)
    if make is t5:
        inputs["labels"] = inputs["input_ids"]
    torch.testing.assert_close(loaded(**inputs).logits, ours(**inputs).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert getattr(part_of(loaded), "projected", False) is False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda: decoder("gpt2"), t5], ids=["gpt2", "t5"])
def test_without_a_task_peft_runs_what_it_reads(make, kind, tmp_path):
    """PEFT passes over the virtual tokens of a file without a task."""
    model, inputs = adapt(make(), peft_config(kind, None)), batch(padding=0)
    if make is t5:
        inputs["labels"] = inputs["input_ids"]
    for parameter in adapter_parameters(model, "default").values():
        parameter.data.add_(torch.randn_like(parameter))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    virtual = VIRTUAL if kind == "prompt" and make is not t5 else 0
    torch.testing.assert_close(model.eval()(**inputs).logits, theirs.eval()(**inputs).logits[:, virtual:])


def test_sizes_of_the_config_are_pefts():
    for kind in KINDS:
        ours, theirs = pair(lambda: decoder("llama"), kind)
        mine, peers = ours.pyfastpeft.configs["default"], theirs.peft_config["default"]
        names = ["token_dim", "num_transformer_submodules", "num_layers", "num_attention_heads"]
        names += ["encoder_hidden_size"] if kind != "prompt" else []
        assert [getattr(mine, name) for name in names] == [getattr(peers, name) for name in names]
        trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
        assert trained == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


SIDES = {f"num_{which}_{what}": 2 for which in ("encoder", "decoder") for what in ("layers", "attention_heads")}
UNKNOWN = {  # to PEFT, which does not find how many layers or heads these have
    "ProphetNetForConditionalGeneration": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.3,
        **SIDES,
    },
    "T5GemmaForConditionalGeneration": {which: {**GROUPED, "head_dim": 8} for which in ("encoder", "decoder")},
    "MambaForCausalLM": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_prompts_of_models_whose_sizes_peft_does_not_find(name, tmp_path):
    kind = getattr(transformers, name)
    make = partial(build, kind, kind.config_class(**UNKNOWN[name]), "eager")
    task, inputs = "CAUSAL_LM" if kind is transformers.MambaForCausalLM else "SEQ_2_SEQ_LM", batch()
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    plain = make()(**inputs).logits
    with pytest.raises(ValueError, match="Please specify `num_"):
        peft.get_peft_model(make(), peft_config("prompt", task))
    ours = adapted(make, "prompt")
    output = ours(**inputs).logits
    assert not torch.allclose(output, plain, atol=1e-3)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(theirs(**inputs).logits[:, -TOKENS:], output)


def test_zero_init_is_pefts():
    config = {"num_virtual_tokens": VIRTUAL, "prefix_projection": True, "init_weights": "zero"}
    ours = adapt(decoder("llama"), PrefixTuningConfig(**config))
    assert part_of(ours).prompt_embeddings().abs().max() == 0
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", **config)
    inputs = batch()
    torch.testing.assert_close(ours(**inputs).logits, peft.get_peft_model(decoder("llama"), config)(**inputs).logits)


@pytest.mark.parametrize("init", ["TEXT", "SAMPLE_VOCAB"])
@pytest.mark.parametrize("virtual", [3, 8])
def test_prompt_starts_from_words_as_pefts(tmp_path, init, virtual):
    words = {word: i for i, word in enumerate(["classify", "this", "review", ":", "good", "or", "bad"])}
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="or"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    given = {"task_type": "CAUSAL_LM", "num_virtual_tokens": virtual, "prompt_tuning_init": init}
    if init == "TEXT":
        given |= {"prompt_tuning_init_text": "classify this review : good", "tokenizer_name_or_path": str(tmp_path)}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(decoder("llama"), peft.PromptTuningConfig(**given))
    torch.manual_seed(1)
    ours = adapt(decoder("llama"), PromptTuningConfig(**given))
    assert torch.equal(part_of(ours).weight, peft.get_peft_model_state_dict(theirs)["prompt_embeddings"])
    save_adapter(ours, tmp_path / "stored")
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    again = load_adapter(decoder("llama"), tmp_path / "stored", is_trainable=True)
    assert torch.equal(part_of(again).weight, part_of(ours).weight)
    assert part_of(again).weight.requires_grad


# --- generation ------------------------------------------------------------------------------------------------------

GENERATION = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_generation_needs_no_cache_and_sees_no_padding(family, kind):
    ours, theirs = pair(lambda: decoder(family), kind)
    inputs = batch(padding=5)
    words = ours.generate(**inputs, **GENERATION)
    assert torch.equal(words, ours.generate(**inputs, **GENERATION, use_cache=False))
    assert torch.equal(words[1:], theirs.generate(**inputs, **GENERATION)[1:])
    beams = ours.generate(**inputs, **GENERATION, num_beams=3)
    assert torch.equal(beams, ours.generate(**inputs, **GENERATION, num_beams=3, use_cache=False))
    if not (kind == "prompt" and family == "gemma3"):  # whose window counts the padding after the prompt
        alone = inputs["input_ids"][:1, 5:]
        assert torch.equal(words[0, 5:], ours.generate(alone, **GENERATION)[0])
        assert torch.equal(words[0, 5:], theirs.generate(input_ids=alone, **GENERATION)[0])


def test_positions_that_begin_at_one():
    """PaliGemma's, in generation: a gap before them would be an offset, and without a cache the end of a text."""
    text = transformers.GemmaConfig(**GROUPED, head_dim=8, initializer_range=0.3)
    vision = transformers.SiglipVisionConfig(hidden_size=32, intermediate_size=64, image_size=16, patch_size=8,
        num_hidden_layers=1, num_attention_heads=4)  # fmt: skip
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_id=VOCABULARY - 1)
    make = partial(build, transformers.PaliGemmaForConditionalGeneration, config)
    ours, theirs = pair(make, "prompt")
    inputs, options = batch(), {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    logits = torch.stack(ours.generate(**inputs, **options).logits)
    torch.testing.assert_close(logits[0], ours(**inputs).logits[:, -1])
    torch.testing.assert_close(logits, torch.stack(theirs.generate(**inputs, **options).logits))
    torch.testing.assert_close(logits, torch.stack(ours.generate(**inputs, **options, use_cache=False).logits))


def test_cached_logits_are_the_uncached_ones():
    for kind in KINDS:
        model = adapted(lambda: decoder("llama"), kind)
        ids = batch()["input_ids"]
        first = model(ids[:, :7], use_cache=True)
        rest = model(ids[:, 7:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), model(ids).logits)


class Llama(transformers.LlamaForCausalLM):
    """With the argument's name since transformers 5.24."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, **others):
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        return super().forward(input_ids, past_key_values=cache, **given, **others)


def test_a_cache_by_its_newer_name():
    model = adapted(lambda: build(Llama, transformers.LlamaConfig(**GROUPED)), "prompt")
    ids, cache = batch()["input_ids"], transformers.DynamicCache(config=model.config)
    first, rest = model(ids[:, :7], cache=cache), model(ids[:, 7:], cache=cache)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), model(ids).logits)
    with pytest.raises(ValueError, match=r"cache is StaticCache.*a cache that grows"):
        model(ids, cache=transformers.StaticCache(config=model.config, max_cache_len=32))


STATES = {
    "Mamba": {**WIDE, "state_size": 4},
    "RecurrentGemma": {**GROUPED, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "head_dim": 8},
    "FalconH1": {**GROUPED, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4},
}


@pytest.mark.parametrize("family", STATES)
def test_a_cache_of_states_holds_the_prompt(family):
    """Mamba's counts no tokens; nor did others' in transformers 4."""
    config = getattr(transformers, f"{family}Config")(**STATES[family], initializer_range=0.5)
    model = adapted(lambda: build(getattr(transformers, f"{family}ForCausalLM"), config, "eager"), "prompt")
    inputs = batch()
    words = model.generate(**inputs, **GENERATION, eos_token_id=None)
    assert torch.equal(words, model.generate(**inputs, **GENERATION, eos_token_id=None, use_cache=False))


def test_static_cache():
    model = adapted(lambda: decoder("llama"), "projection")
    inputs = batch(padding=5)
    options = {**GENERATION, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **GENERATION))
    with pytest.raises(ValueError, match=r"(past_key_values|cache) is StaticCache.*a cache that grows"):
        adapted(lambda: decoder("llama"), "prompt").generate(**inputs, **options)


# --- training --------------------------------------------------------------------------------------------------------


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {path: parameter.grad.clone() for path, parameter in adapter_parameters(model, "default").items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(kind, use_reentrant):
    model = adapted(lambda: decoder("llama"), kind).train()
    inputs = batch(padding=5)
    expected = gradients(model, inputs)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again = gradients(model, inputs)
    for path, gradient in expected.items():
        torch.testing.assert_close(again[path], gradient, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_pefts(kind):
    ours, theirs = pair(lambda: decoder("llama"), kind)
    inputs = batch(padding=0)
    exact = ours(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(**inputs).logits, theirs(**inputs).logits[:, -TOKENS:]
    own = (expected.float() - exact).norm()
    assert own > 0
    assert (out.float() - exact).norm() <= 1.1 * own + 1e-3


def test_the_mask_of_a_window_in_float64():
    model = adapted(lambda: decoder("gemma2", "eager").double(), "prefix")
    inputs, narrow = batch(), copy.deepcopy(model).float()
    torch.testing.assert_close(model(**inputs).logits.float(), narrow(**inputs).logits)


def test_sixteen_bit_models_have_wide_adapters():
    for kind in KINDS:
        model = adapted(lambda: decoder("llama").bfloat16(), kind)
        assert {p.dtype for p in adapter_parameters(model, "default").values()} == {torch.float32}
        assert model(**batch()).logits.dtype == torch.bfloat16
        assert all(gradient.abs().max() > 0 for gradient in gradients(model, batch()).values())


@pytest.mark.parametrize("kind", ["projection", "prompt"])
def test_forward_compiles_as_one_graph(kind):
    model = adapted(lambda: decoder("llama", num_hidden_layers=1), kind)
    inputs = batch(padding=5)
    torch._dynamo.reset()
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(out.logits, model(**inputs).logits)
    out.loss.backward()
    got = {path: p.grad.clone() for path, p in adapter_parameters(model, "default").items()}
    for path, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(got[path], gradient)


def test_a_layers_mlp_runs_once_a_pass_on_the_virtual_tokens_alone():
    model = adapted(lambda: decoder("llama"), "projection")
    rows = []
    for head in part_of(model).heads:
        head.register_forward_hook(lambda head, args, out: rows.append(tuple(out.shape)))
    model(**batch(rows=5))
    assert rows == [(VIRTUAL, 2 * 16)] * 2


def test_kept_rows_follow_the_parameters():
    model = adapted(lambda: decoder("llama"), "projection")
    encoder, inputs = part_of(model), batch()
    fresh = lambda: model(**inputs).logits.detach()  # noqa: E731 -- with gradients nothing is kept
    with torch.no_grad():
        model(**inputs)
        encoder.hidden.bias.add_(0.5)
        torch.testing.assert_close(model(**inputs).logits, model.train()(**inputs).logits)
        model.eval()(**inputs)
        encoder.heads[1].weight = nn.Parameter(torch.randn_like(encoder.heads[1].weight))
        kept = model(**inputs).logits
    torch.testing.assert_close(kept, fresh())
    with torch.no_grad():
        encoder.load_state_dict({key: value + 0.1 for key, value in encoder.state_dict().items()})
        kept = model(**inputs).logits
    torch.testing.assert_close(kept, fresh())


def test_rows_that_were_kept_are_not_copied():
    encoder = copy.deepcopy(PrefixEncoder(VIRTUAL, 2, 2, 4, 5).eval())  # so that all versions are equal
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
        encoder(0)
        twin = copy.deepcopy(encoder)
        for parameter in twin.parameters():
            parameter.add_(1)  # which makes its versions those of the rows that were kept
        kept = twin(0)
    torch.testing.assert_close(kept, twin(0))


def test_training_resumes_with_the_mlp():
    def train(model, optimizer, steps):
        for inputs in steps:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    make = lambda: adapted(lambda: decoder("llama"), "projection").train()  # noqa: E731
    model, steps = make(), [batch() for _ in range(6)]
    optimizer = torch.optim.AdamW(adapter_parameters(model, "default").values(), lr=0.01)
    train(model, optimizer, steps[:3])
    states = copy.deepcopy((part_of(model).state_dict(), optimizer.state_dict()))
    train(model, optimizer, steps[3:])
    resumed = make()
    part_of(resumed).load_state_dict(states[0])
    optimizer = torch.optim.AdamW(adapter_parameters(resumed, "default").values(), lr=0.01)
    optimizer.load_state_dict(states[1])
    train(resumed, optimizer, steps[3:])
    assert torch.equal(part_of(resumed).prompt_embeddings(), part_of(model).prompt_embeddings())


def test_bake_keeps_the_rows():
    model = adapted(lambda: decoder("llama"), "projection")
    inputs = batch()
    before = model(**inputs).logits
    part_of(model).bake()
    assert set(adapter_parameters(model, "default")) == {"rows.0", "rows.1"}
    torch.testing.assert_close(model(**inputs).logits, before)
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, inputs).values())


# --- several adapters, copies, removal -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_two_active_ones_are_one_longer_one(kind):
    two, one = adapted(lambda: decoder("gpt2"), kind, "a"), decoder("gpt2")
    config = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}[kind]
    adapt(two, config(num_virtual_tokens=3), "b")
    adapt(one, config(num_virtual_tokens=VIRTUAL + 3))
    rows = [part_of(two, name).prompt_embeddings() for name in ("b", "a")]
    part_of(one).load_prompt_embeddings(torch.cat(rows))
    inputs = batch(padding=5)
    set_adapter(two, "b", "a")
    torch.testing.assert_close(two(**inputs).logits, one(**inputs).logits)
    assert torch.equal(two.generate(**inputs, **GENERATION), one.generate(**inputs, **GENERATION))
    set_adapter(two, "a", "b")
    assert not torch.allclose(two(**inputs).logits, one(**inputs).logits)


def test_prefix_and_prompt_together():
    """The same as the prompt's embeddings given by hand to a model with the prefix alone."""
    model = adapted(lambda: decoder("llama"), "prefix", "a")
    adapt(model, PromptTuningConfig(num_virtual_tokens=3), "b")
    ids = batch()["input_ids"]
    words = torch.cat([part_of(model, "b")().expand(3, -1, -1), model.get_input_embeddings()(ids)], 1)
    set_adapter(model, "a")
    expected = model(inputs_embeds=words).logits[:, 3:]
    set_adapter(model, "a", "b")
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda: decoder("llama"), t5, vit, distilbert], ids=["llama", "t5", "vit", "distil"])
def test_removal_leaves_nothing(make, kind):
    if make is vit and kind == "prompt":
        pytest.skip("a ViT has no words")
    plain = make()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)} if make is vit else batch(padding=-3)
    if make is t5:
        inputs["labels"] = inputs["input_ids"]
    plain.requires_grad_(False)  # sdpa's kernel depends on it
    expected = plain(**inputs).logits
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in plain.modules()]
    before = {path: (type(module), dict(module.__dict__).keys()) for path, module in plain.named_modules()}
    configs = {path: module.config for path, module in plain.named_modules() if hasattr(module, "config")}
    config = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
    model = adapt(plain, config(num_virtual_tokens=VIRTUAL), "a")
    adapt(model, config(num_virtual_tokens=VIRTUAL), "b")
    changed = model(**inputs).logits
    assert changed.shape == expected.shape
    assert (changed - expected).abs().max() > 1e-4
    with disable_adapter(model):
        assert torch.equal(model(**inputs).logits, expected)
    delete_adapter(model, "a")
    torch.testing.assert_close(model(**inputs).logits, changed)
    delete_adapter(model, "b")
    assert torch.equal(model(**inputs).logits, expected)
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert before == {path: (type(module), dict(module.__dict__).keys()) for path, module in model.named_modules()}
    assert all(model.get_submodule(path).config is config for path, config in configs.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda: decoder("llama"), t5], ids=["llama", "t5"])
def test_copies_are_independent(make, kind):
    model = adapted(make, kind)
    inputs = batch()
    if make is t5:
        inputs["labels"] = inputs["input_ids"]
    expected = model(**inputs).logits
    double = copy.deepcopy(model)
    assert torch.equal(double(**inputs).logits, expected)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "default").values():
            parameter.add_(0.3)
    assert torch.equal(double(**inputs).logits, expected)
    assert not torch.equal(model(**inputs).logits, expected)
    delete_adapter(model, "default")
    assert torch.equal(double(**inputs).logits, expected)
    delete_adapter(double, "default")
    assert torch.equal(double(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("make", [lambda: decoder("llama"), t5], ids=["llama", "t5"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_pickle_and_other_methods(make, kind):
    model = adapt(make(), BottleneckConfig(init_weights=False), "first")
    adapted(lambda: model, kind, "virtual")
    adapt(model, BottleneckConfig(init_weights=False, bottleneck_size=3), "last")
    inputs = batch()
    if make is t5:
        inputs["labels"] = inputs["input_ids"]
    logits = {}
    for names in (("first", "virtual", "last"), ("virtual",), ("first", "last"), ("last",)):
        set_adapter(model, *names)
        logits[names] = model(**inputs).logits
        assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, logits[names])
    assert all((one - other).abs().max() > 1e-4 for one, other in itertools.combinations(logits.values(), 2))
    delete_adapter(model, "first")
    set_adapter(model, "virtual")
    torch.testing.assert_close(model(**inputs).logits, logits["virtual",])
    delete_adapter(model, "virtual")
    set_adapter(model, "last")
    torch.testing.assert_close(model(**inputs).logits, logits["last",])


def test_pickles_are_read_where_nothing_was_adapted(monkeypatch):
    model, inputs = adapted(t5, "prefix"), {**batch(), "labels": batch()["input_ids"]}
    logits, pickled = model(**inputs).logits, pickle.dumps(model)
    del model
    monkeypatch.delitem(transformers.AttentionInterface._global_mapping, "pyfastpeft_prefix")
    assert torch.equal(pickle.loads(pickled)(**inputs).logits, logits)


def test_models_that_share_a_config_do_not_share_a_prefix():
    config = transformers.LlamaConfig(**GROUPED)
    one, other = (build(transformers.LlamaForCausalLM, config) for _ in range(2))
    inputs = batch()
    expected = other(**inputs).logits
    adapt(one, PrefixTuningConfig(num_virtual_tokens=VIRTUAL))
    assert torch.equal(other(**inputs).logits, expected)
    assert not torch.equal(one(**inputs).logits, expected)
    assert config._attn_implementation == "sdpa"


def test_implementation_can_change_afterwards():
    model = adapted(lambda: decoder("llama"), "prefix")
    inputs = batch(padding=5)
    expected = model(**inputs).logits
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True)
    torch.testing.assert_close(out.logits, expected)
    assert out.attentions[0].shape == (3, 4, TOKENS, VIRTUAL + TOKENS)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_flash_attention(family):
    """Its masks are [B, K], it is causal up to the last key, and it knows windows; it reads the module's own config."""
    seen = []

    def flash(module, query, key, value, attention_mask, sliding_window=None, **options):
        seen.append(module.config._attn_implementation)
        tokens, keys = query.shape[2], key.shape[2]
        distance = torch.arange(keys - tokens, keys)[:, None] - torch.arange(keys)
        mask = (distance >= 0) & (distance < (sliding_window or keys))
        mask = mask if attention_mask is None else mask & attention_mask[:, None, None].bool()
        mask = mask.expand(query.shape[0], 1, tokens, keys)
        sdpa = transformers.integrations.sdpa_attention.sdpa_attention_forward
        return sdpa(module, query, key, value, mask, scaling=options["scaling"])

    transformers.AttentionInterface.register("flash_of_this_test", flash)
    masks = transformers.masking_utils.flash_attention_mask
    transformers.AttentionMaskInterface.register("flash_of_this_test", masks)
    model = adapted(lambda: decoder(family), "prefix")
    for inputs in (batch(), batch(padding=-4)):
        expected = model(**inputs).logits
        model.config._attn_implementation = "flash_of_this_test"
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**inputs).logits[real], expected[real])
        words = model.generate(**batch(), **GENERATION)
        model.config._attn_implementation = "sdpa"
        torch.manual_seed(3)
    assert set(seen) == {"flash_of_this_test"}
    assert words.shape == (3, TOKENS + 7)


# --- what goes in and comes out --------------------------------------------------------------------------------------


def test_states_have_one_row_for_each_token():
    model = adapted(lambda: decoder("llama", "eager"), "prompt")
    out = model(**batch(), output_hidden_states=True, output_attentions=True)
    assert {tuple(state.shape) for state in out.hidden_states} == {(3, TOKENS, 32)}
    assert {tuple(weights.shape) for weights in out.attentions} == {(3, 4, TOKENS, VIRTUAL + TOKENS)}
    base = adapted(lambda: decoder("llama").model, "prompt")
    assert base(**batch()).last_hidden_state.shape == (3, TOKENS, 32)


def test_positions_can_be_given():
    for kind in KINDS:
        model = adapted(lambda: decoder("llama"), kind)
        ids = batch()["input_ids"]
        positions = torch.arange(TOKENS).expand(3, -1)
        torch.testing.assert_close(model(ids, position_ids=positions).logits, model(ids).logits)
        assert not torch.allclose(model(ids, position_ids=2 * positions).logits, model(ids).logits)


def test_some_logits_only():
    model = adapted(lambda: decoder("llama"), "prompt")
    inputs = batch()
    every = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, every[:, -2:])
    torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([1, 5])).logits, every[:, [1, 5]])
    torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([1, -2])).logits, every[:, [1, -2]])
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(model(**inputs, labels=inputs["input_ids"], logits_to_keep=TOKENS).loss, loss)
    shifted = nn.functional.pad(inputs["input_ids"], (0, 1), value=-100)[:, 1:].contiguous()
    expected = nn.functional.cross_entropy(every.flatten(0, 1), shifted.flatten())
    out = model(**inputs, labels=inputs["input_ids"], shift_labels=shifted)
    torch.testing.assert_close(out.loss, expected)
    chosen = torch.rand(3, TOKENS) > 0.5
    torch.testing.assert_close(model(**inputs, logits_to_keep=chosen).logits, every[chosen])


@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_virtual_tokens_the_last_alone_gets_logits(family):
    ours, theirs = pair(lambda: decoder(family, "eager"), "prompt")
    rows = []
    ours.get_output_embeddings().register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    inputs = batch()
    labels = inputs["input_ids"].clone()
    labels[:, 3:5] = -100
    for model in (ours, theirs):
        model(**inputs, labels=labels).loss.backward()
    assert rows == [TOKENS + 1]
    torch.testing.assert_close(ours(**inputs, labels=labels).loss, theirs(**inputs, labels=labels).loss)
    (own,), (peers,) = ([p.grad for p in model.parameters() if p.requires_grad] for model in (ours, theirs))
    torch.testing.assert_close(own, peers)


@pytest.mark.parametrize("make", [bert, distilbert, lambda: decoder("llama"), lambda: decoder("llama").model])
def test_a_forward_that_is_called_itself_is_refused(make):
    """As sentence-transformers calls it, past the hooks."""
    model, inputs = adapted(make, "prompt"), batch()
    expected = model(**inputs)[0]
    with pytest.raises(
        ValueError, match=r"prompt tuning: model is a \w+ whose forward.* is called; it must be called its"
    ):
        model.forward(**inputs)
    torch.testing.assert_close(model(**inputs)[0], expected)
    with disable_adapter(model):
        torch.testing.assert_close(model.forward(**inputs)[0], make()(**inputs)[0])


def test_parts_of_a_prompted_model_run_again_in_a_backward_pass():
    """As checkpoints around them have it."""
    model, inputs = adapted(bert, "prompt"), batch()
    (trained,) = (p for p in model.parameters() if p.requires_grad)
    (expected,) = torch.autograd.grad(model(**inputs)[0].square().sum(), trained)
    model.bert = checkpoint_wrapper(model.bert)
    (gradient,) = torch.autograd.grad(model(**inputs)[0].square().sum(), trained)
    torch.testing.assert_close(gradient, expected)


def test_a_prompted_model_is_called_in_a_call_of_another_thread():
    model, inputs = adapted(bert, "prompt"), batch()
    expected, found = model(**inputs)[0], []
    handle = model.bert.register_forward_hook(lambda *_: None if found else in_a_thread())

    def in_a_thread():
        found.append(None)  # its own call starts no other
        thread = Thread(target=lambda: found.append(model(**inputs)[0]))
        thread.start()
        thread.join()

    torch.testing.assert_close(model(**inputs)[0], expected)
    torch.testing.assert_close(found[1], expected)
    handle.remove()


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_share_a_prompted_model_and_not_its_lengths(compiled):
    """Both are in the model at the same time."""
    model, barrier, results = adapted(lambda: decoder("llama"), "prompt"), Barrier(2, timeout=60), [None, None]
    texts = [torch.randint(3, 61, (2, tokens)) for tokens in (5, 9)]
    expected = [model(ids)[0] for ids in texts]
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager") if compiled else model

    @torch.compiler.disable
    def meet(*_):
        barrier.wait()

    def answer(i):
        results[i] = run(texts[i])[0]

    model.model.register_forward_hook(meet)
    threads = [Thread(target=answer, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize(("make", "inside"), [(t5, "encoder"), (t5, "shared"), (partial(decoder, "llama"), "model")])
def test_a_prompt_enters_a_model_a_part_of_which_is_compiled(make, inside):
    plain, model, inputs = adapted(make, "prompt"), make(), batch()
    setattr(model, inside, torch.compile(getattr(model, inside), backend="eager"))
    adapt(model, PromptTuningConfig(num_virtual_tokens=VIRTUAL))
    part_of(model).load_prompt_embeddings(part_of(plain).prompt_embeddings().detach())
    labels = inputs["input_ids"]
    torch.testing.assert_close(model(**inputs, labels=labels)[1], plain(**inputs, labels=labels)[1])


def test_words_of_an_encoder_are_looked_up_outside_of_a_call():
    model, inputs = adapted(bart, "prompt").eval(), batch()
    ids = inputs.pop("input_ids")
    expected = model(input_ids=ids, decoder_input_ids=ids, **inputs)[0]
    words = model.get_encoder().embed_tokens(ids)
    torch.testing.assert_close(model(inputs_embeds=words, decoder_input_ids=ids, **inputs)[0], expected)


def test_a_forward_set_on_the_model_gets_labels_for_all_tokens():
    """As TRL's, which forms the loss from the hidden states."""

    def forward(self, *args, labels=None, **kwargs):
        states = self.model(*args, **kwargs).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(
            loss=self.loss_function(self.lm_head(states), labels, VOCABULARY)
        )

    model, inputs = adapted(lambda: decoder("llama"), "prompt"), batch()
    inputs["labels"] = inputs["input_ids"]
    expected = model(**inputs).loss
    model.forward = functools.wraps(type(model).forward)(forward).__get__(model)
    torch.testing.assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_answers_are_found_where_they_are(kind):
    inputs = batch(padding=-4)
    tagger = build(transformers.BertForTokenClassification, transformers.BertConfig(**ENCODER))
    adapt(tagger, peft_config(kind, "TOKEN_CLS"))
    labels = torch.randint(2, (3, TOKENS))
    out = tagger(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
    reader = build(transformers.BertForQuestionAnswering, transformers.BertConfig(**ENCODER))
    adapt(reader, peft_config(kind, "QUESTION_ANS"))
    start, end = torch.tensor([2, 3, 0]), torch.tensor([4, 3, 11])
    out = reader(**inputs, start_positions=start, end_positions=end)
    assert out.start_logits.shape == (3, TOKENS)
    assert out.loss.isfinite()
    if kind != "prompt":  # its probabilities are over the virtual tokens, too
        both = [(out.start_logits, start), (out.end_logits, end)]
        expected = sum(nn.functional.cross_entropy(logits, target) for logits, target in both) / 2
        torch.testing.assert_close(out.loss, expected)


# --- nearest words ---------------------------------------------------------------------------------------------------


def test_nearest_words():
    model = adapted(lambda: decoder("llama"), "prompt", "a")
    words = model.get_input_embeddings().weight.detach()
    part_of(model, "a").load_prompt_embeddings(3 * words[[5, 90, 7, 5]] + 1e-4 * torch.randn(4, 32))

    class Tokenizer:
        def decode(self, ids):
            return f"<{ids[0]}>"

    report = nearest_words(model, "a", Tokenizer(), k=2)
    assert [(row.virtual_token, row.token_id, row.word) for row in report[::2]] == [
        (0, 5, "<5>"), (1, 90, "<90>"), (2, 7, "<7>"), (3, 5, "<5>")
    ]  # fmt: skip
    prompt = part_of(model, "a")().detach()
    for row in report:
        word = words[row.token_id]
        assert row.cosine == pytest.approx(torch.cosine_similarity(word, prompt[row.virtual_token], 0).item(), abs=1e-5)
        assert row.distance == pytest.approx((word - prompt[row.virtual_token]).norm().item(), rel=1e-5)
    table = str(report).splitlines()
    assert len(table) == 9
    assert table[0].split() == ["virtual", "token", "token", "id", "word", "cosine", "distance"]
    assert table[3].split()[:3] == ["1", "90", "<90>"]
    with pytest.raises(ValueError, match="nearest_words: name is 'b'"):
        nearest_words(model, "b")
    with pytest.raises(ValueError, match="nearest_words: k is 0"):
        nearest_words(model, "a", k=0)
    with pytest.raises(TypeError, match="nearest_words: tokenizer is 'gpt2'"):
        nearest_words(model, "a", "gpt2")


# --- what cannot be --------------------------------------------------------------------------------------------------


def swin():
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    return transformers.SwinModel(transformers.SwinConfig(**sizes))


def bloom():
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (bloom, "prefix", "bloom.*attention interface"),
        (swin, "prefix", r"a SwinModel with \[2, 2\] heads; .* the same number"),
        (lambda: decoder("gpt2", "eager", reorder_and_upcast_attn=True), "prefix", "reorder_and_upcast_attn"),
        (deepseek, "prefix", r"latent keys and values \(kv_lora_rank 8\)"),
        (vit, "prompt", "embedded words"),
        (wav2vec2, "prompt", "embedded words"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "prefix", "transformers model"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "prompt", "transformers model"),
        (with_a_config, "prompt", "embedded words"),
    ],
)
def test_models_that_cannot_be_adapted_stay_as_they_are(make, kind, words):
    model = make()
    keys = model.state_dict().keys()
    with pytest.raises((TypeError, NotImplementedError), match=words):
        adapted(lambda: model, kind)
    assert model.state_dict().keys() == keys
    assert not hasattr(model, "pyfastpeft")
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_positions_end_somewhere(kind):
    model = adapted(lambda: decoder("gpt2", n_positions=16), kind)
    cache = model(**batch(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="13 tokens after 4 virtual ones"):
        model(torch.ones(1, 13, dtype=torch.long))
    if kind == "prompt":
        with pytest.raises(ValueError, match="13 tokens after 4 virtual ones"):
            model(torch.ones(3, 1, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("more", [0, 2, 6])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_does_not_go_on_from_a_cache_that_holds_a_prompt(family, padding, more):
    """It would leave out as many tokens of the new text as there are virtual ones, or pass some again."""
    model = adapted(lambda: decoder(family), "prompt")
    cache, options = transformers.DynamicCache(config=model.config), {"max_new_tokens": 3, "do_sample": False}
    given = batch(padding, rows=1)
    told = model.generate(**given, past_key_values=cache, **options)
    text = torch.cat([told, told[:, :more]], 1)
    mask = nn.functional.pad(given["attention_mask"], (0, 3 + more), value=1)
    with pytest.raises(ValueError, match=r"(past_key_values|cache) is one of 18 tokens, 4 of them virtual"):
        model.generate(text, attention_mask=mask, past_key_values=cache, **options)


def test_a_mask_that_is_causal_is_not_told_to_be_so_again():
    model = adapted(lambda: decoder("gpt2"), "prefix")
    layer, (keys, values) = model.transformer.h[0].attn, part_of(model)(0)
    query, key, value = torch.randn(3, 2, 4, TOKENS, 8)
    from pyfastpeft.methods.prefix import prefixed_attention

    ours = prefixed_attention(layer, query, key, value, None, is_causal=True)[0].transpose(1, 2)
    rows = [torch.cat([r.expand(2, -1, -1, -1), t], 2) for r, t in ((keys, key), (values, value))]
    seen = torch.nn.functional.pad(torch.ones(TOKENS, TOKENS).tril(), (VIRTUAL, 0), value=1).bool()
    torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(query, *rows, attn_mask=seen))


def test_bad_input():
    model = adapted(lambda: decoder("llama"), "prefix")
    with pytest.raises(ValueError, match=r"num_layers is '2' \(str\); it must be None or 2"):
        adapt(decoder("llama"), PrefixTuningConfig(num_layers="2"))
    with pytest.raises(ValueError, match="num_layers is 7"):
        adapt(decoder("llama"), PrefixTuningConfig(num_layers=7))
    with pytest.raises(ValueError, match="token_dim is 7"):
        adapt(decoder("llama"), PromptTuningConfig(token_dim=7))
    with pytest.raises(TypeError, match="PrefixEncoder"):
        merge_adapter(model)
    model = adapted(lambda: decoder("llama"), "prompt")
    with pytest.raises(ValueError, match="attention_mask"):
        model(batch()["input_ids"], attention_mask=torch.ones(3, 1, TOKENS, TOKENS, dtype=torch.bool))
    with pytest.raises(ValueError, match="return_dict"):
        model(**batch(), return_dict=False)
    for part, shape in ((PrefixEncoder(3, 2, 2, 4), r"\[3, 32\]"), (PromptEmbedding(3, 8), r"\[3, 8\]")):
        with pytest.raises(ValueError, match=shape):
            part.load_prompt_embeddings(torch.zeros(3, 9))
        with pytest.raises(TypeError, match="prompt_embeddings"):
            part.load_prompt_embeddings(torch.zeros(3, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="num_heads is 0"):
        PrefixEncoder(3, 2, 0, 4)
    with pytest.raises(ValueError, match="token_dim is 0"):
        PromptEmbedding(3, 0)


def test_attention_that_takes_no_prefix_is_refused():
    model = adapted(lambda: decoder("llama"), "prefix")
    layer = model.model.layers[0].self_attn
    x = torch.randn(1, 4, TOKENS, 8)
    from pyfastpeft.methods.prefix import prefixed_attention

    # As DeepSeek's, whose keys are wider than its config's head_dim.
    with pytest.raises(
        NotImplementedError, match=r"values are of \[\[2, 6\], \[2, 8\]\].* one .* of \[\[2, 8\], \[2, 8\]\]"
    ):
        prefixed_attention(layer, x[..., :6], x[:, :2, :, :6], x[:, :2], None)
    with pytest.raises(NotImplementedError, match="prefix tuning: attn_implementation is 'sdpa'"):
        prefixed_attention(layer, x, x[:, :2], x[:, :2], object())
