"""fdq: quantize large language models in JAX and decode them fast."""
