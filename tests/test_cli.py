import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

import pyfastpeft
from pyfastpeft import cli, methods
from pyfastpeft.ops import dispatch, native, reference, schemas


def doctor(capsys, *options):
    code = cli.main(["doctor", *options])
    return code, capsys.readouterr().out


def break_backend(monkeypatch, backend, function):
    rows = [
        row._replace(function=function) if row.backend == backend else row for row in dispatch.TABLE["lora_forward"]
    ]
    monkeypatch.setitem(dispatch.TABLE, "lora_forward", rows)


def wrong(x, weight, bias, lora_A, lora_B, scaling, *rest):
    reference.lora_forward(x, weight, bias, lora_A, lora_B, 1.001 * scaling, *rest)


def test_doctor_tells_of_every_backend(capsys):
    code, out = doctor(capsys, "--json")
    findings = json.loads(out)
    assert code == 0
    backends = {row["backend"]: row for row in findings["backends"]}
    assert tuple(backends) == dispatch.BACKENDS
    assert sorted(schemas.SCHEMAS) == backends["reference"]["ops"]
    assert backends["cpu"]["available"] == native.AVAILABLE
    assert all(row["available"] or row["why_not"] for row in backends.values())
    checked = {row["backend"]: row for row in findings["checks"]}
    assert checked.keys() == {name for name, row in backends.items() if row["available"]}
    assert all(row["ok"] and 0 < row["error"] < 1e-6 for row in checked.values())


def test_doctor_prints_aligned_tables(capsys, monkeypatch):
    monkeypatch.setenv("PYFASTPEFT_CHECK", "1")
    _, out = doctor(capsys)
    lines = out.splitlines()
    assert pyfastpeft.__version__ in lines[0]
    assert [line.split() for line in lines if line.startswith("PYFASTPEFT_CHECK")] == [["PYFASTPEFT_CHECK", "1"]]
    header = next(line for line in lines if line.startswith("backend") and "dtypes" in line)
    rows = lines[lines.index(header) + 1 :][: len(dispatch.BACKENDS)]
    assert [row.split()[0] for row in rows] == list(dispatch.BACKENDS)
    at = header.index("available")
    assert {row[at:].split()[0] for row in rows} <= {"yes", "no"}


def test_doctor_notices_a_wrong_result(capsys, monkeypatch):
    break_backend(monkeypatch, "reference", wrong)
    code, out = doctor(capsys)
    assert code == 1
    assert "WRONG" in out


def test_doctor_notices_a_backend_that_raises(capsys, monkeypatch):
    def broken(*arguments):
        raise OSError("no such device")

    break_backend(monkeypatch, "reference", broken)
    code, out = doctor(capsys, "--json")
    assert code == 1
    failed = [row for row in json.loads(out)["checks"] if row["backend"] == "reference"]
    assert [row["failure"] for row in failed] == ["OSError: no such device"] * len(failed)
    assert failed


def test_doctor_checks_a_backend_in_a_dtype_that_it_takes(capsys, monkeypatch):
    takes = lambda x, *rest: "" if x.dtype == torch.bfloat16 else "takes bfloat16"  # noqa: E731
    rows = dispatch.TABLE["lora_forward"]
    rows = [row._replace(fits=takes) if row.backend == "reference" else row for row in rows]
    monkeypatch.setitem(dispatch.TABLE, "lora_forward", rows)
    code, out = doctor(capsys, "--json")
    assert code == 0
    found = [row for row in json.loads(out)["checks"] if row["backend"] == "reference"]
    assert {(row["dtype"], row["ok"]) for row in found} == {("bfloat16", True)}


def test_without_a_command_it_prints_help(capsys):
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["surgeon"])
    assert stop.value.code == 2
    assert "surgeon" in capsys.readouterr().err


def test_module_runs_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "pyfastpeft", "doctor", "--json"],
        env=os.environ | {"PYFASTPEFT_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["environment"]["PYFASTPEFT_BACKEND"] == "reference"


# --- adapters --------------------------------------------------------------------------------------------------------

TOKENS = torch.tensor([[5, 17, 42, 8, 23]])
SMALL = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = ["the", "cat", "sat", "on", "mat"]


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=32, vocab_size=61)).eval()


def trained(model, config):
    """An adapted model whose adapter changes what it computes."""
    model = pyfastpeft.adapt(model, config).eval()
    for parameter in methods.adapter_parameters(model, "default").values():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture
def stored(tmp_path):
    """A model in `model` and the adapters of it in other directories; returns the adapted models."""
    base = gpt2()
    base.save_pretrained(tmp_path / "model")
    configs = {
        "lora": methods.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "mlp.c_fc"], rank_pattern={"c_fc": 2}),
        "tied": methods.LoraConfig(r=3, target_modules=["wte"], task_type="CAUSAL_LM"),
        "bitfit": methods.BitFitConfig(train_layer_norm=True),
        "prompt": methods.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "bottleneck": methods.BottleneckConfig(bottleneck_size=5),
    }
    adapted = {}
    for name, config in configs.items():
        model = gpt2()
        model.load_state_dict(base.state_dict())
        adapted[name] = trained(model, config)
        methods.save_adapter(model, tmp_path / name)
    return adapted


def test_inspect_tells_what_is_stored(stored, tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "lora"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    attention, feedforward = 3 * (24 + 72) * 2, 2 * (24 + 96) * 2
    assert found["method"] == "LORA"
    assert found["parameters"] == attention + feedforward
    assert found["bytes"] == {"float32": 4 * (attention + feedforward)}
    assert found["targets"] == [
        {"name": "attn.c_attn", "modules": 2, "ranks": [3], "parameters": attention},
        {"name": "mlp.c_fc", "modules": 2, "ranks": [2], "parameters": feedforward},
    ]
    for name, method in (("bitfit", "BITFIT"), ("prompt", "PROMPT_TUNING"), ("bottleneck", "BOTTLENECK")):
        assert cli.main(["inspect", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        expected = sum(p.numel() for p in methods.adapter_parameters(stored[name], "default").values())
        assert f"method      {method}" in out
        assert f"parameters  {expected:,}\n" in out


def test_inspect_prints_aligned_tables(stored, tmp_path, capsys):
    cli.main(["inspect", str(tmp_path / "lora")])
    facts, rows = (block.splitlines() for block in capsys.readouterr().out.split("\n\n"))
    assert [line.split() for line in facts[1:]] == [
        ["method", "LORA"],
        ["base", "model", "not", "named"],
        ["task", "not", "named"],
        ["parameters", "1,056"],
        ["in", "float32", "4.1", "KiB"],
    ]
    assert [line.split() for line in rows] == [
        ["target", "modules", "ranks", "parameters"],
        ["attn.c_attn", "2", "3", "576"],
        ["mlp.c_fc", "2", "2", "480"],
    ]
    assert len({len(line) for line in rows}) == 1


def test_inspect_reads_methods_that_are_not_here(stored, tmp_path, capsys):
    save_file({"base_model.model.a.lora_A.weight": torch.tensor(1.0)}, tmp_path / "lora" / "adapter_model.safetensors")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LOHA", "base_model_name_or_path": "somebody/model"}))
    assert cli.main(["inspect", str(tmp_path / "lora")]) == 0
    out = capsys.readouterr().out
    assert "LOHA" in out
    assert "somebody/model" in out


@pytest.mark.parametrize("command", ["inspect", "merge", "words"])
def test_paths_that_do_not_fit_are_named(stored, tmp_path, capsys, command):
    def refused(adapter, match, model="model"):
        options = [] if command == "inspect" else ["--model", str(tmp_path / model)]
        if command == "merge":
            options += ["--adapter", str(tmp_path / adapter), "--out", str(tmp_path / "out")]
        else:
            options += [str(tmp_path / adapter)]
        assert cli.main([command, *options]) == 2
        captured = capsys.readouterr()
        assert match in captured.err
        assert not captured.out
        assert not (tmp_path / "out").exists()

    adapter = "prompt" if command == "words" else "lora"
    refused("nowhere", "nowhere")
    refused("model", "adapter_config.json")
    if command != "inspect":
        refused(adapter, "a directory with config.json", model="lora")
    weights = tmp_path / adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    refused(adapter, "no whole safetensors file")
    weights.unlink()
    refused(adapter, "a directory with adapter_model.safetensors")


def merge(tmp_path, adapter, *options, model="model", out="out"):
    paths = "--model", tmp_path / model, "--adapter", tmp_path / adapter, "--out", tmp_path / out
    return cli.main(["merge", *map(str, paths), *options])


@pytest.mark.parametrize("adapter", ["lora", "tied", "bitfit"])
def test_merge_writes_a_plain_model(stored, tmp_path, adapter):
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert merge(tmp_path, adapter) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(merged) is GPT2LMHeadModel
    assert merged.config.tie_word_embeddings == (adapter != "tied")
    torch.testing.assert_close(logits(merged), logits(stored[adapter]), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not list(tmp_path.glob(".merging*"))
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "model").stat().st_mode


def test_merge_refuses_what_the_models_class_would_not_read_again(tmp_path, capsys):
    base = LlamaForCausalLM(LlamaConfig(**SMALL))
    base.save_pretrained(tmp_path / "model")
    methods.save_adapter(trained(base, methods.BitFitConfig(add_missing=True)), tmp_path / "bitfit")
    assert merge(tmp_path, "bitfit") == 2
    assert "merge: adapter is one that adds ['lm_head.bias', " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merge_rounds_once(stored, tmp_path):
    assert merge(tmp_path, "lora", "--dtype", "bfloat16") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    methods.unload(stored["lora"], merge=True)
    exact = stored["lora"].state_dict()
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {torch.bfloat16}
    for key, tensor in merged.state_dict().items():
        assert torch.equal(tensor, exact[key].bfloat16()), key


def test_merge_makes_the_head_that_the_adapter_brings(tmp_path):
    base = RobertaForMaskedLM(RobertaConfig(**SMALL))
    base.save_pretrained(tmp_path / "model")
    classifier = RobertaForSequenceClassification(RobertaConfig(**SMALL, num_labels=5))
    classifier.roberta.load_state_dict(base.roberta.state_dict(), strict=False)
    adapted = trained(classifier, methods.LoraConfig(task_type="SEQ_CLS"))
    methods.save_adapter(adapted, tmp_path / "adapter")
    assert merge(tmp_path, "adapter") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)


def test_merge_overwrites_nothing(stored, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    assert merge(tmp_path, "lora", out="lora") == 2
    assert "where something is" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before
    for name in ("empty", "behind a link"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "behind a link")
    assert merge(tmp_path, "lora", out="empty") == merge(tmp_path, "lora", out="link") == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "behind a link" / "config.json").is_file()


@pytest.mark.parametrize(("adapter", "method"), [("prompt", "PROMPT_TUNING"), ("bottleneck", "BOTTLENECK")])
def test_merge_refuses_methods_that_cannot_be_merged(stored, tmp_path, capsys, adapter, method):
    assert merge(tmp_path, adapter) == 2
    assert f"adapter is of {method}, which cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merge_reads_the_adapters_config_before_the_model(stored, tmp_path, capsys):
    (tmp_path / "model" / "model.safetensors").unlink()
    path = tmp_path / "lora" / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"r": "3"}))
    assert merge(tmp_path, "lora") == 2
    assert "lora/adapter_config.json: LoraConfig: r is '3'" in capsys.readouterr().err


@pytest.mark.parametrize("mapping", ["GPT2LMHeadModel", {"base_model_class": "logging"}, {"base_model_class": ["a"]}])
def test_merge_passes_over_what_names_no_class_of_a_model(stored, tmp_path, mapping):
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": mapping}))
    assert merge(tmp_path, "lora") == 0


def test_merge_that_fails_leaves_nothing(stored, tmp_path, capsys):
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    before = sorted(tmp_path.iterdir())
    assert merge(tmp_path, "lora") == 2
    assert "is without base_model.model.transformer.h" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["merge", "words"])
def test_models_that_do_not_fit_are_named(stored, tmp_path, capsys, command):
    def refused(model, match):
        paths = ["--model", str(tmp_path / model)]
        if command == "merge":
            paths += ["--adapter", str(tmp_path / "lora"), "--out", str(tmp_path / "out")]
        else:
            paths += [str(tmp_path / "prompt")]
        assert cli.main([command, *paths]) == 2
        assert match in capsys.readouterr().err.splitlines()[-1]

    if command == "merge":  # without a task, so that the model's class is stored
        RobertaForMaskedLM(RobertaConfig(**SMALL)).save_pretrained(tmp_path / "roberta")
        refused("roberta", "roberta', with a RobertaConfig; it must be with a GPT2Config, as the GPT2LMHeadModel")
    path = tmp_path / "model" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"n_positions": 16}))
    refused("model", "model holds no whole ")
    path.write_text(json.dumps(settings | {"n_embd": "wide"}))
    refused("model", "'n_embd' expected int, got str")
    path.write_text(json.dumps(settings))
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    refused("model", "model holds no whole ")


def test_words_tells_the_nearest(stored, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = stored["prompt"].adapters["default"]
    prompt.weight.data.copy_(1.5 * model.get_input_embeddings().weight[[4, 1, 2]])
    methods.save_adapter(stored["prompt"], tmp_path / "prompt")
    command = ["words", str(tmp_path / "prompt"), "--model", str(tmp_path / "model"), "-k", "2", "--json"]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert "no tokenizer" in captured.err
    rows = json.loads(captured.out)
    assert len(rows) == 6
    assert [row["token_id"] for row in rows[::2]] == [4, 1, 2]

    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(tmp_path / "model")
    assert cli.main(command[:-1]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[2] for line in lines[::2]] == ["mat", "cat", "sat"]


def test_words_is_for_prompts(stored, tmp_path, capsys):
    assert cli.main(["words", str(tmp_path / "lora"), "--model", str(tmp_path / "model")]) == 2
    assert "of LORA; it must be of PROMPT_TUNING" in capsys.readouterr().err


# --- params ----------------------------------------------------------------------------------------------------------


def params(capsys, *options):
    assert cli.main(["params", *map(str, options), "--json"]) == 0
    return {row.pop("method"): row for row in json.loads(capsys.readouterr().out)}


def test_params_compares_the_methods(tmp_path, capsys):
    gpt2().save_pretrained(tmp_path)
    found = params(capsys, tmp_path, "--rank", 4, "--bottleneck-size", 3, "--virtual-tokens", 7)
    assert found == params(capsys, tmp_path / "config.json", "--rank", 4, "--bottleneck-size", 3, "--virtual-tokens", 7)
    base = sum(parameter.numel() for parameter in gpt2().parameters())
    expected = {
        "full fine-tuning": base,
        "LoRA, rank 4": 2 * 4 * (24 + 72),
        "DoRA, rank 4": 2 * (4 * (24 + 72) + 72),
        "AdaLoRA, rank 4 at the start": 2 * 4 * (24 + 72 + 1),
        "DyLoRA, ranks to 4": 2 * 4 * (24 + 72),
        "IA3": 2 * (72 + 96),
        "Houlsby bottleneck, width 3": 2 * 2 * (2 * 3 * 24 + 3 + 24),
        "Pfeiffer bottleneck, width 3": 2 * (2 * 3 * 24 + 3 + 24),
        "Parallel bottleneck, width 3": 2 * (2 * 3 * 24 + 3 + 24),
        "prefix tuning, 7 tokens": 7 * 2 * 2 * 24,
        "prompt tuning, 7 tokens": 7 * 24,
        "BitFit": 2 * (72 + 24 + 96 + 24 + 2 * 24) + 24,
        "BitFit and norms": 2 * (72 + 24 + 96 + 24 + 4 * 24) + 2 * 24,
        "the top two layers": base - (61 + 32 + 2) * 24,
    }
    assert {name: row["parameters"] for name, row in found.items()} == expected
    for row in found.values():
        assert row["bytes"] == 4 * row["parameters"]
        assert row["percent"] == pytest.approx(100 * row["parameters"] / base)


def test_params_says_what_is_not_for_a_model(tmp_path, capsys):
    assert cli.main(["params", "mpt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "MptModel"
    assert any(line.startswith("full fine-tuning") for line in lines)
    assert any(line.startswith("LoRA, rank 8: ") and "target_modules" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("robreta", None, "close to it are ['roberta'"),
        ("file.json", "{", "no JSON"),
        ("file.json", "{}", "of model type None"),
        ("file.json", '{"model_type": "robreta"}', "close to it are ['roberta'"),
        ("file.json", '{"model_type": "llama", "hidden_size": "big"}', "file.json holds no config of a model: "),
    ],
)
def test_params_names_what_is_no_model(tmp_path, capsys, name, content, match):
    if content is not None:
        (tmp_path / name).write_text(content)
        name = tmp_path / name
    assert cli.main(["params", str(name)]) == 2
    assert match in capsys.readouterr().err
