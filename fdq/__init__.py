"""fdq: quantize large language models in JAX and decode them fast.

A scheme is a name (``"W4A16C8"``), quantization a pure function from arrays to a pytree, a
quantized tensor a pytree that decodes itself, and decoding one ``jax.jit`` over pure pytrees.
"""

from fdq import requirements as requirements  # first: it refuses what would fail later

# isort: split
from fdq import linen as linen
from fdq import models as models
from fdq import nn as nn
from fdq import ops as ops
from fdq import sharding as sharding
from fdq.adapters.low_rank import lora as lora
from fdq.adapters.merging import merge_lora as merge_lora
from fdq.analysis.evaluation import evaluate as evaluate
from fdq.analysis.planner import plan as plan
from fdq.analysis.sensitivity import recommend as recommend
from fdq.cache.cache_tensor import CacheTensor as CacheTensor
from fdq.cache.kv_cache import KVCache as KVCache
from fdq.calibration.observation import calibrate as calibrate
from fdq.calibration.statistics import Calibration as Calibration
from fdq.decoding import exporting as _exporting_states  # noqa: F401
from fdq.decoding.functional import functional as functional
from fdq.decoding.generation import generate as generate
from fdq.decoding.loop import decode as decode
from fdq.decoding.loop import prefill as prefill
from fdq.decoding.sampling import Sampling as Sampling
from fdq.decoding.state import DecodeState as DecodeState
from fdq.formats import exporting as _exporting  # noqa: F401
from fdq.formats.qtensor import QTensor as QTensor
from fdq.formats.qtensor import dequantize as dequantize
from fdq.healing.healing import heal as heal
from fdq.ops import exporting as _exporting_prepared  # noqa: F401
from fdq.ops import prepare as prepare
from fdq.ops import unprepare as unprepare
from fdq.ops.attention.api import attention as attention
from fdq.ops.grouped_matmul.api import grouped_matmul as grouped_matmul
from fdq.ops.matmul.api import matmul as matmul
from fdq.ops.matmul.einsum import einsum as einsum
from fdq.ops.matmul.transposed import take as take
from fdq.quantizers.awq import activation_aware as activation_aware
from fdq.quantizers.fake_quantization import fake_quant as fake_quant
from fdq.quantizers.in_order import quantize_in_order as quantize_in_order
from fdq.quantizers.quantization import match_table as match_table
from fdq.quantizers.quantization import quantize as quantize
from fdq.quantizers.rotated import rotated as rotated
from fdq.quantizers.smooth import smoothed as smoothed
from fdq.schemes.recipe import Recipe as Recipe
from fdq.schemes.scheme import ActivationSpec as ActivationSpec
from fdq.schemes.scheme import CacheSpec as CacheSpec
from fdq.schemes.scheme import Scheme as Scheme
from fdq.schemes.scheme import WeightSpec as WeightSpec
from fdq.sharding.distribution import shard as shard
from fdq.sharding.distribution import unshard as unshard
from fdq.storage import convert as convert
from fdq.storage import export as export
from fdq.storage import load as load
from fdq.storage import load_lora as load_lora
from fdq.storage import save as save
from fdq.storage import save_lora as save_lora

__version__ = "0.1.0"
