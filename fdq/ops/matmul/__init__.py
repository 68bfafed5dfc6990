"""The product of rows with a weight: an array, or a quantized one in any layout."""
