"""Measured choices, one JSON file a device kind; ``pallas_kernels.choices`` reads them."""
