"""Decode attention over a quantized KV cache."""
