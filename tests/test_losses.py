"""T-Few's losses, penalties and LoRA+'s groups: their formulas written out in float64, gradients, Trainer, misuse."""

import copy
import math

import pytest
import torch
from torch import nn

import pyfastpeft
from pyfastpeft.layers import LoRALinear
from pyfastpeft.methods.losses import (
    L2SP,
    TFewLoss,
    choice_scores,
    length_normalized_loss,
    loraplus_groups,
    low_rank_norm_squared,
    low_rank_penalty,
    rank_classification,
    regularize,
    tfew_loss,
    unlikelihood_loss,
)

V = 7
LENGTHS = [[3, 1, 4], [2, 5, 0], [1, 0, 0]]  # of the choices of three examples; 0: the choice does not exist
ANSWERS = [2, 0, 0]


def example(dtype=torch.float64, scale=3.0):
    """logits [3, C, T, V] and labels [3, C, T], whose counted tokens stand at odd places among ignored ones."""
    labels = torch.full((3, 3, 9), -100)
    for i, row in enumerate(LENGTHS):
        for c, length in enumerate(row):
            places = torch.randperm(8)[:length] + 1  # never the first, which no causal logit predicts
            labels[i, c, places] = torch.randint(V, (length,))
    return (scale * torch.randn(3, 3, 9, V, dtype=torch.float64)).to(dtype), labels, torch.tensor(ANSWERS)


def written_out(logits, labels, answers):
    """(scores, L_LM, L_UL, L_LN) token by token, as the paper's sums."""
    scores, language, unlikelihood, normalized = [], [], [], []
    for i, answer in enumerate(answers.tolist()):
        beta, wrong_sum, wrong_tokens = {}, 0.0, 0
        for c in range(labels.shape[1]):
            total, count = 0.0, 0
            for t in range(labels.shape[2]):
                if labels[i, c, t] == -100:
                    continue
                p = torch.softmax(logits[i, c, t], -1)[labels[i, c, t]]
                total, count = total + torch.log(p), count + 1
                if c != answer:
                    wrong_sum, wrong_tokens = wrong_sum + torch.log(1 - p), wrong_tokens + 1
            if count:
                beta[c] = total / count
        scores.append(beta)
        language.append(-beta[answer])
        unlikelihood.append(-wrong_sum / wrong_tokens if wrong_tokens else logits.new_zeros(()))
        normalized.append(-torch.log(torch.exp(beta[answer]) / sum(map(torch.exp, beta.values()))))
    return scores, *(torch.stack(each).mean() for each in (language, unlikelihood, normalized))


@pytest.mark.parametrize("causal", [False, True])
def test_tfew_is_the_papers_sums(causal):
    logits, labels, answers = example()
    shifted = (logits[:, :, :-1], labels[:, :, 1:]) if causal else (logits, labels)
    scores, language, unlikelihood, normalized = written_out(*shifted, answers)

    found = choice_scores(logits, labels, causal)
    for i, row in enumerate(scores):
        for c in range(3):
            torch.testing.assert_close(found[i, c], row.get(c, torch.tensor(-math.inf).double()))
    torch.testing.assert_close(unlikelihood_loss(logits, labels, answers, causal=causal), unlikelihood)
    torch.testing.assert_close(length_normalized_loss(logits, labels, answers, causal=causal), normalized)
    total = language + unlikelihood + normalized
    torch.testing.assert_close(tfew_loss(logits, labels, answers, causal=causal), total)
    best = [max(row, key=row.get) for row in scores]
    assert rank_classification(logits, labels, causal=causal).tolist() == best


def test_a_mask_takes_choices_away():
    logits, labels, answers = example(scale=1.0)
    mask = torch.tensor([[True, False, True], [True, True, True], [True, True, True]])
    without = labels.clone()
    without[0, 1] = -100
    for loss in (tfew_loss, unlikelihood_loss, length_normalized_loss):
        masked = loss(logits, labels, answers, choices=mask)
        torch.testing.assert_close(masked, loss(logits, without, answers))
        assert (masked - loss(logits, labels, answers)).abs() > 1e-3
    alone = torch.eye(3, dtype=torch.bool)[answers]
    assert rank_classification(logits, labels, choices=alone).tolist() == ANSWERS


@pytest.mark.parametrize("loss", [tfew_loss, unlikelihood_loss, length_normalized_loss])
def test_gradients(loss):
    labels = torch.tensor([[[-100, 1, 2], [4, -100, -100]], [[-100, -100, -100], [0, 3, 1]]])  # [2, C, T]
    answers = torch.tensor([0, 1])
    logits = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, answers), logits)


def test_leading_axes_and_a_common_answer():
    logits, labels = torch.randn(2, 3, 4, 5, V), torch.randint(V, (2, 3, 4, 5))
    flat = tfew_loss(logits.flatten(0, 1), labels.flatten(0, 1), torch.full((6,), 1))
    torch.testing.assert_close(tfew_loss(logits, labels, 1), flat)
    assert rank_classification(logits, labels).shape == (2, 3)
    assert tfew_loss(logits[0, 0], labels[0, 0], 1).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    logits, labels, answers = example(dtype)
    loss = tfew_loss(logits, labels, answers)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), tfew_loss(logits.double(), labels, answers), rtol=1e-5, atol=1e-5)


def test_a_wrong_choice_that_is_certain_has_a_finite_loss_and_gradient():
    logits = torch.zeros(2, 1, V)  # C, T, V
    logits[1, 0, 3] = 200.0  # 1 - p is 6 exp(-200), which no 1 - p in float32 shows
    labels = torch.tensor([[2], [3]])
    logits.requires_grad_()
    loss = unlikelihood_loss(logits, labels, 0)
    loss.backward()
    assert loss.item() == pytest.approx(200 - math.log(6), rel=1e-6)
    assert logits.grad[1, 0, 3].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.zeros(3, 9, V)}, ValueError, ["labels", "[3, 9]"]),
        ({"logits": torch.zeros(3, 3, 9, V, dtype=torch.int64)}, TypeError, ["logits", "int64", "float64"]),
        ({"logits": torch.zeros(3, 3, 9, 1)}, ValueError, ["logits", "V >= 2"]),
        ({"labels": torch.zeros(3, 3, 8, dtype=torch.int64)}, ValueError, ["labels", "[3, 3, 9]"]),
        ({"labels": torch.zeros(3, 3, 9)}, ValueError, ["labels", "int64"]),
        ({"labels": None}, ValueError, ["labels", "None"]),
        ({"answer": "first"}, ValueError, ["answer", "first"]),
        ({"labels": torch.full((3, 3, 9), V)}, ValueError, ["labels", f"[{V}]", "-100"]),
        ({"answer": torch.tensor([0, 1])}, ValueError, ["answer", "[3]"]),
        ({"answer": 3}, ValueError, ["answer", "[3, 3, 3]", "0 ... 2"]),
        ({"answer": torch.tensor([0, 2, 0])}, ValueError, ["answer", "absent"]),
        ({"choices": torch.ones(3, 3)}, ValueError, ["choices", "torch.bool", "[3, 3]"]),
        ({"choices": torch.tensor([[True, True, False]] * 3)}, ValueError, ["answer", "absent"]),
    ],
)
def test_misuse_of_tfew(change, error, words):
    logits, labels, answers = example()
    given = {"logits": logits, "labels": labels, "answer": answers} | change
    with pytest.raises(error) as raised:
        tfew_loss(**given)
    assert all(word in str(raised.value) for word in ["tfew_loss", *words]), raised.value


# --- penalties -------------------------------------------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def test_l2sp():
    model = network()
    model[0].bias.requires_grad_(False)
    start = copy.deepcopy(model)
    penalty = L2SP(model, alpha=0.6, beta=0.25, new=["2"])
    assert penalty().item() == pytest.approx(0.125 * sum(p.square().sum() for p in start[2].parameters()).item())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = 0.3 * (model[0].weight - start[0].weight).square().sum()
    expected = expected + 0.125 * (model[2].weight.square().sum() + model[2].bias.square().sum())
    torch.testing.assert_close(penalty(), expected)
    penalty().backward()
    torch.testing.assert_close(model[0].weight.grad, 0.6 * (model[0].weight - start[0].weight).detach())
    torch.testing.assert_close(model[2].weight.grad, 0.25 * model[2].weight.detach())
    assert model[0].bias.grad is None


def test_low_rank_norm_never_needs_the_product():
    a, b = torch.randn(3, 11).double().requires_grad_(), torch.randn(8, 3).double().requires_grad_()
    torch.testing.assert_close(low_rank_norm_squared(a, b, 0.7), (0.7 * b @ a).square().sum())
    assert torch.autograd.gradcheck(lambda a, b: low_rank_norm_squared(a, b, 0.7), (a, b))
    half = low_rank_norm_squared(a.bfloat16(), b.bfloat16(), 0.7)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(low_rank_norm_squared(a.bfloat16().double(), b.bfloat16().double(), 0.7).item())


def test_low_rank_penalty_sums_over_trainable_adapters():
    layers = [LoRALinear(5, 6, rank=2, alpha=3), LoRALinear(6, 4, rank=3, alpha=1), LoRALinear(4, 2, rank=1)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    layers[2].lora_A.requires_grad_(False)
    expected = sum((layer.scaling * layer.lora_B @ layer.lora_A).square().sum() for layer in layers[:2])
    torch.testing.assert_close(low_rank_penalty(nn.Sequential(*layers)), expected)


@pytest.mark.parametrize("kind", ["LoraConfig", "DoRA", "DyLoraConfig", "AdaLoraConfig"])
def test_low_rank_penalty_of_adapted_models(kind):
    fields = {"r": 3, "lora_alpha": 2, "target_modules": ["0", "2"], "init_lora_weights": False}
    if kind == "AdaLoraConfig":
        fields |= {"init_r": 4, "target_r": 2}
    if kind == "DoRA":
        fields["use_dora"] = True
    model = pyfastpeft.adapt(network(), getattr(pyfastpeft, "LoraConfig" if kind == "DoRA" else kind)(**fields))
    if kind == "DyLoraConfig":
        pyfastpeft.set_rank(model, rank=2)
    changes = []
    for layer in (model[0], model[2]):
        part = layer.adapters["default"]
        lora_A, lora_B, scaling = part.lora_A, part.lora_B, 2 / 3
        if kind == "AdaLoraConfig":
            lora_A, scaling = part.lora_E * lora_A, 2 / (4 + 1e-5)
        elif kind == "DyLoraConfig":
            lora_A, lora_B, scaling = lora_A[:2], lora_B[:, :2], 2 / 2
        changes.append((scaling * lora_B @ lora_A).square().sum())
    torch.testing.assert_close(low_rank_penalty(model), sum(changes))


def test_misuse_of_penalties():
    with pytest.raises(ValueError, match=r"L2SP: model is without parameters that require grad"):
        L2SP(network().requires_grad_(False), 1.0)
    with pytest.raises(ValueError, match=r"L2SP: new is 'classifier'"):
        L2SP(network(), 1.0, new=["classifier"])
    with pytest.raises(ValueError, match=r"lora_B is .* \[N, r\] to lora_A \[r, K\] = \[3, 11\]"):
        low_rank_norm_squared(torch.randn(3, 11), torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"low_rank_penalty: model is without trainable lora_A"):
        low_rank_penalty(network())
    with pytest.raises(ValueError, match=r"loraplus_groups: model is without a trainable lora_B"):
        loraplus_groups(network(), lr=1.0)
    with pytest.raises(ValueError, match=r"loraplus_groups: ratio is 0 .* > 0"):
        loraplus_groups(LoRALinear(2, 2, rank=1), lr=1.0, ratio=0)


# --- LoRA+ -----------------------------------------------------------------------------------------------------------


def test_loraplus_groups():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 5), "first": LoRALinear(5, 6, rank=2), "head": nn.Linear(6, 3)})
    groups = loraplus_groups(model, lr=1e-3, ratio=8, weight_decay=0.1)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates) == 5
    assert rates[id(model["first"].lora_A)] == (1e-3, 0.1)
    assert rates[id(model["first"].lora_B)] == (8e-3, 0.1)
    assert rates[id(model["embed"].weight)] == (1e-3, 0.1)
    assert rates[id(model["head"].weight)] == (1e-3, 0.1)
    assert rates[id(model["head"].bias)] == (8e-3, 0.0)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([group | {"weight_decay": 0.0} for group in groups])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - p).abs().max().item() for name, p in model.named_parameters()}
    assert moved["first.lora_B"] == pytest.approx(8 * moved["first.lora_A"], rel=1e-4)
    assert moved["first.weight"] == moved["first.bias"] == 0


def test_loraplus_rates_are_those_of_peft():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    def rates(groups, model):
        of = {id(p): group["lr"] for group in groups for p in group["params"]}
        return sorted((of[id(p)], p.shape) for p in model.parameters() if p.requires_grad)

    for options in ({"bias": "all"}, {"use_dora": True, "modules_to_save": ["2"]}):
        base = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 6), nn.Linear(6, 3))
        targets = ["1"] if "use_dora" in options else ["0", "1"]
        config = peft.LoraConfig(target_modules=targets, r=2, **options)
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        ours = pyfastpeft.adapt(base, config)
        optimizer = create_loraplus_optimizer(theirs, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=8)
        for model in (ours, theirs):
            groups = loraplus_groups(model, lr=1e-3, ratio=8)
            assert rates(groups, model) == rates(optimizer.param_groups, theirs)


# --- transformers.Trainer --------------------------------------------------------------------------------------------


def llama():
    """A tiny Llama with LoRA on its query and value projections, B away from zero."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    return pyfastpeft.adapt(model, pyfastpeft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))


def rows(count, choices=1):
    """Tokens with labels on a random tail of each row, the tails of unequal lengths."""
    found = []
    for _ in range(count * choices):
        tokens = torch.randint(32, (8,))
        labels = tokens.clone()
        labels[: torch.randint(1, 6, ())] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


def trained(model, data, folder, batch, accumulation, **arguments):
    """The adapters' values after Trainer's three steps, in order of the data."""
    transformers = pytest.importorskip("transformers")
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    arguments.setdefault(
        "optimizers", (torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05), None)
    )
    transformers.Trainer(model, options, train_dataset=data, **arguments).train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def by_hand(model, batches, loss_of, optimizer=None):
    """The same in a plain loop."""
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    model.train()
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def collated(data, size):
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    return [{key: torch.stack([row[key] for row in piece]) for key in piece[0]} for piece in pieces]


def assert_equal(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_trainer_with_tfew(tmp_path):
    data = rows(6, choices=3)
    for filler in (5, 11):  # two examples have only two choices
        data[filler]["labels"] = torch.full((8,), -100)

    def loss_of(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits.unflatten(0, (-1, 3))
        return tfew_loss(logits, batch["labels"].unflatten(0, (-1, 3)), causal=True)

    expected = by_hand(llama(), collated(data, 6), loss_of)
    loss = TFewLoss(num_choices=3, causal=True)
    assert_equal(trained(llama(), data, tmp_path, 6, 1, compute_loss_func=loss), expected)
    with pytest.raises(ValueError, match="6 rows; it must be of 4 rows for each example"):
        trained(llama(), data, tmp_path, 6, 1, compute_loss_func=TFewLoss(num_choices=4, causal=True))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_with_a_penalty_once_a_step(tmp_path, accumulation):
    data = rows(12)

    def loss_of(model, batch):
        near = sum((p - start).square().sum() for p, start in zip(model.parameters(), starts) if p.requires_grad)
        pairs = [
            list(layer.adapters["default"].parameters()) for layer in model.modules() if hasattr(layer, "adapters")
        ]
        low = sum((1.5 * lora_B @ lora_A).square().sum() for lora_A, lora_B in pairs)
        return model(**batch).loss + 0.5 * near + 0.1 * low

    model = llama()
    starts = [p.detach().clone() for p in model.parameters()]
    expected = by_hand(model, collated(data, 4), loss_of)

    model = llama()
    l2sp = L2SP(model, alpha=1.0)
    regularize(model, lambda: l2sp() + 0.1 * low_rank_penalty(model))
    assert_equal(trained(model, data, tmp_path, 4 // accumulation, accumulation), expected)
    plain = trained(llama(), data, tmp_path, 4 // accumulation, accumulation)
    assert any((plain[name] - value).abs().max() > 1e-4 for name, value in expected.items())


def test_trainer_with_loraplus(tmp_path):
    data = rows(12)
    model = llama()
    optimizer = torch.optim.AdamW(loraplus_groups(model, lr=1e-3, ratio=8))
    found = trained(model, data, tmp_path, 4, 1, optimizers=(optimizer, None))
    model = llama()
    factors = {kind: [p for name, p in model.named_parameters() if kind in name] for kind in ("lora_A", "lora_B")}
    plain = [{"params": factors["lora_A"], "lr": 1e-3}, {"params": factors["lora_B"], "lr": 8e-3}]
    optimizer = torch.optim.AdamW(plain, weight_decay=0.0)
    expected = by_hand(model, collated(data, 4), lambda model, batch: model(**batch).loss, optimizer)
    assert_equal(found, expected)


def test_regularize_in_eval_and_without_a_loss():
    model = llama()
    batch = collated(rows(4), 4)[0]
    plain = model.train()(**batch).loss.item()
    handle = regularize(model, lambda: torch.tensor(2.5))
    assert model(**batch).loss.item() == pytest.approx(plain + 2.5)
    assert model.eval()(**batch).loss.item() == pytest.approx(plain)
    with pytest.raises(RuntimeError, match="regularize: output is without a loss"):
        model.train()(input_ids=batch["input_ids"])
    handle.remove()
    assert model(**batch).loss.item() == pytest.approx(plain)
