"""What is tuned in a quantized model so that it says again what its original says."""
