"""The base layer and an adapter for each token (ops.multi_lora_linear): decode, prefill and training, on a GPU."""

OP = "multi_lora_linear"


def test_multi_lora_linear(record):
    record()
