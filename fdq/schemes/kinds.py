"""The kinds of things that scheme names speak of; filled by the rooms above.

Names are read here, below the formats that they name, so each format brings its grammar along: its
name in a scheme, its default spec and what a spec of it may say.
"""

from typing import Any

from fdq.registry import Registry

WEIGHT_FORMATS: Registry[Any] = Registry("weight format")
"""`fdq.formats.Format` objects by name."""

CACHE_FORMATS: Registry[Any] = Registry("KV cache format")
"""`fdq.cache.CacheFormat` objects by name."""

QUANTIZERS: Registry[Any] = Registry("quantizer")
"""`fdq.quantizers.Quantizer` objects by name."""
