"""Texts as tokens: files, or parts of Python's standard library."""

import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from benchmarks import Misuse

STDLIB = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = ("asyncio", "email", "json", "logging")  # what the base model does not see and adapters learn
# Installed packages, and what is data or fixtures more than Python.
PASSED_OVER = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
BASE_CHARACTERS = 2_000_000
HELD_OUT_EVERY = 8  # of the rows of a text, every eighth is held out
MOST_HELD_OUT = 32  # rows


@dataclass
class Part:
    """A text as tokens, cut into rows of `length`; every HELD_OUT_EVERY-th row is kept from training."""

    name: str
    training: Tensor  # [T] int64
    held_out: Tensor  # [rows, length] int64

    def batches(self, rows: int, seed: int = 0) -> Iterator[Tensor]:
        """Endless batches [rows, length] of crops at random places of the training tokens."""
        generator, length = torch.Generator().manual_seed(seed), self.held_out.shape[1]
        while True:
            starts = torch.randint(len(self.training) - length, (rows, 1), generator=generator)
            yield self.training[starts + torch.arange(length)]


def part(name: str, text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Part:
    """Raises Misuse where the text is too short for two held-out rows."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    rows, needed = len(tokens) // length, 2 * HELD_OUT_EVERY
    if rows < needed:
        raise Misuse(
            f"the text {name!r} has {len(tokens)} tokens; at least {needed * length} are needed, "
            f"{needed} rows of {length} (--length takes a smaller number)"
        )
    table = tokens[: rows * length].view(rows, length)
    held_out = torch.arange(rows) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return Part(name, table[~held_out].flatten(), table[held_out][:MOST_HELD_OUT])


def files(given: list[str]) -> dict[str, str]:
    """The texts of "FILE" or "NAME=FILE", by name. Raises Misuse for what cannot be read or named."""
    found = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not equals:
            name, path = re.sub(r"\W", "_", Path(entry).stem), entry
        # PEFT keeps adapters in an nn.ModuleDict under their names and "default" apart from others on disk.
        if not re.fullmatch(r"[\w-]+", name) or name in ("default", "__base__") or hasattr(nn.ModuleDict(), name):
            raise Misuse(f"--data {entry}: {name!r} cannot name an adapter; give another name: --data NAME={path}")
        if name in found:
            raise Misuse(f"--data {entry}: the name {name!r} is given twice; give another: --data NAME={path}")
        try:
            found[name] = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Misuse(f"--data {entry}: {path} cannot be read as a UTF-8 text: {error}") from error
    return found


def base_text() -> str:
    """Python's standard library without PACKAGES, its files in a fixed random order."""
    files = [file for file in _sources(STDLIB) if file.relative_to(STDLIB).parts[0] not in PACKAGES]
    random.Random(0).shuffle(files)
    text = ""
    for file in files:
        text += _read(file)
        if len(text) >= BASE_CHARACTERS:
            break
    return text


def package_texts(count: int) -> dict[str, str]:
    """The text of the first `count` of PACKAGES. Raises Misuse where this Python comes without its sources."""
    texts = {name: "".join(map(_read, _sources(STDLIB / name))) for name in PACKAGES[:count]}
    if not all(texts.values()):
        raise Misuse(f"this Python's standard library ({STDLIB}) holds no sources; give --model and --data")
    return texts


def _sources(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*.py")) if not PASSED_OVER & set(file.relative_to(STDLIB).parts)]


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
