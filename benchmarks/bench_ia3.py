"""IA3 on a linear layer (ops.ia3_linear): scaled input and scaled output; forward; forward and backward."""

OP = "ia3_linear"


def test_ia3_linear(record):
    record()
