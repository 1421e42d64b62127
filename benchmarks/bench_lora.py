"""LoRA on a linear layer (ops.lora_linear): forward; forward and backward, without and with dropout."""

OP = "lora_linear"


def test_lora_linear(record):
    record()
