"""Tasks: readers of the datasets' own files and of a user's, as rows with a target; and their prompt templates."""

import csv
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import Misuse

Row = dict  # the file's columns by name, and "target": int, float or str; generation: "references", a list of str

KINDS = ("classification", "regression", "generation")
METRICS = {
    "classification": ("accuracy", "f1"),
    "regression": ("pearson", "spearman"),
    "generation": ("bleu", "nist", "meteor", "rouge1", "rouge2", "rougeL", "cider"),
}


@dataclass(frozen=True)
class Task:
    """A dataset and what is asked of it.

    text: the columns that an encoder reads, one or two. target: the column to predict; for classification `labels` maps
    its values to the words that stand for them in a completion, in order of the classes. templates: prompts, formatted
    with a row's columns; training goes through them in turn, evaluation uses the first. files: of the training and of
    the validation rows. folder: that of the files, if it has not the task's name.
    """

    name: str
    kind: str
    text: tuple[str, ...]
    target: str
    templates: tuple[str, ...]
    files: tuple[str, tuple[str, ...]]
    read: Callable[[Path], list[Row]]
    labels: dict[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    folder: str = ""

    @property
    def measured(self) -> tuple[str, ...]:
        return self.metrics or METRICS[self.kind]

    @property
    def choices(self) -> tuple[str, ...]:
        """The completions to choose from; none where text is generated. A score is written as the nearest integer."""
        return tuple(self.labels.values()) if self.kind == "classification" else tuple("012345") * self.is_score

    @property
    def is_score(self) -> bool:
        return self.kind == "regression"

    def prompt(self, row: Row, template: int = 0) -> str:
        return self.templates[template % len(self.templates)].format_map(row)

    def answer(self, row: Row) -> int:
        """The place among `choices` of a row's target."""
        return row["target"] if self.kind == "classification" else min(max(round(row["target"]), 0), 5)

    def completion(self, row: Row) -> str:
        return self.choices[self.answer(row)] if self.choices else row["target"]

    def load(self, folder: Path) -> tuple[list[Row], list[Row]]:
        """Training and validation rows from the task's own folder in `folder`, or from `folder`. Raises Misuse."""
        own = folder / (self.folder or self.name)
        folder = own if own.is_dir() else folder
        training, validation = self.files
        return self.rows([folder / training]), self.rows([folder / name for name in validation], grouped=True)

    def rows(self, paths: Sequence[Path], grouped: bool = False) -> list[Row]:
        """All rows of `paths` with their targets; `grouped` gathers a prompt's references into one row."""
        found = [self._with_target(row, path) for path in paths for row in self.read(path)]
        if self.kind != "generation" or not grouped:
            return found
        groups: dict[str, Row] = {}
        for row in found:
            groups.setdefault(self.prompt(row), row | {"references": []})["references"].append(row["target"])
        return list(groups.values())

    def _with_target(self, row: Row, path: Path) -> Row:
        for column in (self.target, *self.text):
            if not isinstance(row.get(column), (str, int, float)):
                raise Misuse(f"{path}: no column {column!r} in a row with {sorted(map(str, row))}")
        value = str(row[self.target]).strip()
        if self.kind == "generation":
            return row | {"target": value}
        if self.kind == "regression":
            try:
                return row | {"target": float(value)}
            except ValueError:
                raise Misuse(f"{path}: {self.target} is {value!r}; it must be a number") from None
        if value not in self.labels:
            raise Misuse(f"{path}: {self.target} is {value!r}; it must be one of {list(self.labels)}")
        return row | {"target": list(self.labels).index(value)}


def table(*columns: str, delimiter: str = "\t", quoted: bool = False) -> Callable[[Path], list[Row]]:
    """A reader of delimited text whose first line names the columns, or of one without where `columns` names them."""

    def read(path: Path) -> list[Row]:
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        with opened(path) as file:
            return list(csv.DictReader(file, columns or None, "rest", delimiter=delimiter, quoting=quoting))

    return read


def with_attribute(name: str, read: Callable[[Path], list[Row]]) -> Callable[[Path], list[Row]]:
    """A reader of E2E NLG: of the rows that `read` gives those whose meaning representation has the attribute `name`,
    and its value in a column of that name."""
    pattern = re.compile(rf"(?:^|, ){re.escape(name)}\[([^]]*)\]")

    def read_attribute(path: Path) -> list[Row]:
        rows = ((row, pattern.search(row.get("mr") or "")) for row in read(path))
        return [row | {name: found[1]} for row, found in rows if found]

    return read_attribute


def json_lines(path: Path) -> list[Row]:
    with opened(path) as file:
        try:
            return [json.loads(line) for line in file if line.strip()]
        except json.JSONDecodeError as error:
            raise Misuse(f"{path} is not JSON line by line: {error}") from error


def opened(path: Path):
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise Misuse(f"{path} cannot be read: {error.strerror}") from error


READERS = {".jsonl": json_lines, ".tsv": table(), ".csv": table(delimiter=",", quoted=True)}

TASKS = {
    task.name: task
    for task in (
        Task(
            "sst2",
            "classification",
            ("sentence",),
            "label",
            ("Review: {sentence}\nSentiment:", "{sentence}\nIs this review negative or positive?"),
            ("train.tsv", ("dev.tsv",)),
            table(),
            {"0": "negative", "1": "positive"},
            ("accuracy",),
        ),
        Task(
            "rte",
            "classification",
            ("sentence1", "sentence2"),
            "label",
            (
                "{sentence1}\nDoes it follow that {sentence2} Yes or no?",
                "Premise: {sentence1}\nHypothesis: {sentence2}\nTrue:",
            ),
            ("train.tsv", ("dev.tsv",)),
            table(),
            {"not_entailment": "no", "entailment": "yes"},
            ("accuracy",),
        ),
        Task(
            "cola",
            "classification",
            ("sentence",),
            "label",
            ("{sentence}\nIs this sentence good or bad English?", "Sentence: {sentence}\nGrammar:"),
            ("in_domain_train.tsv", ("in_domain_dev.tsv", "out_of_domain_dev.tsv")),
            table("source", "label", "mark", "sentence"),
            {"0": "bad", "1": "good"},
            ("matthews", "accuracy"),
        ),
        Task(
            "mrpc",
            "classification",
            ("#1 String", "#2 String"),
            "Quality",
            ("{#1 String}\n{#2 String}\nDo both say the same, yes or no?", "A: {#1 String}\nB: {#2 String}\nSame:"),
            ("train.txt", ("test.txt",)),
            table(),
            {"0": "no", "1": "yes"},
        ),
        Task(
            "stsb",
            "regression",
            ("sentence1", "sentence2"),
            "score",
            ("{sentence1}\n{sentence2}\nHow alike are they, from 0 to 5?", "A: {sentence1}\nB: {sentence2}\nAlike:"),
            ("sts-train.csv", ("sts-dev.csv",)),
            table("genre", "file", "year", "id", "score", "sentence1", "sentence2"),
        ),
        Task(
            "e2e_nlg",
            "generation",
            ("mr",),
            "ref",
            ("{mr}\n",),
            ("trainset.csv", ("devset.csv",)),
            table(delimiter=",", quoted=True),
        ),
        Task(
            "e2e_family",
            "classification",
            ("ref",),
            "familyFriendly",
            ("{ref}\nIs it good for families?",),
            ("trainset.csv", ("devset.csv",)),
            with_attribute("familyFriendly", table(delimiter=",", quoted=True)),
            {"no": "no", "yes": "yes"},
            ("accuracy", "matthews"),
            "e2e_nlg",
        ),
    )
}


def own_task(kind: str, text: Sequence[str], target: str, prompt: str | None, path: Path) -> Task:
    """A task on a user's files (.jsonl, .tsv, .csv), its labels those that `path` holds. Raises Misuse."""
    if path.suffix not in READERS:
        raise Misuse(f"{path} ends in {path.suffix!r}; known are {', '.join(READERS)}")
    read = READERS[path.suffix]
    labels = {}
    if kind == "classification":
        values = sorted({str(row.get(target, "")).strip() for row in read(path)})
        if not 2 <= len(values) <= 100:
            raise Misuse(f"{path}: column {target!r} has {len(values)} values; 2 to 100 classes are needed")
        labels = {value: value for value in values}
    prompt = prompt or "\n".join(f"{{{column}}}" for column in text) + "\n"
    return Task("own", kind, tuple(text), target, (prompt,), (path.name, (path.name,)), read, labels)


def hold_out(rows: list[Row], task: Task, share: float = 0.125) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: at random, of every class the same share, and at least one prompt of each
    that has two; yet rows with one prompt stay together."""
    answers = {task.prompt(row): row["target"] if task.kind == "classification" else None for row in rows}
    shuffle, held = random.Random(0).shuffle, set()
    for answer in dict.fromkeys(answers.values()):
        prompts = sorted(prompt for prompt in answers if answers[prompt] == answer)
        shuffle(prompts)
        held.update(prompts[: min(max(1, round(share * len(prompts))), len(prompts) - 1)])
    if not held:
        few = f"{task.name} has {len(answers)} different prompts"
        raise Misuse(f"{few}; at least two, of one class, are needed to hold some out")
    return [row for row in rows if task.prompt(row) not in held], [row for row in rows if task.prompt(row) in held]
