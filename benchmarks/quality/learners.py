"""What learns a task: a decoder or an encoder-decoder through prompts, or an encoder with a head."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks import Misuse
from pyfastpeft.methods.losses import IGNORED, choice_scores, rank_classification

from .tasks import Row, Task
from .vocabulary import llama2c_tokenizer, word_tokenizer

SPARE = 32  # positions left free for virtual tokens


@dataclass
class Dataset:
    """A task with its rows."""

    task: Task
    training: list[Row]
    validation: list[Row]


@dataclass
class Example:
    """One row of a batch for a generative model: the loss counts the completion alone."""

    prompt: list[int]
    completion: list[int]


class Generative:
    """A decoder on prompts and completions; several tasks may be mixed."""

    head: tuple[str, ...] = ()
    family = "generative"
    causal = True  # logits at t predict the token after t

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, new_tokens: int):
        if tokenizer.eos_token_id is None:
            raise Misuse("the model's tokenizer has no token that ends a text; one is needed to end completions with")
        longest = getattr(model.config, "max_position_embeddings", None) or length + SPARE
        self.model, self.tokenizer = model, tokenizer
        self.length, self.new_tokens = min(length, longest - SPARE), new_tokens
        self.end = tokenizer.eos_token_id
        self.pad = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    # --- tokens ---

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def example(self, task: Task, row: Row, completion: str, template: int = 0, shots: Sequence[Row] = ()) -> Example:
        """A row's prompt, behind as many solved ones as fit, and a completion with its end."""
        answer = [*self.tokens(completion), self.end]
        room = self.length - len(self.begin) - max(len(answer), self.new_tokens if not task.choices else 0)
        return Example(self.begin + self._prompt(task, row, template, shots, room), answer)

    def _prompt(self, task, row, template, shots, room) -> list[int]:
        prompt = self.tokens(task.prompt(row, template))
        for shot in shots:
            solved = self.tokens(task.prompt(shot)) + self.tokens(task.completion(shot)) + self.tokens("\n")
            prompt = solved + prompt if len(solved) + len(prompt) <= room else prompt
        return prompt[-room:]

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels [B, T], padded on the right; -100 where nothing is predicted."""
        labels = [[IGNORED] * len(each.prompt) + each.completion for each in examples]
        return self._inputs([each.prompt + each.completion for each in examples]) | {"labels": self._padded(labels)}

    def _inputs(self, rows: Sequence[Sequence[int]], left: bool = False) -> dict[str, Tensor]:
        mask = self._padded([[1] * len(row) for row in rows], 0, left)
        return {"input_ids": self._padded(rows, self.pad, left), "attention_mask": mask}

    def _padded(self, rows: Sequence[Sequence[int]], filler: int = IGNORED, left: bool = False) -> Tensor:
        longest = max(map(len, rows))
        fill = [[filler] * (longest - len(row)) for row in rows]
        whole = [[*more, *row] if left else [*row, *more] for row, more in zip(rows, fill)]
        return torch.tensor(whole, device=next(self.model.parameters()).device)

    def training_batch(self, rows: Sequence[tuple[Task, Row, int]], choices: int = 0) -> dict[str, Tensor]:
        """A batch of (task, row, template). With `choices` every row becomes that many: one for each answer to choose
        from, the right one first, and fillers without labels, as TFewLoss wants them."""
        if not choices:
            return self.batch([self.example(task, row, task.completion(row), each) for task, row, each in rows])
        examples, filler = [], []
        for task, row, template in rows:
            right = task.answer(row)
            order = [right, *(i for i in range(len(task.choices)) if i != right)]
            filler += [i >= len(order) for i in range(choices)]
            order += [right] * (choices - len(order))
            examples += [self.example(task, row, task.choices[i], template) for i in order]
        batch = self.batch(examples)
        batch["labels"][torch.tensor(filler)] = IGNORED
        return batch

    def outputs(self, batch: dict[str, Tensor]):
        """The model's, with logits that nothing need be counted in."""
        return self.model(**{**batch, "labels": None})

    # --- evaluation ---

    @torch.no_grad()
    def loss(self, task: Task, rows: Sequence[Row], shots: Sequence[Row] = (), size: int = 32) -> float:
        """Mean cross-entropy per token of the completions, in nats; every reference counts."""
        examples = [
            self.example(task, row, completion, shots=shots)
            for row in rows
            for completion in row.get("references", [task.completion(row)])
        ]
        total = count = 0
        for batch in map(self.batch, _by_length(examples, size)):
            tokens = (batch["labels"] != IGNORED).sum().item()
            total, count = total + self.model(**batch).loss.item() * tokens, count + tokens
        return total / count

    @torch.no_grad()
    def predict(self, task: Task, rows: Sequence[Row], shots: Sequence[Row] = (), size: int = 32) -> list:
        """A class, a score or a text for every row.

        Classes by rank classification; scores as the mean of the choices under their length-normalised likelihoods;
        texts greedily.
        """
        if not task.choices:
            return self._generate(task, rows, shots, size)
        found = []
        for i in range(0, len(rows), size):
            examples = [
                self.example(task, row, each, shots=shots) for row in rows[i : i + size] for each in task.choices
            ]
            batch = self.batch(examples)
            labels = batch["labels"].unflatten(0, (-1, len(task.choices)))
            logits = self.outputs(batch).logits[:, -labels.shape[-1] :].unflatten(0, labels.shape[:2])
            if task.is_score:
                weights = choice_scores(logits, labels, causal=self.causal).double().softmax(-1)
                found += (weights @ torch.tensor([float(each) for each in task.choices]).to(weights)).tolist()
            else:
                found += rank_classification(logits, labels, causal=self.causal).tolist()
        return found

    def _generate(self, task, rows, shots, size):
        prompts = [self.example(task, row, "", shots=shots).prompt for row in rows]
        order, texts = sorted(range(len(rows)), key=lambda i: len(prompts[i])), {}
        for first in range(0, len(rows), size):
            places = order[first : first + size]
            inputs = self._inputs([prompts[i] for i in places], left=self.causal)
            made = self.model.generate(
                **inputs,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                eos_token_id=self.end,
                pad_token_id=self.pad,
            )
            start = inputs["input_ids"].shape[1] if self.causal else 1
            for i, row in zip(places, made[:, start:].tolist()):
                row = row[: row.index(self.end)] if self.end in row else row
                texts[i] = self.tokenizer.decode(row, skip_special_tokens=True).strip()
        return [texts[i] for i in range(len(rows))]


class EncoderDecoder(Generative):
    """An encoder-decoder: the encoder reads the prompt, the decoder learns the completion, each within the special
    tokens that the tokenizer puts around a text to read and one to write."""

    causal = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, new_tokens: int):
        super().__init__(model, tokenizer, length, new_tokens)
        self.around_prompt, self.around_completion = _around(tokenizer, "text"), _around(tokenizer, "text_target")

    def example(self, task: Task, row: Row, completion: str, template: int = 0, shots: Sequence[Row] = ()) -> Example:
        before, after = self.around_prompt
        prompt = self._prompt(task, row, template, shots, self.length - len(before) - len(after))
        begin, finish = self.around_completion
        return Example([*before, *prompt, *after], [*begin, *self.tokens(completion), *(finish or [self.end])])

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, S], labels [B, T], from which the model makes the decoder's input."""
        labels = self._padded([each.completion for each in examples])
        return self._inputs([each.prompt for each in examples]) | {"labels": labels}

    def outputs(self, batch: dict[str, Tensor]):
        return self.model(**batch)


def _around(tokenizer: PreTrainedTokenizerBase, side: str) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text, as an argument of the tokenizer: "text" or "text_target"."""
    whole, bare = (tokenizer(**{side: "a"}, add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


class Encoder:
    """An encoder with a head for one task of classes or scores."""

    family = "encoder"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: tuple[str, ...], length: int):
        longest = getattr(model.config, "max_position_embeddings", length)
        self.model, self.tokenizer, self.head, self.length = model, tokenizer, head, min(length, longest)

    def batch(self, task: Task, rows: Sequence[Row]) -> dict[str, Tensor]:
        texts = ([str(row[column]) for row in rows] for column in task.text)
        options = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        kind = torch.float32 if task.is_score else torch.int64
        labels = torch.tensor([row["target"] for row in rows], dtype=kind)
        device = next(self.model.parameters()).device
        batch = {**self.tokenizer(*texts, **options), "labels": labels}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def training_batch(self, rows: Sequence[tuple[Task, Row, int]]) -> dict[str, Tensor]:
        return self.batch(rows[0][0], [row for _, row, _ in rows])

    @torch.no_grad()
    def loss(self, task: Task, rows: Sequence[Row], size: int = 64) -> float:
        """Mean over the rows of the cross-entropy in nats, or of the squared error."""
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return sum(self.model(**self.batch(task, part)).loss.item() * len(part) for part in parts) / len(rows)

    @torch.no_grad()
    def predict(self, task: Task, rows: Sequence[Row], size: int = 64) -> list:
        logits = [self.model(**self.batch(task, rows[i : i + size])).logits for i in range(0, len(rows), size)]
        return torch.cat([each.squeeze(-1) if task.is_score else each.argmax(-1) for each in logits]).tolist()


def _by_length(examples, size):
    order = sorted(examples, key=lambda each: len(each.prompt) + len(each.completion))
    return [order[i : i + size] for i in range(0, len(order), size)]


def batches(datasets: Sequence[Dataset], size: int, seed: int) -> Iterator[list[tuple[Task, Row, int]]]:
    """Endless batches of (task, row, template) over all tasks' rows, in an order that `seed` alone sets."""
    rows = [(dataset.task, row) for dataset in datasets for row in dataset.training]
    shuffle, epoch, batch = random.Random(seed).shuffle, 0, []
    while True:
        order = list(range(len(rows)))
        shuffle(order)
        for i in order:
            batch.append((*rows[i], i + epoch))
            if len(batch) == size:
                yield batch
                batch = []
        epoch += 1


# --- where models come from ------------------------------------------------------------------------------------------


def load(folder: Path, datasets: Sequence[Dataset], length: int, new_tokens: int) -> Generative | Encoder:
    """The model in `folder`, in float32. Raises Misuse where it does not load or does not fit the tasks."""
    if not (folder / "config.json").is_file():
        raise Misuse(f"--model {folder} holds no config.json; it must be the directory of a transformers model")
    try:
        config = AutoConfig.from_pretrained(folder)
        architecture = (config.architectures or ["?"])[0]
        if config.is_encoder_decoder and "Classification" not in architecture:
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
            return EncoderDecoder(model.eval(), _tokenizer(folder), length, new_tokens)
        if "ForCausalLM" in architecture or "LMHead" in architecture:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            return Generative(model.eval(), _tokenizer(folder), length, new_tokens)
        if "ConditionalGeneration" in architecture:
            raise Misuse(f"--model {folder} is a {architecture}; a language model or an encoder is needed")
        task = one_task(datasets)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, num_labels=classes(task), output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise Misuse(f"--model {folder} does not load: {str(error).strip().splitlines()[0]}") from error
    head = tuple(sorted({name.rpartition(".")[0] for name in info["missing_keys"]})) or ("classifier",)
    return Encoder(model.eval(), _tokenizer(folder), head, length)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    own = sorted(folder.glob("tok*.bin"))
    if own:
        return llama2c_tokenizer(own[0])
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises whatever its tokenizers do
        raise Misuse(f"--model {folder} has no tokenizer that loads: {str(error).strip().splitlines()[0]}") from error


def one_task(datasets: Sequence[Dataset]) -> Task:
    """The task of an encoder. Raises Misuse where there are several, or one of texts to generate."""
    task = datasets[0].task
    if len(datasets) > 1 or task.kind == "generation":
        names = ", ".join(f"{dataset.task.name} ({dataset.task.kind})" for dataset in datasets)
        raise Misuse(f"--task is {names}; an encoder takes one task of classes or scores")
    return task


def classes(task: Task) -> int:
    return 1 if task.is_score else len(task.labels)


def small_encoder(datasets: Sequence[Dataset], steps: int, length: int = 64, seed: int = 0) -> Encoder:
    """A BERT of 2 layers, 128 wide, with words of the training texts for vocabulary; pooler and classifier are new.

    Its words start from `word_vectors` of these texts, and it is pretrained on them for `steps` steps of 32 rows of at
    most 32 tokens: as a masked language model, and to predict the words of a row from its first state, which is what a
    classifier is to read.
    """
    task = one_task(datasets)
    texts = [str(row[column]) for row in datasets[0].training for column in task.text]
    tokenizer = word_tokenizer(texts, 8000)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=classes(task),
    )
    masked = BertForMaskedLM(config).train()
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    masked.get_input_embeddings().weight.data.copy_(word_vectors(rows, len(tokenizer), config.hidden_size))
    optimizer = torch.optim.AdamW(masked.parameters(), lr=1e-3)
    pick = random.Random(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        options = {"padding": True, "truncation": True, "max_length": 32, "return_tensors": "pt"}
        batch = tokenizer(pick.choices(texts, k=32), return_special_tokens_mask=True, **options)
        ids, special = batch["input_ids"], batch["special_tokens_mask"].bool()
        chosen = (torch.rand(ids.shape) < 0.15) & ~special
        labels = ids[chosen]
        ids = ids.masked_fill(chosen & (torch.rand(ids.shape) < 0.9), tokenizer.mask_token_id)
        if chosen.any():
            hidden = masked.bert(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state
            summary = masked.cls(hidden[:, 0]).log_softmax(-1).gather(1, batch["input_ids"])  # [B, T]
            told = summary.masked_select(~special).mean()
            (F.cross_entropy(masked.cls(hidden[chosen]), labels) - told).backward()
            nn.utils.clip_grad_norm_(masked.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(masked.bert.state_dict(), strict=False)
    return Encoder(model.eval(), tokenizer, ("bert.pooler", "classifier"), length)


def word_vectors(rows: Sequence[Sequence[int]], words: int, size: int, window: int = 4) -> Tensor:
    """[words, size]: unit vectors from the singular value decomposition of the positive pointwise mutual information of
    words that stand within `window` of each other (Levy & Goldberg 2014); zero for a word that stands alone."""
    from scipy.sparse import coo_array
    from sklearn.decomposition import TruncatedSVD

    tokens = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    near = [(tokens[:-d], tokens[d:], owner[:-d] == owner[d:]) for d in range(1, window + 1)]
    left, right = (np.concatenate([pair[side][pair[2]] for pair in near]) for side in (0, 1))
    places = np.concatenate([left, right]), np.concatenate([right, left])
    counts = coo_array((np.ones(len(places[0])), places), shape=(words, words)).tocsr().tocoo()
    of_word = np.maximum(counts.sum(1), 1)
    information = np.log(counts.data * counts.sum() / (of_word[counts.row] * of_word[counts.col]))
    matrix = coo_array((np.maximum(information, 0), (counts.row, counts.col)), shape=counts.shape).tocsr()
    vectors = torch.from_numpy(TruncatedSVD(min(size, words), random_state=0).fit_transform(matrix)).float()
    return F.pad(F.normalize(vectors, eps=1e-6), (0, max(0, size - words)))
