"""MXFP4 as vLLM and transformers read it of most models: that of compressed-tensors.

gpt-oss alone has a layout of its own (`_blocks`, `_scales`), which is not written.
"""

from fdq_checkpoints.export.compressed_tensors import OneFormat

MXFP4 = OneFormat("mxfp4", ("mxfp4",))
