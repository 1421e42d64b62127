"""How many parameters each method trains, on models of published sizes that have no weights."""

import pytest
import torch
from transformers import GPT2Config, GPT2Model, RobertaConfig, RobertaModel

import pyfastpeft
from pyfastpeft import methods

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
MODELS = {  # model, its layers and its width
    "RoBERTa-base": (lambda: RobertaModel(RobertaConfig(vocab_size=50265), add_pooling_layer=False), 12, 768),
    "RoBERTa-large": (
        lambda: RobertaModel(RobertaConfig(vocab_size=50265, **LARGE), add_pooling_layer=False),
        24,
        1024,
    ),
    "GPT-2 medium": (lambda: GPT2Model(GPT2Config(n_embd=1024, n_layer=24, n_head=16)), 24, 1024),
}


def lora(r, layers, d, gpt2):
    return layers * r * (d + 3 * d if gpt2 else 4 * d)  # GPT-2 has one matrix for q, k and v


def bottleneck(width, places, layers, d):
    return layers * places * (2 * width * d + width + d)


def biases(layers, d, gpt2):
    """Of attention, feed-forward and two LayerNorms a layer; and of the LayerNorm before or after all layers."""
    return layers * (4 * d + 4 * d + d + 2 * d) + d


COUNTS = {  # config, formula of (layers, width, whether it is GPT-2)
    "LoRA": (methods.LoraConfig(r=8), lambda L, d, g: lora(8, L, d, g)),
    "DoRA": (methods.LoraConfig(r=8, use_dora=True), lambda L, d, g: lora(8, L, d, g) + L * (3 * d if g else 2 * d)),
    "AdaLoRA": (
        methods.AdaLoraConfig(init_r=12, target_r=8),
        lambda L, d, g: lora(12, L, d, g) + 12 * L * (1 if g else 2),
    ),
    "DyLoRA": (methods.DyLoraConfig(r=16), lambda L, d, g: lora(16, L, d, g)),
    "IA3": (methods.IA3Config(), lambda L, d, g: L * ((3 * d if g else 2 * d) + 4 * d)),
    "Houlsby": (methods.BottleneckConfig(), lambda L, d, g: bottleneck(64, 2, L, d)),
    "Pfeiffer": (methods.BottleneckConfig(placement="pfeiffer"), lambda L, d, g: bottleneck(64, 1, L, d)),
    "parallel": (methods.BottleneckConfig(placement="parallel"), lambda L, d, g: bottleneck(64, 1, L, d)),
    "prefix": (methods.PrefixTuningConfig(num_virtual_tokens=20), lambda L, d, g: 20 * L * 2 * d),
    "prefix with its MLP": (
        methods.PrefixTuningConfig(num_virtual_tokens=20, prefix_projection=True, encoder_hidden_size=512),
        lambda L, d, g: 20 * d + d * 512 + 512 + (512 + 1) * L * 2 * d,
    ),
    "prompt": (methods.PromptTuningConfig(num_virtual_tokens=20), lambda L, d, g: 20 * d),
    "BitFit": (methods.BitFitConfig(), lambda L, d, g: biases(L, d, g)),
    "BitFit and norms": (
        methods.BitFitConfig(train_layer_norm=True),
        lambda L, d, g: biases(L, d, g) + (2 * L + 1) * d,
    ),
    "top two layers": (
        methods.SelectiveConfig(layers_to_transform=[-2, -1]),
        lambda L, d, g: 2 * (4 * d * d + 8 * d * d) + biases(2, d, g) - d + 2 * 2 * d,
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    make, layers, width = MODELS[request.param]
    with torch.device("meta"):
        made = make()
    return made, request.param, layers, width


def trained(model, config):
    pyfastpeft.adapt(model, config)
    count, _ = methods.count_parameters(model)
    methods.delete_adapter(model, "default")
    return count


@pytest.mark.parametrize("method", COUNTS)
def test_counts_follow_the_formulas(model, method):
    made, name, layers, width = model
    config, formula = COUNTS[method]
    assert trained(made, config) == formula(layers, width, name == "GPT-2 medium")
    assert all(parameter.is_meta for parameter in made.parameters())


def test_published_figures():
    def of(name, config):
        with torch.device("meta"):
            model = MODELS[name][0]()
        count = trained(model, config)
        return count, 100 * count / methods.count_parameters(model)[1]

    assert of("RoBERTa-base", methods.LoraConfig(r=8))[0] == 294_912
    for name in ("RoBERTa-large", "GPT-2 medium"):
        count, percent = of(name, methods.LoraConfig(r=8))
        assert count == 786_432
        assert percent == pytest.approx(0.22, abs=0.005)
        count, percent = of(name, methods.PromptTuningConfig(num_virtual_tokens=20))
        assert count == 20_480
        assert percent == pytest.approx(0.006, abs=0.0005)
        count, percent = of(name, methods.BitFitConfig(train_layer_norm=True))
        assert count == pytest.approx(0.32e6, rel=0.01)
        assert percent == pytest.approx(0.09, abs=0.005)
        count, percent = of(name, methods.BottleneckConfig(bottleneck_size=64))
        assert count == pytest.approx(6e6, rel=0.06)
        assert percent == pytest.approx(2, abs=0.25)
