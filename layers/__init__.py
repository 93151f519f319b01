"""Sequence mixers, channel mixers and norms: parameters around one kernel call each.

Every mixer is `y, state = mixer(x, state=None, reset=None)` with `mixer.init_state(batch,
max_length, dtype)`: the same call trains, prefills, streams and, with T = 1, decodes.
"""

from .aaren import Aaren, AarenConfig
from .attention import Attention, AttentionConfig
from .constant import Constant
from .conv import ShortConv
from .convlstm import ConvLSTM, ConvLSTMConfig
from .convs5 import ConvS5, ConvS5Config
from .gated_conv import GatedConv, GatedConvConfig
from .gla import GLA, GLAConfig
from .image import ImageConv
from .lightning import Lightning, LightningConfig
from .mamba import Mamba, MambaConfig
from .mamba2 import Mamba2, Mamba2Config
from .mlp import GELU, GLU, GeGLU, MLPConfig, SwiGLU
from .moe import MoE, MoEConfig
from .norm import GroupNorm, LayerNorm, RMSNorm, SimpleRMSNorm
from .retention import Retention, RetentionConfig
from .router_config import RouterConfig
from .vir import Vir, VirConfig

__all__ = [
    "GELU",
    "GLA",
    "GLU",
    "Aaren",
    "AarenConfig",
    "Attention",
    "AttentionConfig",
    "Constant",
    "ConvLSTM",
    "ConvLSTMConfig",
    "ConvS5",
    "ConvS5Config",
    "GLAConfig",
    "GatedConv",
    "GatedConvConfig",
    "GeGLU",
    "GroupNorm",
    "ImageConv",
    "LayerNorm",
    "Lightning",
    "LightningConfig",
    "MLPConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "MoE",
    "MoEConfig",
    "RMSNorm",
    "Retention",
    "RetentionConfig",
    "RouterConfig",
    "ShortConv",
    "SimpleRMSNorm",
    "SwiGLU",
    "Vir",
    "VirConfig",
]
