"""The quality benchmark: readers and templates, tokenizers, metrics, learners, the report, and runs on tiny files."""

import itertools
import json
import math
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks import Misuse
from benchmarks.quality import learners, metrics, report
from benchmarks.quality.__main__ import main
from benchmarks.quality.learners import Dataset, Encoder, EncoderDecoder, Generative, batches
from benchmarks.quality.methods import METHODS
from benchmarks.quality.tasks import TASKS, hold_out, own_task
from benchmarks.quality.train import Budget, trained
from benchmarks.quality.vocabulary import llama2c_tokenizer, word_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself
ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("PYFASTPEFT_DATA", ROOT.parent / "shared" / "data"))  # real data, where there is some

FILES = {
    "sst2": {
        "train.tsv": 'sentence\tlabel\na "quoted film \t1\nnot good\t0\n',
        "dev.tsv": "sentence\tlabel\nfine\t1\n",
    },
    "rte": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n",
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is dry.\tnot_entailment\n",
    },
    "cola": {
        "in_domain_train.tsv": "gj04\t1\t\tThe cat sat.\ngj04\t0\t*\tCat the sat.\n",
        "in_domain_dev.tsv": "gj04\t1\t\tA dog ran.\n",
        "out_of_domain_dev.tsv": "b\t0\t*\tRan dog a.\n",
    },
    "mrpc": {
        "train.txt": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tHe left.\tHe went.\n",
        "test.txt": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tHe left.\tShe "came".\n',
    },
    "stsb": {
        "sts-train.csv": "main\tMSR\t2012\t1\t4.750\tA child rides.\tA kid rides.\textra\n",
        "sts-dev.csv": "main\tMSR\t2012\t1\t0.400\tA child rides.\tIt rains.\n",
    },
    "e2e_nlg": {
        "trainset.csv": 'mr,ref\n"name[A], food[Thai]","A serves Thai food, ""cheap""."\n"name[B]",B is a pub.\n'
        '"name[E], familyFriendly[no], near[F]",E is for adults.\n',
        "devset.csv": 'mr,ref\n"name[C]",C is a pub.\n"familyFriendly[yes], name[D]",D is bad.\n'
        '"name[C]",There is a pub C.\n',
    },
}


@pytest.fixture
def data(tmp_path):
    for task, files in FILES.items():
        (tmp_path / task).mkdir()
        for name, text in files.items():
            (tmp_path / task / name).write_text(text, encoding="utf-8")
    return tmp_path


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_readers_and_templates(data):
    rows = {name: task.load(data) for name, task in TASKS.items()}
    told = {
        name: [(task.prompt(row), task.completion(row), row["target"]) for row in rows[name][0]]
        for name, task in TASKS.items()
    }
    assert told["sst2"][0] == ('Review: a "quoted film \nSentiment:', "positive", 1)
    assert [target for *_, target in told["sst2"]] == [1, 0]
    assert told["rte"][0][1:] == ("yes", 1)
    assert [completion for _, completion, _ in told["cola"]] == ["good", "bad"]
    assert told["mrpc"] == [("He left.\nHe went.\nDo both say the same, yes or no?", "yes", 1)]
    assert told["stsb"][0][1:] == ("5", 4.75)
    assert told["e2e_nlg"][0] == (
        "name[A], food[Thai]\n",
        'A serves Thai food, "cheap".',
        'A serves Thai food, "cheap".',
    )
    assert told["e2e_family"] == [("E is for adults.\nIs it good for families?", "no", 0)]
    assert TASKS["sst2"].prompt(rows["sst2"][0][1], 1).startswith("not good\n")
    assert TASKS["sst2"].prompt(rows["sst2"][0][1], 2) == TASKS["sst2"].prompt(rows["sst2"][0][1])

    validation = {name: found for name, (_, found) in rows.items()}
    assert [row["target"] for row in validation["cola"]] == [1, 0]
    assert validation["mrpc"][0]["#2 String"] == 'She "came".'
    assert TASKS["stsb"].completion(validation["stsb"][0]) == "0"
    assert [row["references"] for row in validation["e2e_nlg"]] == [["C is a pub.", "There is a pub C."], ["D is bad."]]
    assert [(row["ref"], row["target"]) for row in validation["e2e_family"]] == [("D is bad.", 1)]
    assert [row["target"] for row in TASKS["sst2"].load(data / "sst2")[1]] == [1]
    assert TASKS["e2e_family"].load(data / "e2e_nlg") == rows["e2e_family"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("own.jsonl", '{"a": "x", "b": "yes"}\n\n{"a": "y", "b": "no"}\n', None),
        ("own.tsv", "a\tb\nx\tyes\ny\tno\n", None),
        ("own.csv", 'a,b\nx,yes\n"y",no\n', None),
        ("own.txt", "", ["own.txt", "'.txt'", ".jsonl, .tsv, .csv"]),
        ("own.jsonl", "{", ["own.jsonl", "JSON"]),
        ("own.tsv", "a\tb\nx\tyes\n", ["'b'", "1 values"]),
        ("own.tsv", "c\tb\nx\tyes\ny\tno\n", ["no column 'a'", "'c'"]),
    ],
)
def test_own_files(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)

    def read():
        task = own_task("classification", ["a"], "b", "Say {a}:", path)
        return task, task.rows([path])

    if words:
        with pytest.raises(Misuse) as raised:
            read()
        assert all(word in str(raised.value) for word in words), raised.value
    else:
        task, rows = read()
        assert [(task.prompt(row), task.completion(row)) for row in rows] == [("Say x:", "yes"), ("Say y:", "no")]


def test_bad_targets(data):
    (data / "sst2" / "dev.tsv").write_text("sentence\tlabel\nfine\t2\n")
    with pytest.raises(Misuse, match=r"label is '2'; it must be one of \['0', '1'\]"):
        TASKS["sst2"].load(data)
    (data / "stsb" / "sts-dev.csv").write_text("main\tMSR\t2012\t1\tmany\tA.\tB.\n")
    with pytest.raises(Misuse, match="score is 'many'; it must be a number"):
        TASKS["stsb"].load(data)
    (data / "rte" / "dev.tsv").unlink()
    with pytest.raises(Misuse, match=r"dev\.tsv cannot be read"):
        TASKS["rte"].load(data)


def test_held_out_rows_share_no_prompt():
    task = TASKS["e2e_nlg"]
    rows = [{"mr": f"name[{i % 40}]", "ref": str(i), "target": str(i)} for i in range(200)]
    training, held = hold_out(rows, task)
    assert len(held) == 25
    assert len(training) + len(held) == 200
    assert not {row["mr"] for row in training} & {row["mr"] for row in held}
    with pytest.raises(Misuse, match="1 different prompts; at least two"):
        hold_out(rows[:1], task)


def test_every_class_trains_and_is_held_out():
    task = TASKS["sst2"]
    rows = [{"sentence": str(i), "target": int(i < 3)} for i in range(40)] * 2
    training, held = hold_out(rows, task)
    assert [sum(row["target"] == answer for row in held) for answer in (0, 1)] == [2 * 5, 2 * 1]
    assert [sum(row["target"] == answer for row in training) for answer in (0, 1)] == [2 * 32, 2 * 2]
    training, held = hold_out(rows[2:40], task)  # a class of one prompt trains
    assert {row["target"] for row in training} == {0, 1}
    assert {row["target"] for row in held} == {0}
    with pytest.raises(Misuse, match="2 different prompts; at least two, of one class, are needed"):
        hold_out(rows[2:4], task)


# --- tokenizers ------------------------------------------------------------------------------------------------------

WORDS = [" ", "a", "b", "c", "d", "e", "ab", "cd", "abc", "bc", " a", " ab", " abcd", "de", "cde", "é"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A file in llama2.c's format, its later tokens with the lower scores, as trained ones have."""
    special = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [text.encode() for text in special + WORDS]
    path = tmp_path_factory.mktemp("vocabulary") / "tok.bin"
    entries = (struct.pack("<fi", -float(max(0, i - 259)), len(text)) + text for i, text in enumerate(tokens))
    path.write_bytes(struct.pack("<i", max(map(len, tokens))) + b"".join(entries))
    return path


def greedy(text):
    """llama2.c's encoding, as its documentation tells it, on the vocabulary above."""
    ids = {word: 259 + i for i, word in enumerate(WORDS)}
    pieces = list(" " + text) if text else []
    while True:
        merges = [(-ids[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ids]
        if not merges:
            break
        best = max(score for score, _ in merges)
        place = min(i for score, i in merges if score == best)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return [token for piece in pieces for token in ([ids[piece]] if piece in ids else [3 + b for b in piece.encode()])]


@given(st.text(alphabet="abcde é£\n", max_size=12))
def test_llama2c_merges(vocabulary, text):
    tokenizer = llama2c_tokenizer(vocabulary)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == greedy(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 1, 2)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:3], lambda b: b[:4] + b"\0" * 8 + b[4:]])
def test_damaged_vocabularies(vocabulary, tmp_path, damage):
    path = tmp_path / "tok.bin"
    path.write_bytes(damage(vocabulary.read_bytes()))
    with pytest.raises(Misuse, match=r"tok\.bin (is no vocabulary of llama2\.c|begins with)"):
        llama2c_tokenizer(path)


def test_word_tokenizer():
    tokenizer = word_tokenizer(["The cat, the dog.", "the cat"], 9)
    assert tokenizer.tokenize("THE cat sat.") == ["the", "cat", "[UNK]", "."]
    assert tokenizer("the", "cat")["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["[CLS]", "the", "[SEP]", "cat", "[SEP]"]
    )


def test_word_vectors_are_the_mutual_informations():
    """With as many numbers as words nothing is lost: their products are those of the normalised rows."""
    pytest.importorskip("sklearn")
    rows = [[0, 1, 2, 3, 4, 5], [3, 1, 4], [5, 0], [2, 5, 1, 1]] * 2  # the word 6 stands nowhere
    near = torch.zeros(7, 7, dtype=torch.float64)
    for row in rows:
        for i, word in enumerate(row):
            for other in row[max(0, i - 2) : i]:
                near[word, other] += 1
                near[other, word] += 1
    expected = torch.log(near * near.sum() / near.sum(1, keepdim=True) / near.sum(0)).nan_to_num(0, 0, 0).clamp(min=0)
    expected = torch.nn.functional.normalize(expected)
    vectors = learners.word_vectors(rows, 7, 7, window=2)
    torch.testing.assert_close(vectors @ vectors.T, (expected @ expected.T).float(), rtol=1e-4, atol=1e-4)
    assert not vectors[6].any()
    wide = learners.word_vectors(rows, 7, 16, window=2)
    assert wide.shape == (7, 16)
    assert not wide[:, 7:].any()


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_classes_and_scores():
    for library in ("sklearn", "scipy"):
        pytest.importorskip(library)
    found = metrics.measure(["accuracy", "f1", "matthews"], [1, 1, 0, 0, 1], [1, 0, 0, 0, 1])
    # tp 2, fp 1, tn 2, fn 0
    assert found == pytest.approx({"accuracy": 0.8, "f1": 0.8, "matthews": 4 / math.sqrt(3 * 2 * 3 * 2)})
    assert metrics.f1([0, 1, 2], [0, 2, 2]) == pytest.approx((1 + 0 + 2 / 3) / 3)
    found = metrics.measure(["pearson", "spearman"], [1.0, 2.0, 9.0], [1.0, 2.0, 3.0])
    assert found["spearman"] == pytest.approx(1)
    assert 0 < found["pearson"] < 0.95
    assert metrics.pearson([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == 0


def test_metrics_of_texts():
    for library in ("sacrebleu", "nltk", "rouge_score"):
        pytest.importorskip(library)
    references = [["The pub is cheap.", "A cheap pub in the city."], ["Zizzi serves fish near the river."]]
    names = ["bleu", "nist", "meteor", "rouge1", "rouge2", "rougeL"]
    exact = metrics.measure(names, [references[0][1], references[1][0].lower()], references)
    assert exact["bleu"] == pytest.approx(100)
    assert exact["rouge1"] == exact["rouge2"] == exact["rougeL"] == 1
    assert exact["meteor"] > 0.99
    wrong = metrics.measure(names, ["fish", "pub"], references)
    assert all(wrong[name] < 0.2 * exact[name] for name in names)
    empty = metrics.measure(names, ["", ""], references)
    assert not any(empty.values())
    stems = metrics.meteor(["he serving fishes"], [["he serves fish"]])
    assert stems > 0.9
    assert metrics.meteor(["a tavern"], [["a pub"]]) == metrics.meteor(["a xyz"], [["a pub"]])  # no synonyms


def test_cider_where_it_is_installed():
    references = [["the pub is cheap", "a cheap pub"], ["it serves fish by the river"]]
    if "cider" in metrics.measure(["cider"], ["a", "b"], references):
        assert metrics.cider(["a cheap pub", "it serves fish by the river"], references) > 2
        assert metrics.cider(["fish", "pub"], references) < 0.5


# --- learners --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def story_model(vocabulary, tmp_path_factory):
    """A directory with a tiny Llama and llama2.c's vocabulary beside it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259 + len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tok.bin").write_bytes(vocabulary.read_bytes())
    return folder


@pytest.fixture(scope="module", params=["t5", "bart"])
def pair_model(request, tmp_path_factory):
    """A directory with a tiny encoder-decoder, whose tokenizer puts [CLS] and [SEP] around all texts."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = word_tokenizer([" ".join(row.values()) for row in letters(40)], 100)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "d_model": 16, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    if request.param == "t5":
        config = T5Config(d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0, **sizes)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    else:
        layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        feedforward = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 128, "init_std": 0.1}
        special = {"decoder_start_token_id": tokenizer.eos_token_id, "forced_eos_token_id": None, "bos_token_id": 2}
        BartForConditionalGeneration(BartConfig(**layers, **feedforward, **special, **sizes)).save_pretrained(folder)
    return folder


def letters(count, start=0):
    """Rows to learn: the completion is the prompt's first letter twice."""
    return [{"x": "abcde"[i % 5] + "bc", "y": 2 * "abcde"[i % 5], "n": str(i)} for i in range(start, start + count)]


def task_of(kind, folder, text="x", target="y"):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in letters(40)))
    task = own_task(kind, [text], target, "{x} ", path)
    return task, task.rows([path])


def test_batches_count_the_completion_alone(story_model, tmp_path):
    task, rows = task_of("generation", tmp_path)
    learner = learners.load(story_model, [Dataset(task, rows, rows)], 64, 8)
    assert isinstance(learner, Generative)
    batch = learner.training_batch([(task, rows[0], 0), (task, rows[2], 0)])
    completion = [*learner.tokens(rows[0]["y"]), learner.end]
    prompt = [1, *learner.tokens("abc ")]
    assert batch["input_ids"][0].tolist()[: len(prompt) + len(completion)] == prompt + completion
    counted = batch["labels"][0] != -100
    assert batch["labels"][0][counted].tolist() == completion
    assert not counted[: len(prompt)].any()
    assert torch.equal(batch["attention_mask"].sum(1) > 0, torch.tensor([True, True]))

    shots = learner.example(task, rows[0], "a", shots=rows[1:4]).prompt
    text = learner.tokenizer.decode(shots[1:])
    assert [text.count(f"{row['x']} ") for row in rows[1:4]] == [1, 1, 1]
    assert shots[-len(prompt) + 1 :] == prompt[1:]
    crowded = learner.example(task, rows[0], "a", shots=rows[1:4] * 20)
    assert len(crowded.prompt) + 8 <= learner.length


def test_encoders_see_which_text_is_which(tmp_path):
    _, rows = task_of("classification", tmp_path)
    task = own_task("classification", ["x", "n"], "y", "{x} {n}", tmp_path / "rows.jsonl")
    tokenizer = word_tokenizer([row["x"] + " " + row["n"] for row in rows], 100)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    batch = Encoder(BertForSequenceClassification(config), tokenizer, (), 32).batch(task, rows[:2])
    assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]] * 2


def test_choices_stand_together_with_the_answer_first(story_model, tmp_path):
    task, rows = task_of("classification", tmp_path)
    learner = learners.load(story_model, [Dataset(task, rows, rows)], 64, 8)
    batch = learner.training_batch([(task, rows[3], 0)], choices=5)
    words = [batch["labels"][i][batch["labels"][i] != -100][:-1].tolist() for i in range(5)]
    assert words[0] == learner.tokens("dd")
    assert sorted(words) == sorted(learner.tokens(each) for each in task.choices)
    other = own_task("regression", ["x"], "n", "{x} ", tmp_path / "rows.jsonl")
    mixed = [(task, rows[3], 0), (other, other.rows([tmp_path / "rows.jsonl"])[2], 0)]
    labels = learner.training_batch(mixed, choices=6)["labels"].unflatten(0, (2, 6))
    assert (labels != -100).any(-1).tolist() == [[True] * 5 + [False], [True] * 6]


def test_predictions_follow_the_likelihood(story_model, tmp_path):
    """Rank classification and the validation loss against the model's own log-probabilities, row by row."""
    task, rows = task_of("classification", tmp_path)
    rows = rows[:6]
    learner = learners.load(story_model, [Dataset(task, rows, rows)], 64, 8)
    scores, total, count = [], 0.0, 0
    for row in rows:
        each = []
        for choice in task.choices:
            prompt, answer = [1, *learner.tokens(task.prompt(row))], [*learner.tokens(choice), learner.end]
            with torch.no_grad():
                logits = learner.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            likely = [logits[len(prompt) + t - 1, token].item() for t, token in enumerate(answer)]
            each.append(sum(likely) / len(likely))
            if choice == task.completion(row):
                total, count = total - sum(likely), count + len(likely)
        scores.append(each)
    assert learner.predict(task, rows, size=4) == [each.index(max(each)) for each in scores]
    assert learner.loss(task, rows, size=4) == pytest.approx(total / count, rel=1e-5)

    score = own_task("regression", ["x"], "n", "{x} ", tmp_path / "rows.jsonl")
    values = learner.predict(score, score.rows([tmp_path / "rows.jsonl"])[:3])
    assert all(0 < value < 5 for value in values)


def test_generation_reads_no_padding(story_model, tmp_path):
    task, rows = task_of("generation", tmp_path)
    rows = [rows[0], rows[1] | {"x": "bcbcbc a bc"}]
    learner = learners.load(story_model, [Dataset(task, rows, rows)], 64, 6)
    assert learner.predict(task, rows, size=2) == [learner.predict(task, [row])[0] for row in rows]


def test_batches_are_the_seeds(tmp_path):
    task, rows = task_of("generation", tmp_path)
    datasets = [Dataset(task, rows[:20], []), Dataset(task, rows[20:], [])]

    def drawn(seed):
        stream = batches(datasets, 8, seed)
        return [row["n"] for _ in range(5) for _, row, _ in next(stream)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert sorted(drawn(0), key=int) == [str(i) for i in range(40)]


def test_training_learns_and_repeats(story_model, tmp_path):
    task, rows = task_of("generation", tmp_path)
    datasets = [Dataset(task, rows[:30], rows[30:])]
    learner = learners.load(story_model, datasets, 64, 8)
    before = learner.loss(task, rows[30:])
    weights = {name: value.clone() for name, value in learner.model.state_dict().items()}
    first, again = (trained("full", learner, datasets, Budget(20, 8), 3, 1e-2, measured=False) for _ in range(2))
    assert first["training_losses"] == again["training_losses"]
    assert first["tasks"]["own"]["loss"] < 0.7 * before
    assert all(torch.equal(value, weights[name]) for name, value in learner.model.state_dict().items())
    short = trained("full", learner, datasets, Budget(50, 8, seconds=1e-6), 3, 1e-2, measured=False)
    assert short["steps"] == 1


def taught(name, model, tmp_path):
    """A learner and the record of a method that has trained it, to a lower loss."""
    task, rows = task_of("classification", tmp_path)
    datasets = [Dataset(task, rows[:30], rows[30:])]
    learner = learners.load(model, datasets, 64, 8)
    before = learner.loss(task, rows[30:])
    found = trained(name, learner, datasets, Budget(12, 8), 0, 3e-2)
    assert found["tasks"]["own"]["loss"] < before
    return learner, found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(story_model, tmp_path, name):
    learner, found = taught(name, story_model, tmp_path)
    assert 0 <= found["tasks"]["own"]["accuracy"] <= 1
    assert 0 < found["trainable"] <= sum(p.numel() for p in learner.model.parameters())
    assert found["memory"] > sum(p.nbytes for p in learner.model.parameters())
    assert not hasattr(learner.model, "pyfastpeft")


def test_encoder_decoders_read_prompts_and_write_completions(pair_model, tmp_path):
    task, rows = task_of("classification", tmp_path)
    rows = rows[:6]
    learner = learners.load(pair_model, [Dataset(task, rows, rows)], 32, 4)
    assert isinstance(learner, EncoderDecoder)
    first, last = (learner.tokenizer.convert_tokens_to_ids(word) for word in ("[CLS]", "[SEP]"))
    batch = learner.training_batch([(task, rows[0], 0), (task, rows[1], 0)])
    assert batch["input_ids"].tolist() == [[first, *learner.tokens(row["x"]), last] for row in rows[:2]]
    assert batch["labels"].tolist() == [[first, *learner.tokens(row["y"]), last] for row in rows[:2]]
    shots = learner.example(task, rows[0], "aa", shots=rows[1:4] * 20).prompt
    assert 28 < len(shots) <= 32
    assert shots[-2:] == batch["input_ids"][0].tolist()[-2:]

    scores, total, count = [], 0.0, 0
    for row in rows:
        each = []
        for choice in task.choices:
            answer = [first, *learner.tokens(choice), last]
            given = [learner.model.config.decoder_start_token_id, *answer[:-1]]
            prompt = torch.tensor([[first, *learner.tokens(row["x"]), last]])
            with torch.no_grad():
                logits = learner.model(prompt, decoder_input_ids=torch.tensor([given])).logits[0].log_softmax(-1)
            likely = [logits[t, token].item() for t, token in enumerate(answer)]
            each.append(sum(likely) / len(likely))
            if choice == task.completion(row):
                total, count = total - sum(likely), count + len(likely)
        scores.append(each)
    assert learner.predict(task, rows, size=4) == [each.index(max(each)) for each in scores]
    assert learner.loss(task, rows, size=4) == pytest.approx(total / count, rel=1e-5)

    texts, rows = task_of("generation", tmp_path)
    rows = [rows[0], rows[1] | {"x": "a bc abc bbc"}]
    assert learner.predict(texts, rows, size=2) == [learner.predict(texts, [row])[0] for row in rows]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_teaches_an_encoder_decoder(pair_model, tmp_path, name):
    assert taught(name, pair_model, tmp_path)[1]["trainable"] > 0


def test_a_trained_encoder_decoder_writes_what_it_learned(pair_model, tmp_path):
    task, rows = task_of("generation", tmp_path)
    learner = learners.load(pair_model, [Dataset(task, rows, rows)], 32, 8)
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=1e-2)
    for batch in itertools.islice(batches([Dataset(task, rows, rows)], 10, 0), 150):
        learner.model(**learner.training_batch(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learner.predict(task, rows[:5]) == [row["y"] for row in rows[:5]]


def small_results():
    """Two methods and prompts on a task, one of the methods worse than a prompt."""

    def record(method, seed, loss, trainable):
        cost = {"lr": 0.1, "memory": 5e6, "seconds_per_step": 0.01} if trainable else {}
        found = {"loss": loss, "perplexity": math.exp(loss), "bleu": 100 / loss}
        return {"method": method, "seed": seed, "trainable": trainable, "tasks": {"t": found}} | cost

    runs = [record("zero-shot", 0, 3.0, 0), record("few-shot", 0, 2.0, 0), record("few-shot", 1, 1.5, 0)]
    for name, losses in {"full": (1.0, 1.2), "LoRA": (1.1, 1.2), "Houlsby": (1.4, 1.6)}.items():
        runs += [record(name, seed, loss, 1234) for seed, loss in enumerate(losses)]
    machine = {
        "device": "cpu",
        "cpu": {"model": "a CPU"},
        "threads": 1,
        "isa": "avx2",
        "isa_capped": False,
        "versions": {},
    }
    settings = {"command": "it", "model": "m", "seeds": [0, 1], "steps": 5, "batch": 2, "seconds": None}
    about = {"loss_before": 3.0, "training": 9, "validation": 4}
    return {"machine_info": machine | {"versions": {}}, "settings": settings, "tasks": {"t": about}, "runs": runs}


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    results = small_results()
    text = report.markdown(results)
    assert "| LoRA | 0.1 | 1,234 | 5 | 10 | 3 | 1.15 ± 0.071 |" in text
    assert "- yes: t: every method, every seed, ends with a lower validation loss than the unadapted model" in text
    assert re.search(r"- \*\*no\*\*: .* than few-shot prompting; not so Houlsby \(seed 1: 1.6\)", text)
    assert "- **no**: t: loss reductions within 15% of one another: full 1.9, LoRA 1.85, Houlsby 1.5" in text
    results["runs"][-1]["tasks"]["t"]["loss"] = 1.0
    assert "**no**" not in report.markdown(results)

    results["tasks"]["t"]["most_frequent"] = {"answer": "yes", "measured": {"bleu": 72}}
    text = report.markdown(results)
    assert "Always 'yes', the most frequent answer of the training rows: bleu 72." in text
    assert re.search(
        r"no\*\*: .* higher bleu than the most frequent answer; not so Houlsby \(seed 0: 71.*, seed 1: ", text
    )
    results["runs"][-2]["tasks"]["t"]["bleu"] = 73
    assert "Houlsby (seed 0" not in report.markdown(results)
    results["tasks"]["t"]["most_frequent"]["measured"]["bleu"] = 101
    assert "than the most frequent answer; so in no run\n" in report.markdown(results)

    (tmp_path / "r.json").write_text(json.dumps(results))
    (tmp_path / "notes.md").write_text("<!-- benchmark table start --><!-- benchmark table end -->")
    paths = [str(tmp_path / name) for name in ("r.json", "notes.md", "r.png")]
    report.main([paths[0], "--into", paths[1], "--plot", paths[2]])
    assert "| LoRA |" in (tmp_path / "notes.md").read_text()
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


# --- from the command line -------------------------------------------------------------------------------------------


def results_of(folder, *arguments):
    assert main([*map(str, arguments), "--out", str(folder), "--steps", "3", "--batch", "4"]) == 0
    return json.loads((folder / "results.json").read_text())


def test_a_generative_model_on_a_mixture(story_model, data, tmp_path):
    for library in ("sklearn", "scipy", "matplotlib"):
        pytest.importorskip(library)
    arguments = ("--model", story_model, "--data", data, "--task", "sst2,stsb", "--seeds", 2, "--length", 90)
    out = tmp_path / "out"
    found = results_of(out, *arguments, "--methods", "zero-shot,few-shot,full,LoRA+,T-Few,prompt,prefix")
    runs = {(run["method"], run["seed"]): run for run in found["runs"]}
    assert len(runs) == 13  # nothing in zero-shot is random
    for run in runs.values():
        assert set(run["tasks"]["sst2"]) == {"loss", "accuracy"}
        assert set(run["tasks"]["stsb"]) == {"loss", "pearson", "spearman"}
    before = found["tasks"]["sst2"]["loss_before"]
    assert runs["zero-shot", 0]["tasks"]["sst2"]["loss"] == pytest.approx(before)
    assert runs["prompt", 1]["tasks"]["sst2"]["loss"] != pytest.approx(before)
    assert runs["T-Few", 0]["steps"] == 3
    assert runs["full", 0]["trainable"] > runs["LoRA+", 0]["trainable"] > runs["prompt", 0]["trainable"] == 20 * 16
    assert str(tmp_path) not in json.dumps(found)
    assert (out / "results.md").read_text().count("| T-Few |") == 2
    assert (out / "results.png").stat().st_size > 10_000


def test_no_validation_row_trains(story_model, tmp_path, capsys):
    pytest.importorskip("sklearn")
    task_of("classification", tmp_path)
    rows = letters(5) + letters(3, 100) + letters(1, 100)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("--model", story_model, "--task", "own", "--text", "x,n", "--target", "y", "--seeds", 1)
    train, few = ("--train", tmp_path / "rows.jsonl"), ("--validation", tmp_path / "few.jsonl")
    found = results_of(tmp_path / "out", *own, *train, *few, "--methods", "IA3,T-Few", "--lr", "IA3=0.2")
    assert [run["lr"] for run in found["runs"]] == [0.2, METHODS["T-Few"].rate("generative")]
    found = found["tasks"]["own"]
    assert (found["training"], found["validation"]) == (35, 9)
    right = sum(row["y"] == found["most_frequent"]["answer"] for row in rows)
    assert found["most_frequent"]["measured"]["accuracy"] == pytest.approx(right / 9)
    assert main([*map(str, own), "--train", str(few[1]), *map(str, few)]) == 2
    assert "own has no training row with a prompt that no validation row has" in capsys.readouterr().err


def test_texts_are_generated_and_measured(story_model, data, tmp_path):
    for library in ("sacrebleu", "nltk", "rouge_score", "matplotlib"):
        pytest.importorskip(library)
    arguments = ("--model", story_model, "--data", data, "--task", "e2e_nlg", "--new-tokens", 5, "--seeds", 1)
    found = results_of(tmp_path / "out", *arguments, "--methods", "one-shot,IA3")
    assert found["tasks"]["e2e_nlg"]["validation"] == 2
    for run in found["runs"]:
        measured = run["tasks"]["e2e_nlg"]
        assert {"bleu", "nist", "meteor", "rougeL", "perplexity", "loss"} <= set(measured)
        assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_an_encoder(data, tmp_path, task):
    for library in ("sklearn", "scipy", "matplotlib"):
        pytest.importorskip(library)
    arguments = ("--encoder", "small", "--pretrain", 2, "--data", data, "--task", task, "--seeds", 1)
    found = results_of(tmp_path / "out", *arguments, "--methods", "full,LoRA,BitFit,Houlsby,prompt")
    trainable = {run["method"]: run["trainable"] for run in found["runs"]}
    head = 128 * 128 + 128 + (2 if task == "mrpc" else 1) * 129
    assert trainable["prompt"] == 20 * 128 + head
    assert trainable["BitFit"] < 10_000 + head < trainable["LoRA"] + 10_000 < trainable["full"]


def test_sweep(story_model, tmp_path, capsys):
    task_of("classification", tmp_path)
    own = ("--task", "own", "--train", tmp_path / "rows.jsonl", "--text", "x,n", "--target", "y")
    arguments = ("--model", story_model, *own, "--methods", "full", "--steps", 6, "--seeds", 1, "--sweep")
    assert main([*map(str, arguments)]) == 0
    line = capsys.readouterr().out.strip()
    losses = {rate: float(loss) for rate, loss in re.findall(r"(\*?[\d.e-]+): ([\d.]+)", line)}
    assert len(losses) == 5
    assert min(losses, key=losses.get).startswith("*")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere", "--task", "sst2"], ["--model nowhere", "config.json"]),
        (["--model", "MODEL", "--task", "sst3"], ["'sst3'", "sst2", "own"]),
        (["--model", "MODEL", "--task", "own"], ["--train", "--text", "--target"]),
        (["--model", "MODEL", "--task", "sst2", "--methods", "LoRa"], ["'LoRa'", "LoRA"]),
        (["--model", "MODEL", "--task", "e2e_nlg", "--methods", "T-Few"], ["T-Few", "generative"]),
        (["--encoder", "small", "--task", "sst2", "--methods", "few-shot"], ["few-shot", "encoder"]),
        (["--encoder", "small", "--task", "sst2,rte"], ["sst2 (classification), rte (classification)", "one task"]),
        (["--encoder", "small", "--task", "e2e_nlg"], ["e2e_nlg (generation)"]),
    ],
)
def test_misuse(story_model, data, capsys, arguments, words):
    pytest.importorskip("sklearn")
    arguments = [str(story_model) if each == "MODEL" else each for each in arguments]
    assert main([*arguments, "--data", str(data), "--pretrain", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("quality: error: ")
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "0"], ["--seconds", "-1"], ["--evaluate", "0"], ["--lr", "IA3"], ["--lr", "IA=1"], ["--lr", "IA3=0"]],
)
def test_arguments_out_of_range(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        main(["--encoder", "small", "--task", "sst2", *arguments])
    assert exit.value.code == 2
    assert f"argument {arguments[0]}: " in capsys.readouterr().err


# --- real data, where there is some ----------------------------------------------------------------------------------

needs_data = pytest.mark.skipif(not (DATA / "sst2").is_dir(), reason="needs the datasets; PYFASTPEFT_DATA=DIR")


@needs_data
@pytest.mark.parametrize("name", TASKS)
def test_real_files(name):
    task = TASKS[name]
    training, validation = task.load(DATA)
    assert len(training) > 2000
    assert len(validation) > 200
    for row in (*training, *validation):
        assert task.prompt(row).strip()
        assert task.completion(row).strip()
    if task.kind == "classification":
        assert {row["target"] for row in training} == {0, 1}


@needs_data
def test_a_real_story_model_tells_stories():
    learner = learners.load(DATA / "stories260K", [], 512, 20)
    ids = torch.tensor([[*learner.begin, *learner.tokens("Once upon a time")]])
    told = learner.model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=learner.end)
    text = learner.tokenizer.decode(told[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")
