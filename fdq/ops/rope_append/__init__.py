"""Rotation of queries and keys, and the write to a KV cache."""
