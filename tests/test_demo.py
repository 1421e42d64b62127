"""The demo in its short form, end to end; with a given model and given texts; and what it says of misuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")

from transformers import GPT2Config, GPT2LMHeadModel

from demo.__main__ import main
from demo.model import byte_tokenizer
from pyfastpeft.ops import dispatch

ROOT = Path(__file__).parent.parent
SMALL = ("--quick", "--rows", 4, "--length", 32, "--steps", 12)

BROKEN = """
import sys
from pyfastpeft import ops

right = ops.lora_linear
ops.lora_linear = lambda x, W, b, A, B, scaling, p=0.0: right(x, W, b, A, B, 1.05 * scaling, p)
from demo.__main__ import main

sys.exit(main(sys.argv[1:]))
"""


def run(start, *arguments):
    """The finished demo, started by `start`, python's arguments."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, (*start, *SMALL, *arguments))]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def read(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a GPT-2 of 30,000 parameters and its tokenizer, the same without, and texts good and bad."""
    folder = tmp_path_factory.mktemp("given")
    tokenizer = byte_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=160, bos_token_id=256, eos_token_id=256
    )
    for name in ("model", "bare"):
        GPT2LMHeadModel(config).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "model")
    (folder / "numbers.txt").write_text(" ".join(map(str, range(1000))))
    (folder / "letters.txt").write_text("abcdefgh ijklmnop qrstuvwx yz\n" * 60)
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    (folder / "short.txt").write_text("short")
    return folder


def test_the_short_form_on_its_own_model(tmp_path):
    done = run(["-m", "demo"], "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = read(tmp_path)

    assert report["backend"] in dispatch.BACKENDS
    checks = {check["name"]: check for check in report["checks"]}
    assert report["passed"]
    assert all(check["passed"] and check["measured"] <= check["limit"] for check in checks.values())
    for method in ("LoRA", "IA3"):
        assert {f"{method}: {what}" for what in ("fused path", "loss curve", "gradients", "saved and reloaded")} <= set(
            checks
        )
    assert {"mixed batch: as PEFT's", "mixed batch: as one at a time", "LoRA, bfloat16: gradients"} <= set(checks)

    losses = report["base"]["losses"]
    assert losses[-1] < losses[0]
    assert {(found["method"], found["part"]) for found in report["adapters"]} == {
        (method, part) for method in ("LoRA", "IA3") for part in ("asyncio", "email")
    }
    for found in report["adapters"]:
        assert found["held_out_loss"] < found["held_out_loss_before"]
        assert found["steps"] == 12
        folder = tmp_path / found["method"].lower() / found["part"]
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            tmp_path / "base"
        )
        assert (folder / "adapter_model.safetensors").exists()

    assert [(case["method"], case["base_dtype"]) for case in report["training"]] == [
        ("LoRA", "float32"),
        ("IA3", "float32"),
        ("LoRA", "bfloat16"),
    ]
    for case in report["training"]:
        assert set(case["contenders"]) == {"base", "peft", "ours"}
        for found in case["contenders"].values():
            assert 0 < found["seconds"]["p20"] <= found["seconds"]["median"] <= found["seconds"]["p80"]
            assert found["rounds"] >= 3
            assert 0 < found["saved_bytes"] < found["peak_bytes"]
        if case["method"] == "LoRA":
            assert case["contenders"]["ours"]["saved_bytes"] < case["contenders"]["peft"]["saved_bytes"]
    assert report["serving"]["adapters"] == ["__base__", "asyncio", "email"]
    for phase in ("prefill", "decode"):
        found = report["serving"]["phases"][phase]
        assert set(found) == {"base", "peft", "one at a time", "ours"}
        assert all(each["tokens_per_s"] > 0 for each in found.values())

    assert report["headline"] in done.stdout
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 7
    assert "src=" not in page
    assert "<link" not in page


def test_a_given_model_and_texts(given, tmp_path):
    done = run(
        ["-m", "demo"],
        *("--model", given / "model", "--data", given / "numbers.txt", "--data", f"abc={given / 'letters.txt'}"),
        *("--target", "c_attn", "--target", "c_proj", "--rank", 4, "--out", tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = read(tmp_path)
    assert report["base"]["name"] == str(given / "model")
    assert "losses" not in report["base"]
    assert {found["part"] for found in report["adapters"]} == {"numbers", "abc"}
    assert "Conv1D" in done.stdout
    saved = json.loads((tmp_path / "lora" / "abc" / "adapter_config.json").read_text())
    assert saved["r"] == 4
    assert set(saved["target_modules"]) == {"c_attn", "c_proj"}


def test_a_failed_check_fails_the_demo(given, tmp_path):
    data = ("--model", given / "model", "--data", given / "letters.txt")
    done = run(["-c", BROKEN], *data, "--out", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = {check["name"] for check in read(tmp_path)["checks"] if not check["passed"]}
    assert "LoRA: gradients" in failed
    assert not any(name.startswith("IA3") for name in failed)
    assert "checks failed: " in done.stderr
    assert "LoRA: gradients" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "missing.txt"], ["missing.txt", "cannot be read"]),
        (["--data", "latin1.txt"], ["latin1.txt", "UTF-8"]),
        (["--data", "short.txt"], ["'short' has 5 tokens", "at least 2048"]),
        (["--data", "items=letters.txt"], ["'items'", "--data NAME=letters.txt"]),
        (["--data", "letters.txt", "--data", "letters=numbers.txt"], ["'letters' is given twice"]),
        (["--data", "letters.txt", "--length", "8", "--target", "query"], ["--target query", "q_proj", "down_proj"]),
        (["--data", "letters.txt", "--model", "nowhere"], ["--model nowhere"]),
        (["--data", "letters.txt", "--model", "bare"], ["--model bare", "without a tokenizer"]),
        (["--data", "letters.txt", "--model", "model", "--length", "999"], ["--length is 999", "at most 160"]),
    ],
)
def test_misuse(given, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(given)
    assert main([*arguments, "--out", "report"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("demo: error: ")
    assert all(word in error for word in words), error
    assert not Path("report").exists()


@pytest.mark.parametrize("arguments", [["--rank", "0"], ["--rows", "-1"], ["--dropout", "1"], ["--steps", "few"]])
def test_arguments_out_of_range(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert f"argument {arguments[0]}: " in capsys.readouterr().err
