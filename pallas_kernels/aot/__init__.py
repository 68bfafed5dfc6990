"""Compiling for GPUs that are not there, and reading what comes out."""
