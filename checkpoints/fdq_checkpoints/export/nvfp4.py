"""NVFP4 as compressed-tensors stores it.

transformers 5 refuses stored models of its own `nvfp4` and knows no ModelOpt; vLLM takes ModelOpt's
layout for models whose inputs have scales, too, which fdq's have not.
"""

from fdq_checkpoints.export.compressed_tensors import OneFormat

NVFP4 = OneFormat("nvfp4", ("nvfp4",))
