"""Checkpoints in and out: safetensors, Hugging Face and Paddle names, Orbax."""
