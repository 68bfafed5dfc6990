"""What is in a source: whose names its tensors have."""
