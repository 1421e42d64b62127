"""AdaLoRA's allocation against its formulas and PEFT's, DyLoRA's nested ranks, and what both keep and refuse."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import pyfastpeft
from pyfastpeft import AdaLoraConfig, DyLoraConfig, LoraConfig, RankAllocator, draw_rank, orthogonality_loss, set_rank
from pyfastpeft.methods import adapter_parameters, load_adapter, merge_adapter, save_adapter, set_adapter, truncate

VOCABULARY = 61
TARGETS = ["q_proj", "v_proj", "down_proj"]

pytestmark = pytest.mark.usefixtures("one_thread")


def llama(dtype=torch.float32):
    torch.manual_seed(7)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)).to(dtype)


def t5(dtype=torch.float32):
    torch.manual_seed(7)
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).to(dtype)


def tokens(step):
    return torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(step))


def randomise(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.3)


# --- AdaLoRA ---------------------------------------------------------------------------------------------------------

ADALORA = {
    "target_modules": TARGETS, "init_r": 5, "target_r": 2, "lora_alpha": 13, "tinit": 2, "tfinal": 4, "deltaT": 2,
    "total_step": 14, "beta1": 0.8, "beta2": 0.9, "orth_reg_weight": 0.3,
}  # fmt: skip
LAYERS = 6


def adalora(dtype=torch.float32, make=llama, **changes):
    return pyfastpeft.adapt(make(dtype), AdaLoraConfig(**ADALORA | changes))


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)


def train(model, allocator, optimizer, steps):
    losses = []
    for step in steps:
        loss = model(input_ids=tokens(step), labels=tokens(step)).loss + orthogonality_loss(model)
        loss.backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens(99), labels=tokens(99)).logits


def test_budget_at_the_schedules_ends_and_along_the_cubic_curve():
    allocator = RankAllocator(adalora(tinit=10, tfinal=20, total_step=70))
    full, target = 5 * LAYERS, 2 * LAYERS
    assert [allocator.budget(step) for step in (0, 9, 10)] == [full] * 3
    assert [allocator.budget(step) for step in (50, 51, 69, 1000)] == [target] * 4
    assert allocator.budget(11) == int(target + (full - target) * (39 / 40) ** 3) == 28
    assert allocator.budget(30) == int(target + (full - target) / 8) == 14
    assert allocator.budget(49) == target
    budgets = [allocator.budget(step) for step in range(10, 51)]
    assert budgets == sorted(budgets, reverse=True)
    assert len(set(budgets)) > 10


def test_importance_is_the_closed_form_of_the_moving_averages():
    """After n steps an average is the sum of (1 - beta) beta^(n - 1 - i) x_i; a layer without gradient counts as 0."""
    model = adalora(torch.float64)
    allocator, beta1, beta2 = RankAllocator(model), 0.8, 0.9
    unused = "model.layers.1.mlp.down_proj"
    observed: dict[str, list[torch.Tensor]] = {}
    for step in range(4):
        for key, parameter in adapter_parameters(model, "default").items():
            parameter.data.normal_()
            off = key.startswith(unused) and step == 2
            parameter.grad = None if off else torch.randn_like(parameter)
            seen = torch.zeros_like(parameter) if off else (parameter * parameter.grad).abs()
            observed.setdefault(key, []).append(seen.detach())
        allocator.step(step)

    def average(beta, values):
        return sum((1 - beta) * beta ** (len(values) - 1 - i) * value for i, value in enumerate(values))

    importance = {}
    for key, seen in observed.items():
        sensitivity = [average(beta1, seen[: n + 1]) for n in range(len(seen))]
        importance[key] = sensitivity[-1] * average(beta2, [(i - s).abs() for i, s in zip(seen, sensitivity)])
    assert set(allocator.scores()) == {key.rpartition(".")[0] for key in importance}
    for path, score in allocator.scores().items():
        a, b, e = (importance[f"{path}.lora_{each}"] for each in "ABE")
        expected = torch.stack([e[i, 0] + a[i].mean() + b[:, i].mean() for i in range(5)])
        torch.testing.assert_close(score, expected, rtol=1e-12, atol=0)
    assert allocator.masks == {}


def test_the_most_important_ranks_of_all_layers_stay():
    model = adalora(tinit=1, deltaT=2, tfinal=3, total_step=12)
    randomise(adapter_parameters(model, "default").values())
    allocator = RankAllocator(model)
    before = {path: part.lora_E.detach().clone() for path, part in allocator.parts.items()}
    for step in (0, 1, 2):
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        allocator.step(step)
        assert bool(allocator.masks) == (step == 2)
    scores = torch.stack(list(allocator.scores().values()))
    best = scores.flatten().argsort(descending=True)[: allocator.budget(2)]
    expected = torch.zeros(scores.numel(), dtype=torch.bool).index_fill_(0, best, True).view_as(scores)
    assert 2 * LAYERS < allocator.budget(2) < 5 * LAYERS
    assert expected.sum(1).unique().numel() > 1, "the ranks of the layers are to differ"
    for row, (path, part) in zip(expected, allocator.parts.items()):
        assert allocator.masks[path].equal(row)
        assert part.lora_E.equal(torch.where(row[:, None], before[path], 0))
        assert allocator.config.rank_pattern[f"{path}.lora_E"] == row.tolist()


def test_ranks_come_back_until_the_choice_is_made_for_good():
    model = adalora(tinit=1, deltaT=1, tfinal=3, total_step=8)
    allocator, optimizer = RankAllocator(model), optimizer_of(model)
    train(model, allocator, optimizer, range(4))
    early = allocator.masks
    for path, part in allocator.parts.items():  # what was dropped becomes important
        part.lora_E.data[~early[path]] = 3.0
    train(model, allocator, optimizer, range(4, 6))
    final = allocator.masks
    assert any((final[path] & ~early[path]).any() for path in final)
    assert sum(int(mask.sum()) for mask in final.values()) == 2 * LAYERS
    assert not allocator.sensitivity
    for path, part in allocator.parts.items():
        part.lora_E.data[~final[path]] = 3.0
    train(model, allocator, optimizer, range(6, 8))
    assert allocator.masks is final
    for path, part in allocator.parts.items():
        assert part.lora_E.ne(0)[:, 0].equal(final[path])


LONG = {"tinit": 6, "tfinal": 14, "deltaT": 3, "total_step": 60}


def peft_twin(model, make, **changes):
    """PEFT's AdaLoRA on the same base, from the same weights."""
    task = "CAUSAL_LM" if make is llama else "SEQ_2_SEQ_LM"
    theirs = peft.get_peft_model(make(), peft.AdaLoraConfig(task_type=task, **ADALORA | LONG | changes))
    weights = dict(theirs.base_model.model.named_parameters())
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, "default").items():
            weights[f"{key}.default"].copy_(parameter)
    return theirs


@pytest.mark.parametrize(("make", "accelerated"), [(llama, False), (t5, True)])
def test_equal_to_peft_over_a_training(make, accelerated):
    targets = {} if make is llama else {"target_modules": ["q", "v", "wo"]}
    ours = adalora(make=make, **LONG, **targets)
    theirs = peft_twin(ours, make, **targets)
    if accelerated:  # which leaves PEFT's forward pass where it is
        assert not pyfastpeft.accelerate(theirs, strict=False).replaced
    optimizer, allocator = optimizer_of(theirs), RankAllocator(ours)
    our_optimizer = optimizer_of(ours)
    patterns = []
    for step in range(60):
        (our_loss,) = train(ours, allocator, our_optimizer, [step])
        loss = theirs(input_ids=tokens(step), labels=tokens(step)).loss
        loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        assert our_loss == pytest.approx(loss.item(), rel=1e-5), f"step {step}"
        pattern = theirs.peft_config["default"].rank_pattern
        pattern = pattern and {key.removesuffix(".default"): mask for key, mask in pattern.items()}
        assert allocator.config.rank_pattern == pattern, f"step {step}"
        patterns.append(str(pattern))
    assert len(set(patterns)) > 4
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


def test_orthogonality_loss_and_its_gradient():
    model = adalora(torch.float64)
    randomise(adapter_parameters(model, "default").values())
    parameters = adapter_parameters(model, "default")
    terms = []
    for key, p in parameters.items():
        if not key.endswith("lora_E"):
            gram = (p @ p.T if key.endswith("lora_A") else p.T @ p) - torch.eye(5, dtype=torch.float64)
            terms.append(gram.square().sum().sqrt())
    assert len(terms) == 2 * LAYERS
    expected = 0.3 * sum(terms) / len(terms)
    found = orthogonality_loss(model)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    inputs = [p for key, p in parameters.items() if not key.endswith("lora_E")]
    for ours, exact in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stop", [2, 7, 12], ids=["before the first cut", "while cutting", "after the last cut"])
def test_resumed_equals_uninterrupted(stop):
    model = adalora(lora_dropout=0.2)
    allocator, optimizer = RankAllocator(model), optimizer_of(model)
    train(model, allocator, optimizer, range(stop))
    kept = save(allocator.state_dict())  # no pickle
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    random = torch.get_rng_state()
    losses = train(model, allocator, optimizer, range(stop, 14))

    other = adalora(lora_dropout=0.2)
    other.load_state_dict(weights)
    again, its_optimizer = RankAllocator(other), optimizer_of(other)
    again.load_state_dict(load(kept))
    its_optimizer.load_state_dict(moments)
    torch.set_rng_state(random)
    assert train(other, again, its_optimizer, range(stop, 14)) == losses
    assert again.config.rank_pattern == allocator.config.rank_pattern
    for one, two in zip(model.state_dict().values(), other.state_dict().values()):
        assert one.equal(two)


def test_state_is_replaced_as_a_whole():
    """Loading a state from before the first cut forgets the masks of later ones; what is loaded is a copy."""
    allocator = RankAllocator(model := adalora())
    optimizer = optimizer_of(model)
    train(model, allocator, optimizer, range(3))
    early = {key: tensor.clone() for key, tensor in allocator.state_dict().items()}
    kept = {key: tensor.clone() for key, tensor in early.items()}
    train(model, allocator, optimizer, range(3, 7))
    assert allocator.config.rank_pattern
    allocator.load_state_dict(early)
    assert allocator.masks == {}
    assert allocator.config.rank_pattern is None
    train(model, allocator, optimizer, range(3, 5))
    assert all(early[key].equal(kept[key]) for key in kept)


def test_copies_train_apart():
    model = adalora()
    allocator = RankAllocator(model)
    train(model, allocator, optimizer_of(model), range(6))
    twin, its_allocator = copy.deepcopy((model, allocator))
    before = copy.deepcopy(allocator.state_dict())
    losses = train(twin, its_allocator, optimizer_of(twin), range(6, 10))
    assert all(tensor.equal(before[key]) for key, tensor in allocator.state_dict().items())
    assert train(model, allocator, optimizer_of(model), range(6, 10)) == losses


def test_accumulated_gradients_equal_those_of_one_batch():
    one, many = adalora(torch.float64), adalora(torch.float64)
    for model in (one, many):
        torch.manual_seed(3)
        randomise(adapter_parameters(model, "default").values())
    allocators = RankAllocator(one), RankAllocator(many)
    for step in range(4):
        ids = torch.cat([tokens(10 * step), tokens(10 * step + 1)])
        one(input_ids=ids, labels=ids).loss.backward()
        for half in ids.chunk(2):
            (many(input_ids=half, labels=half).loss / 2).backward()
        for model, allocator in zip((one, many), allocators):
            allocator.step(step)
            model.zero_grad()
    for key, tensor in allocators[0].state_dict().items():
        torch.testing.assert_close(allocators[1].state_dict()[key], tensor, rtol=1e-8, atol=1e-15)


def test_finalize_drops_ranks_and_changes_nothing(tmp_path):
    model = adalora()
    allocator = RankAllocator(model)
    train(model, allocator, optimizer_of(model), range(14))
    empty = "model.layers.0.self_attn.q_proj"  # a layer may lose all of its ranks
    allocator.load_state_dict(allocator.state_dict() | {f"{empty}.mask": torch.zeros(5, dtype=torch.bool)})
    allocator.parts[empty].lora_E.data.zero_()
    expected = logits(model)
    allocator.finalize()
    kept = {path: sum(allocator.config.rank_pattern[f"{path}.lora_E"]) for path in allocator.parts}
    assert kept[empty] == 0 < sum(kept.values())
    for path, part in allocator.parts.items():
        assert part.lora_A.shape[0] == part.lora_E.shape[0] == part.lora_B.shape[1] == part.r == kept[path]
        assert all(p.requires_grad and p.is_leaf for p in part.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)

    model(input_ids=tokens(0), labels=tokens(0)).loss.backward()  # it trains on
    assert all(p.grad is not None or p.numel() == 0 for p in adapter_parameters(model, "default").values())
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path)), expected, rtol=1e-5, atol=1e-6)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    for refused in (lambda: allocator.step(14), allocator.finalize, lambda: RankAllocator(model)):
        with pytest.raises(RuntimeError, match="some were dropped"):
            refused()


def test_layers_that_keep_all_ranks_are_stored_as_any_other(tmp_path):
    model = adalora()
    randomise(adapter_parameters(model, "default").values())
    allocator = RankAllocator(model)
    paths = list(allocator.parts)
    masks = {path: torch.arange(5) < (5 if path == paths[1] else 2) for path in paths}
    allocator.load_state_dict({f"{path}.mask": mask for path, mask in masks.items()})
    allocator.step(13)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path)), logits(model), rtol=1e-5, atol=1e-6)


def test_finalize_before_the_schedules_end_allots_the_final_budget():
    model = adalora()
    allocator = RankAllocator(model)
    train(model, allocator, optimizer_of(model), range(7))
    assert sum(int(mask.sum()) for mask in allocator.masks.values()) > 2 * LAYERS
    scores = torch.stack(list(allocator.scores().values()))
    allocator.finalize()
    least = scores.flatten().sort().values[-2 * LAYERS]
    assert [part.r for part in allocator.parts.values()] == (scores >= least).sum(1).tolist()
    assert sum(part.r for part in allocator.parts.values()) == 2 * LAYERS


def test_sixteen_bit_models():
    """Only the factors train, not the rank's number; averages of 16-bit factors are float32."""
    model = adalora(torch.bfloat16)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_E"}
    scalings = [part.scaling for part in RankAllocator(model).parts.values()]
    train(model, RankAllocator(model), optimizer_of(model), range(3))
    assert [part.scaling for part in RankAllocator(model).parts.values()] == scalings == [13 / (5 + 1e-5)] * LAYERS
    narrow = pyfastpeft.adapt(llama(torch.bfloat16), AdaLoraConfig(**ADALORA), autocast_adapter_dtype=False)
    allocator = RankAllocator(narrow)
    randomise(adapter_parameters(narrow, "default").values())
    train(narrow, allocator, optimizer_of(narrow), range(7))
    assert {tensor.dtype for tensor in allocator.sensitivity.values()} == {torch.float32}
    assert sum(int(mask.sum()) for mask in allocator.masks.values()) == allocator.budget(6)


def test_no_rank_is_dropped_while_the_budget_is_full():
    model = adalora(target_r=5)
    allocator = RankAllocator(model)
    train(model, allocator, optimizer_of(model), range(8))
    assert all(mask.all() for mask in allocator.masks.values())


def test_adalora_errors():
    model = adalora()
    allocator = RankAllocator(model)
    with pytest.raises(RuntimeError, match=r"without gradients; it must be called after backward\(\)"):
        allocator.step(0)
    for step in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match="step is"):
            allocator.step(step)
        with pytest.raises(ValueError, match="step is"):
            allocator.budget(step)
    with pytest.raises(TypeError, match=r"state is None .*; it must be what state_dict returned"):
        allocator.load_state_dict(None)
    with pytest.raises(RuntimeError, match="end of the schedule first"):
        allocator.step(12)
    with pytest.raises(RuntimeError, match="end of the schedule first"):
        allocator.finalize()
    with pytest.raises(ValueError, match="total_step is None"):
        RankAllocator(adalora(total_step=None)).step(0)
    with pytest.raises(ValueError, match=r"name is 'other' .* one of the model's adapters: default"):
        RankAllocator(model, "other")
    with pytest.raises(ValueError, match="adapted"):
        RankAllocator(llama())
    other = pyfastpeft.adapt(llama(), LoraConfig(target_modules=TARGETS))
    for function in (RankAllocator, orthogonality_loss):
        with pytest.raises(ValueError, match="adapter of LoraConfig; it must be of one of AdaLoraConfig"):
            function(other)
    with pytest.raises(ValueError, match="rank_pattern is of 3 ranks"):
        adalora(rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [True, True, False]})


def test_gradients_that_overflow_are_an_error():
    model = adalora(tinit=1, deltaT=1)
    allocator = RankAllocator(model)
    for step in range(2):
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        allocator.step(step)
    next(iter(allocator.parts.values())).lora_A.grad[0, 0] = torch.inf
    before = {path: part.lora_E.detach().clone() for path, part in allocator.parts.items()}
    with pytest.raises(RuntimeError, match="importance is infinite or NaN"):
        allocator.step(2)
    assert all(part.lora_E.equal(before[path]) for path, part in allocator.parts.items())


def test_states_that_do_not_fit_change_nothing():
    model = adalora()
    allocator = RankAllocator(model)
    train(model, allocator, optimizer_of(model), range(8))
    state = dict(allocator.state_dict())
    path = "model.layers.0.self_attn.q_proj"
    whole = {key: tensor.clone() for key, tensor in state.items()}
    for change, told in [
        ({f"{path}.lora_A.sensitivity": None}, r"without .*q_proj\.lora_A\.sensitivity"),
        ({f"{path}.mask": None}, r"without .*q_proj\.mask"),
        ({"model.layers.7.mask": torch.ones(5, dtype=torch.bool)}, "with 'model.layers.7.mask'"),
        ({f"{path}.mask": torch.ones(4, dtype=torch.bool)}, r"bool of shape \[5\]"),
        ({f"{path}.mask": torch.ones(5)}, r"holding .*mask' of torch.float32"),
        ({f"{path}.lora_B.uncertainty": torch.ones(24, 4)}, r"floating of shape \[24, 5\]"),
    ]:
        bad = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
        with pytest.raises(ValueError, match=told):
            allocator.load_state_dict(bad)
        assert all(tensor.equal(whole[key]) for key, tensor in allocator.state_dict().items())


# --- DyLoRA ----------------------------------------------------------------------------------------------------------

R, ALPHA = 6, 9


def dylora(dtype=torch.float64, **options):
    options = {"target_modules": TARGETS, "r": R, "lora_alpha": ALPHA} | options
    model = pyfastpeft.adapt(llama(dtype), DyLoraConfig(**options))
    randomise(adapter_parameters(model, "default").values())
    return model


def dylora_parts(model):
    return {path: module.adapters["default"] for path, module in model.named_modules() if hasattr(module, "adapters")}


def test_draws_are_uniform_and_follow_from_seed_and_step():
    model = dylora(min_rank=2)
    before = torch.get_rng_state()
    draws = [draw_rank(model, step=step) for step in range(1000)]
    assert torch.get_rng_state().equal(before)
    assert set(draws) == {2, 3, 4, 5, 6}
    counts = torch.tensor([draws.count(rank) for rank in range(2, 7)])
    assert ((counts - 200).square() / 200).sum() < 18.5  # chi-square of 4 degrees of freedom, 0.999
    assert {part.rank for part in dylora_parts(model).values()} == {draws[-1]}
    other = dylora(min_rank=2)
    assert [draw_rank(other, step=step) for step in (5, 6, 7, 993)] == [draws[5], draws[6], draws[7], draws[993]]
    reseeded = [draw_rank(other, step=step, seed=1) for step in range(1000)]
    assert 120 < sum(a == b for a, b in zip(draws, reseeded)) < 280


@pytest.mark.parametrize("rank", [1, 4, R])
def test_rank_cuts_factors_and_scaling(rank):
    model, plain = dylora(), llama(torch.float64)
    set_rank(model, rank=rank)
    with torch.no_grad():
        for path, part in dylora_parts(model).items():
            change = sum(torch.outer(part.lora_B[:, i], part.lora_A[i]) for i in range(rank))
            plain.get_submodule(path).weight += ALPHA / rank * change
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-10, atol=1e-12)
    set_rank(model)
    apart = (logits(model) - logits(plain)).abs().max()
    assert apart < 1e-9 if rank == R else apart > 1e-3


@pytest.mark.parametrize(
    ("frozen", "rank", "trained"),
    [(False, 4, [0, 1, 2, 3]), (True, 4, [3]), (True, 2, [0, 1]), (True, 1, [0]), (True, R, [R - 1])],
)
def test_which_ranks_get_gradients(frozen, rank, trained):
    model = dylora(frozen=frozen, min_rank=2).train()
    set_rank(model, rank=rank)
    model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    for part in dylora_parts(model).values():
        for gradient in (part.lora_A.grad, part.lora_B.grad.T):
            assert gradient.abs().sum(1).nonzero().flatten().tolist() == trained


def test_frozen_changes_no_output_and_no_kept_gradient():
    free, frozen = dylora().train(), dylora(frozen=True).train()
    frozen.load_state_dict(free.state_dict())
    for model in (free, frozen):
        set_rank(model, rank=4)
    outs = [model(input_ids=tokens(0), labels=tokens(0)) for model in (free, frozen)]
    torch.testing.assert_close(outs[0].logits, outs[1].logits, rtol=1e-12, atol=1e-14)
    for out in outs:
        out.loss.backward()
    for one, two in zip(dylora_parts(free).values(), dylora_parts(frozen).values()):
        torch.testing.assert_close(one.lora_A.grad[3], two.lora_A.grad[3], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(one.lora_B.grad[:, 3], two.lora_B.grad[:, 3], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_use_the_drawn_rank(reentrant):
    plain = dylora(lora_dropout=0.0).train()
    recomputed = copy.deepcopy(plain)
    recomputed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed.enable_input_require_grads()
    for step in range(3):
        gradients = []
        for model in (plain, recomputed):
            model.zero_grad()
            draw_rank(model, step=step)
            model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
            gradients.append([p.grad for p in adapter_parameters(model, "default").values()])
        for one, two in zip(*gradients):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("frozen", [False, True])
def test_one_graph_serves_every_rank(frozen):
    """torch.compile gives up after eight graphs of a function, and every rank would need one of its own."""
    model = dylora(torch.float32, r=16, min_rank=2, frozen=frozen).train()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=count)
    try:
        for rank in range(16, 0, -1):
            set_rank(model, rank=rank)
            found = []
            for run in (compiled, model):
                model.zero_grad()
                loss = run(input_ids=tokens(0), labels=tokens(0)).loss
                loss.backward()
                found.append([loss.detach(), *(p.grad for p in adapter_parameters(model, "default").values())])
            for one, two in zip(*found):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    finally:
        torch.compiler.reset()
    assert len(graphs) == 1


@pytest.mark.parametrize("rank", [1, 3, R])
def test_truncated_adapter_is_lora_that_peft_reads(rank, tmp_path):
    pattern = {"layers.1.mlp.down_proj": 2, "layers.0.mlp.down_proj": 8}
    model = dylora(torch.float32, rank_pattern=pattern, alpha_pattern={"v_proj": 4}, modules_to_save=["lm_head"])
    set_rank(model, rank=rank)
    expected = logits(model)
    ranks = {path: part.rank for path, part in dylora_parts(model).items()}
    truncate(model, "default", rank, "small")
    assert model.pyfastpeft.active == ("default",)
    assert {path: part.rank for path, part in dylora_parts(model).items()} == ranks
    assert type(model.pyfastpeft.configs["small"]) is LoraConfig
    assert not any(p.requires_grad for p in adapter_parameters(model, "small").values())
    set_adapter(model, "small")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    save_adapter(model, tmp_path, "small")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    source = adapter_parameters(model, "default")
    for key, parameter in adapter_parameters(model, "small").items():
        assert parameter.data_ptr() != source[key].data_ptr()
    randomise(source.values())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_truncating_keeps_the_adapters_dtype():
    model = pyfastpeft.adapt(llama(torch.bfloat16), DyLoraConfig(target_modules=TARGETS, r=R))
    truncate(model, "default", 2, "wide")
    assert {p.dtype for p in adapter_parameters(model, "wide").values()} == {torch.float32}
    model = pyfastpeft.adapt(
        llama(torch.bfloat16), DyLoraConfig(target_modules=TARGETS, r=R), autocast_adapter_dtype=False
    )
    truncate(model, "default", 2, "narrow")
    assert {p.dtype for p in adapter_parameters(model, "narrow").values()} == {torch.bfloat16}


def test_every_rank_learns():
    """After one training each rank is better than none, and than what a plain LoRA adapter of r is cut to."""
    torch.manual_seed(0)
    x, weight = torch.randn(256, 12), torch.randn(8, 3) @ torch.randn(3, 12)
    y = x @ weight.T

    def trained(config, step_begins):
        torch.manual_seed(1)
        model = pyfastpeft.adapt(nn.Sequential(nn.Linear(12, 8)), config)
        model.get_submodule("0").weight.data.zero_()
        optimizer = torch.optim.Adam(adapter_parameters(model, "default").values(), lr=0.02)
        for step in range(300):
            step_begins(model, step)
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    options = {"target_modules": ["0"], "r": 4, "lora_alpha": 4}
    nested = trained(DyLoraConfig(**options), lambda model, step: draw_rank(model, step=step))
    full = trained(DyLoraConfig(**options), lambda model, step: None)
    errors = {}
    for name, model in {"nested": nested, "full": full}.items():
        for rank in (1, 2, 3, 4):
            set_rank(model, rank=rank)
            with torch.no_grad():
                errors[name, rank] = (model(x) - y).square().mean() / y.square().mean()
    assert all(errors["nested", rank] < 0.9 for rank in (1, 2, 3, 4)), errors
    assert all(errors["nested", rank] < errors["full", rank] for rank in (1, 2)), errors


def test_a_step_does_not_walk_through_the_model_but_sees_its_changes(monkeypatch):
    calls = (orthogonality_loss, adalora()), (lambda model: draw_rank(model, step=0), dylora())
    for call, model in calls:
        call(model)
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "named_modules", lambda *_: pytest.fail("walked"))
            call(model)
        layers = model.model.layers
        layers[0], layers[1] = layers[1], nn.Sequential(layers[0])  # both at other paths
        call(model)
        attention = layers[0].self_attn
        own, attention.q_proj = attention.q_proj, nn.Linear(24, 24)
        with pytest.raises(RuntimeError, match=r"\['model.layers.1.self_attn.q_proj'\] were replaced"):
            call(model)
        attention.q_proj = own
        call(model)
        del layers[1]
        with pytest.raises(RuntimeError, match=r"\['model.layers.0.self_attn.q_proj', .*\] were replaced"):
            call(model)


def test_dylora_errors():
    model = dylora()
    for rank in (0, 7, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"rank is .*\[1, 6\]"):
            set_rank(model, rank=rank)
        with pytest.raises(ValueError, match=r"rank is .*\[1, 6\]"):
            truncate(model, "default", rank, "small")
    assert list(model.pyfastpeft.configs) == ["default"]
    with pytest.raises(ValueError, match="'default', which the model has"):
        truncate(model, "default", 2, "default")
    with pytest.raises(ValueError, match=r"name is 'other' .* one of the model's adapters: default"):
        draw_rank(model, "other", step=0)
    with pytest.raises(ValueError, match="draw_rank: step is None"):  # which would draw the same rank for all steps
        draw_rank(model, step=None)
    other = pyfastpeft.adapt(llama(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="adapter of LoraConfig; it must be of one of DyLoraConfig"):
        draw_rank(other, step=0)


# --- several processes -----------------------------------------------------------------------------------------------

WORKER = """
import sys, torch
import torch.distributed as dist
sys.path[:0] = sys.argv[4:]
import test_ranks as t
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
torch.set_num_threads(1)
found = {}
for kind in ("adalora", "dylora"):
    model = t.adalora() if kind == "adalora" else t.dylora(torch.float32)
    allocator = t.RankAllocator(model) if kind == "adalora" else None
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = t.optimizer_of(model)
    for step in range(8):
        drawn = allocator or t.draw_rank(model, step=step)
        ids = t.tokens(2 * step + rank)
        parallel(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        allocator and allocator.step(step)
        optimizer.zero_grad()
    found |= {f"{kind}.{key}": p.detach() for key, p in t.adapter_parameters(model, "default").items()}
    found |= {f"{kind}.{key}": tensor for key, tensor in (allocator.state_dict() if allocator else {}).items()}
torch.save(found, sys.argv[3])
dist.destroy_process_group()
"""


def test_processes_agree(tmp_path):
    """Two processes on different data hold the same weights, importances, masks and ranks, step by step."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    arguments = [f"file://{tmp_path / 'store'}"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), *arguments, str(tmp_path / f"{rank}.pt"), str(here)],
            env=environment,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)
    masks = torch.stack([tensor for key, tensor in one.items() if key.endswith(".mask")])
    assert 2 * LAYERS <= masks.sum() < 5 * LAYERS
