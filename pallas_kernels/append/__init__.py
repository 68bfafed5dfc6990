"""Rotation, quantization and the write to the KV cache."""
