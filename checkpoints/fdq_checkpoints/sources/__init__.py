"""What fdq reads weights from: one module an importer, one row of `SOURCES` an importer."""

from fdq_checkpoints.sources.float_model import FLOAT_MODELS as _FLOAT_MODELS
from fdq_checkpoints.sources.gguf import GGUF_MODELS as _GGUF_MODELS
from fdq_checkpoints.sources.orbax_tree import ORBAX_TREES as _ORBAX_TREES
from fdq_checkpoints.sources.quantized_model import QUANTIZED_MODELS as _QUANTIZED_MODELS
from fdq_checkpoints.sources.source import SOURCES as SOURCES
from fdq_checkpoints.sources.source import Importer as Importer
from fdq_checkpoints.sources.source import Source as Source
from fdq_checkpoints.sources.source import importer_of as importer_of
from fdq_checkpoints.sources.source import open_source as open_source
from fdq_checkpoints.sources.stored_tree import STORED_TREES as _STORED_TREES

for _importer in (_FLOAT_MODELS, _QUANTIZED_MODELS, _GGUF_MODELS, _ORBAX_TREES, _STORED_TREES):
    SOURCES.register(_importer)
