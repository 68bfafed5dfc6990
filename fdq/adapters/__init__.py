"""Adapters beside quantized layers: which layers have a place for them, adding and merging them."""
