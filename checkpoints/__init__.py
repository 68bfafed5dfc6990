"""Checkpoints in and out: safetensors, Hugging Face and Paddle names, Orbax."""

from checkpoints.convert import convert as convert
from checkpoints.errors import CheckpointError as CheckpointError
from checkpoints.inspect import Inspection as Inspection
from checkpoints.inspect import inspect as inspect
from checkpoints.inspect import verify as verify
from checkpoints.load import load as load
from checkpoints.save import save as save
