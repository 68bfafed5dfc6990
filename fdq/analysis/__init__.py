"""What quantization costs and saves: evaluation, plans, comparison."""
