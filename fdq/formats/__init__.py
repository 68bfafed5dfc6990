"""How codes decode to values: one module a format family, one row of `FORMATS` a format."""

from fdq.formats import convolutional, float8, integer, microscaling, normal_float, trellis
from fdq.formats.format import Arrays as Arrays
from fdq.formats.format import Candidates as Candidates
from fdq.formats.format import Format as Format
from fdq.formats.format import ScaledFormat as ScaledFormat
from fdq.schemes.kinds import WEIGHT_FORMATS as FORMATS

for _format in (
    integer.INT8,
    integer.INT4,
    integer.INT3,
    integer.INT2,
    float8.E4M3,
    float8.E5M2,
    normal_float.NF4,
    microscaling.MXFP4,
    microscaling.MXFP8,
    microscaling.NVFP4,
    convolutional.CC2,
    *trellis.TRELLISES,
):
    FORMATS.register(_format)
