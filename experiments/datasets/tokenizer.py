"""Text to token numbers and back: bytes by default, a Hugging Face tokenizer.json by path."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...models.pretrained import options

BYTES = "bytes"  # in place of a path: a token is a byte


class Marks(NamedTuple):
    """The tokens that stand where a text begins and ends, where a tokenizer has such."""

    before: tuple[int, ...] = ()
    """What its own template puts before every text."""
    start: tuple[int, ...] = ()
    """What the first token of a text follows: `before`, else the beginning's, else the end's."""
    ends: frozenset[int] = frozenset()
    """What a text ends with."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One token a byte of UTF-8. No special tokens: 256 numbers, and every text has an encoding."""

    vocab: int = 256
    marks = Marks()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode_documents(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        """Each text's tokens, and how many of its bytes come after its first token."""
        tokens = [self.encode(text) for text in texts]
        return tokens, [max(len(t) - 1, 0) for t in tokens]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of these bytes; a character cut in two shows as a replacement mark.

        So does a number that is no byte, which a model of a larger vocabulary may make.
        """
        numbers = np.asarray(tokens, np.int64)
        never = 0xFF  # in no UTF-8
        return bytes(np.where(numbers < 256, numbers, never).astype(np.uint8)).decode(
            "utf-8", errors="replace"
        )

    def json(self) -> str:
        """The tokenizer.json of the same tokens, for other libraries."""
        # a byte that is not a visible character of Latin-1 is written as one from 256 on (GPT-2)
        visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
        hidden = [byte for byte in range(256) if byte not in visible]
        vocab = {chr(b if b in visible else 256 + hidden.index(b)): b for b in range(256)}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        level |= {"use_regex": False}
        body = {"version": "1.0", "pre_tokenizer": level, "decoder": level}
        body |= {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []}
        return json.dumps(body, ensure_ascii=False, indent=1)


@dataclasses.dataclass(frozen=True)
class TokenizerJson:
    """A tokenizer.json, read by the package `tokenizers`. Special tokens are never added.

    Which ones begin and end a text say its own template and the files that published models have
    beside it (tokenizer_config.json, config.json, generation_config.json).
    """

    path: str

    @functools.cached_property
    def _tokenizer(self) -> Any:
        if not Path(self.path).is_file():
            raise ValueError(f"tokenizer {self.path}: no such file (a tokenizer.json is expected)")
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"tokenizer {self.path} needs the package tokenizers: pip install 'scanax[text]'"
            ) from None
        try:
            return tokenizers.Tokenizer.from_file(self.path)
        except Exception as error:  # the Rust side raises plain Exception
            said = options.shown([str(error)])
            raise ValueError(f"tokenizer {self.path} is not a tokenizer.json: {said}") from None

    @functools.cached_property
    def vocab(self) -> int:
        # A vocabulary may have holes: what the embedding needs is the largest number plus one.
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def marks(self) -> Marks:
        encoding = self._tokenizer.encode("a")
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        before = tuple(token for token, _ in itertools.takewhile(lambda pair: pair[1], pairs))
        found: dict[str, list[int]] = {"bos": [], "eos": []}
        for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
            path = Path(self.path).with_name(name)
            values = options.read(path) if path.is_file() else {}
            for kind, numbers in found.items():
                token = values.get(f"{kind}_token")
                text = token.get("content") if isinstance(token, dict) else token
                number = values.get(f"{kind}_token_id")
                number = self._tokenizer.token_to_id(text) if isinstance(text, str) else number
                given = number if isinstance(number, list) else [number]
                numbers += [n for n in given if isinstance(n, int)]
        start = before or tuple((found["bos"] or found["eos"])[:1])
        return Marks(before, start, frozenset(found["eos"]))

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_documents(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        """Each text's tokens, and how many of its bytes come after its first token."""
        tokens, sizes = [], []
        batch = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, batch, strict=True):
            tokens.append(np.asarray(encoding.ids, np.int32))
            first = encoding.offsets[0][1] if encoding.ids else len(text)
            sizes.append(len(text[first:].encode("utf-8")))
        return tokens, sizes

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False)


def load(path: str | None) -> Bytes | TokenizerJson:
    """The byte tokeniser for None or BYTES, else the tokenizer.json at `path`, read and checked."""
    if path in (None, BYTES):
        return Bytes()
    tokenizer = TokenizerJson(path)
    if tokenizer.vocab < 1:
        raise ValueError(f"tokenizer {path} has no tokens")
    return tokenizer
