"""Batched multi-LoRA (ops.multi_lora), the adapter part alone: Punica's four popularity mixes, and decode batches."""

OP = "multi_lora"


def test_multi_lora(record):
    record()
