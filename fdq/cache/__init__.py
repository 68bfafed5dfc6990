"""Formats of the KV cache, and the cache.

=====================  ==============================  ==========================================
`CacheSpec`            scale (float32)                 value
=====================  ==============================  ==========================================
None (C16)             none                            the array itself
int8, token_head       `[B, KH, S]`, absmax / 127      `code * scale`
float8, token_head     `[B, KH, S]`, absmax / 448      `code * scale`
int4, token_head       `[B, KH, S]` and uint8 zero     `(code - zero) * scale`, codes 0 .. 15
int3, int2             likewise                        likewise, codes 0 .. 7, 0 .. 3
int8, channel          `[KH, D]`, static               `code * scale`
float8 or int8, head   `[KH, 1]`, static               `code * scale`
int4, static           `[KH, D]` or `[KH, 1]`          `(code - zero) * scale`
any, block             `[B, KH, S / 32, D]` of keys,   `(code - zero) * scale`, the block that is
                       `[B, KH, S, D / 64]` of values  not full yet as it is (`block_tensor`)
=====================  ==============================  ==========================================

Transforms `rotated` and `centered` say that this is the value of a head that was turned by a
Hadamard matrix (`rotation`), less the calibrated mean of a key; scales are then bfloat16.
"""

from fdq.cache.block_tensor import BlockTensor as BlockTensor
from fdq.cache.cache_tensor import CacheTensor as CacheTensor
from fdq.cache.cache_tensor import quantize_cache as quantize_cache
from fdq.cache.float8 import Float8Cache
from fdq.cache.format import CacheFormat as CacheFormat
from fdq.cache.int2 import Int2Cache
from fdq.cache.int3 import Int3Cache
from fdq.cache.int4 import Int4Cache
from fdq.cache.int8 import Int8Cache
from fdq.cache.kv_cache import KVCache as KVCache
from fdq.cache.kv_cache import LayerCache as LayerCache
from fdq.cache.kv_cache import LayerScales as LayerScales
from fdq.cache.kv_cache import abstract_scales as abstract_scales
from fdq.cache.kv_cache import parse_format as parse_format
from fdq.schemes.kinds import CACHE_FORMATS as CACHE_FORMATS

for _format in (Int8Cache(), Int4Cache(), Int3Cache(), Int2Cache(), Float8Cache()):
    CACHE_FORMATS.register(_format)
