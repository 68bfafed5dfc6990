"""How codes are chosen: one module an algorithm; ``quantize_array`` is the entry."""

from fdq.quantizers.weight import METHODS as METHODS
from fdq.quantizers.weight import check_finite as check_finite
from fdq.quantizers.weight import quantize_array as quantize_array
