"""The notation of patterns, and the errors of a wrong one."""

import pytest
from scanax.models import block
from scanax.models.config import LMConfig
from scanax.models.pattern import FRAMES, MIXERS, Kind, parse


def test_every_name_has_its_class():
    assert (*block.MIXERS, *block.FRAMES) == MIXERS + FRAMES


@pytest.mark.parametrize(
    "pattern, depth, expected",
    [
        ("gla+swiglu", 2, [("gla", "swiglu")] * 2),
        ("mamba", 1, [("mamba", "none")]),
        ("mamba+none*2", 3, [("mamba", "none")] * 3),
        (" gla + swiglu * 2 , attention", 3, [("gla", "swiglu")] * 2 + [("attention", "none")]),
        ("gla,attention", 5, [("gla", "none"), ("attention", "none")] * 2 + [("gla", "none")]),
    ],
)
def test_a_pattern_is_repeated_to_depth(pattern, depth, expected):
    assert parse(pattern, depth) == tuple(Kind(*each) for each in expected)


@pytest.mark.parametrize(
    "pattern, says",
    [
        ("", "incomplete"),
        ("gla+swiglu,", "incomplete"),
        ("gla+", "incomplete"),
        ("lstm+swiglu", "'lstm' .* gla, retention, vir, lightning, mamba, mamba2, aaren, att"),
        ("gla+relu", "'relu' .* swiglu, geglu, gelu, glu, moe, none"),
        ("gla+swiglu*0", "'0' .* from 1 up"),
        ("gla+swiglu*", "'' .* from 1 up"),
        ("gla+swiglu*2.5", "'2.5' .* from 1 up"),
        ("gla+swiglu*-1", "'-1' .* from 1 up"),
        ("gla*9", "9 blocks, more than depth=4"),
    ],
)
def test_a_wrong_pattern_is_named(pattern, says):
    with pytest.raises(ValueError, match=says):
        LMConfig(pattern=pattern)


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("depth", 0, "depth=0"),
        ("width", 0, "width=0"),
        ("unroll", 0, "unroll=0"),
        ("vocab", 0, "vocab=0"),
        ("vocab_multiple", 0, "vocab_multiple=0"),
        ("loss_chunk", -1, "loss_chunk=-1"),
        ("norm", "batch", "norm='batch' is not one of rms, layer, simple"),
        ("dtype", "float16", "dtype='float16' is not one of"),
        ("remat", "some", "remat='some' is not one of none, full, dots"),
    ],
)
def test_a_wrong_field_is_named(field, value, says, unchecked):
    with pytest.raises(ValueError, match=says):
        LMConfig(**{field: value})
