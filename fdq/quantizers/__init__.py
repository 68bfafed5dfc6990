"""How codes are chosen: one module an algorithm, one row of `QUANTIZERS` a quantizer."""

from fdq.quantizers import (
    ccq,
    clip_search,
    fastdeploy_rounding,
    gptq,
    hqq,
    ldlq,
    round_to_nearest,
)
from fdq.quantizers.quantizer import QUANTIZERS as QUANTIZERS
from fdq.quantizers.quantizer import Quantizer as Quantizer
from fdq.quantizers.quantizer import Statistics as Statistics
from fdq.quantizers.quantizer import expected_distortion as expected_distortion
from fdq.quantizers.quantizer import pick as pick
from fdq.quantizers.weight import check_finite as check_finite
from fdq.quantizers.weight import quantize_array as quantize_array

for _quantizer in (
    clip_search.SEARCH,
    round_to_nearest.ABSMAX,
    round_to_nearest.SIGNED_MAX,
    round_to_nearest.FOUR_OVER_SIX,
    hqq.HQQ,
    gptq.GPTQ,
    gptq.GPTQ2,
    ldlq.LDLQ1,
    ldlq.LDLQ2,
    ccq.CCQ1,
    ccq.CCQ2,
    fastdeploy_rounding.FASTDEPLOY,
    fastdeploy_rounding.FASTDEPLOY_CPU,
):
    QUANTIZERS.register(_quantizer)
