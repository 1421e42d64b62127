"""Small random models of every architecture that methods know by itself, and of none, with what each must be given."""

from typing import NamedTuple

import torch
import transformers as tf
from torch import nn

HIDDEN, INNER, VOCABULARY = 32, 48, 61
BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
COMMON = {"hidden_size": HIDDEN, "intermediate_size": INNER, **BLOCKS}
GROUPED = {**COMMON, "num_key_value_heads": 2}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LABELS = {"num_labels": 3}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = (
            nn.Linear(HIDDEN, INNER),
            nn.LayerNorm(INNER),
            nn.Linear(INNER, HIDDEN, bias=False),
        )

    def forward(self, x):
        return x + self.down(torch.tanh(self.norm(self.up(x))))


def llama(**options):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**GROUPED, **NO_TOKENS, **options}))


def gpt2(**options):
    sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32}
    drop = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(**{**sizes, **drop, **NO_TOKENS, **options}))


def opt():
    sizes = {"hidden_size": HIDDEN, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 32}
    return tf.OPTForCausalLM(tf.OPTConfig(**sizes, **BLOCKS, dropout=0.0, bos_token_id=2))


def bart(**options):
    side = {"layers": 2, "attention_heads": 4, "ffn_dim": INNER}
    sides = {f"{which}_{name}": value for which in ("encoder", "decoder") for name, value in side.items()}
    sizes = {"d_model": HIDDEN, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "dropout": 0.0}
    return tf.BartForConditionalGeneration(tf.BartConfig(**sides, **sizes, **options))


def distilbert():
    sizes = {"dim": HIDDEN, "hidden_dim": INNER, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY}
    return tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**sizes, **LABELS))


def t5():
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0))


def vit():
    sizes = {key: value for key, value in COMMON.items() if key != "vocab_size"}
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=16, patch_size=8, **LABELS))


def tree():
    return nn.Sequential(nn.Embedding(VOCABULARY, HIDDEN), Block(), Block(), nn.Linear(HIDDEN, VOCABULARY))


class Known(NamedTuple):
    """What must be found in a model of two blocks: ends of module paths, and numbers of modules."""

    make: object
    lora: tuple[str, ...]  # the usual targets of LoRA
    ia3: tuple[str, ...]  # of IA3, apart from
    feedforward: tuple[str, ...]  # those of which it scales the input
    each: int  # how many modules the usual targets of LoRA are
    scaled: int  # and those of IA3
    linear: int  # "all-linear"
    biased: int  # modules with a bias


LLAMA = ("q_proj", "v_proj"), ("k_proj", "v_proj"), ("mlp.down_proj",), 4, 6, 14
BERT = ("self.query", "self.value"), ("self.key", "self.value"), ("0.output.dense", "1.output.dense"), 4, 6, 14
MODELS = {
    "llama": Known(llama, *LLAMA, 0),
    "mistral": Known(lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED)), *LLAMA, 0),
    "qwen2": Known(lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)), *LLAMA, 6),
    "qwen3": Known(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=8)), *LLAMA, 0),
    "gemma2": Known(lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, head_dim=8)), *LLAMA, 0),
    "gpt2": Known(gpt2, ("attn.c_attn",), ("attn.c_attn",), ("mlp.c_proj",), 2, 4, 8, 13),
    "opt": Known(opt, ("q_proj", "v_proj"), ("k_proj", "v_proj"), ("fc2",), 4, 6, 12, 17),
    "gpt_neox": Known(
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**COMMON)),
        ("query_key_value",), ("query_key_value",), ("dense_4h_to_h",), 2, 4, 8, 13,
    ),
    "bert": Known(lambda: tf.BertForSequenceClassification(tf.BertConfig(**COMMON, **LABELS)), *BERT, 19),
    "roberta": Known(lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**COMMON, **LABELS)), *BERT, 19),
    "distilbert": Known(distilbert, ("q_lin", "v_lin"), ("k_lin", "v_lin"), ("ffn.lin2",), 4, 6, 14, 19),
    "t5": Known(t5, ("Attention.q", "Attention.v"), ("Attention.k", "Attention.v"), ("wo",), 12, 16, 32, 0),
    "bart": Known(bart, ("q_proj", "v_proj"), ("k_proj", "v_proj"), ("fc2",), 12, 16, 32, 44),
    "vit": Known(
        vit, ("attention.q_proj", "attention.v_proj"), ("attention.k_proj", "attention.v_proj"), ("mlp.fc2",),
        4, 6, 13, 19,
    ),
    "tree": Known(tree, (), (), (), 0, 0, 5, 5),
}  # fmt: skip


def inputs(model: nn.Module, batch: int = 2) -> dict[str, torch.Tensor]:
    """What a model's forward is called with: labels, too, except where it is a plain tree."""
    ids = torch.randint(3, VOCABULARY, (batch, 7))
    if isinstance(model, nn.Sequential):
        return {"input": ids}
    if isinstance(model, tf.ViTForImageClassification):
        return {"pixel_values": torch.randn(batch, 3, 16, 16), "labels": torch.arange(batch)}
    per_sequence = "SequenceClassification" in type(model).__name__
    return {"input_ids": ids, "labels": torch.arange(batch) if per_sequence else ids}


@torch.no_grad()  # attention takes another path where a position bias requires a gradient
def output(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(**given)
    return out if isinstance(out, torch.Tensor) else out.logits


def loss(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(**given)
    return out.square().mean() if isinstance(out, torch.Tensor) else out.loss


def randomise(model: nn.Module, std: float = 0.1) -> None:
    """Moves every parameter that trains by random values, all distinct."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
