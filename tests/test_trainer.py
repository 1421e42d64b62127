"""Adapted models in transformers.Trainer: methods without a callback, AdaLoRA and DyLoRA with theirs, checkpoints."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import pyfastpeft
from pyfastpeft import (
    AdaLoraConfig,
    BitFitConfig,
    DyLoraConfig,
    IA3Config,
    LoraConfig,
    RankAllocator,
    SelectiveConfig,
)  # fmt: skip
from pyfastpeft.integrations.transformers import AdapterCallback
from pyfastpeft.methods import adapter_parameters, draw_rank, load_adapter, orthogonality_loss

STEPS, ACCUMULATED, BATCH = 6, 2, 2
ADALORA = {
    "init_r": 4,
    "target_r": 2,
    "lora_alpha": 9,
    "tinit": 1,
    "tfinal": 2,
    "target_modules": ["q_proj", "down_proj"],
}

pytestmark = pytest.mark.usefixtures("one_thread")


def llama():
    torch.manual_seed(7)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, num_key_value_heads=2, **sizes))


def rows():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(61, (STEPS * ACCUMULATED * BATCH, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(directory, **options):
    fixed = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    fixed |= {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATED}
    fixed |= {"learning_rate": 2e-2, "lr_scheduler_type": "constant", "max_steps": STEPS}
    return TrainingArguments(output_dir=str(directory), **fixed | options)


def train(model, directory, callbacks=(), resume=None, data=None, compute_loss_func=None, **options):
    trainer = Trainer(
        model, arguments(directory, **options), train_dataset=data or rows(), callbacks=list(callbacks),
        compute_loss_func=compute_loss_func,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapted(config, model=None):
    torch.manual_seed(3)
    return pyfastpeft.adapt(model or llama(), config)


def same_tensors(one, two):
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys()
    return all(one[key].equal(two[key]) for key in one)


# --- without a callback ----------------------------------------------------------------------------------------------


METHODS = [
    LoraConfig(r=3, lora_dropout=0.1), IA3Config(), BitFitConfig(add_missing=True),
    SelectiveConfig(layers_to_transform=[-1]),
]  # fmt: skip


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.peft_type)
def test_trains_and_resumes_without_a_callback(config, tmp_path):
    model = adapted(copy.copy(config))
    before = copy.deepcopy(model.state_dict())
    trainer = train(model, tmp_path / "whole", save_strategy="steps", save_steps=3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    changed = {key for key, tensor in model.state_dict().items() if not tensor.equal(before[key])}
    assert changed == trained
    again = adapted(copy.copy(config))
    resumed = train(again, tmp_path / "rest", resume=tmp_path / "whole" / "checkpoint-3")
    assert resumed.state.global_step == STEPS
    assert losses(resumed) == losses(trainer)
    assert same_tensors(model, again)


# --- with it ---------------------------------------------------------------------------------------------------------


CALLED = {
    "AdaLoRA": AdaLoraConfig(**ADALORA, lora_dropout=0.1),
    "DyLoRA": DyLoraConfig(r=4, lora_dropout=0.1),
    "LoRA with a head": LoraConfig(r=3, modules_to_save=["lm_head"]),
}


def test_a_checkpoint_of_another_adapter_is_not_resumed(tmp_path):
    model = adapted(LoraConfig(r=3))
    train(model, tmp_path, [AdapterCallback(model)], save_strategy="steps", save_steps=3)
    other = pyfastpeft.adapt(llama(), LoraConfig(r=3), "other")
    message = r"state_dict is one without anything that \['other'\] train; it must be a checkpoint of these adapters"
    with pytest.raises(RuntimeError, match=message):
        train(other, tmp_path / "rest", [AdapterCallback(other)], resume=tmp_path / "checkpoint-3")


@pytest.mark.parametrize("kind", CALLED)
def test_checkpoints_hold_the_adapter_and_resume_to_the_same_end(kind, tmp_path):
    model = adapted(copy.copy(CALLED[kind]))
    callback = AdapterCallback(model)
    trainer = train(model, tmp_path / "whole", [callback], save_strategy="steps", save_steps=3)
    folder = tmp_path / "whole" / "checkpoint-3"
    held = load_file(folder / "model.safetensors")
    weights = {key for key in held if not key.startswith("rank_allocators.")}
    assert weights == {name for name, p in model.named_parameters() if p.requires_grad}
    assert (len(weights) < len(held)) == (kind == "AdaLoRA")

    again = adapted(copy.copy(CALLED[kind]))
    its_callback = AdapterCallback(again)
    resumed = train(again, tmp_path / "rest", [its_callback], resume=folder)
    assert losses(resumed) == losses(trainer)
    assert same_tensors(model, again)
    assert again.pyfastpeft.configs == model.pyfastpeft.configs
    for name, allocator in callback.allocators.items():
        assert allocator.masks.keys() == its_callback.allocators[name].masks.keys() != set()

    stored = load_adapter(llama(), tmp_path / "whole" / f"checkpoint-{STEPS}", check_base_model=False)
    ids = rows()[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(stored.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)


def test_several_callbacks_of_one_model(tmp_path):
    """A checkpoint is for each whose adapter is there still, and not for one whose adapter was deleted."""
    model = adapted(AdaLoraConfig(**ADALORA | {"init_r": 6}))
    stale = AdapterCallback(model)
    train(model, tmp_path / "other", [stale])
    pyfastpeft.delete_adapter(model, "default")
    before = {key: tensor.clone() for key, tensor in stale.allocators["default"].state_dict().items()}

    adapted(AdaLoraConfig(**ADALORA), model)
    first, second = AdapterCallback(model), AdapterCallback(model)
    trainer = train(model, tmp_path / "whole", [first], save_strategy="steps", save_steps=3)
    state = load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    assert model.load_state_dict(state, strict=True).unexpected_keys == []
    states = [each.allocators["default"].state_dict() for each in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert any(key.endswith("sensitivity") for key in states[0])
    assert all(states[0][key].equal(states[1][key]) for key in states[0])
    after = stale.allocators["default"].state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].equal(before[key]) for key in before)
    whole = tmp_path / "whole" / "checkpoint-3"
    assert losses(train(model, tmp_path / "rest", [second], resume=whole)) == losses(trainer)

    pyfastpeft.unload(model)
    held = next(key for key in state if key.startswith("rank_allocators."))
    assert held in model.load_state_dict(state, strict=False).unexpected_keys


def test_after_training_the_model_saves_as_before(tmp_path):
    model = adapted(LoraConfig(r=3))
    keys, save = list(model.state_dict()), model.save_pretrained.__func__
    train(model, tmp_path, [AdapterCallback(model)])
    assert list(model.state_dict()) == keys
    assert model.save_pretrained.__func__ is save
    assert not model._forward_hooks


def test_adalora_in_trainer_equals_a_plain_loop(tmp_path):
    """Accumulated gradients, clipped; the orthogonality term once a step; total_step from Trainer."""
    ours = adapted(AdaLoraConfig(**ADALORA))
    callback = AdapterCallback(ours)
    train(ours, tmp_path, [callback], max_grad_norm=0.5, data_seed=1)
    assert callback.allocators["default"].config.total_step == STEPS

    plain = adapted(AdaLoraConfig(**ADALORA, total_step=STEPS))
    allocator = RankAllocator(plain)
    optimizer = torch.optim.AdamW(adapter_parameters(plain, "default").values(), lr=2e-2, weight_decay=0.0)
    order = seen_order(tmp_path / "order")
    for step in range(STEPS):
        size = ACCUMULATED * BATCH
        ids = torch.stack([rows()[index]["input_ids"] for index in order[step * size : (step + 1) * size]])
        (plain(input_ids=ids, labels=ids).loss + orthogonality_loss(plain)).backward()
        nn.utils.clip_grad_norm_(adapter_parameters(plain, "default").values(), 0.5)
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
    assert allocator.config.rank_pattern == callback.allocators["default"].config.rank_pattern
    for key, parameter in adapter_parameters(plain, "default").items():
        torch.testing.assert_close(adapter_parameters(ours, "default")[key], parameter, rtol=1e-3, atol=1e-5)


def seen_order(directory):
    """The order in which Trainer takes the rows, by a model that writes down what it is given."""

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(())), []

        def forward(self, input_ids, labels):
            self.seen += input_ids.tolist()
            return {"loss": self.weight * 1.0}

    recorder = Recorder()
    train(recorder, directory, data_seed=1)
    place = {tuple(row["input_ids"].tolist()): index for index, row in enumerate(rows())}
    return [place[tuple(row)] for row in recorder.seen]


class Watch(TrainerCallback):
    """Writes down the ranks of a DyLoRA adapter as its layers compute, and whether they train."""

    def __init__(self, model):
        self.seen = []
        self.parts = [module.adapters["default"] for module in model.modules() if hasattr(module, "adapters")]
        model.register_forward_pre_hook(lambda module, args: self.note(module.training))

    def note(self, training):
        (rank,) = {part.rank for part in self.parts}
        self.seen.append((training, rank))


def test_dylora_draws_a_rank_for_each_step_and_evaluates_all(tmp_path):
    model = adapted(DyLoraConfig(r=8))
    watch = Watch(model)
    trainer = Trainer(
        model, arguments(tmp_path, eval_strategy="steps", eval_steps=2, seed=11), train_dataset=rows(),
        eval_dataset=rows()[:2], callbacks=[AdapterCallback(model)],
    )  # fmt: skip
    trainer.train()
    drawn = [rank for training, rank in watch.seen if training]
    twin = adapted(DyLoraConfig(r=8))
    expected = [draw_rank(twin, step=step, seed=11) for step in range(STEPS)]
    assert drawn == [rank for rank in expected for _ in range(ACCUMULATED)]
    assert len(set(drawn)) > 2
    evaluated = [rank for training, rank in watch.seen if not training]
    assert len(evaluated) >= 3
    assert set(evaluated) == {8}


def test_keys_that_transformers_renames_are_found_again(tmp_path):
    """save_pretrained writes ViT's layers under older names, which Trainer's resuming does not translate."""

    def vit():
        torch.manual_seed(1)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))

    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": index % 2} for index in range(24)]
    config = AdaLoraConfig(init_r=3, target_r=1, modules_to_save=["classifier"])
    model = adapted(copy.copy(config), vit())
    train(model, tmp_path / "whole", [AdapterCallback(model)], data=data, save_strategy="steps", save_steps=3)
    again = adapted(copy.copy(config), vit())
    train(again, tmp_path / "rest", [AdapterCallback(again)], tmp_path / "whole" / "checkpoint-3", data)
    assert same_tensors(model, again)


def test_plain_modules_train_and_resume(tmp_path):
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 5), nn.Linear(5, 1)

        def forward(self, x, labels):
            return {"loss": (self.out(self.inner(x).tanh())[:, 0] - labels).square().mean()}

    def made():
        torch.manual_seed(2)
        return adapted(AdaLoraConfig(init_r=3, target_r=1, target_modules=["inner", "out"]), Regression())

    data = [{"x": torch.randn(6), "labels": float(index)} for index in range(24)]
    options = {"data": data, "save_strategy": "steps", "save_steps": 3}
    model, again = made(), made()
    train(model, tmp_path / "whole", [AdapterCallback(model, orthogonality=False)], **options)
    folder = tmp_path / "whole" / "checkpoint-3"
    train(again, tmp_path / "rest", [AdapterCallback(again, orthogonality=False)], resume=folder, **options)
    assert not any(key.endswith("weight") for key in load_file(folder / "model.safetensors"))
    assert same_tensors(model, again)


def test_skipped_optimizer_steps_do_not_count():
    model = adapted(AdaLoraConfig(**ADALORA, total_step=STEPS))
    callback = AdapterCallback(model)
    model(input_ids=rows()[0]["input_ids"][None], labels=rows()[0]["labels"][None]).loss.backward()
    allocator = callback.allocators["default"]
    next(iter(allocator.parts.values())).lora_A.grad.fill_(torch.inf)
    state = type("State", (), {"global_step": 0})
    callback.on_optimizer_step(None, state, None, optimizer=type("Skipped", (), {"step_was_skipped": True}))
    assert not allocator.sensitivity
    callback.on_optimizer_step(None, state, None, optimizer=type("Taken", (), {"step_was_skipped": False}))
    assert allocator.sensitivity


def test_missing_keys_are_told_of_where_they_matter():
    """A state dict of the adapter alone is whole; one that lacks some of either is not."""
    model = adapted(LoraConfig(r=3))
    AdapterCallback(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    state = model.state_dict()
    alone = {key: tensor for key, tensor in state.items() if key not in frozen}
    assert model.load_state_dict(alone, strict=True).missing_keys == []
    lacking = dict(alone)
    gone = next(iter(alone))
    del lacking[gone]
    assert model.load_state_dict(lacking, strict=False).missing_keys == [gone]
    gone = next(iter(frozen))
    del state[gone]
    assert model.load_state_dict(state, strict=False).missing_keys == [gone]


def reads_head(model, input_ids, labels):
    """As TRL's trainers have it."""
    logits = model.model(input_ids).last_hidden_state @ model.lm_head.weight.T
    return {"loss": model.loss_function(logits, labels, 61)}


def test_bad_inputs(tmp_path):
    with pytest.raises(ValueError, match="AdapterCallback: model is a LlamaForCausalLM without adapters"):
        AdapterCallback(llama())
    model, other = adapted(LoraConfig(r=3)), adapted(LoraConfig(r=3))
    with pytest.raises(ValueError, match="the one given to Trainer"):
        train(model, tmp_path, [AdapterCallback(other)])
    for options in ({"label_smoothing_factor": 0.1}, {"compute_loss_func": lambda outputs, labels, **_: None}):
        model = adapted(AdaLoraConfig(**ADALORA))
        with pytest.raises(RuntimeError, match=r"in Trainer with label_smoothing_factor .* orthogonality=False"):
            train(model, tmp_path, [AdapterCallback(model)], **options)
    model = adapted(LoraConfig(r=3, inference_mode=True))
    with pytest.raises(ValueError, match=r"model is one of which all parameters are frozen.*is_trainable=True"):
        train(model, tmp_path, [AdapterCallback(model)])
    model = adapted(LoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
    callback = AdapterCallback(model)
    model.lm_head = nn.Linear(24, 61, bias=False)
    with pytest.raises(RuntimeError, match=r"AdapterCallback: model is one whose \['lm_head'\] were replaced"):
        train(model, tmp_path, [callback])
    model = adapted(AdaLoraConfig(**ADALORA | {"tfinal": STEPS}))
    with pytest.raises(ValueError, match=r"total_step is 6 \(int\); it must be more than tinit \+ tfinal"):
        train(model, tmp_path, [AdapterCallback(model)])
    for target, named in ((["q_proj", "lm_head"], True), (["q_proj"], False)):
        model = adapted(LoraConfig(r=3, target_modules=target, modules_to_save=None if named else ["lm_head"]))
        model.forward = partial(reads_head, model)
        told = pytest.raises(ValueError, match="AdapterCallback: model is one whose head has an adapter, but is never")
        with told if named else nullcontext():
            train(model, tmp_path, [AdapterCallback(model)])
