"""Models drawn at random, in transformers and here: theirs is read, ours is read by them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scanax.models.pretrained import (
    FAMILIES,
    UncheckedWarning,
    load_pretrained,
    save_pretrained,
)
from support.compare import close
from support.their_models import CONFIGS, PLAIN, build
from transformers import AutoModelForCausalLM, logging

BAR = 3e-6
ELSEWHERE = {"gla", "retnet", "torchscale", "transnormer"}  # kinds that transformers does not know
logging.set_verbosity_error()


def theirs(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def ours(model, tokens):
    return model(jnp.asarray(tokens, jnp.int32))[0]


def load(folder):
    with pytest.warns(UncheckedWarning):  # transformers writes no checksums
        return load_pretrained(folder)


def their_load(folder):
    """By transformers, which finds each tensor that it looks for and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **PLAIN)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module", params=[0, 1, 2], ids=lambda seed: f"seed{seed}")
def seed(request):
    return request.param


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, seed, tmp_path_factory):
    """(their model, the folder that it wrote, our model read from it, tokens, their logits)."""
    rng = np.random.default_rng([seed, *request.param.encode()])
    model = build(request.param, rng)
    folder = tmp_path_factory.mktemp("theirs") / request.param
    model.save_pretrained(folder)
    tokens = rng.integers(model.config.vocab_size, size=(2, 23))
    return model, folder, load(folder), tokens, theirs(model, tokens)


def test_every_kind_is_drawn():
    assert FAMILIES.keys() - ELSEWHERE == CONFIGS.keys()


def test_we_read_theirs(case):
    model, _, mine, tokens, logits = case
    assert model.config.to_dict()["model_type"] in FAMILIES
    close(ours(mine, tokens), logits, BAR)


@pytest.mark.parametrize("like", [False, True], ids=["alone", "like"])
def test_they_read_ours(case, like, tmp_path):
    model, folder, mine, tokens, logits = case
    kind = model.config.model_type
    save_pretrained(mine, tmp_path / "ours", family=kind, like=folder if like else None)
    close(theirs(their_load(tmp_path / "ours"), tokens), logits, BAR)
    close(ours(load_pretrained(tmp_path / "ours"), tokens), ours(mine, tokens), 0.0)


def test_shards(case, tmp_path):
    model, _, mine, tokens, logits = case
    model.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    close(ours(load(tmp_path / "theirs"), tokens), logits, BAR)
    save_pretrained(mine, tmp_path / "ours", family=model.config.model_type, most=5_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    close(theirs(their_load(tmp_path / "ours"), tokens), logits, BAR)
