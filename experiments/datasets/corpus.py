"""What to train on: files and directories to token sources, split into train and held-out.

Text (the standard library's source, text files, directories, JSONL) is read into memory, one
document a file or a row. Token arrays (.npy, .bin) are mapped, never read whole.

The split is by document: a hash of its path relative to the directory that was named decides, so
it is the same on every machine and does not move when other files come or go. With fewer than 20
documents the last sixteenth of each one, from a line's start, is held out instead; of token arrays,
laid end to end, the last twentieth.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import documents
from . import tokenizer as tokenizers
from .sources import Source

HELD_OUT_PERCENT = 8
ARRAYS = (".npy", ".bin")
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Tokenizer = tokenizers.Bytes | tokenizers.TokenizerJson


@dataclasses.dataclass(frozen=True)
class Corpus:
    """`tokenizer` is None for token arrays that came without one."""

    train: Source
    heldout: Source
    vocab: int
    tokenizer: Tokenizer | None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Flags for `corpus`, by the same names: `corpus(**vars(config))`."""

    paths: tuple[str, ...] = ("stdlib",)
    """What to train on: `stdlib` (the source of Python's standard library), text files, directories
    of them, .jsonl, or token arrays (.npy, .bin)."""
    heldout: tuple[str, ...] = ()
    """What to validate on, in the same forms; empty: a part of `paths`, chosen by document."""
    tokenizer: str | None = None
    """Path of a Hugging Face tokenizer.json; without one, or `bytes`, a token is a byte."""
    suffixes: tuple[str, ...] = ()
    """In directories, only files whose names end so (.py .txt); empty: every file not hidden."""
    field: str = "text"
    """The field of each JSONL row that holds the text."""
    token_dtype: str | None = None
    """Type of the numbers in .bin token arrays: uint8, uint16 (if None), uint32 or int32."""
    document_end: int | None = None
    """The token that closes a document in token arrays; what follows it starts fresh."""
    vocab: int | None = None
    """Number of tokens of the vocabulary, for token arrays without a tokenizer."""


def corpus(
    paths: Paths = "stdlib",
    *,
    heldout: Paths = (),
    tokenizer: str | None = None,
    suffixes: Sequence[str] = (),
    field: str = "text",
    token_dtype: str | None = None,
    document_end: int | None = None,
    vocab: int | None = None,
) -> Corpus:
    """Read or map `paths`. Errors: ValueError naming the path and what is wrong with it."""
    train_names, test_names = _names(paths), _names(heldout)
    if not train_names:
        raise ValueError("no paths are given: name text files, directories of them, or stdlib")
    name = "corpus " + " ".join(train_names)
    held_name = "corpus " + " ".join(test_names) if test_names else name + " (held out)"
    files, held = documents.find(train_names, suffixes), documents.find(test_names, suffixes)
    arrays = _all_arrays(files + held, name)
    suffix = {path.suffix for _, path in files + held}
    for option, value, default, heard, by in (
        ("document_end", document_end, None, arrays, "token arrays"),
        ("vocab", vocab, None, arrays, "token arrays"),
        ("token_dtype", token_dtype, None, ".bin" in suffix, ".bin token arrays"),
        ("field", field, "text", ".jsonl" in suffix, ".jsonl files"),
    ):
        if value != default and not heard:
            raise ValueError(f"{option}={value} is for {by}, and {name} has none")
    if arrays:
        tokens = tokenizers.load(tokenizer) if tokenizer is not None else None
        vocab = _vocab(vocab, tokens, name)
        parts, rest = (_arrays(found, token_dtype or "uint16") for found in (files, held))
        if not held:
            parts, rest = _tail(parts)
        per_token = _sampled(parts, vocab, tokens)
        start = np.zeros(1, np.int64)
        train = Source(parts, start, vocab, document_end, per_token, name)
        test = Source(rest, start, vocab, document_end, per_token, held_name)
    else:
        tokens = tokenizers.load(tokenizer)
        vocab = tokens.vocab
        texts = list(documents.read(files, field))
        rest_texts = list(documents.read(held, field))
        if not held:
            texts, rest_texts = _split(texts)
        train = _source(texts, tokens, vocab, name)
        test = _source(rest_texts, tokens, vocab, held_name)
    for source in (train, test):
        if len(source) < 2:
            raise ValueError(f"{source.name} is empty: {len(source)} tokens, at least 2 are needed")
    return Corpus(train, test, vocab, tokens)


def are_arrays(paths: Paths, suffixes: Sequence[str] = ()) -> bool:
    """Whether these are token arrays; ValueError if only some of them are."""
    names = _names(paths)
    return _all_arrays(documents.find(names, suffixes), "corpus " + " ".join(names))


def _all_arrays(files: list[tuple[str, Path]], name: str) -> bool:
    kinds = {path.suffix in ARRAYS for _, path in files}
    if len(kinds) > 1:
        raise ValueError(f"{name}: text and token arrays cannot be mixed")
    return kinds == {True}


def _arrays(files: list[tuple[str, Path]], dtype: str) -> tuple[np.ndarray, ...]:
    return tuple(array for _, path in files if len(array := _map(path, dtype)))


def _map(path: Path, dtype: str) -> np.ndarray:
    """A token array as a read-only map: .npy by its header, other files raw `dtype`."""
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            if dtype not in ("uint8", "uint16", "uint32", "int32"):
                raise ValueError(f"token_dtype {dtype!r} is not uint8, uint16, uint32 or int32")
            array = np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a token array: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: a token array is one row of integers, this is {array.dtype}{array.shape}"
        )
    return array


def _names(paths: Paths) -> tuple[str, ...]:
    return (str(paths),) if isinstance(paths, str | os.PathLike) else tuple(map(str, paths))


def _vocab(vocab: int | None, tokenizer: Tokenizer | None, name: str) -> int:
    if tokenizer is None:
        if vocab is None:
            raise ValueError(f"{name}: token arrays need vocab, or a tokenizer to know it from")
        if vocab < 1:
            raise ValueError(f"vocab={vocab}; it must be at least 1")
        return vocab
    if vocab is not None and vocab < tokenizer.vocab:
        raise ValueError(f"{name}: vocab={vocab} is less than the tokenizer's {tokenizer.vocab}")
    return tokenizer.vocab if vocab is None else vocab


def _split(texts: list[tuple[str, str]]) -> tuple[list, list]:
    texts = [(key, text) for key, text in texts if text]
    if len(texts) >= 20:
        test = [d for d in texts if _held_out(d[0])]
        train = [d for d in texts if not _held_out(d[0])]
        if test and train:
            return train, test
    train, test = [], []
    for key, text in texts:
        cut = len(text) - len(text) // 16
        line = text.find("\n", cut - 1) + 1
        cut = line if 0 < line < len(text) else cut
        train.append((key, text[:cut]))
        test.append((key, text[cut:]))
    return train, test


def _held_out(key: str) -> bool:
    digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def _source(texts: list[tuple[str, str]], tokenizer: Tokenizer, vocab: int, name: str) -> Source:
    tokens, sizes = tokenizer.encode_documents([text for _, text in texts])
    kept = [(t, s) for t, s in zip(tokens, sizes, strict=True) if len(t)]
    if not kept:
        return Source((), np.zeros(1, np.int64), vocab, name=name)
    starts = np.cumsum([0, *(len(t) for t, _ in kept)], dtype=np.int64)[:-1]
    whole = np.concatenate([t for t, _ in kept])
    predicted = len(whole) - len(kept)
    per_token = sum(s for _, s in kept) / predicted if predicted else None
    return Source((whole,), starts, vocab, None, per_token, name)


def _tail(parts: tuple[np.ndarray, ...]) -> tuple[tuple, tuple]:
    """The arrays, laid end to end, without their last twentieth, and that."""
    cut = (total := sum(map(len, parts))) - total // 20
    train, test, at = [], [], 0
    for part in parts:
        here = min(max(cut - at, 0), len(part))
        train.append(part[:here])
        test.append(part[here:])
        at += len(part)
    return tuple(p for p in train if len(p)), tuple(p for p in test if len(p))


def _sampled(
    parts: tuple[np.ndarray, ...], vocab: int, tokenizer: Tokenizer | None
) -> float | None:
    """Bytes a token, from the first tokens of a mapped array; None without a tokenizer."""
    if tokenizer is None or not parts:
        return None
    sample = np.asarray(parts[0][:65536])
    if sample.min() < 0 or sample.max() >= vocab:
        return None  # reading a batch will say which token is wrong
    return len(tokenizer.decode(sample).encode("utf-8")) / len(sample)
