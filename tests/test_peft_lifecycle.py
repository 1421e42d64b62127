"""An accelerated model lives as PEFT's does: reports, restores, saves, merges, switches, checkpoints and compiles."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

pytest.importorskip("peft")

from peft import LoHaConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from peft_harness import (
    HIDDEN,
    MLP,
    NAMES,
    adapted,
    gpt2,
    ia3_config,
    llama,
    lora_config,
    measure,
    randomise,
    recorded,
)

import pyfastpeft
from pyfastpeft.integrations.peft import FusedLoraLinear

RED, GREEN, BLUE = NAMES


def mlp(*configs, **options):
    return adapted(MLP, *(configs or [lora_config(MLP)]), **options)


def embeds(*batch):
    return torch.randn(*(batch or (3, 5)), HIDDEN)


def run(model, x, **options):
    """The output, and the names of the raw ops that ran."""
    with recorded() as calls, torch.no_grad():
        out = model(inputs_embeds=x, **options)
    return (out if isinstance(out, torch.Tensor) else out.logits), [op for op, _ in calls]


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def classes(model):
    return [type(module) for module in model.modules()]


# --- accelerate, restore, report ---


def test_report_names_what_was_replaced_and_why_the_rest_was_not():
    model = adapted(MLP, lora_config(MLP, target_modules=["up", "down", "embed"]))
    report = pyfastpeft.accelerate(model)
    prefix = "base_model.model"
    kind = "lora.Linear on nn.Linear"
    assert report.replaced == [(f"{prefix}.up", kind), (f"{prefix}.down", kind)]
    assert report.skipped == [(f"{prefix}.embed", "lora.Embedding", "no fused kernel for layers of this type")]
    ids = torch.randint(0, 61, (2, 4))
    assert close(model(input_ids=ids), stock_of(model)(input_ids=ids))


def stock_of(model):
    stock = copy.deepcopy(model)
    pyfastpeft.restore(stock)
    return stock


def test_report_prints_one_line_for_each_kind():
    report = pyfastpeft.accelerate(adapted(gpt2, lora_config(gpt2, target_modules=["c_attn", "c_fc", "wte"])))
    header, *lines = str(report).splitlines()
    assert header.split() == ["layers", "kind", "forward", "pass", "for", "example"]
    assert len(lines) == 2
    assert len(report.replaced) == 4
    fused = next(line for line in lines if "fused  " in line)
    assert fused.split("  ")[0].strip() == "4"
    assert "lora.Linear on Conv1D" in fused
    assert "base_model.model.transformer.h.0.attn.c_attn" in fused


def test_ia3_layers_are_named():
    report = pyfastpeft.accelerate(adapted(MLP, ia3_config(MLP)))
    assert [kind for _, kind in report.replaced] == ["ia3.Linear on nn.Linear"] * 2


def test_restore_undoes_it_exactly():
    model = mlp()
    x, before = embeds(), classes(model)
    attributes = [dict(module.__dict__) for module in model.modules()]
    expected = model(inputs_embeds=x)
    pyfastpeft.accelerate(model)
    assert FusedLoraLinear in classes(model)
    assert run(model, x)[1] == ["lora_forward"] * 2
    assert pyfastpeft.restore(model) == 2
    assert classes(model) == before
    assert [dict(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(model(inputs_embeds=x), expected)
    assert pyfastpeft.restore(model) == 0


def test_accelerating_twice_changes_nothing_and_picks_up_new_layers():
    model = mlp(lora_config(MLP, target_modules=["up"]))
    assert len(pyfastpeft.accelerate(model).replaced) == 1
    once = classes(model)
    assert len(pyfastpeft.accelerate(model).replaced) == 1
    assert classes(model) == once
    model.add_adapter(GREEN, lora_config(MLP))
    assert len(pyfastpeft.accelerate(model).replaced) == 2


def test_one_instance_alone_is_changed():
    one, other = mlp(), mlp()
    forward = lora.Linear.forward
    pyfastpeft.accelerate(one)
    assert lora.Linear.forward is forward
    assert run(one, embeds())[1] == ["lora_forward"] * 2
    assert run(other, embeds())[1] == []


def test_strict_raises_where_nothing_can_be_replaced():
    biased = mlp(lora_config(MLP, lora_bias=True))
    with pytest.raises(ValueError, match=r"nothing can be replaced.*(?s:.)*'red' has a bias \(lora_bias=True"):
        pyfastpeft.accelerate(biased)
    assert pyfastpeft.accelerate(biased, strict=False).replaced == []
    with pytest.raises(ValueError, match="PEFT has adapted no layer"):
        pyfastpeft.accelerate(MLP())
    for function in (pyfastpeft.accelerate, pyfastpeft.restore):
        with pytest.raises(TypeError, match=r"model is a dict; it must be a torch\.nn\.Module"):
            function({})


def test_what_else_is_skipped():
    class Odd(nn.Linear):
        pass

    def reason(change, **options):
        model = mlp(lora_config(MLP, target_modules=["up"], **options))
        change(model.base_model.model.up)
        [(_, _, why)] = pyfastpeft.accelerate(model, strict=False).skipped
        return why

    def parametrised(layer):
        nn.utils.parametrizations.weight_norm(layer.base_layer)

    def hooked(layer):
        layer.base_layer.register_forward_hook(lambda *args: None)

    def patched(layer):
        layer.forward = layer.forward

    def subclassed(layer):
        layer.base_layer.__class__ = Odd

    def integer(layer):
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)

    def dropped(layer):
        layer.lora_dropout[RED] = nn.AlphaDropout(0.1)

    def hot_swapped(layer):
        layer.scaling[RED] = torch.tensor(2.0)

    assert "Odd, not exactly nn.Linear" in reason(subclassed)
    assert "not exactly nn.Linear" in reason(parametrised)
    assert reason(hooked) == "its base layer has hooks or a forward of its own"
    assert reason(patched) == "it has a forward of its own, set on the instance"
    assert "not an ordinary floating-point matrix" in reason(integer)
    assert reason(lambda layer: None, lora_bias=True) == "adapter 'red' has a bias (lora_bias=True)"
    assert "not nn.Dropout with p < 1" in reason(dropped)
    assert "a tensor as scaling" in reason(hot_swapped)


def test_mixed_models():
    """LoRA beneath LoHa is covered, LoRA on top of LoHa is not."""
    for first, second in (("lora", "loha"), ("loha", "lora")):
        configs = {"lora": lora_config(MLP, target_modules=["up"]), "loha": LoHaConfig(target_modules=["up"])}
        model = get_peft_model(MLP(), configs[first], RED, mixed=True)
        model.add_adapter(GREEN, configs[second])
        model.set_adapter([RED, GREEN])
        randomise(model)
        x = embeds()
        expected = run(model, x)[0]
        report = pyfastpeft.accelerate(model, strict=False)
        out, ops = run(model, x)
        assert close(out, expected)
        skipped = [(kind, reason) for _, kind, reason in report.skipped]
        assert ("loha.Linear", "no fused kernel for layers of this type") in skipped
        if first == "lora":
            assert report.replaced == [("base_model.model.up.base_layer", "lora.Linear on nn.Linear")]
            assert ops == ["lora_forward"]
        else:
            assert ("lora.Linear", "its base layer is loha.Linear, not exactly nn.Linear or Conv1D") in skipped
            assert ops == []


def test_injected_adapters():
    model = inject_adapter_in_model(lora_config(MLP), MLP())
    randomise(model)
    x = embeds()
    expected = run(model, x)[0]
    assert len(pyfastpeft.accelerate(model).replaced) == 2
    out, ops = run(model, x)
    assert ops == ["lora_forward"] * 2
    assert close(out, expected)


def test_importing_pyfastpeft_imports_neither_peft_nor_transformers():
    code = (
        "import sys, pyfastpeft; assert not {'peft', 'transformers'} & set(sys.modules);"
        "pyfastpeft.accelerate, pyfastpeft.restore; assert 'peft' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_peft_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['peft'] = None\nimport pyfastpeft\n"
        "try:\n    pyfastpeft.accelerate\nexcept ImportError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "pip install 'pyfastpeft[hf]'" in out


# --- PEFT's own methods ---


@pytest.fixture
def pair():
    """A stock model with two adapters, and an accelerated copy."""
    stock = mlp(lora_config(MLP), lora_config(MLP, r=6, lora_alpha=3))
    ours = copy.deepcopy(stock)
    pyfastpeft.accelerate(ours)
    return stock, ours


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_state_dict_copies_and_pickles(pair):
    stock, ours = pair
    x = embeds()
    assert same_state(stock, ours)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert same_state(twin, stock)
        out, ops = run(twin, x)
        assert ops == ["lora_forward"] * 2
        assert torch.equal(out, run(ours, x)[0])


def test_save_and_load(pair, tmp_path):
    stock, ours = pair
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    for name in (RED, GREEN):
        one, other = (tmp_path / side / name / "adapter_model.safetensors" for side in ("stock", "ours"))
        assert one.read_bytes() == other.read_bytes()
    base = copy.deepcopy(stock).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours" / RED)
    pyfastpeft.accelerate(loaded)
    x = embeds()
    out, ops = run(loaded, x)
    assert ops == ["lora_forward"] * 2
    assert torch.equal(out, run(ours, x)[0])


def test_merging_is_bitwise_that_of_peft(pair):
    stock, ours = pair
    x = embeds()
    for model in pair:
        model.merge_adapter()
    assert same_state(stock, ours)
    out, ops = run(ours, x)
    assert ops == []
    assert torch.equal(out, run(stock, x)[0])
    for model in pair:
        model.unmerge_adapter()
    assert same_state(stock, ours)
    assert run(ours, x)[1] == ["lora_forward"] * 2
    stock, ours = stock.merge_and_unload(), ours.merge_and_unload()
    assert classes(stock) == classes(ours)
    assert same_state(stock, ours)


def test_disabling_switching_adding_and_deleting(pair):
    stock, ours = pair
    x = embeds()

    def agree(ops):
        out, ran = run(ours, x)
        assert ran == ops
        assert close(out, run(stock, x)[0])
        trainable = [{n for n, p in model.named_parameters() if p.requires_grad} for model in pair]
        assert trainable[0] == trainable[1]
        return out

    with stock.disable_adapter(), ours.disable_adapter():
        base = agree([])
    red = agree(["lora_forward"] * 2)
    for model in pair:
        model.set_adapter(GREEN)
    green = agree(["lora_forward"] * 2)
    assert not close(red, green)
    assert not close(red, base)
    for model in pair:
        torch.manual_seed(3)
        model.add_adapter(BLUE, lora_config(MLP))
        model.set_adapter(BLUE)
        randomise(model)
    agree(["lora_forward"] * 2)
    for model in pair:
        model.delete_adapter(BLUE)
        model.set_adapter(RED)
    agree(["lora_forward"] * 2)
    for model in pair:
        model.base_model.set_adapter([])
    agree([])


def test_adapters_of_both_kinds_on_one_layer():
    """DoRA beside LoRA, as they are switched: together they run PEFT's forward."""
    stock = mlp(lora_config(MLP, use_dora=True), lora_config(MLP))
    ours = copy.deepcopy(stock)
    assert len(pyfastpeft.accelerate(ours).replaced) == 2
    x = embeds()
    dora = ["dora_norm", "dora_forward"] * 2
    for active, ops in ((RED, dora), (GREEN, ["lora_forward"] * 2), ([RED, GREEN], [])):
        for model in (stock, ours):
            model.base_model.set_adapter(active)
        out, ran = run(ours, x)
        assert ran == ops
        assert close(out, run(stock, x)[0])


def test_dora_with_dropout_in_training_keeps_pefts_forward():
    model = mlp(lora_config(MLP, use_dora=True, lora_dropout=0.5)).train()
    x = embeds()
    torch.manual_seed(0)
    expected = run(model, x)[0]
    pyfastpeft.accelerate(model)
    torch.manual_seed(0)
    out, ran = run(model, x)
    assert ran == []
    assert torch.equal(out, expected)
    assert run(model.eval(), x)[1] == ["dora_norm", "dora_forward"] * 2


# --- states that fall back, at the call ---


@pytest.mark.parametrize("path", ["base_layer", "lora_A.red", "lora_B.red", "lora_dropout.red"])
@pytest.mark.parametrize("way", ["pre-hook", "hook", "backward hook", "forward"])
def test_what_intercepts_an_inner_module_is_heard(pair, path, way):
    _, model = pair
    inner, heard = model.base_model.model.up.get_submodule(path), []

    def listen(*args):
        heard.append(path)

    if way == "pre-hook":
        inner.register_forward_pre_hook(listen)
    elif way == "hook":
        inner.register_forward_hook(listen)
    elif way == "backward hook":
        inner.register_full_backward_hook(listen)
    else:
        plain = inner.forward
        inner.forward = lambda x: (listen(), plain(x))[1]
    with recorded() as calls:
        model(inputs_embeds=embeds().requires_grad_()).sum().backward()
    assert heard == [path]
    assert [op for op, _ in calls] == ["lora_forward", "lora_backward"]  # the other layer


def test_what_intercepts_a_magnitude_is_heard():
    model, heard = mlp(lora_config(MLP, use_dora=True)), []
    model.base_model.model.up.lora_magnitude_vector["red"].register_forward_hook(lambda *_: heard.append("red"))
    pyfastpeft.accelerate(model)
    assert run(model, embeds())[1] == ["dora_norm", "dora_forward"]  # the other layer
    assert heard == ["red"]


def test_dtypes_that_peft_casts_and_that_the_kernels_do_not():
    """float64 adapters on a float32 base."""
    model = mlp(ia3_config(MLP))
    loras = mlp()
    x = embeds()
    for m, name in ((model, "ia3_l"), (loras, "lora_")):
        for key, parameter in m.named_parameters():
            if name in key:
                parameter.data = parameter.data.double()
        expected = run(m, x)[0]
        pyfastpeft.accelerate(m)
        out, ops = run(m, x)
        assert ops == []
        assert torch.equal(out, expected)


def test_inputs_of_another_dtype_fail_as_they_do_in_peft(pair):
    for model in pair:
        with pytest.raises(RuntimeError, match="dtype"):
            model(inputs_embeds=embeds().bfloat16())


@pytest.mark.parametrize("config", [lora_config, ia3_config])
def test_inputs_that_are_not_dense_take_pefts_forward_pass(config):
    stock = mlp(config(MLP)).base_model.model.up
    ours = copy.deepcopy(stock)
    pyfastpeft.accelerate(ours)
    x = embeds()[0]
    inputs = [x.to_sparse(), x.to_sparse_csr()]
    if config is lora_config:  # PEFT's IA3 takes no nested tensors
        inputs.append(torch.nested.nested_tensor([x[:2], x[2:]]))
    for given in inputs:
        with torch.no_grad(), recorded() as calls:
            out, expected = ours(given), stock(given)
        assert calls == []
        assert all(torch.equal(a, b) for a, b in zip(out.unbind(), expected.unbind()))


def test_input_casting_turned_off():
    model = adapted(MLP, lora_config(MLP), dtype=torch.bfloat16)  # float32 adapters
    pyfastpeft.accelerate(model)
    x = embeds().bfloat16()
    assert run(model, x)[1] == ["lora_forward"] * 2
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(inputs_embeds=x)


# --- mixed batches ---


def test_mixed_batches_are_refused_as_by_peft(pair):
    _, ours = pair
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        ours(inputs_embeds=embeds(), adapter_names=[RED])
    with pytest.raises(ValueError, match="non-existing adapter"):
        ours(inputs_embeds=embeds(), adapter_names=[RED, BLUE, RED])
    ours.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        ours(inputs_embeds=embeds(), adapter_names=[RED, GREEN, RED])


def test_mixed_batches_in_disabled_states_and_beside_dora():
    stock = mlp(lora_config(MLP), lora_config(MLP), lora_config(MLP, lora_bias=True))
    ours = copy.deepcopy(stock)
    pyfastpeft.accelerate(ours)
    x = embeds()
    for names, ops in (([RED, GREEN, RED], ["multi_lora_forward"] * 2), ([RED, BLUE, RED], [])):
        out, ran = run(ours, x, adapter_names=names)
        assert ran == ops
        assert close(out, run(stock, x, adapter_names=names)[0])
        with stock.disable_adapter(), ours.disable_adapter():
            out, ran = run(ours, x, adapter_names=names)
            assert ran == []
            assert torch.equal(out, run(stock, x, adapter_names=names)[0])


def test_a_mixed_batch_of_a_layer_in_training_mode_drops():
    layer = mlp(lora_config(MLP, lora_dropout=0.5), lora_config(MLP)).base_model.model.up
    model = nn.ModuleList([layer]).train()
    pyfastpeft.accelerate(model)
    x = embeds()
    with recorded() as calls:
        torch.manual_seed(1)
        out = layer(x, adapter_names=[RED, GREEN, RED])
    assert calls == []
    pyfastpeft.restore(model)
    torch.manual_seed(1)
    assert torch.equal(out, layer(x, adapter_names=[RED, GREEN, RED]))


def test_mixed_batches_see_every_change_of_the_adapters(pair):
    """Also those behind the back of version counters, such as PEFT's hot-swapping makes."""
    stock, ours = pair
    x, names = embeds(), [RED, GREEN, "__base__"]
    seen = [run(ours, x, adapter_names=names)[0]]
    for change in (
        lambda model: model.base_model.model.up.lora_B[RED].weight.data.mul_(2),
        lambda model: model.base_model.model.up.set_scale(RED, 3.0),
        lambda model: model.load_state_dict({k: v.flip(-1) for k, v in model.state_dict().items()}),
    ):
        for model in pair:
            change(model)
        seen.append(run(ours, x, adapter_names=names)[0])
        assert close(seen[-1], run(stock, x, adapter_names=names)[0])
        assert not close(seen[-1], seen[-2])


@torch.no_grad()
def test_mixed_batches_see_changes_of_the_adapters_also_after_a_call_that_raised(pair):
    """PEFT then leaves the layers its hooks with the names that it was given."""
    from pyfastpeft.integrations import peft as integration

    def fail(*args):
        raise InterruptedError

    x, names, seen = embeds(), [RED, GREEN, "__base__"], []
    for scale in (1, 2, 3):
        for model in pair:
            model.base_model.model.up.lora_B[RED].weight.data.mul_(scale)
            hook = model.base_model.model.register_forward_hook(fail)
            with pytest.raises(InterruptedError):
                model(inputs_embeds=x, adapter_names=names)
            hook.remove()
        expected, out = (run(model, x, adapter_names=names)[0] for model in pair)
        assert close(out, expected)
        seen.append(out)
    assert not close(seen[0], seen[1])
    assert not close(seen[1], seen[2])
    assert not integration._STACKS


def test_generating_with_a_mixed_batch_stacks_the_adapters_once(monkeypatch):
    from pyfastpeft.integrations import peft as integration

    model = adapted(llama, lora_config(llama), lora_config(llama, r=7))
    options = {"max_new_tokens": 6, "do_sample": False, "adapter_names": [RED, "__base__", GREEN]}
    ids = torch.randint(0, 61, (3, 4))
    expected = model.generate(input_ids=ids, **options)
    pyfastpeft.accelerate(model)
    stacks, stack = [], integration._stack
    monkeypatch.setattr(integration, "_stack", lambda *args: stacks.append(stack(*args)) or stacks[-1])
    with recorded() as calls:
        out = model.generate(input_ids=ids, **options)
    assert torch.equal(out, expected)
    assert [op for op, _ in calls] == ["multi_lora_forward"] * 36  # 6 layers, 6 steps
    assert len(stacks) == 6
    assert not integration._STACKS  # gone with the call
    with torch.inference_mode():
        model(input_ids=ids, adapter_names=options["adapter_names"])
    model(input_ids=ids, adapter_names=options["adapter_names"]).logits.sum().backward()


def test_a_list_of_names_that_changes_while_a_mixed_batch_is_generated():
    stock = adapted(llama, lora_config(llama), lora_config(llama), lora_config(llama))
    ours = copy.deepcopy(stock)
    pyfastpeft.accelerate(ours)
    ids, outs = torch.randint(0, 61, (3, 4)), []
    for model in (stock, ours):
        names = [RED, "__base__", GREEN]

        def change(ids, scores, names=names):
            if ids.shape[1] == 6:
                names[:] = [BLUE, RED, "__base__"]
            return scores

        options = {"max_new_tokens": 8, "do_sample": False, "logits_processor": [change]}
        options |= {"output_scores": True, "return_dict_in_generate": True}
        outs.append(torch.stack(model.generate(input_ids=ids, adapter_names=names, **options).scores))
    assert close(outs[1], outs[0])


# --- training ---


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """The recomputation draws the same dropout masks."""
    model = adapted(llama, lora_config(llama, lora_dropout=0.3)).train()
    pyfastpeft.accelerate(model)
    x, cotangent = embeds(), torch.randn(3, 5, 61)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(5)
        with recorded() as calls:
            results.append(measure(model, x, cotangent))
        assert [op for op, _ in calls].count("lora_forward") == (12 if checkpointing else 6)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def compiled(model, backend="aot_eager"):
    """The model as one graph, and a list of the graphs that are made of it."""
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    return torch.compile(model, fullgraph=True, backend=compiler), graphs


def fused_nodes(graph):
    return sum(node.target is torch.ops.higher_order.autograd_function_apply for node in graph.graph.nodes)


@pytest.mark.parametrize(("make", "backend"), [(llama, "aot_eager"), (gpt2, "aot_eager"), (MLP, "inductor")])
def test_compiled_training_step(make, backend):
    """One graph, two steps of an optimizer, against the same steps run eagerly."""
    eager = adapted(make, lora_config(make))
    layers = len(pyfastpeft.accelerate(eager).replaced)
    model = copy.deepcopy(eager)
    step, graphs = compiled(model, backend)
    x = embeds(2, 4)
    for parameters, call in ((eager.parameters(), eager), (model.parameters(), step)):
        optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)
        for _ in range(2):
            out = call(inputs_embeds=x)
            out = out if make is MLP else out.logits
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), other in zip(eager.named_parameters(), model.parameters()):
        torch.testing.assert_close(one, other, msg=name)
    assert [fused_nodes(graph) for graph in graphs] == [layers]


@pytest.mark.parametrize("make_config", [ia3_config, lambda make: lora_config(make, lora_dropout=0.5)])
def test_compiled_ia3_and_dropout(make_config):
    model = mlp(make_config(MLP)).train()
    pyfastpeft.accelerate(model)
    step, graphs = compiled(model)
    step(inputs_embeds=embeds()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert [fused_nodes(graph) for graph in graphs] == [2]


def test_compiled_mixed_batch():
    """As one call of a layer, since PEFT hands adapter_names down a model through hooks, which do not compile."""
    layer = mlp(lora_config(MLP), lora_config(MLP, r=7)).base_model.model.up
    pyfastpeft.accelerate(nn.ModuleList([layer]))
    call, graphs = compiled(layer)
    x, names = embeds(2, 4), [RED, "__base__"]
    assert close(call(x, adapter_names=names), layer(x, adapter_names=names))
    assert [fused_nodes(graph) for graph in graphs] == [1]
