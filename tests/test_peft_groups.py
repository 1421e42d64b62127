"""Layers of an accelerated model that share their input read it once, compute what they would alone, keep nothing."""

import copy
import functools
import gc
import io
import threading
import weakref
from collections import Counter

import pytest
import torch
import transformers as tf
from torch import nn

pytest.importorskip("peft")

import peft_harness
from peft import LoraConfig, get_peft_model
from peft_harness import HIDDEN, NAMES, adapted, llama, lora_config, measure, randomise, recorded
from tiny_models import COMMON, MODELS, inputs, loss, output

import pyfastpeft
from pyfastpeft.integrations import peft as integration

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUPED = {"lora_group_forward": 4, "lora_group_backward": 4, "lora_forward": 4, "lora_backward": 4}  # of two blocks
ALONE = {"lora_forward": 14}


@pytest.fixture(autouse=True)
def _sharing(monkeypatch):
    monkeypatch.setattr(integration, "_pays", lambda *args: True)
    yield
    assert pending() is None


def pending():
    return integration._thread.pending


def config(**options):
    return lora_config(llama, target_modules=LINEAR, **options)


def fused(*configs, **options):
    model = adapted(llama, *(configs or [config()]), **options)
    pyfastpeft.accelerate(model)
    return model


def ran(calls):
    return dict(Counter(op for op, _ in calls))


differential = functools.partial(peft_harness.differential, count=ran)


def block(model, index=0):
    return model.base_model.model.model.layers[index]


def embeds():
    return torch.randn(3, 5, HIDDEN)


def alone(layer, x):
    """What a layer computes by itself."""
    twin = copy.deepcopy(layer)
    twin.__class__ = integration._STOCK[type(layer)]
    return twin(x)


# --- what is computed ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_groups_obey_the_error_rule(dtype):
    differential(adapted(llama, config(), dtype=dtype, autocast_adapter_dtype=False), GROUPED)


def test_float32_adapters_on_a_bfloat16_base():
    differential(adapted(llama, config(), dtype=torch.bfloat16), GROUPED)


def test_autocast():
    differential(adapted(llama, config()), GROUPED, autocast=torch.bfloat16)


def test_everything_trains():
    differential(adapted(llama, config()).requires_grad_(True), GROUPED)


def test_different_ranks_and_scalings():
    ranks = {"k_proj": 2, "up_proj": 9}
    differential(adapted(llama, config(rank_pattern=ranks, alpha_pattern={"v_proj": 3})), GROUPED)


def test_some_layers_of_a_block():
    """q and v are a group of two; k is no adapted layer, gate alone none."""
    model = adapted(llama, lora_config(llama, target_modules=["q_proj", "v_proj", "gate_proj"]))
    counts = {"lora_group_forward": 2, "lora_group_backward": 2, "lora_forward": 2, "lora_backward": 2}
    differential(model, counts)


def test_dropout_keeps_a_mask_for_each_layer():
    model = adapted(llama, config(lora_dropout=0.3))
    differential(model, GROUPED)
    differential(model, {"lora_forward": 14, "lora_backward": 14}, train=True)


GATED_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
FAMILIES = {
    **{name: known.make for name, known in MODELS.items() if name != "tree"},
    "gated t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**GATED_T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    ),
    "decoding bert": lambda: tf.BertLMHeadModel(tf.BertConfig(**COMMON, is_decoder=True, add_cross_attention=True)),
}
LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "gemma2"}
GROUPS = dict.fromkeys(FAMILIES, 2) | dict.fromkeys(LLAMA_LIKE, 4) | {"gated t5": 4}
GROUPS |= dict.fromkeys(("gpt2", "gpt_neox", "t5", "bart"), 0)


def test_modules_that_take_no_input():
    """Swin's tables of positions."""
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2}
    model = get_peft_model(tf.SwinModel(tf.SwinConfig(**sizes)), LoraConfig(target_modules="all-linear"))
    assert len(pyfastpeft.accelerate(model).groups) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """Outputs and gradients are those without groups; what is computed ahead is always taken, so nothing is in vain."""
    kinds = "(q|k|v|query|key|value|[qkv]_lin|wi_[01])"
    target = rf".*\.({kinds}|({kinds[1:-1]}|gate|up)_proj|c_attn|query_key_value|wi)"
    model = get_peft_model(FAMILIES[name](), LoraConfig(r=3, lora_alpha=5, target_modules=target))
    randomise(model)
    model.eval()
    given = inputs(model.base_model.model)
    if name == "decoding bert":
        given["encoder_hidden_states"] = torch.randn(2, 4, 32)
    report = pyfastpeft.accelerate(model)
    assert len(report.groups) == GROUPS[name]
    grouped = {layer for _, names in report.groups for layer in names}
    counts = []
    for sharing in (True, False):
        with pytest.MonkeyPatch.context() as patch, recorded() as calls:
            patch.setattr(integration, "_pays", lambda *args: sharing)  # noqa: B023
            model.zero_grad()
            value = loss(model, given)
            value.backward()
        counts.append(ran(calls))
        found = [value.detach(), output(model, given), *(p.grad for p in model.parameters() if p.requires_grad)]
        if sharing:
            expected = found
    torch.testing.assert_close(found, expected)
    together = sum(len(names) for _, names in report.groups)
    assert counts[0].get("lora_group_forward", 0) == len(report.groups), grouped
    assert counts[0].get("lora_forward", 0) == counts[1]["lora_forward"] - together


def test_generation():
    model = fused()
    prompt = torch.randint(61, (2, 4))
    with recorded() as calls:
        tokens = model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False)
    assert ran(calls)["lora_group_forward"] == 4 * 3
    pyfastpeft.restore(model)
    assert torch.equal(tokens, model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False))


# --- report, restore, copies ---


def test_the_report_tells_of_groups():
    model = adapted(llama, config())
    report = pyfastpeft.accelerate(model)
    prefix = "base_model.model.model.layers"
    attention, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    paths = [
        (f"{prefix}.{i}.{part}", names) for i in (0, 1) for part, names in (("self_attn", attention), ("mlp", mlp))
    ]
    assert report.groups == paths
    lines = [line.split("  ") for line in str(report).splitlines() if "read their input once" in line]
    assert [(line[0].strip(), line[-1]) for line in lines] == [("2", f"{prefix}.0.mlp"), ("2", f"{prefix}.0.self_attn")]
    assert pyfastpeft.accelerate(model).groups == paths


def test_restore_undoes_groups():
    model = adapted(llama, config())
    attributes = [dict(module.__dict__) for module in model.modules()]
    pyfastpeft.accelerate(model)
    layer = block(model).self_attn.q_proj
    assert layer in integration._GROUPS
    pyfastpeft.restore(model)
    assert layer not in integration._GROUPS
    assert [dict(module.__dict__) for module in model.modules()] == attributes


def test_models_die_with_their_last_reference():
    model = fused()
    model(inputs_embeds=embeds())
    died = weakref.ref(block(model).self_attn.q_proj)
    gc.disable()
    try:
        del model
        assert died() is None
    finally:
        gc.enable()


def test_copies_and_pickles_run():
    model, x = fused(), embeds()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = model(inputs_embeds=x).logits
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(twin(inputs_embeds=x).logits, expected)
        assert len(pyfastpeft.accelerate(twin).groups) == 4
        with recorded() as calls:
            torch.testing.assert_close(twin(inputs_embeds=x).logits, expected)
        assert ran(calls) == {"lora_group_forward": 4, "lora_forward": 4}


# --- states in which layers run alone ---


def test_disabled_merged_switched_mixed():
    model, x = fused(config(), config(r=7)), embeds()

    def counts(**options):
        with recorded() as calls, torch.no_grad():
            model(inputs_embeds=x, **options)
        return ran(calls)

    forward = {"lora_group_forward": 4, "lora_forward": 4}
    assert counts() == forward
    with model.disable_adapter():
        assert counts() == {}
    model.set_adapter(NAMES[1])
    assert counts() == forward
    model.base_model.set_adapter(list(NAMES[:2]))
    assert counts() == {"lora_forward": 28}
    model.set_adapter(NAMES[0])
    assert counts(adapter_names=[NAMES[0], "__base__", NAMES[1]]) == {"multi_lora_forward": 14}
    model.merge_adapter()
    assert counts() == {}
    model.unmerge_adapter()
    assert counts() == forward
    block(model).self_attn.k_proj.merge()
    assert counts() == {"lora_group_forward": 3, "lora_forward": 6}
    block(model).self_attn.k_proj.unmerge()
    for module in block(model).self_attn.children():
        handle = module.register_forward_hook(lambda *args: None)
        assert counts() == ({"lora_group_forward": 3, "lora_forward": 7} if module is not o_proj(model) else forward)
        handle.remove()
    with torch.inference_mode():
        assert counts() == ALONE
    assert counts() == forward


def o_proj(model):
    return block(model).self_attn.o_proj


def test_dora_and_other_dtypes_of_adapters_run_alone():
    model = adapted(llama, config(use_dora=True))
    with recorded() as calls, torch.no_grad():
        pyfastpeft.accelerate(model)
        model(inputs_embeds=embeds())
    assert ran(calls) == {"dora_norm": 14, "dora_forward": 14}
    model = fused()
    for part in (block(model).self_attn.k_proj.lora_A, block(model).self_attn.k_proj.lora_B):
        part.to(torch.bfloat16)
    with recorded() as calls, torch.no_grad():
        model(inputs_embeds=embeds())
    assert ran(calls) == {"lora_group_forward": 3, "lora_forward": 7}


def test_a_backend_that_is_best_for_one_layer_and_serves_no_group_serves_layers_alone(monkeypatch):
    model = fused()
    for name in ("reference", "cpu"):
        with recorded() as calls, torch.no_grad(), pyfastpeft.use_backend(name):
            model(inputs_embeds=embeds())
        assert ran(calls) == {"lora_group_forward": 4, "lora_forward": 4}
    rows = [row for row in integration.dispatch.TABLE["lora_group_forward"] if row.backend != "cpu"]
    monkeypatch.setitem(integration.dispatch.TABLE, "lora_group_forward", rows)
    with recorded() as calls, torch.no_grad(), pyfastpeft.use_backend("cpu"):
        model(inputs_embeds=embeds())
    assert ran(calls) == ALONE


def test_inference_on_a_cpu_runs_alone(monkeypatch):
    monkeypatch.undo()
    model, counts = fused(), []
    for gradients in (True, False):
        with recorded() as calls, torch.set_grad_enabled(gradients):
            model(inputs_embeds=embeds())
        counts.append(ran(calls))
    assert counts == [{"lora_group_forward": 4, "lora_forward": 4}, ALONE]
    model.requires_grad_(False)
    with recorded() as calls:
        model(inputs_embeds=embeds())
    assert ran(calls) == ALONE


# --- nothing stale ---


CHANGES = {
    "nothing": (lambda layer, x: None, True),
    "x in place": (lambda layer, x: x.data.add_(0) is x.mul_(2), False),
    "x through a view": (lambda layer, x: x.detach()[0].add_(1), False),
    "lora_B": (lambda layer, x: layer.lora_B[NAMES[0]].weight.mul_(2), False),
    "the weight": (lambda layer, x: layer.base_layer.weight.mul_(2), False),
    "another lora_A": (lambda layer, x: replace(layer.lora_A[NAMES[0]]), False),
    "the scaling": (lambda layer, x: layer.set_scale(NAMES[0], 3.0), False),
    "the adapter": (lambda layer, x: layer.set_adapter(NAMES[1]), False),
    "what trains": (lambda layer, x: layer.lora_A[NAMES[0]].weight.requires_grad_(False), False),
}


def replace(linear):
    linear.weight = nn.Parameter(linear.weight * 2)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("gradients", [True, False])
def test_what_changes_between_two_layers_is_seen(change, gradients):
    attention, x = block(fused(config(), config(r=7))).self_attn, embeds()
    change, taken = CHANGES[change]
    with torch.set_grad_enabled(gradients):
        attention.q_proj(x)
        with torch.no_grad():
            change(attention.k_proj, x)
        with recorded() as calls:
            key = attention.k_proj(x)
        assert (not calls) == taken
        torch.testing.assert_close(key, alone(attention.k_proj, x))
        attention.v_proj(x)
        if not taken:
            attention.o_proj(embeds().reshape(3, 5, -1))
    assert attention.k_proj.lora_A[NAMES[0]].weight.grad is None


def test_outputs_are_written_without_each_other():
    attention, x = block(fused()).self_attn, embeds().requires_grad_()
    gradients = []
    for call in (lambda layer: layer(x), lambda layer: alone(layer, x)):
        query, key, value = (
            call(layer).mul_(2).sin() for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        loss = query.square().sum() + (key * value).sum()
        gradients.append((loss.detach(), *torch.autograd.grad(loss, x)))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("way", ["grad mode", "autocast", "requires_grad", "equal x", "view of x"])
def test_what_changes_around_two_layers_is_seen(way):
    attention, x = block(fused()).self_attn, embeds()
    with torch.no_grad():
        attention.q_proj(x)
    if way == "autocast":
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert attention.k_proj(x).dtype == torch.bfloat16
    elif way == "grad mode":
        assert attention.k_proj(x).requires_grad
    else:
        with torch.no_grad():
            given = {"requires_grad": x.requires_grad_(), "equal x": x.clone(), "view of x": x[:]}[way]
            with recorded() as calls:
                key = attention.k_proj(given)
            assert calls
        torch.testing.assert_close(key, alone(attention.k_proj, x))
    attention.o_proj(embeds())


def test_a_layer_called_alone_stops_its_group():
    model, x = fused(), embeds()
    attention = block(model).self_attn
    with torch.no_grad():
        first = attention.q_proj(x)
        assert set(pending().outputs) == {attention.k_proj, attention.v_proj}
        with recorded() as calls:
            assert torch.equal(attention.q_proj(x), first)
        assert ran(calls) == {"lora_forward": 1}
        assert pending() is None
        with recorded() as calls:
            model(inputs_embeds=x)
        assert ran(calls) == {"lora_group_forward": 3, "lora_forward": 7}
        pyfastpeft.accelerate(model)
        with recorded() as calls:
            model(inputs_embeds=x)
        assert ran(calls) == {"lora_group_forward": 4, "lora_forward": 4}


def test_what_is_pending_goes_with_x_or_with_the_next_layer():
    attention = block(fused()).self_attn
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            x = embeds()
            attention.q_proj(x)
            outputs = list(map(weakref.ref, pending().outputs.values()))
            attention.o_proj(embeds())
            assert pending() is None
            assert [output() for output in outputs] == [None, None]
    integration._GROUPS[attention.q_proj].idle = False
    with torch.no_grad():
        attention.q_proj(x)
        outputs = list(map(weakref.ref, pending().outputs.values()))
        del x
        assert [output() for output in outputs] == [None, None]
        attention.o_proj(embeds())


def test_an_exception_between_two_layers_leaves_nothing_that_is_used():
    model, x = fused(), embeds()
    expected = model(inputs_embeds=x).logits
    attention = block(model).self_attn

    def fail(*args):
        raise RuntimeError("in between")

    attention.k_proj.forward = fail
    with pytest.raises(RuntimeError, match="in between"):
        model(inputs_embeds=x)
    del attention.k_proj.forward
    torch.testing.assert_close(model(inputs_embeds=x).logits, expected)


def test_threads_take_their_own():
    model, failures = fused(), []
    xs = [embeds() for _ in range(4)]
    with torch.no_grad():
        expected = [model(inputs_embeds=x).logits for x in xs]

    def work(x, wanted):
        try:
            with torch.no_grad():
                for _ in range(10):
                    torch.testing.assert_close(model(inputs_embeds=x).logits, wanted)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=given) for given in zip(xs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


BROKEN = {
    "y of the second layer": ("lora_group_forward", lambda args: args[8][1].mul_(1.01)),
    "dX": ("lora_group_backward", lambda args: args[9].mul_(1.001)),
    "dA of the last layer": ("lora_group_backward", lambda args: args[10][-1].neg_()),
    "dB of the first layer": ("lora_group_backward", lambda args: args[11][0].mul_(1.01)),
}


@pytest.mark.parametrize("kernel", BROKEN)
def test_a_broken_kernel_is_noticed(kernel):
    name, change = BROKEN[kernel]

    def wrap(op, function):
        def call(*args):
            function(*args)
            if op == name:
                change(args)

        return call

    with peft_harness.rows_replaced(wrap), pytest.raises(AssertionError, match=r"error .* PEFT's"):
        differential(adapted(llama, config()), GROUPED)


# --- checkpointing, compilation ---


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = fused()
    model.train()
    x, cotangent = embeds(), torch.randn(3, 5, 61)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        with recorded() as calls:
            results.append(measure(model, x, cotangent))
        assert ran(calls)["lora_group_forward"] == (8 if checkpointing else 4)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_compiled_layers_run_alone():
    model, x = fused(), embeds()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs_embeds=x).logits, model(inputs_embeds=x).logits)
