"""Measured choices, one JSON file a device kind; `pallas_kernels.tuning.choices` reads them."""
