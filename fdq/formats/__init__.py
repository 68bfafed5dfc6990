"""How codes decode to values: one module a format family, one entry in ``FORMATS`` a format."""

from fdq.formats import convolutional as _convolutional
from fdq.formats import float8 as _float8
from fdq.formats import integer as _integer
from fdq.formats import microscaling as _microscaling
from fdq.formats import normal_float as _normal_float
from fdq.formats.format import Arrays as Arrays
from fdq.formats.format import Candidates as Candidates
from fdq.formats.format import Format as Format
from fdq.formats.format import ScaledFormat as ScaledFormat

FORMATS: dict[str, Format] = {
    **_integer.FORMATS,
    **_float8.FORMATS,
    **_normal_float.FORMATS,
    **_microscaling.FORMATS,
    **_convolutional.FORMATS,
}
