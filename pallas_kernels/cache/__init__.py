"""KV caches as kernels read and write them, one file a format."""
