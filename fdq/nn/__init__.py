"""Flax NNX modules whose weights may be arrays or quantized tensors."""

from fdq.formats.qtensor import QCodes as QCodes
from fdq.formats.qtensor import QScale as QScale
from fdq.formats.qtensor import boxed as boxed
from fdq.nn.attention import Attention as Attention
from fdq.nn.embedding import Embedding as Embedding
from fdq.nn.experts import ExpertLinear as ExpertLinear
from fdq.nn.experts import Experts as Experts
from fdq.nn.general import QuantizedEinsum as QuantizedEinsum
from fdq.nn.general import QuantizedLinear as QuantizedLinear
from fdq.nn.general import QuantizedLinearGeneral as QuantizedLinearGeneral
from fdq.nn.latent_attention import LatentAttention as LatentAttention
from fdq.nn.linear import Linear as Linear
from fdq.nn.lora import LoRA as LoRA
from fdq.nn.lora import LowRank as LowRank
from fdq.nn.mlp import MLP as MLP
from fdq.nn.mlp import MoE as MoE
from fdq.nn.mlp import Router as Router
from fdq.nn.norm import RMSNorm as RMSNorm
from fdq.nn.parameters import ActivationScale as ActivationScale
from fdq.nn.parameters import CacheScale as CacheScale
from fdq.nn.parameters import bind as bind
from fdq.nn.parameters import split as split
from fdq.nn.parameters import value as value
from fdq.nn.rotary import RotaryConfig as RotaryConfig
from fdq.nn.rotary import rotary_angles as rotary_angles
from fdq.ops.rope_append.xla import apply_rotary as apply_rotary
