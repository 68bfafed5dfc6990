"""Files, read with suspicion."""
