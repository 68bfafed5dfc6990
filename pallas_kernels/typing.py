"""Words for annotations that say an array's dtype and shape: `x: Float[Array, "m k"]`.

They are jaxtyping's where jaxtyping is imported before fdq, as fdq's tests do, which then check
every call; a name for an axis stands for one size in all arguments of a call, `*` for any number
of axes, and a number for itself. Without jaxtyping, which fdq does not need, they stand for the
type of the array alone.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array as Array

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
    from jaxtyping import Num as Num
    from jaxtyping import Shaped as Shaped
else:

    class _Described:
        """`Float[Array, "m k"]` is `Array`."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Bool = Float = Int = Num = Shaped = _Described

if not TYPE_CHECKING and "jaxtyping" in sys.modules:
    Array = Array | np.ndarray  # NumPy's are taken too
