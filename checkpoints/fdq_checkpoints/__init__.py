"""Checkpoints in and out: safetensors, Hugging Face and Paddle names, Orbax."""

from fdq_checkpoints import conversion as _conversion
from fdq_checkpoints import destinations as _destinations
from fdq_checkpoints import saving as _saving
from fdq_checkpoints.errors import CheckpointError as CheckpointError
from fdq_checkpoints.inspection import Inspection as Inspection
from fdq_checkpoints.inspection import inspect as inspect
from fdq_checkpoints.inspection import verify as verify
from fdq_checkpoints.inspection import weight_errors as weight_errors
from fdq_checkpoints.loading import load as load

convert = _destinations.local(_conversion.convert, "dst")
save = _destinations.local(_saving.save, "path")
