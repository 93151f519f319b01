"""Between pixels and a video model's stream: ResNets over each frame alone  (arXiv:2310.19694)."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from .image import ImageConv
from .norm import GroupNorm

PACKED = "b t (h p) (w q) c -> b t h w (p q c)"
UNPACKED = "b t h w (p q c) -> b t (h p) (w q) c"


class ResNetBlock(nnx.Module):
    """x + conv(gelu(norm(conv(gelu(norm(x))))), convolutions 3 x 3, the second drawn small."""

    def __init__(self, channels: int, groups: int = 32, **kinds):
        self.norm_1 = GroupNorm(channels, groups, **kinds)
        self.conv_1 = ImageConv(channels, channels, **kinds)
        self.norm_2 = GroupNorm(channels, groups, **kinds)
        self.conv_2 = ImageConv(channels, channels, gain=0.1, **kinds)

    def __call__(self, x: Float[Array, "B T H W D"]) -> Float[Array, "B T H W D"]:
        y = self.conv_1(jax.nn.gelu(self.norm_1(x)))
        return x + self.conv_2(jax.nn.gelu(self.norm_2(y)))


class Encoder(nnx.Module):
    """Frames of `channels` a pixel to frames of `width` channels, smaller by all `scales`.

    At each stage squares of scale x scale become channels, which a convolution takes to the stage's
    number, and a ResNet block follows; a 1 x 1 convolution ends it.
    """

    def __init__(
        self,
        channels: int,
        stages: tuple[int, ...],
        scales: tuple[int, ...],
        width: int,
        groups: int = 32,
        **kinds,
    ):
        self.scales = scales
        sizes = zip((channels, *stages), stages, scales, strict=False)
        self.convs = nnx.List([ImageConv(a * s * s, b, **kinds) for a, b, s in sizes])
        self.blocks = nnx.List([ResNetBlock(n, groups, **kinds) for n in stages])
        self.out = ImageConv(stages[-1], width, 1, **kinds)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H2 W2 D"]:
        for scale, conv, block in zip(self.scales, self.convs, self.blocks, strict=True):
            x = block(conv(rearrange(x, PACKED, p=scale, q=scale)))
        return self.out(x)


class Decoder(nnx.Module):
    """The way back through the same stages, to pixels in (-1, 1) by tanh."""

    def __init__(
        self,
        channels: int,
        stages: tuple[int, ...],
        scales: tuple[int, ...],
        width: int,
        groups: int = 32,
        **kinds,
    ):
        self.scales = scales[::-1]
        self.stem = ImageConv(width, stages[-1], 1, **kinds)
        self.blocks = nnx.List([ResNetBlock(n, groups, **kinds) for n in stages[::-1]])
        self.norm = GroupNorm(stages[0], groups, **kinds)
        sizes = zip(stages, (channels, *stages), scales, strict=False)
        convs = [ImageConv(a, b * s * s, **kinds) for a, b, s in sizes]
        self.convs = nnx.List(convs[::-1])

    def __call__(self, x: Float[Array, "B T H W D"]) -> Float[Array, "B T H2 W2 C"]:
        x = self.stem(x)
        for stage in range(len(self.scales)):
            x, scale = self.blocks[stage](x), self.scales[stage]
            if stage + 1 == len(self.scales):
                x = jax.nn.gelu(self.norm(x))
            x = rearrange(self.convs[stage](x), UNPACKED, p=scale, q=scale)
        return jnp.tanh(x)
