"""Training that stops and goes on equals training that does not, bit for bit; what does not fit is refused."""

import json
import random

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim import SGD, AdamW, lr_scheduler
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pyfastpeft
from pyfastpeft import methods
from pyfastpeft.methods import training_state

STATE, TENSORS = training_state.STATE_FILE, training_state.TENSORS_FILE
SMALL = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
QV = {"target_modules": ["q_proj", "v_proj"]}
STEPS, STOP = 7, 3


def llama():
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2))


def gpt2():
    torch.manual_seed(5)
    return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=32, vocab_size=61))


def lora(**options):
    return methods.LoraConfig(**{**QV, "r": 4, "lora_dropout": 0.2, **options})


def adalora():
    return methods.AdaLoraConfig(**QV, init_r=5, target_r=2, tinit=1, tfinal=1, total_step=STEPS, lora_dropout=0.1)


def dylora():
    return methods.DyLoraConfig(**QV, r=4, lora_dropout=0.1)


def prefix():
    return methods.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=10)


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def warm_then_fall(optimizer):
    first = lr_scheduler.LambdaLR(optimizer, lambda step: (1 + step) / 3)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.5)], [2])


class Run:
    """A training in which everything that can be random is."""

    def __init__(self, config, scheduler=cosine, model=llama):
        self.model = pyfastpeft.adapt(model(), config).train()
        parameters = list(methods.adapter_parameters(self.model, "default").values())
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.03, "betas": (0.8, 0.95)}]
        self.optimizer = AdamW(groups, lr=0.01, weight_decay=0.1)
        self.scheduler = scheduler(self.optimizer)
        self.others = {}
        if isinstance(config, methods.AdaLoraConfig):
            self.others["allocator"] = methods.RankAllocator(self.model)

    def train(self, first, last):
        losses = []
        for step in range(first, last):
            if isinstance(self.model.pyfastpeft.configs["default"], methods.DyLoraConfig):
                methods.draw_rank(self.model, step=step)
            tokens = torch.randint(61, (2, 5))
            tokens[0, 0] = random.randrange(61)
            tokens[1, 0] = int(numpy.random.randint(61))
            loss = self.model(tokens, labels=tokens).loss
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            if "allocator" in self.others:
                self.others["allocator"].step(step)
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def save(self, directory, step):
        arguments = directory, self.model, self.optimizer, self.scheduler
        methods.save_training_state(*arguments, step=step, **self.others)

    def load(self, directory):
        return methods.load_training_state(directory, self.model, self.optimizer, self.scheduler, **self.others)

    def parameters(self):
        return {key: p.detach().clone() for key, p in methods.adapter_parameters(self.model, "default").items()}


def seed(number):
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


@pytest.mark.parametrize(
    ("config", "scheduler", "model"),
    [
        (lora, cosine, llama),
        (lora, warm_then_fall, gpt2),
        (adalora, cosine, llama),
        (dylora, cosine, llama),
        (prefix, cosine, llama),
    ],
)
def test_resumed_training_equals_uninterrupted_training(config, scheduler, model, tmp_path):
    def new():
        made = config()
        if model is gpt2:
            made.target_modules = ["c_attn"]
        return Run(made, scheduler, model)

    whole = new()
    seed(1)
    expected = whole.train(0, STEPS)

    first = new()
    seed(1)
    assert first.train(0, STOP) == expected[:STOP]
    first.save(tmp_path, STOP)

    second = new()
    second.train(0, 1)
    seed(2)
    assert second.load(tmp_path) == STOP
    assert second.train(STOP, STEPS) == expected[STOP:]
    assert second.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    for key, parameter in whole.parameters().items():
        assert torch.equal(second.parameters()[key], parameter), key
    patterns = [getattr(run.model.pyfastpeft.configs["default"], "rank_pattern", None) for run in (whole, second)]
    assert patterns[0] == patterns[1]


def test_a_resumed_state_is_saved_to_the_same_bytes(tmp_path):
    run = Run(lora(), warm_then_fall)
    run.train(0, 2)
    run.save(tmp_path / "first", 2)
    again = Run(lora(), warm_then_fall)
    again.load(tmp_path / "first")
    again.save(tmp_path / "second", 2)
    for name in (STATE, TENSORS):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_tensors_are_stored_by_the_names_of_parameters(tmp_path):
    run = Run(lora())
    run.train(0, 1)
    run.save(tmp_path, 1)
    tensors = load_file(tmp_path / TENSORS)
    for key, parameter in run.parameters().items():
        assert torch.equal(tensors[f"parameters|default/{key}"], parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert tensors[f"optimizer|state|default/{key}|{moment}"].shape == parameter.shape
    assert json.loads((tmp_path / STATE).read_text())["step"] == 1


def test_ranks_in_the_budget_come_back_without_an_allocator(tmp_path):
    run = Run(adalora())
    run.train(0, 4)
    pattern = run.model.pyfastpeft.configs["default"].rank_pattern
    assert not all(kept for mask in pattern.values() for kept in mask)
    methods.save_training_state(tmp_path, run.model)
    again = pyfastpeft.adapt(llama(), adalora())
    assert methods.load_training_state(tmp_path, again) == 0
    assert again.pyfastpeft.configs["default"].rank_pattern == pattern
    methods.save_training_state(tmp_path, pyfastpeft.adapt(llama(), adalora()))
    methods.load_training_state(tmp_path, again)
    assert again.pyfastpeft.configs["default"].rank_pattern is None


def test_a_parameter_of_the_model_that_the_optimizer_trains_is_stored_too(tmp_path):
    run = Run(lora())
    norm = run.model.model.norm.weight.requires_grad_(True)
    run.optimizer.add_param_group({"params": [norm]})
    run.scheduler = cosine(run.optimizer)
    run.train(0, 2)
    run.save(tmp_path, 2)
    again = Run(lora())
    again.optimizer.add_param_group({"params": [again.model.model.norm.weight]})
    again.scheduler = cosine(again.optimizer)
    again.load(tmp_path)
    assert torch.equal(again.model.model.norm.weight, norm)
    assert not torch.equal(norm, torch.ones_like(norm))


@pytest.fixture
def saved(tmp_path):
    run = Run(lora())
    run.train(0, 2)
    run.save(tmp_path, 2)
    return tmp_path


def refused(directory, run, match, error=ValueError):
    before, generator = run.parameters(), torch.get_rng_state()
    with pytest.raises(error, match=match):
        run.load(directory)
    assert all(torch.equal(parameter, before[key]) for key, parameter in run.parameters().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_another_adapter_is_refused(saved):
    refused(saved, Run(lora(lora_alpha=3)), "lora_alpha 3.*one with lora_alpha 8")
    refused(saved, Run(lora(target_modules=["q_proj"])), r"default/model.layers.0.self_attn.v_proj.lora_A")
    refused(saved, Run(lora(target_modules=["q_proj", "v_proj", "o_proj"])), "o_proj.lora_A.*4 are missing, 0 have")


def test_other_objects_are_refused(saved):
    run = Run(lora())
    with pytest.raises(ValueError, match="scheduler is None; it must be given"):
        methods.load_training_state(saved, run.model, run.optimizer)
    with pytest.raises(ValueError, match="scaler is given; it must be not given"):
        methods.load_training_state(saved, run.model, run.optimizer, run.scheduler, scaler=torch.amp.GradScaler("cpu"))
    parameters = methods.adapter_parameters(run.model, "default").values()
    run.optimizer = AdamW(parameters, lr=0.1)
    run.scheduler = cosine(run.optimizer)
    refused(saved, run, r"groups of \[8\].*groups of \[4, 4\]")
    run.optimizer = SGD(parameters, lr=0.1)
    refused(saved, run, f"optimizer is of class SGD; it must be of class AdamW, whose state .*{STATE} has", TypeError)
    assert not run.optimizer.state
    run.optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    refused(saved, run, "parameters of something else")


def test_a_wrapped_optimizer_counts_as_the_one_inside(saved):
    accelerate = pytest.importorskip("accelerate")
    run = Run(lora())
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(run.optimizer)
    assert type(wrapped) is not AdamW
    methods.load_training_state(saved, run.model, wrapped, run.scheduler)


def test_files_without_the_class_of_the_optimizer_are_read(saved):
    state = json.loads((saved / STATE).read_text())
    assert state["optimizer"].pop("class") == "AdamW"
    (saved / STATE).write_text(json.dumps(state))
    run = Run(lora())
    run.load(saved)
    assert len(run.optimizer.state) == 8


def change(directory, edit):
    tensors = load_file(directory / TENSORS)
    edit(tensors)
    save_file(tensors, directory / TENSORS)


KEY = "parameters|default/model.layers.0.self_attn.q_proj.lora_A"


def test_damaged_tensors_are_refused(saved):
    whole = (saved / TENSORS).read_bytes()
    change(saved, lambda tensors: tensors.pop(KEY))
    refused(saved, Run(lora()), r"without parameters\|default/model.layers.0.self_attn.q_proj.lora_A")
    (saved / TENSORS).write_bytes(whole)
    change(saved, lambda tensors: tensors.update({KEY: tensors[KEY][:2].clone()}))
    refused(saved, Run(lora()), r"q_proj.lora_A of torch.float32 \[2, 24\]; it must be of torch.float32 \[4, 24\]")
    (saved / TENSORS).write_bytes(whole)
    change(saved, lambda tensors: tensors.update({KEY: tensors[KEY].double()}))
    refused(saved, Run(lora()), "torch.float64")
    (saved / TENSORS).write_bytes(whole)
    change(saved, lambda tensors: tensors.update({"stray": torch.ones(1)}))
    refused(saved, Run(lora()), "stray")
    (saved / TENSORS).write_bytes(whole[:-8])
    refused(saved, Run(lora()), f"{TENSORS} is no whole safetensors file")
    (saved / TENSORS).unlink()
    refused(saved, Run(lora()), TENSORS, FileNotFoundError)


def test_damaged_json_is_refused(saved):
    (saved / STATE).write_text('{"step": 2')
    refused(saved, Run(lora()), f"{STATE} is no JSON")
    (saved / STATE).write_text('{"step": 2}')
    refused(saved, Run(lora()), r"generators")
    (saved / STATE).unlink()
    refused(saved, Run(lora()), STATE, FileNotFoundError)


class Odd:
    def state_dict(self):
        return {"when": {"call": print}}


def test_what_cannot_be_stored_is_named_and_the_old_files_stay(saved):
    run = Run(lora())
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(TypeError, match=r"others\|odd\|when\|call"):
        methods.save_training_state(saved, run.model, odd=Odd())
    for given in ({"optimizer": "adam"}, {"scheduler": "cosine"}, {"scaler": None}):
        with pytest.raises(TypeError, match=f"save_training_state: {next(iter(given))} is"):
            methods.save_training_state(saved, run.model, **given)
    with pytest.raises(ValueError, match="step is -1"):
        methods.save_training_state(saved, run.model, step=-1)
    with pytest.raises(ValueError, match="one of the model's adapters: default"):
        methods.save_training_state(saved, run.model, name="other")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
