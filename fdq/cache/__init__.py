"""Formats of the KV cache, and the cache."""
