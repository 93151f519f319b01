"""Published directories of tiny models, with a tokenizer that fits them."""

import shutil
from pathlib import Path

from .parity import CASES

MERGES = ["e f", "d ef", "Ġ a", "i n", "a d", "Ġ ="]


def make(folder: Path, case: str = "llama", tokenizer: bool = True) -> Path:
    """A copy of a parity case's weights, and a byte-level tokenizer.json of 97 tokens at most."""
    folder.mkdir(parents=True)
    for path in [CASES / case / "config.json", *(CASES / case).glob("model*.safetensors*")]:
        shutil.copy(path, folder)
    if tokenizer:
        words().save(str(folder / "tokenizer.json"))
    return folder


def words():
    """Letters, digits, some marks, the blank, the line's end, and a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [*map(chr, [*range(ord("a"), ord("z") + 1), *range(ord("0"), ord("9") + 1)])]
    names = [*letters, *"()[]{}.,:;+-*/='!?_<>ABCDEFGHIJKLMNOPQRSTUVWXYZ", "Ġ", "Ċ"]
    names += [merge.replace(" ", "") for merge in MERGES]
    assert len(names) <= 97
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split()) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
