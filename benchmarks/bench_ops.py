"""The suite's one benchmark: conftest.py calls it for every op, case and provider."""


def test_op(record):
    record()
