"""The benchmark of training steps runs, and refuses to time what does not compute what PEFT does."""

import json

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_harness import rows_replaced
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import steps

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_method_is_timed(monkeypatch, tmp_path, capsys):
    path = tmp_path / "steps.json"
    monkeypatch.setattr("sys.argv", ["steps", "--tiny", "--json", str(path)])
    assert steps.main() == 0
    found = json.loads(path.read_text())
    assert [entry["figure"] for entry in found["figures"] if "time over PEFT" in entry["figure"]] == [
        f"{method}: time over PEFT" for method in steps.METHODS
    ]
    assert found["refused"] == []
    printed = capsys.readouterr().out
    for entry in found["figures"]:
        assert entry["rounds"] == 3
        assert entry["p20"] <= entry["median"] <= entry["p80"]
        assert f"| {entry['figure']} |" in printed


@pytest.mark.parametrize(
    ("method", "op", "change", "why"),
    [
        ("LoRA", "lora_backward", lambda args: args[10].mul_(1.01), r"LoRA: the gradient's norm is .*it is .* in PEFT"),
        ("IA3", "ia3_forward", lambda args: args[5].mul_(1.01), "IA3: "),
        ("DoRA", "dora_forward", lambda args: args[9].mul_(1.01), "DoRA: "),
    ],
)
def test_what_is_wrong_is_not_timed(method, op, change, why):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**steps.TINY)).requires_grad_(False)
    ids = torch.randint(steps.TINY["vocab_size"], steps.TINY_BATCH)
    loops = steps.loops(*steps.pair(base, steps.METHODS[method](16)), ids)
    assert steps.agree(method, *loops) <= steps.TOLERANCE

    def wrap(name, function):
        def call(*args):
            function(*args)
            change(args)

        return call if name == op else function

    with rows_replaced(wrap), pytest.raises(steps.Disagreement, match=why):
        steps.agree(method, *loops)
