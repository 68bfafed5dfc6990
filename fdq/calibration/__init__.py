"""What a model's layers are fed."""
