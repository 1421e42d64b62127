"""Whole models that serve many adapters at once, against one adapter, and one request, at a time."""

import copy
import json
import sys
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, GROUPED, VOCABULARY, gpt2, llama, randomise, t5
from torch import nn

import pyfastpeft
from pyfastpeft import AdaLoraConfig, BitFitConfig, DyLoraConfig, IA3Config, LoraConfig, ops
from pyfastpeft.layers import MultiLoRABranch, MultiLoRALinear
from pyfastpeft.layers.multi_lora import Batch

pytestmark = pytest.mark.usefixtures("one_thread")


class Int8Linear(nn.Linear):
    """Weights of eight bits, which it scales when it is called."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def int8_llama():
    """All linear layers but the head and some, which stay plain."""
    model = llama(pad_token_id=0)
    randomise(model, 0.2)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear) and name != "k_proj":
                    setattr(block, name, Int8Linear(linear))
    return model


MAKE = {"llama": lambda: llama(pad_token_id=0), "gpt2": lambda: gpt2(pad_token_id=0), "t5": t5, "int8": int8_llama}
MAKE |= {f"any {kind}": MAKE[kind] for kind in ("gpt2", "int8")}  # kinds of adapters
MAKE["any llama"] = lambda: llama(pad_token_id=0, attention_bias=True, mlp_bias=True)
MASKS = {"model.layers.0.self_attn.k_proj.lora_E": [False, True, True, False, True]}
MASKS |= {"model.layers.1.mlp.up_proj.lora_E": [False] * 5}
# Of different ranks, layers and scalings.
CONFIGS = {
    "llama": [
        LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True),
        LoraConfig(r=4, target_modules=["q_proj", "mlp.down_proj"], rank_pattern={"down_proj": 6}),
        LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[1], alpha_pattern={r"1\.self_attn.*": 3}),
        AdaLoraConfig(init_r=5, target_r=2, target_modules=["k_proj", "up_proj"], rank_pattern=MASKS),
    ],
    "gpt2": [
        LoraConfig(r=3, target_modules="all-linear"),
        LoraConfig(r=6, lora_alpha=3, target_modules=["c_attn"], use_rslora=True),
        LoraConfig(r=2, target_modules=["mlp.c_proj"], rank_pattern={r"h\.0\.mlp\.c_proj": 4}),
        DyLoraConfig(r=5, target_modules=["c_fc"]),
    ],
    "int8": [
        LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True),
        LoraConfig(r=4, target_modules=["q_proj", "mlp.down_proj"], rank_pattern={"down_proj": 6}),
        DyLoraConfig(r=2, target_modules=["k_proj", "v_proj"]),
    ],
    "t5": [
        LoraConfig(r=3, target_modules="all-linear"),
        LoraConfig(r=2, lora_alpha=3, target_modules=["q", "v"], use_rslora=True),
        LoraConfig(r=4, target_modules=["wi", "EncDecAttention.k"], alpha_pattern={"wi": 9}),
    ],
    "any llama": [
        LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_dora=True),
        IA3Config(),
        LoraConfig(r=2, target_modules=["v_proj", "up_proj"]),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, rank_pattern={"down_proj": 6}),
    ],
    "any gpt2": [
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        LoraConfig(r=3, target_modules="all-linear", use_dora=True, use_rslora=True),
        IA3Config(target_modules=r".*\.c_fc", feedforward_modules=[]),
        DyLoraConfig(r=5, target_modules=["c_fc"]),
    ],
    "any int8": [
        IA3Config(),
        LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True),
        LoraConfig(r=4, target_modules=["k_proj"], use_dora=True),
    ],
}


def write(model, config, directory):
    """An adapter of random values for a copy of `model`, as a directory."""
    adapted = pyfastpeft.adapt(copy.deepcopy(model), config)
    randomise(adapted, 0.2)
    pyfastpeft.save_adapter(adapted, directory)
    return directory


def alone(model, directory):
    """A copy of `model` with one adapter, by PEFT where it is there and knows the method."""
    model = copy.deepcopy(model)
    if directory is None:
        return model
    try:
        import peft
    except ImportError:
        peft = None
    if peft is None or json.loads((directory / "adapter_config.json").read_text())["peft_type"] == "DYLORA":
        return pyfastpeft.load_adapter(model, directory).eval()
    return peft.PeftModel.from_pretrained(model, directory).eval()


class Case:
    """A model, its adapters, the served model and, by slot, models that have one of them alone; -1 is the base."""

    def __init__(self, kind, root, **options):
        torch.manual_seed(1)
        self.base = MAKE[kind]().eval()
        randomise(self.base, 0.2)
        self.directories = [write(self.base, config, root / str(i)) for i, config in enumerate(CONFIGS[kind])]
        self.alone = {slot: alone(self.base, directory) for slot, directory in enumerate([*self.directories, None])}
        self.alone[-1] = self.alone.pop(len(self.directories))
        self.model = copy.deepcopy(self.base)
        options |= {"scales": kind.startswith("any")}
        self.served = pyfastpeft.serve(self.model, len(self.directories) + 1, 6, **options)
        for slot, directory in enumerate(self.directories):
            self.served.load_adapter(slot, directory)


CASES = {}


@pytest.fixture
def case(request, tmp_path_factory):
    kind = getattr(request, "param", "llama")
    if kind not in CASES:
        CASES[kind] = Case(kind, tmp_path_factory.mktemp(kind))
    return CASES[kind]


every_kind = pytest.mark.parametrize("case", list(MAKE), indirect=True)


def tokens(*shape):
    return torch.randint(3, VOCABULARY, shape)


@torch.no_grad()
def logits(model, ids):
    more = {"decoder_input_ids": ids[:, 2:]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def assert_rows(case, slots, ids, out):
    for slot, row, got in zip(slots, ids, out):
        expected = logits(case.alone[slot], row[None])[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert slot == -1 or not torch.allclose(expected, logits(case.base, row[None])[0], atol=1e-2)


@every_kind
def test_every_row_goes_through_its_adapter(case):
    slots, ids = [2, -1, 0, 1, len(case.directories) - 1, 0], tokens(6, 7)
    for given in (slots, torch.tensor(slots, dtype=torch.int32)):
        with case.served.slots(given):
            assert_rows(case, slots, ids, logits(case.model, ids))
    last = len(case.directories)
    with case.served.slots([last] * 6):  # an empty slot
        torch.testing.assert_close(logits(case.model, ids), logits(case.base, ids))
    for slot in (0, 2):  # which has fewer layers
        case.served.load_adapter(last, case.directories[slot])
        with case.served.slots([last] * 6):
            assert_rows(case, [slot] * 6, ids, logits(case.model, ids))
    case.served.unload(last)
    assert torch.equal(logits(case.model, ids), logits(case.base, ids))  # outside of any block
    assert case.served.loaded == {i: str(path) for i, path in enumerate(case.directories)}


@pytest.mark.parametrize("case", [kind for kind in MAKE if kind not in ("any gpt2", "any int8")], indirect=True)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate(case, options):
    slots, lengths, ids = [1, -1, 0, 2], [5, 3, 6, 2], torch.zeros(4, 6, dtype=torch.int64)
    options |= {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompts = [tokens(1, length) for length in lengths]
    for row, prompt in zip(ids, prompts):
        row[6 - prompt.shape[1] :] = prompt[0]
    with case.served.slots(slots):
        got = case.model.generate(input_ids=ids, attention_mask=(ids > 0).long(), **options)
    got = got.view(4, -1, got.shape[1])
    for slot, prompt, rows in zip(slots, prompts, got):
        expected = case.alone[slot].generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        new = 5 + case.base.config.is_encoder_decoder
        assert torch.equal(rows[:, -new:], expected[:, -new:])


@pytest.mark.parametrize("case", ["llama", "any llama"], indirect=True)
def test_packed_tokens(case):
    slots, rows = [2, 0, -1], [tokens(1, length) for length in (4, 3, 5)]
    lengths = torch.tensor([row.shape[1] for row in rows])
    sequence = torch.arange(3).repeat_interleave(lengths)
    mask = (sequence[:, None] == sequence).tril()[None, None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = torch.tensor(slots).repeat_interleave(lengths)
    for given in (packed, packed.tolist(), ops.route(packed, 5)):
        with case.served.slots(given), torch.no_grad():
            out = case.model(input_ids=torch.cat(rows, 1), attention_mask=mask, position_ids=positions).logits[0]
        for slot, row, got in zip(slots, rows, out.split(lengths.tolist())):
            assert_rows(case, [slot], row, got[None])


def test_a_16_bit_model_with_adapters_in_float32(tmp_path):
    torch.manual_seed(1)
    base = llama().bfloat16().eval()
    directory = write(base, LoraConfig(r=4, target_modules="all-linear"), tmp_path)
    model, ids = copy.deepcopy(base), tokens(2, 7)
    served = pyfastpeft.serve(model, 2, 4, adapter_dtype=torch.float32)
    served.load_adapter(1, directory)
    with served.slots([1, -1]):
        out = logits(model, ids)
    stored = load_file(directory / "adapter_model.safetensors")
    path = "model.layers.0.mlp.up_proj"
    assert torch.equal(served.layers[path].lora_A[1], stored[f"base_model.model.{path}.lora_A.weight"])
    torch.testing.assert_close(out[:1], logits(alone(base, directory), ids[:1]), rtol=0.05, atol=0.01)
    torch.testing.assert_close(out[1:], logits(base, ids[1:]), rtol=0.05, atol=0.01)


def test_threads_run_batches_of_their_own_while_slots_are_loaded(case):
    ids, wrong = tokens(2, 7), []

    def run(slots):
        expected = torch.cat([logits(case.alone[slot], row[None]) for slot, row in zip(slots, ids)])
        for _ in range(15):
            with case.served.slots(slots):
                if not torch.allclose(logits(case.model, ids), expected, rtol=1e-4, atol=1e-4):
                    wrong.append(slots)

    threads = [Thread(target=run, args=(slots,)) for slots in ([0, 1], [1, -1], [-1, 0])]
    for thread in threads:
        thread.start()
    for i in range(15):
        case.served.load_adapter(4, case.directories[i % 4])
        case.served.unload(4)
    for thread in threads:
        thread.join()
    assert not wrong


def test_blocks_in_blocks_and_blocks_that_raise(case):
    ids = tokens(1, 7)
    with case.served.slots([0]):
        with case.served.slots([1]):
            assert_rows(case, [1], ids, logits(case.model, ids))
        with pytest.raises(KeyError), case.served.slots([1]):
            raise KeyError
        assert_rows(case, [0], ids, logits(case.model, ids))
    assert torch.equal(logits(case.model, ids), logits(case.base, ids))


def test_slots_are_grouped_once_for_every_number_of_tokens(case, monkeypatch):
    module, calls = sys.modules["pyfastpeft.ops.multi_lora"], []
    group = module._grouped
    monkeypatch.setattr(module, "_grouped", lambda *args: calls.append(args) or group(*args))
    with case.served.slots(torch.tensor([0, 1, -1])):
        for length in (7, 7, 1, 1):
            logits(case.model, tokens(3, length))
    assert len(calls) == 2


def test_listed_slots_stay_on_the_host_until_rows_need_them():
    batch, x = Batch([0, 1, -1], 2, torch.device("meta")), torch.empty(3, 2, 8, device="meta")
    assert batch.slots.device.type == "cpu"
    assert all(batch.routing(rows).order.is_meta for rows in (x[:, :1], x))


@pytest.mark.parametrize("case", ["llama", "any llama"], indirect=True)
def test_what_is_written_into_a_routing_holds_from_the_next_call_on(case):
    ids, routing = tokens(3, 1), ops.Routing(torch.arange(3), torch.full((6,), 3))
    with case.served.slots(routing):
        for slots in ([-1, -1, -1], [2, 0, -1], [1, 2, 1]):
            for own, new in zip(routing, ops.route(slots, 5)):
                own.copy_(new)
            assert_rows(case, slots, ids, logits(case.model, ids))


@pytest.mark.parametrize("case", ["llama", "int8", "any llama"], indirect=True)
def test_compiled_models_take_the_slots_of_every_call(case):
    ids, out = tokens(3, 7), []
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")

    def run(slots):
        with case.served.slots(slots):
            assert_rows(case, slots, ids, logits(compiled, ids))
        out.append(slots)

    torch.testing.assert_close(logits(compiled, ids), logits(case.base, ids), rtol=1e-4, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for slots in ([0, 1, -1], [-1, 2, 0]):
            run(slots)
            torch.testing.assert_close(logits(compiled, ids), logits(case.base, ids), rtol=1e-4, atol=1e-4)
        with case.served.slots([1, 1, 1]):
            thread = Thread(target=run, args=([2, 0, 1],))
            thread.start()
            thread.join()
    assert len(out) == 3


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_a_model_whose_layers_are_compiled(case):
    model, slots, ids = copy.deepcopy(case.base), [3, 0, -1, 2], tokens(4, 5)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    served = pyfastpeft.serve(model, 4, 6)
    for slot, directory in enumerate(case.directories):
        served.load_adapter(slot, directory)
    with served.slots(slots):
        assert_rows(case, slots, ids, logits(model, ids))


def test_quantised_layers_are_called_as_they_are():
    model = int8_llama()
    modules, types = dict(model.named_modules()), {path: type(module) for path, module in model.named_modules()}
    flags = {path: p.requires_grad for path, p in model.named_parameters()}
    served = pyfastpeft.serve(model, 2, 3)
    kinds = {path.split(".")[-1]: (type(layer), layer.lora_A.dtype) for path, layer in served.layers.items()}
    assert kinds.pop("k_proj") == (MultiLoRALinear, torch.float32)
    assert {*kinds.values()} == {(MultiLoRABranch, torch.float32)}
    layer, base = served.layers["model.layers.0.mlp.up_proj"], modules["model.layers.0.mlp.up_proj"]
    assert layer.base_layer is base
    assert layer.weight is base.weight
    assert not any(p.requires_grad for p in layer.parameters())
    model.train().eval()
    assert served.remove() is model
    assert dict(model.named_modules()) == modules
    assert {path: type(module) for path, module in model.named_modules()} == types
    assert {path: p.requires_grad for path, p in model.named_parameters()} == flags
    half = int8_llama().bfloat16()
    served = pyfastpeft.serve(half, 2, 3)
    assert {layer.lora_A.dtype for layer in served.layers.values()} == {torch.bfloat16}
    with served.slots([1, -1]):
        assert logits(half, tokens(2, 4)).dtype == torch.bfloat16


class PackedLinear(nn.Module):
    """A linear layer of a library of its own: no nn.Linear, and without a weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scales", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("packed", (linear.weight.detach() / self.scales).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.packed.to(x.dtype) * self.scales)


def test_linear_layers_of_other_libraries(tmp_path):
    torch.manual_seed(1)
    base = llama(pad_token_id=0).eval()
    randomise(base, 0.2)
    model = copy.deepcopy(base)
    for layer, twin in zip(model.model.layers, base.model.layers):
        packed = layer.mlp.down_proj = PackedLinear(layer.mlp.down_proj)
        twin.mlp.down_proj.weight.data = packed.packed * packed.scales
    configs = LoraConfig(r=3, target_modules="all-linear"), IA3Config()
    directories = [write(base, config, tmp_path / str(i)) for i, config in enumerate(configs)]
    served, ids = pyfastpeft.serve(model, 2, 3, scales=True), tokens(3, 7)
    assert len(served.layers) == 14
    layer = served.layers["model.layers.1.mlp.down_proj"]
    assert type(layer) is MultiLoRABranch
    assert layer.lora_A.dtype == torch.float32
    for slot, directory in enumerate(directories):
        served.load_adapter(slot, directory)
    with served.slots([1, -1, 0]):
        out = logits(model, ids)
    for slot, row, got in zip([1, -1, 0], ids, out):
        alike = base if slot < 0 else alone(base, directories[slot])
        torch.testing.assert_close(got, logits(alike, row[None])[0], rtol=1e-4, atol=1e-4)
    served.remove()
    assert type(model.model.layers[0].mlp.down_proj) is PackedLinear
    with pytest.raises(TypeError, match=r"which holds a Tensor of torch\.float32 on meta"):
        pyfastpeft.serve(nn.Sequential(PackedLinear(nn.Linear(3, 3)).to("meta")), 2, 2)


def test_remove_gives_the_plain_model_back(tmp_path):
    model = gpt2()
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    parameters["transformer.h.0.attn.c_attn.weight"].requires_grad_(False)
    flags = {path: p.requires_grad for path, p in parameters.items()}
    served = pyfastpeft.serve(model, 2, 3, ["c_attn", "lm_head"])
    assert sum(isinstance(module, MultiLoRALinear) for module in model.modules()) == 3
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight.data_ptr() == parameters["transformer.h.0.attn.c_attn.weight"].data_ptr()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not any(p.requires_grad for p in layer.parameters())
    model.eval()
    assert served.remove() is model
    assert dict(model.named_modules()) == modules
    assert not any(module.training for module in model.modules())
    assert {path: p.requires_grad for path, p in model.named_parameters()} == flags
    assert all(now is parameters[path] for path, now in model.named_parameters())
    assert all(torch.equal(now, state[path]) for path, now in model.state_dict().items())
    with pytest.raises(RuntimeError, match="the model is plain again"):
        served.load_adapter(0, tmp_path)
    served = pyfastpeft.serve(model, 2, 3)
    model.double()
    assert {p.dtype for p in served.remove().parameters()} == {torch.float64}
    served = pyfastpeft.serve(model, 2, 3)
    model.to("meta")
    assert all(p.is_meta for p in served.remove().parameters())
    untied = {"lm_head.weight": True}  # by torch
    assert {path: p.requires_grad for path, p in model.named_parameters()} == flags | untied


def test_batches_whose_rows_are_joined_before_experts(tmp_path):
    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
    model = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**GROUPED, **sizes, shared_expert_intermediate_size=16)).eval()
    randomise(model, 0.2)
    directory, base, ids = write(model, LoraConfig(r=2, target_modules="all-linear"), tmp_path), model, tokens(2, 7)
    model = copy.deepcopy(base)
    served = pyfastpeft.serve(model, 1, 2)
    assert any("shared_expert" in path for path in served.layers)
    served.load_adapter(0, directory)
    with served.slots([-1, 0]):
        out = logits(model, ids)
    for row, alike in enumerate((base, pyfastpeft.load_adapter(copy.deepcopy(base), directory))):
        torch.testing.assert_close(out[row], logits(alike, ids[row : row + 1])[0], rtol=1e-4, atol=1e-4)
    model = nn.Sequential(nn.Linear(3, 3))
    served = pyfastpeft.serve(model, 2, 2, ["0"])
    with pytest.raises(ValueError, match=r"slots is of 2 .* x is of shape \[4, 3\]"), served.slots([0, 1]):
        model(torch.ones(4, 3))


def test_modules_in_several_places_are_served_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.other = nn.Linear(4, 4)

        def forward(self, x):
            return self.other(self.one(x))

    model = Twice()
    directory, x = write(model, LoraConfig(r=2, target_modules=["one"]), tmp_path), torch.randn(3, 4)
    expected, plain = pyfastpeft.load_adapter(copy.deepcopy(model), directory)(x), model(x)
    served = pyfastpeft.serve(model, 1, 2, ["one"])
    served.load_adapter(0, directory)
    assert model.one is model.other
    with served.slots([0, -1, 0]):
        torch.testing.assert_close(model(x), torch.stack([expected[0], plain[1], expected[2]]))
    served.remove()
    assert type(model.one) is nn.Linear
    assert model.one is model.other


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["k_proj", "down_proj", "fc2"], "feedforward_modules": ["down_proj", "fc2"]},
        {"target_modules": ["k_proj", "down_proj"], "exclude_modules": ["down_proj"]},
        {"target_modules": r".*k_proj"},
        {"target_modules": r".*k_proj", "feedforward_modules": r".*down_proj"},
        {"target_modules": r".*\.(k_proj|down_proj)", "feedforward_modules": r".*down_proj"},
        {"target_modules": r".*\.(k_proj|down_proj)", "feedforward_modules": ["n_proj"]},
        {"target_modules": r".*\.(o_proj|down_proj)", "feedforward_modules": ["down_proj", "_proj"]},
    ],
)
def test_feedforward_modules_as_peft_reads_them(tmp_path, options):
    peft = pytest.importorskip("peft")
    base, ids = llama().eval(), tokens(2, 7)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.IA3Config(**{"feedforward_modules": ["down_proj"]} | options)
    )
    randomise(theirs, 0.2)
    base.load_state_dict(theirs.unload().state_dict())
    theirs = peft.get_peft_model(copy.deepcopy(base), theirs.peft_config["default"]).eval()
    for name, parameter in theirs.named_parameters():
        if "ia3_l" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs, ids)
    assert not torch.allclose(expected, logits(base, ids), atol=1e-3)
    model = pyfastpeft.load_adapter(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    served = pyfastpeft.serve(base, 1, 1, scales=True)
    served.load_adapter(0, tmp_path)
    with served.slots([0, 0]):
        torch.testing.assert_close(logits(base, ids), expected, rtol=1e-4, atol=1e-4)


def test_what_peft_stores_beside_an_adapter_of_the_head(tmp_path):
    peft = pytest.importorskip("peft")
    base, ids = llama(tie_word_embeddings=False).eval(), tokens(2, 7)
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = copy.deepcopy(base)
    served = pyfastpeft.serve(model, 1, 8, ["lm_head", "q_proj"])
    served.load_adapter(0, tmp_path)
    with served.slots([-1, 0]):
        out = logits(model, ids)
    torch.testing.assert_close(out[1], logits(theirs, ids[1:])[0], rtol=1e-4, atol=1e-5)


# --- errors ---


def another_linear():
    class Linear(nn.Module):
        pass

    return nn.Sequential(Linear())


def longformer():
    return tf.LongformerModel(tf.LongformerConfig(**COMMON, attention_window=4, max_position_embeddings=32))


def musicgen():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48, "num_codebooks": 2}
    return tf.MusicgenForCausalLM(tf.MusicgenDecoderConfig(vocab_size=61, max_position_embeddings=32, **sizes))


def hooked():
    model = llama()
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (llama, {"target_modules": ["q_prj"]}, ValueError, "target_modules is holding 'q_prj'.*q_proj"),
        (llama, {"target_modules": ["embed_tokens"]}, TypeError, "meaning 'model.embed_tokens', a Embedding"),
        (llama, {"exclude_modules": ["nothing"]}, ValueError, "exclude_modules is holding 'nothing'"),
        (llama, {"rank": 0}, ValueError, "rank is 0"),
        (llama, {"num_adapters": 1.5}, ValueError, "num_adapters is 1.5"),
        (llama, {"adapter_dtype": torch.int8}, TypeError, "adapter_dtype is torch.int8"),
        (lambda: "llama", {}, TypeError, "model is 'llama'"),
        (lambda: nn.Linear(3, 3), {"target_modules": ".*"}, TypeError, "the model itself"),
        (
            lambda: nn.Sequential(nn.Linear(3, 3, device="meta")),
            {"target_modules": ".*"}, TypeError, "which holds a Parameter of torch.float32 on meta",
        ),
        (hooked, {}, TypeError, "meaning 'model.layers.1.self_attn.q_proj', which has hooks"),
        (lambda: nn.Sequential(torch.compile(nn.Linear(3, 3))), {"target_modules": ["0"]}, TypeError, "compile wraps"),
        (another_linear, {"target_modules": ["0"]}, TypeError, r"'0', a test_serve\.Linear"),
        (musicgen, {}, TypeError, "of a model whose generate, with guidance, has all rows of a batch a second time"),
        (lambda: pyfastpeft.adapt(llama(), LoraConfig()), {}, ValueError, "model is one that is adapted or served"),
        (lambda: pyfastpeft.serve(llama(), 1, 1).model, {}, ValueError, "model is one that is adapted or served"),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1),
            {"target_modules": ["linear1"]}, TypeError, "meaning 'layers.0.linear1', whose weight torch's",
        ),
        (
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2), 1),
            {"target_modules": ["linear1"]}, TypeError, "meaning 'layers.0.linear1', which sees tokens, not the rows",
        ),
        (longformer, {}, TypeError, "meaning '.*attention.self.query', which sees tokens, not the rows"),
        (
            lambda: nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3)])}),
            {"target_modules": ".*"}, TypeError, "meaning 'experts.0', an expert",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_served(make, options, error, message):
    model = make()
    plain = isinstance(model, nn.Module)
    before = {path: (type(m), m.training) for path, m in model.named_modules()} if plain else None
    flags = [p.requires_grad for p in model.parameters()] if plain else None
    with pytest.raises(error, match=message):
        pyfastpeft.serve(model, **({"num_adapters": 2, "rank": 4} | options))
    if plain:
        assert before == {path: (type(m), m.training) for path, m in model.named_modules()}
        assert flags == [p.requires_grad for p in model.parameters()]


def test_models_of_pefts_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="modules of PEFT's"):
        pyfastpeft.serve(model, 2, 4)


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        ([0, 5], ValueError, r"slots is between 0 and 5; it must be in \[-1, 5\)"),
        ([-2, 0], ValueError, "slots is between -2 and 0"),
        ([0.5, 1.0], TypeError, "slots is of dtype float64"),
        ([[0, 1]], ValueError, r"slots is of shape \[1, 2\]"),
        (torch.tensor([True, False]), TypeError, "slots is a torch.bool tensor"),
        (None, TypeError, "slots is of dtype object"),
        ("01", TypeError, "slots is of dtype"),
        (ops.route([0, 1], 3), ValueError, "slots is Routing.* it must be a Routing among 5 adapters"),
        ([0, 1, 2], ValueError, r"slots is of 3 tokens or rows where x is of shape \[2, 7, 32\]"),
        ([], ValueError, "slots is of 0 tokens or rows"),
        ([0] * 28, ValueError, "slots is of 28 tokens"),
        (ops.route([0, 1], 5), ValueError, "slots is of 2 tokens or rows"),
    ],
)
def test_what_is_no_slots_of_a_batch(case, slots, error, message):
    with pytest.raises(error, match=message), case.served.slots(slots):
        logits(case.model, tokens(2, 7))


def edit(directory, fields=(), tensors=None):
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(fields)))
    if tensors is not None:
        path = directory / "adapter_model.safetensors"
        save_file(tensors(load_file(path)), path)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def replaced(value):
    return lambda stored: stored | {KEY: value}


@pytest.mark.parametrize(
    ("config", "change", "error", "message"),
    [
        ({"use_dora": True}, {}, ValueError, "use_dora of adapter_config.json is True"),
        ({"bias": "all"}, {}, ValueError, "bias of adapter_config.json is 'all'"),
        ({"modules_to_save": ["lm_head"]}, {}, ValueError, r"modules_to_save .* is \['lm_head'\]"),
        ({"r": 5}, {}, ValueError, "of rank 5 in .*q_proj.* of ranks up to 4"),
        ({"target_modules": ["k_proj"]}, {}, ValueError, "holding .*k_proj.lora_A.*, for which there are no slots"),
        ({"target_modules": ["embed_tokens"]}, {}, ValueError, "holding .*lora_embedding_A"),
        (IA3Config(), {}, ValueError, "adapter_config.json is of peft_type 'IA3'.* served with scales=True"),
        (BitFitConfig(add_missing=True), {}, ValueError, "adapter_config.json is of peft_type 'BITFIT'"),
        ({}, {"fields": {"r": 3}}, ValueError, r"lora_A.weight of shape \[2, 32\]; it must be of shape \[3, 32\]"),
        ({}, {"fields": {"lora_bias": True}}, ValueError, "config is with {'lora_bias': True}"),
        ({}, {"fields": {"base_model_name_or_path": "other"}}, ValueError, "'other', for which the adapter was made"),
        ({}, {"fields": {"rank_pattern": {"(": 2}}}, ValueError, "rank_pattern is '\\('.* a regular expression"),
        ({}, {"tensors": replaced(torch.ones(2, 31))}, ValueError, rf"holding {KEY} of shape \[2, 31\]"),
        ({}, {"tensors": replaced(torch.ones(2, 32).int())}, TypeError, f"holding {KEY} of dtype I32"),
        ({}, {"tensors": lambda s: {k: v for k, v in s.items() if k != KEY}}, ValueError, f"without {KEY}"),
        (
            {}, {"tensors": lambda s: {k: v for k, v in s.items() if ".1.self_attn.q_proj" not in k}},
            ValueError, f"without {KEY}",
        ),
        ({}, {"tensors": lambda s: s | {"more": torch.ones(1)}}, ValueError, "holding more, for which"),
    ],
)  # fmt: skip
def test_a_refused_adapter_leaves_the_slot_as_it_was(tmp_path, config, change, error, message):
    base = llama()
    base.config._name_or_path = "ours"
    served = pyfastpeft.serve(copy.deepcopy(base), 2, 4, ["q_proj", "v_proj"])
    if isinstance(config, dict):
        config = LoraConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"]} | config))
    good = write(base, LoraConfig(r=4), tmp_path / "good")
    bad = write(base, config, tmp_path / "bad")
    edit(bad, **change)
    served.load_adapter(1, good)
    before = copy.deepcopy(served.model.state_dict())
    with pytest.raises(error, match=message):
        served.load_adapter(1, bad)
    assert all(torch.equal(now, before[key]) for key, now in served.model.state_dict().items())
    assert served.loaded == {1: str(good)}


def test_dora_and_ia3_that_do_not_fit_leave_the_slot_as_it_was(tmp_path):
    base = int8_llama()
    served = pyfastpeft.serve(copy.deepcopy(base), 2, 4, scales=True)
    plain = llama(pad_token_id=0)
    dora = write(plain, LoraConfig(r=2, target_modules=["k_proj", "v_proj"], use_dora=True), tmp_path / "dora")
    ia3 = write(base, IA3Config(), tmp_path / "ia3")
    served.load_adapter(1, ia3)
    before = copy.deepcopy(served.model.state_dict())
    with pytest.raises(ValueError, match=r"of DoRA in 'model.layers.0.self_attn.v_proj', a quantised layer"):
        served.load_adapter(1, dora)
    key = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"
    edit(ia3, tensors=lambda stored: stored | {key: torch.ones(48)})
    with pytest.raises(ValueError, match=r"mlp.down_proj.ia3_l of shape \[48\]; it must be of shape \[32, 1\]"):
        served.load_adapter(1, ia3)
    assert all(torch.equal(now, before[key]) for key, now in served.model.state_dict().items())


def test_nothing_is_drawn_for_slots():
    state = torch.get_rng_state()
    model = nn.Sequential(nn.Linear(3, 4))
    drawn = torch.get_rng_state()
    layer = pyfastpeft.serve(model, 2, 4, ["0"]).layers["0"]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(state, drawn)
    assert not any(t.any() for t in (layer.lora_A, layer.lora_B, layer.scaling, layer.ranks))


def test_adalora_is_multiplied_before_it_is_rounded(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32))
    pyfastpeft.adapt(model, AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["0"]))
    part = model[0].adapters["default"]
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(torch.randn_like(parameter).bfloat16())
    expected = (part.lora_A * part.lora_E).detach()
    pyfastpeft.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: t.bfloat16() for key, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    served = pyfastpeft.serve(pyfastpeft.unload(model), 2, 4, ["0"])
    served.load_adapter(1, tmp_path)
    assert torch.equal(served.layers["0"].lora_A[1], expected)


def test_adapters_that_are_stored_in_8_bits(tmp_path):
    base = llama()
    directory = write(base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    edit(directory, tensors=lambda stored: {key: t.to(torch.float8_e4m3fn) for key, t in stored.items()})
    served = pyfastpeft.serve(base, 2, 4, ["q_proj"])
    served.load_adapter(1, directory)
    stored = load_file(directory / "adapter_model.safetensors")
    for path, layer in served.layers.items():
        for own in ("lora_A", "lora_B"):
            expected = stored[f"base_model.model.{path}.{own}.weight"].float()
            assert expected.any()
            assert torch.equal(getattr(layer, own)[1], expected)


def test_nothing_is_loaded_on_the_meta_device(tmp_path):
    base = llama()
    directory = write(base, LoraConfig(r=4), tmp_path / "adapter")
    served = pyfastpeft.serve(base, 2, 4)
    served.model.to("meta")
    with pytest.raises(ValueError, match=r"load_adapter: model is without memory for model\.layers\.0"):
        served.load_adapter(1, directory)


def test_slots_that_are_none(case, tmp_path):
    for call in (lambda slot: case.served.load_adapter(slot, tmp_path), case.served.unload):
        for slot in (-1, 5, "a", True):
            with pytest.raises(ValueError, match=rf"slot is {slot!r}.* an integer in \[0, 5\)"):
                call(slot)
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json"):
        case.served.load_adapter(4, tmp_path)


def test_while_a_layer_is_merged_slots_keep_what_they_hold(tmp_path):
    base = llama()
    served = pyfastpeft.serve(copy.deepcopy(base), 2, 4)
    directory = write(base, LoraConfig(r=4, target_modules="all-linear"), tmp_path)
    served.load_adapter(1, directory)
    list(served.layers.values())[-1].merge(1)
    before = copy.deepcopy(served.model.state_dict())
    for call in (lambda: served.load_adapter(1, directory), lambda: served.unload(1)):
        with pytest.raises(RuntimeError, match=r"model is one whose \['model.layers.1.mlp.down_proj'\] are merged"):
            call()
    assert all(torch.equal(now, before[key]) for key, now in served.model.state_dict().items())
    assert served.loaded == {1: str(directory)}
