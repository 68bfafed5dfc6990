"""Attention over a KV cache, quantized or not; the function is `fdq.attention`."""
