"""Answers to lm-evaluation-harness's requests are those of a plain computation, text by text."""

import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from scanax.experiments import answers, evaluate
from scanax.experiments.answers import Answers
from scanax.experiments.asking import understood, windows
from scanax.experiments.datasets.text import DataConfig
from scanax.experiments.datasets.tokenizer import Marks, TokenizerJson
from scanax.experiments.loading import load
from scanax.experiments.sampling import Choice
from scanax.sharding import mesh
from support import untrained
from support.compare import close

LENGTH = 12
PATTERNS = {"gla": "gla+swiglu", "window": "gla+swiglu,attention+gelu", "full": "attention+gelu"}
PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " green, they say, on some days"),
    ("Question: two and two?\nAnswer: ", "four"),
    ("", "alone"),
    ("x", ""),
    ("na\u00efve " * 9, "caf\u00e9s"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of bytes, one a pattern, and one of a tokenizer that marks where texts begin and end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("answers")
    (folder / "text.txt").write_text("the four blue skies are four blue skies alone\n" * 4)
    data = DataConfig(paths=(str(folder / "text.txt"),))
    for name, pattern in PATTERNS.items():
        window = 5 if name == "window" else None
        attention = untrained.SMALL.attention
        attention = type(attention)(**vars(attention) | {"window": window})
        model = type(untrained.SMALL)(
            **vars(untrained.SMALL) | {"pattern": pattern, "attention": attention}
        )
        untrained.save(folder / name, model, data, length=LENGTH)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
    )
    tokenizer.train(["" + str(folder / "text.txt")], trainer)
    (folder / "tokens").mkdir()
    tokenizer.save(str(folder / "tokens" / "tokenizer.json"))
    return folder


def asked(*requests):
    return [SimpleNamespace(args=request) for request in requests]


@nnx.jit
def read(model, tokens):
    return model(tokens)[0]


def direct(found, tokens, first, length):
    """Summed log-probabilities and greediness, a forward pass a token."""
    total, greedy = 0.0, True
    if first == 0 and len(tokens):
        total, greedy, first = -math.log(256), False, 1
    end = min(first + (length or 10**9), len(tokens))
    for i in range(first, len(tokens)):
        if i == end:
            end = min(end + length, len(tokens))
        start = max(0, end - 1 - length) if length else 0
        padded = np.zeros((1, 128), np.int32)
        padded[0, : i - start] = tokens[start:i]
        logits = np.asarray(read(found.generator.model, padded), np.float64)[0, i - start - 1]
        total += logits[tokens[i]] - np.log(np.exp(logits).sum())
        greedy &= bool(logits.argmax() == tokens[i])
    return total, greedy


@pytest.mark.parametrize("kind", PATTERNS)
def test_log_likelihoods_are_those_of_a_direct_computation(kind, folder, monkeypatch):
    monkeypatch.setattr(answers, "CHUNK", 32)  # so that states go on
    found = Answers(folder / kind, batch_size=4)
    assert found.length == (LENGTH if kind == "full" else None)
    results = found.loglikelihood(asked(*PAIRS))
    for (context, continuation), (total, greedy) in zip(PAIRS, results, strict=True):
        stem = context.rstrip().encode()
        tokens = np.frombuffer((context + continuation).encode(), np.uint8)
        expected = direct(found, tokens, len(stem), found.length)
        close(np.array(total), np.array(expected[0]), 1e-5)
        assert greedy == expected[1]
    texts = ["", "a", "some words " * 8, "b" * (LENGTH + 1)]
    rolled = found.loglikelihood_rolling(asked(*((text,) for text in texts)))
    for text, total in zip(texts, rolled, strict=True):
        tokens = np.frombuffer(text.encode(), np.uint8)
        close(np.array(total), np.array(direct(found, tokens, 0, found.length)[0]), 1e-5)


@pytest.mark.parametrize("length", [1, 4, 7, None])
def test_windows_score_each_token_once_with_as_much_context_as_there_is(length):
    """Those of the harness's own example, and others."""
    for count, first in itertools.product(range(1, 15), (1, 2)):
        tokens, seen = np.arange(count), []
        for part, at in windows(tokens, first, length):
            assert np.array_equal(part, np.arange(part[0], part[-1] + 1)) and at >= 1
            assert length is None or len(part) <= length + 1
            assert len(part) == min(part[-1] + 1, (length or count) + 1)
            seen += part[at:].tolist()
        assert seen == list(range(first, count))
    if length == 4:  # a mark and then 0 ... 9, as the harness's documentation has it
        found = [(p[:-1].tolist(), p[at:].tolist()) for p, at in windows(np.arange(-1, 10), 1, 4)]
        assert found == [
            ([-1, 0, 1, 2], [0, 1, 2, 3]),
            ([3, 4, 5, 6], [4, 5, 6, 7]),
            ([5, 6, 7, 8], [8, 9]),
        ]


def greedy(found, prompt, count):
    tokens = list(prompt.encode())
    for _ in range(count):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(read(found.generator.model, padded)[0, len(tokens) - 1].argmax()))
    return bytes(tokens[len(prompt.encode()) :])


@pytest.mark.parametrize("kind", PATTERNS)
def test_greedy_continuations_are_the_model_s_own(kind, folder, monkeypatch):
    monkeypatch.setattr(answers, "PIECE", 4)
    found, prompts = Answers(folder / kind, batch_size=2), ["ab", "the four", "b"]
    most = 10
    requests = [(p, {"until": ["never this"], "max_gen_toks": most}) for p in prompts]
    texts = found.generate_until(asked(*requests))
    for prompt, text in zip(prompts, texts, strict=True):
        prompt = prompt[-(LENGTH - most) :] if kind == "full" else prompt
        whole = greedy(found, prompt, most)
        assert text == whole.decode("utf-8", errors="replace")
    stop, other = texts[1][3:5], texts[1][6:]
    cut = found.generate_until(
        asked((prompts[1], {"until": [other, stop, ""], "max_gen_toks": 10}))
    )
    assert cut == [texts[1][: texts[1].index(stop)]]


def test_results_do_not_depend_on_the_batch(folder):
    prompts = ["a", "the four blue", "ab", "a", "skies are"]
    draws = {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 1.5, "top_k": 40}
    requests = asked(*((p, draws) for p in prompts))
    results = []
    for rows in (1, 4):
        found = Answers(folder / "gla", batch_size=rows)
        pairs, texts = found.loglikelihood(asked(*PAIRS)), found.generate_until(requests)
        results.append((np.array(pairs), texts))
    close(results[0][0], results[1][0], 1e-5)
    assert results[0][1] == results[1][1]
    assert texts[0] != texts[3]  # of equal prompts


def test_the_same_on_a_mesh(folder):
    plain = Answers(folder / "window", batch_size=4)
    wide = Answers(folder / "window", batch_size=4, over=mesh.make("data=2,seq=2,tensor=2"))
    request = asked(("the four", {"until": [], "max_gen_toks": 5}))
    assert wide.generate_until(request) == plain.generate_until(request)
    totals = [np.array(one.loglikelihood(asked(*PAIRS))) for one in (plain, wide)]
    close(totals[1], totals[0], 1e-5)


def test_few_shapes_are_compiled(folder):
    found = Answers(folder / "gla", batch_size=2)
    found.loglikelihood_rolling(asked(*(("x" * n,) for n in range(1, 129))))
    assert found.read._cache_size() <= 4


def marked(folder, values, template=False):
    path = folder / "tokens" / "tokenizer.json"
    tokenizer = TokenizerJson(str(path))
    (folder / "tokens" / "tokenizer_config.json").write_text(json.dumps(values))
    if template:
        from tokenizers.processors import TemplateProcessing

        kind = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer._tokenizer.post_processor = kind
    return tokenizer


def test_marks_are_those_of_the_files_and_the_template(folder):
    end = {"eos_token": {"content": "</s>"}, "bos_token": None}
    assert marked(folder, {}).marks == Marks()
    assert marked(folder, end).marks == Marks((), (1,), frozenset({1}))
    both = marked(folder, end | {"bos_token": "<s>"}, template=True)
    assert both.marks == Marks((0,), (0,), frozenset({1}))
    (folder / "tokens" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        _ = TokenizerJson(str(folder / "tokens" / "tokenizer.json")).marks


def test_the_border_is_that_of_both_texts_together(folder):
    found = Answers(folder / "gla")
    tokenizer = marked(folder, {"bos_token": "<s>", "eos_token": "</s>"})
    found.tokenizer, (found.before, found.start, found.ends) = tokenizer, tokenizer.marks
    whole = tokenizer.encode("the four blue").tolist()
    parts = [tokenizer.decode([token]) for token in whole]
    assert parts[1] == " four"
    for context, continuation in (
        ("the", " four blue"),
        ("the ", "four blue"),
        ("the fo", "ur blue"),
    ):
        tokens, first = found._pair(context, continuation)
        assert tokens.tolist() == whole and first == 1
    tokens, first = found._pair("", "the four blue")
    assert tokens.tolist() == [0, *whole] and first == 1
    tokens, first = found._pair("<s>", "the four")
    assert tokens.tolist() == [0, *whole[:2]] and first == 1
    tokenizer = marked(folder, {}, template=True)
    found.tokenizer, (found.before, found.start, found.ends) = tokenizer, tokenizer.marks
    assert [found._pair(*pair)[1] for pair in (("the", " four"), ("", "the"))] == [2, 1]


def test_continuations_end_with_the_document(folder):
    found = Answers(folder / "gla")
    request = asked(("the four", {"until": [], "max_gen_toks": 8}))
    whole = greedy(found, "the four", 8)
    found.ends = frozenset({whole[3]})
    assert found.generate_until(request)[0] == whole[: whole.index(whole[3])].decode(
        errors="replace"
    )


def test_generation_options_are_understood():
    assert understood({"until": "a"}) == (Choice(0.0), 256, ("a",))
    assert understood({"until": ["a", ""], "temperature": 0.0, "max_gen_toks": 3})[1:] == (
        3,
        ("a",),
    )
    assert understood({"do_sample": False, "temperature": 0.7, "top_p": 0.5})[0] == Choice(0.0)
    assert understood({"do_sample": True})[0] == Choice(1.0)
    drawn = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "max_new_tokens": 7}
    assert understood(drawn) == (Choice(0.5, 3, 0.9), 7, ())


WRONG = {
    "num_beams": ({"num_beams": 4}, "num_beams"),
    "two limits": ({"max_gen_toks": 4, "max_tokens": 5}, "one number"),
    "no tokens": ({"max_gen_toks": 0}, "one number"),
    "until": ({"until": 3}, "until=3"),
    "temperature": ({"temperature": -1.0}, "temperature"),
    "top_p": ({"do_sample": True, "top_p": 1.5}, "top_p"),
    "room": ({"max_gen_toks": LENGTH}, "no room"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_option_that_would_be_ignored_is_an_error(name, folder):
    options, said = WRONG[name]
    with pytest.raises(ValueError, match=said):
        Answers(folder / "full").generate_until(asked(("a", options)))


def test_an_empty_text_cannot_be_continued(folder):
    with pytest.raises(ValueError, match="continue an empty text"):
        Answers(folder / "gla").generate_until(asked(("", {})))


BAD = {
    "--shots 1": "shots=1 is for --tasks",
    "--limit 3": "limit=3 is for --tasks",
    "--tasks x --limit 0": "limit=0; it must be at least 1",
    "--tasks x --shots -1": "shots=-1; it must be at least 0",
    "--tasks x": "pip install 'scanax\\[eval\\]'",
}


@pytest.mark.parametrize("flag", BAD)
def test_a_wrong_flag_or_a_missing_package_is_one_line(flag, folder, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert evaluate.main(["--checkpoint", str(folder / "gla"), *flag.split()]) == 2
    assert re.fullmatch(rf"evaluate: .*{BAD[flag]}.*\n", capsys.readouterr().err)
    assert load(folder / "gla").step == 2 and not (folder / "gla" / "evaluation.json").exists()
