"""Tokenizers that come without transformers' files: llama2.c's binary vocabulary, and one word per token."""

import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks import Misuse


def read_llama2c(path: Path) -> list[tuple[str, float]]:
    """(token, score) in order of the ids. The file: int32 longest token, then for each token float32 score, int32
    length and that many bytes, all little-endian. Raises Misuse where it is not that."""
    data = path.read_bytes()
    tokens, place = [], 4
    try:
        (longest,) = struct.unpack_from("<i", data)
        while place < len(data):
            score, length = struct.unpack_from("<fi", data, place)
            text = data[place + 8 : place + 8 + length]
            if not 0 <= length <= longest or len(text) != length:
                raise ValueError(f"a token of {length} bytes at byte {place}, the longest having {longest}")
            tokens.append((text.decode(), score))
            place += 8 + length
    except (struct.error, ValueError) as error:
        raise Misuse(f"{path} is no vocabulary of llama2.c: {error}") from error
    return tokens


def llama2c_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Greedy merges of the pair whose union scores highest, leftmost first; bytes for characters outside the
    vocabulary; a space before the text. As in llama2.c, the token <s> both begins and ends a text."""
    tokens = read_llama2c(path)
    names = {text.strip() for text, _ in tokens[:3]}
    if not {"<unk>", "<s>", "</s>"} <= names:
        raise Misuse(f"{path} begins with {sorted(names)}; it must begin with <unk>, <s> and </s>")
    # The file writes <s> and </s> with line ends around them.
    vocabulary = {text if i >= 3 else text.strip(): i for i, (text, _) in enumerate(tokens)}
    merges = [
        (-score, (text[:cut], text[cut:]))
        for text, score in tokens[259:]  # after three special tokens and 256 bytes
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: merge[0])
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[pair for _, pair in merges], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = {"bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def word_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """The `size` - 5 most frequent lower-case words and signs of `texts`, with BERT's special tokens."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower()))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    words = sorted(counts, key=lambda word: (-counts[word], word))[: size - len(special)]
    vocabulary = {word: token for token, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **special)
