"""The 16 levels of NF4, in a module that imports no kernels: fdq's format reads them too."""

import numpy as np

_BELOW = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036)
_ABOVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)

NF4_LEVELS = tuple(float(np.float32(level)) for level in (*_BELOW, 0.0, *_ABOVE))
"""float32 numbers as bitsandbytes ships them (QLoRA, arXiv 2305.14314, appendix E): up to 2e-7 from
the formula, and checkpoints mean these."""
