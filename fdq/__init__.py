"""fdq: quantize large language models in JAX and decode them fast.

A scheme is a name (``"W4A16C8"``), quantization a pure function from arrays to a pytree, a
quantized tensor a pytree that decodes itself, and decoding one ``jax.jit`` over pure pytrees.
"""

from fdq import linen as linen
from fdq import models as models
from fdq import nn as nn
from fdq import ops as ops
from fdq.calibration import Calibration as Calibration
from fdq.calibration import calibrate as calibrate
from fdq.decode import DecodeState as DecodeState
from fdq.decode import decode as decode
from fdq.decode import functional as functional
from fdq.decode import prefill as prefill
from fdq.evaluate import evaluate as evaluate
from fdq.generate import generate as generate
from fdq.kv_cache import KVCache as KVCache
from fdq.ops import attention as attention
from fdq.ops import grouped_matmul as grouped_matmul
from fdq.ops import matmul as matmul
from fdq.ops import prepare as prepare
from fdq.ops import unprepare as unprepare
from fdq.planner import plan as plan
from fdq.qtensor import QTensor as QTensor
from fdq.qtensor import dequantize as dequantize
from fdq.quantize import match_table as match_table
from fdq.quantize import quantize as quantize
from fdq.recipe import Recipe as Recipe
from fdq.sampling import Sampling as Sampling
from fdq.scheme import ActivationSpec as ActivationSpec
from fdq.scheme import CacheSpec as CacheSpec
from fdq.scheme import Scheme as Scheme
from fdq.scheme import WeightSpec as WeightSpec
from fdq.storage import load as load
from fdq.storage import save as save

__version__ = "0.1.0"
