"""What fdq's models are written as for other programs: one file, one row of `EXPORTERS` each."""

from fdq_checkpoints.export.awq import AWQ as _AWQ
from fdq_checkpoints.export.bitsandbytes import BITSANDBYTES as _BITSANDBYTES
from fdq_checkpoints.export.compressed_tensors import COMPRESSED_TENSORS as _COMPRESSED_TENSORS
from fdq_checkpoints.export.dense import DENSE as _DENSE
from fdq_checkpoints.export.exporter import EXPORTERS as EXPORTERS
from fdq_checkpoints.export.exporter import Exporter as Exporter
from fdq_checkpoints.export.exporter import Options as Options
from fdq_checkpoints.export.exporter import Plan as Plan
from fdq_checkpoints.export.fp8 import FP8 as _FP8
from fdq_checkpoints.export.gguf import GGUF as _GGUF
from fdq_checkpoints.export.gptq import GPTQ as _GPTQ
from fdq_checkpoints.export.gptq import GPTQ_V2 as _GPTQ_V2
from fdq_checkpoints.export.mxfp4 import MXFP4 as _MXFP4
from fdq_checkpoints.export.nvfp4 import NVFP4 as _NVFP4
from fdq_checkpoints.export.origin import Origin as Origin

for _exporter in (
    _COMPRESSED_TENSORS,
    _GPTQ,
    _GPTQ_V2,
    _AWQ,
    _MXFP4,
    _NVFP4,
    _FP8,
    _BITSANDBYTES,
    _GGUF,
    _DENSE,
):
    EXPORTERS.register(_exporter)
