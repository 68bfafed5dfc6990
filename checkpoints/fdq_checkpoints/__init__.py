"""Checkpoints in and out: safetensors, Hugging Face and Paddle names, Orbax."""

from fdq_checkpoints.conversion import convert as convert
from fdq_checkpoints.errors import CheckpointError as CheckpointError
from fdq_checkpoints.inspection import Inspection as Inspection
from fdq_checkpoints.inspection import inspect as inspect
from fdq_checkpoints.inspection import verify as verify
from fdq_checkpoints.loading import load as load
from fdq_checkpoints.saving import save as save
