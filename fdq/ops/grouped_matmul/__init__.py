"""Products of rows with the weights of the experts that were picked for them."""
