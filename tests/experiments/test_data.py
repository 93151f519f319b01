"""Corpora, tokenizers, batches as functions of (seed, step), and the order-2 yardstick."""

import collections
import itertools
import json
import math
import sys

import numpy as np
import pytest
from scanax.experiments.datasets.order2 import order2_bits_per_byte
from scanax.experiments.datasets.text import (
    Source,
    corpus,
    evaluation,
    evaluation_steps,
    permuted,
    streams,
    windows,
)

LENGTHS = [7, 1, 30, 12, 50, 3]  # of documents: 103 tokens


def source(**changes):
    """Token i is i, so a batch says where it was read; in two arrays, as two files would be."""
    whole = np.arange(sum(LENGTHS), dtype=np.uint16)
    starts = np.cumsum([0, *LENGTHS[:-1]])
    return Source(
        **{**{"parts": (whole[:40], whole[40:]), "starts": starts, "vocab": 256}, **changes}
    )


def obeys(batch):
    """Targets follow tokens round the circle; documents begin and do not run on, as they should."""
    s = source()
    np.testing.assert_array_equal(batch["targets"], (batch["tokens"] + 1) % len(s))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    np.testing.assert_array_equal(batch["reset"], np.isin(batch["tokens"], s.starts))
    np.testing.assert_array_equal(batch["weights"], ~np.isin(batch["targets"], s.starts))
    types = {name: value.dtype.name for name, value in batch.items()}
    assert types == {"tokens": "int32", "targets": "int32", "reset": "bool", "weights": "float32"}


def test_windows_are_shuffled_and_each_seen_once_an_epoch():
    s, length, count = source(), 5, 103 // 5  # 20 windows: batches of 3 run on across epochs
    serial = []
    for step in range(20):
        batch = windows(s, 4, step, batch=3, length=length)
        obeys(batch)
        serial += [tuple(row) for row in batch["tokens"]]
    epochs = [serial[i : i + count] for i in range(0, len(serial), count)]
    for epoch in epochs:
        assert len({token for row in epoch for token in row}) == count * length
    assert len({tuple(e) for e in epochs}) == 3
    assert len({min(row[0] % length for row in epoch) for epoch in epochs}) > 1  # other offsets
    again = windows(s, 4, 13, batch=3, length=length)
    assert [tuple(row) for row in again["tokens"]] == serial[39:42]
    other = windows(s, 5, 13, batch=3, length=length)
    assert (other["tokens"] != again["tokens"]).any()


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 1000])
def test_permutations_are_permutations(count):
    found = [[permuted(i, count, key) for i in range(count)] for key in (0, 2**63 + 1)]
    assert all(sorted(order) == list(range(count)) for order in found)
    if count > 3:
        assert found[0] != found[1] and found[0] != list(range(count))


def test_streams_go_on_where_they_ended_and_cover_the_text():
    s, batch, length = source(), 4, 5
    steps = [streams(s, 1, step, batch=batch, length=length) for step in range(60)]
    for before, after in itertools.pairwise(steps):
        obeys(before)
        np.testing.assert_array_equal(before["targets"][:, -1], after["tokens"][:, 0])
    seen = collections.Counter(np.concatenate([b["tokens"].ravel() for b in steps]).tolist())
    assert len(seen) == len(s) and max(seen.values()) - min(seen.values()) <= batch
    start = streams(s, 2, 0, batch=batch, length=length)["tokens"]
    assert (start != steps[0]["tokens"]).any()


@pytest.mark.parametrize(
    ("batch", "length"), [(1, 103), (4, 5), (3, 17), (8, 1), (2, 102), (7, 40)]
)
def test_evaluation_covers_the_text_once(batch, length):
    s = source()
    steps = evaluation_steps(s, batch=batch, length=length)
    batches = [evaluation(s, i, batch=batch, length=length) for i in range(steps)]
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    expected = [i for i in range(len(s)) if i not in s.starts]
    assert sorted(targets) == expected
    assert all(b["tokens"].shape == (batch, length) for b in batches)
    for before, after in itertools.pairwise(batches):
        row = after["weights"].any(1)
        np.testing.assert_array_equal(before["targets"][row, -1], after["tokens"][row, 0])
    with pytest.raises(ValueError, match=f"batch {steps} is not one of the {steps}"):
        evaluation(s, steps, batch=batch, length=length)


def test_sources_say_what_cannot_be_read():
    for make, said in (
        (lambda: windows(source(), 0, 0, batch=2, length=0), "sequence length is 0"),
        (lambda: streams(source(), 0, 0, batch=0, length=8), "batch size is 0"),
        (lambda: windows(source(), 0, 0, batch=2, length=103), "has 103 tokens, too few"),
        (lambda: evaluation(source(), 0, batch=2, length=0), "sequence length is 0"),
        (
            lambda: evaluation(source(vocab=50, name="x.bin"), 0, batch=1, length=60),
            "x.bin: token 102 at position 102 is outside the vocabulary of 50",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            make()


def test_the_standard_library_is_split_by_file_and_order_2_gives_its_figure():
    c = corpus()
    share = len(c.heldout) / (len(c.train) + len(c.heldout))
    assert 0.05 < share < 0.1 and len(c.train) > 5_000_000 and c.vocab == 256
    assert c.heldout.bytes_per_token == 1.0
    assert len(c.train.starts) > 5 * len(c.heldout.starts) > 50
    assert 2.4 < order2_bits_per_byte(c.train, c.heldout) < 2.9


def test_order_2_is_witten_bell():
    def bytes_source(documents):
        starts = np.cumsum([0, *map(len, documents)])[:-1]
        whole = np.frombuffer(b"".join(documents), np.uint8)
        return Source(parts=(whole,), starts=starts, vocab=256)

    train, test = [b"abracadabra", b"a", b"cadabra abra"], [b"abrac abba", b"zq", b"dab"]
    follow = collections.defaultdict(collections.Counter)
    for text in train:
        for i, byte in enumerate(text):
            for order in range(min(i, 2) + 1):
                follow[text[i - order : i]][byte] += 1

    def p(context, byte):
        lower = p(context[1:], byte) if context else 1 / 256
        n = follow[context]
        return (n[byte] + len(n) * lower) / (n.total() + len(n)) if n else lower

    bits = [-math.log2(p(t[max(0, i - 2) : i], t[i])) for t in test for i in range(1, len(t))]
    got = order2_bits_per_byte(bytes_source(train), bytes_source(test))
    assert abs(got - sum(bits) / len(bits)) < 1e-12
    with pytest.raises(ValueError, match="over bytes, not a vocabulary of 300"):
        order2_bits_per_byte(source(vocab=300), source())


def text_of(s):
    return bytes(s.read(0, len(s)).astype(np.uint8)).decode()


def test_directories_files_and_jsonl(tmp_path):
    tree = tmp_path / "tree"
    for i in range(40):
        path = tree / f"{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<text {i}é>\n", encoding="utf-8")
    (tree / "empty.txt").touch()
    (tree / ".hidden").write_bytes(b"\xff")
    c = corpus(str(tree))
    both = text_of(c.train) + text_of(c.heldout)
    assert sorted(both.split()) == sorted(t for i in range(40) for t in f"<text {i}é>".split())
    assert len(c.train.starts) + len(c.heldout.starts) == 40 > len(c.train.starts)
    assert c.train.read(0, 5).tobytes() == corpus(tree).train.read(0, 5).tobytes()
    (tree / "0" / "new.txt").write_text("new")  # moves nothing else between the parts
    assert set(text_of(c.heldout).split("\n")) <= set(text_of(corpus(tree).heldout).split("\n"))

    rows = [json.dumps({"body": f"row {i}"}) for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n\n")
    c = corpus([tmp_path / "rows.jsonl"], field="body")
    assert len(c.train.starts) + len(c.heldout.starts) == 30 and "row 8" in text_of(c.train)

    (tmp_path / "one.md").write_text("".join(f"line {i}\n" for i in range(100)))
    c = corpus(str(tmp_path / "one.md"))  # a single document: its last lines are held out
    assert text_of(c.heldout).startswith("line 9") and text_of(c.heldout).endswith("99\n")
    assert text_of(c.train) + text_of(c.heldout) == (tmp_path / "one.md").read_text()
    c = corpus(str(tmp_path / "one.md"), heldout=str(tree), suffixes=(".txt",))
    assert text_of(c.train) == (tmp_path / "one.md").read_text() and len(c.heldout.starts) == 41


def test_token_arrays_are_mapped_and_their_documents_end(tmp_path):
    numbers = np.random.default_rng(0).integers(1, 500, 1000)
    numbers[[10, 11, 500]] = 0
    np.save(tmp_path / "a.npy", numbers[:300].astype(np.int64))
    numbers[300:].astype(np.uint32).tofile(tmp_path / "b.bin")
    paths = [tmp_path / "a.npy", tmp_path / "b.bin"]
    c = corpus(paths, token_dtype="uint32", vocab=500, document_end=0)
    assert all(isinstance(part, np.memmap) for part in c.train.parts + c.heldout.parts)
    assert (len(c.train), len(c.heldout), c.vocab, c.tokenizer) == (950, 50, 500, None)
    np.testing.assert_array_equal(c.train.read(0, 950), numbers[:950])
    np.testing.assert_array_equal(c.heldout.read(0, 50), numbers[950:])
    window = c.train.window(0, 900)
    assert np.flatnonzero(window["reset"]).tolist() == [0, 11, 12, 501]
    assert np.flatnonzero(window["weights"] == 0).tolist() == [10, 11, 500]
    # A window that begins after a document's end begins a document.
    assert c.train.window(501, 5)["reset"][0] and not c.train.window(502, 5)["reset"].any()


def test_a_tokenizer_json_and_its_bytes_a_token(tmp_path, monkeypatch):
    import tokenizers

    texts = ["the cat sat on the mat\n", "the dog — naïve\n"] * 15
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet)
    )
    path = str(tmp_path / "tokenizer.json")
    made.save(path)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    c = corpus(tmp_path / "rows.jsonl", tokenizer=path)
    assert c.vocab == made.get_vocab_size() and c.train.vocab == c.vocab
    for s in (c.train, c.heldout):
        documents = np.split(s.read(0, len(s)), s.starts[1:])
        assert all(c.tokenizer.decode(d) in texts for d in documents)
        total = sum(len(c.tokenizer.decode(d[1:]).encode()) for d in documents)
        assert s.bytes_per_token == pytest.approx(total / (len(s) - len(documents)), rel=1e-12)
        assert s.bytes_per_token > 1.5
    np.save(tmp_path / "t.npy", np.tile(c.train.read(0, len(c.train)), 3))
    mapped = corpus(tmp_path / "t.npy", tokenizer=path)
    assert mapped.train.bytes_per_token == pytest.approx(c.train.bytes_per_token, rel=0.2)
    with pytest.raises(ValueError, match="vocab=100 is less than the tokenizer's"):
        corpus(tmp_path / "t.npy", tokenizer=path, vocab=100)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the package tokenizers: pip install 'scanax\[tex"):
        corpus(tmp_path / "rows.jsonl", tokenizer=path)


def test_bad_corpora_are_named(tmp_path):
    def put(name, data):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    np.save(tmp_path / "floats.npy", np.zeros(5))
    (tmp_path / "nothing").mkdir()
    array, text = put("a.bin", bytes(400)), put("good.txt", b"some text\n" * 9)
    for arguments, said in (
        ({"paths": str(tmp_path / "absent")}, "absent: no such file or directory"),
        ({"paths": str(tmp_path / "nothing")}, "nothing is empty: it holds no file"),
        ({"paths": put("empty.txt", b"")}, "empty.txt is empty: 0 tokens"),
        ({"paths": put("latin.txt", b"caf\xe9")}, r"latin.txt is not UTF-8 text \(byte 3\)"),
        ({"paths": put("r.jsonl", b'{"text": "a"}\n{"txt": 1}')}, "line 2 has no text field"),
        ({"paths": put("s.jsonl", b"{")}, "s.jsonl line 1 is not JSON"),
        ({"paths": [array, text], "vocab": 9}, "text and token arrays cannot be mixed"),
        ({"paths": array}, "token arrays need vocab"),
        ({"paths": array, "vocab": 9, "token_dtype": "float32"}, "token_dtype 'float32' is not"),
        ({"paths": put("odd.bin", bytes(3)), "vocab": 9}, "odd.bin: not a token array"),
        ({"paths": put("b.npy", b"text"), "vocab": 9}, "b.npy: not a token array"),
        ({"paths": str(tmp_path / "floats.npy"), "vocab": 9}, r"this is float64\(5,\)"),
        ({"paths": text, "tokenizer": str(tmp_path / "t.json")}, "t.json: no such file"),
        ({"paths": text, "tokenizer": text}, "good.txt is not a tokenizer.json"),
        ({"paths": text, "vocab": 300}, "vocab=300 is for token arrays"),
        ({"paths": text, "document_end": 0}, "document_end=0 is for token arrays"),
        ({"paths": text, "token_dtype": "int32"}, "token_dtype=int32 is for .bin token arrays"),
        ({"paths": array, "vocab": 9, "field": "body"}, "field=body is for .jsonl files"),
    ):
        with pytest.raises(ValueError, match=said):
            corpus(**arguments)
