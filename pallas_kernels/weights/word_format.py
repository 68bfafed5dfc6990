"""Quantized weights as 32-bit words, and what a kernel does to read them.

A column of a weight is a sequence of *units*: the smallest whole number of int32 words that holds
whole codes. `WordFormat.decode` turns the words of a unit into one float32 array for each of its
rows, and that is all that a matrix kernel knows of a format::

    sum_k weight_k * x_k = 2**exponent * sum_k decoded_k * (x_k * 2**exponents[k % rows])
                           - bias * sum_k x_k

(before scales; `bias` where codes are offset binary). The powers of two cost nothing, the kernel
stages x once for all columns, and they are what makes decoding cheap:

**Linear bits.** Any integer below 2^24, read as the bits of a float32, *is* that integer times
2^-149: subnormals and the first binade of float32 share one step. GPU arithmetic is exact and of
full speed there. So a field of a word is decoded by one AND with a mask, without a shift or a
conversion: the field at bit p comes out as `q * 2**(p - 149)`, and `x * 2**(64 - p)` undoes the
position. Fields above bit 23 are shifted down first. Numbers are safe while `|x| < 2**60`, and
have all bits of a float32 while `|x| > 2**-40`: products of smaller ones lose their last.

XLA on CPU flushes subnormals to zero, therefore the interpreter converts (`astype`) instead of
reinterpreting bits: the same masks, with exponents that differ by a constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Arrays = Sequence[jax.Array]
Rows = list[jax.Array]
NamedArrays = dict[str, jax.Array]

LINEAR_EXPONENT = 149
"""Bits of an integer below 2^24, read as a float32, are the integer times 2^-149."""

SIGN_BITS = -0x7F7F7F80
"""The highest bit of each byte of a word, 0x80808080: what signed bytes are offset by."""

STAGED_EXPONENT = 64
"""Staged x is this many powers of two larger, so that products are normal numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """How a weight is stored: what its (canonical) arrays are besides the format; static."""

    granularity: str = "group"  # or "tensor", "channel", "block"
    group_size: int | None = None  # rows that share a scale; only with "group"
    block_size: tuple[int, int] | None = None  # likewise rows and columns; only with "block"
    zero_point: str = "none"  # or "half", "integer"
    code_dtype: str = "uint8"
    scale_dtype: str = "bfloat16"  # `WordFormat.scale_dtype` where there is one


@dataclasses.dataclass(frozen=True)
class Storage(Stored):
    """A way to store weights that is compiled ahead of time, and its title for people.

    More machine instructions a weight than `instruction_limit` are a failure of the check.
    """

    title: str
    instruction_limit: float | None = None


def per_channel(title: str, **changes: Any) -> Storage:
    """A float32 scale for each column."""
    return Storage(title, granularity="channel", scale_dtype="float32", **changes)


@dataclasses.dataclass(frozen=True)
class WordFormat:
    """One weight format in words; formats with their own decoding override methods.

    A format is one object in a file of its own and a row in `pallas_kernels.weights.formats`;
    nothing else knows its name.

    `column_scale` names the canonical array that multiplies whole columns besides `scale`, which is
    of groups then; `scale_dtype` is the scales' where the canonical array's dtype does not say it
    (`uint4`, two in a byte).
    """

    name: str  # as in a QTensor's spec
    words: int  # of a unit, int32
    rows: int  # of K, of a unit; divides 128
    columns: tuple[str, ...] = ()  # float32 constants [..., 1, N] that decoding needs
    column_scale: str | None = None
    scale_dtype: str | None = None
    storages: tuple[Storage, ...] = ()  # compiled ahead of time; kernels take others too
    terms: int = 1  # lists of `fragments`

    @property
    def bits(self) -> int:
        """Of a row's code."""
        return 32 * self.words // self.rows

    def bias(self, zero_point: str) -> float:
        """What is subtracted from every decoded value; zero_point as in a QTensor's spec."""
        return 0.0

    def exponents(self, interpreted: bool) -> tuple[int, ...]:
        """For each row of a unit, the power of two that staged x is multiplied by."""
        return (0,) * self.rows

    def exponent(self, interpreted: bool) -> int:
        """The power of two that the finished sum is multiplied by."""
        return 0

    def decode(self, words: Arrays, columns: Arrays, interpreted: bool, layout: Any = None) -> Rows:
        """Words of a unit -> its `rows` float32 arrays, before bias and scale, element by element.

        Words are int32 arrays of one shape (of columns), `columns` the constants in float32 arrays
        of that shape; `interpreted`: XLA on CPU runs this, rather than a GPU. `layout` is that of
        these arrays in a kernel, for formats that need instructions without a name in `jax.numpy`;
        None: arrays `[columns]`, neighbours in one thread.
        """
        raise NotImplementedError(self.name)

    @property
    def paired_rows(self) -> tuple[tuple[int, int], ...] | None:
        """The rows (low, high) of a unit that each register of `fragments` holds; None: tensor
        cores have no form of it.
        """
        return None

    def fragment_exponent(self, dtype: Any) -> int:
        """Two to it is what `fragments` are multiplied by."""
        return 0

    @property
    def scaled_fragments(self) -> bool:
        """Whether `offset` of `fragments` is instead the scale of a unit: it has so few bits that
        products with it are 16-bit floats, and its groups are too small for sums of their own.
        """
        return False

    def fragments(
        self, words: Sequence[Any], columns: Sequence[Any], offset: Any, dtype: Any
    ) -> list[list[Any]]:
        """Registers of two 16-bit floats of `dtype`, for tensor cores, of one column of a unit.

        MLIR values in (i32 words, f32 constants of the column) and out, by nothing that needs more
        than sm_80. `offset` (two such floats, `2**fragment_exponent` of a number; None: zero) is
        added. Several lists are terms whose sum is the weight.
        """
        raise NotImplementedError(self.name)

    def code_rows(self, k: int) -> int:
        """Rows of bytes of the canonical codes of K rows."""
        return -(-k * self.bits // 8)

    def pack(self, codes: jax.Array) -> jax.Array:
        """Canonical codes -> words, in plain JAX: `[..., B, N]` -> int32 `[..., B / 4, N]`.

        Codes are bytes: the little-endian bit stream of each column, filled up to whole units.
        """
        return bytes_to_words(codes)

    def unpack(self, words: jax.Array, dtype: str = "uint8") -> jax.Array:
        """The inverse of `pack`; of the codes' dtype."""
        codes = words_to_bytes(words)
        return codes if dtype == "uint8" else lax.bitcast_convert_type(codes, jnp.dtype(dtype))

    def extra_shapes(self, n: int) -> dict[str, tuple[int, int]]:
        """Canonical arrays that the format has besides codes, scale and zero points."""
        return dict.fromkeys(self.columns, (1, n))

    def merged_scale(self, arrays: NamedArrays, n: int) -> tuple[jax.Array, NamedArrays]:
        """Scales as a kernel reads them, and canonical arrays to keep if they say more than those.

        `arrays` are canonical, of `n` columns.
        """
        return arrays["scale"], {}

    @property
    def byte_rows(self) -> tuple[tuple[int, int, int, int], ...] | None:
        """For each array of `signed_planes`, the rows that its four bytes hold; None: there is no
        such form, and products with int8 activations decode as all others do.
        """
        return None

    def signed_planes(self, word: jax.Array) -> list[jax.Array]:
        """A unit's word -> int32 arrays of four signed bytes each, for four-byte dots: the codes
        minus the middle of their range, times `2^(8 - bits)`.
        """
        raise NotImplementedError(self.name)


@dataclasses.dataclass(frozen=True)
class LinearWords(WordFormat):
    """Formats whose rows are fields of words, read as linear bits (see above)."""

    @property
    def positions(self) -> Sequence[int]:
        """For each row of a unit, the lowest bit of its field when it is decoded."""
        raise NotImplementedError(self.name)

    def exponents(self, interpreted: bool) -> tuple[int, ...]:
        """Undo the position of each field."""
        staged = 0 if interpreted else STAGED_EXPONENT
        return tuple(staged - position for position in self.positions)

    def exponent(self, interpreted: bool) -> int:
        """That of linear bits."""
        return 0 if interpreted else LINEAR_EXPONENT - STAGED_EXPONENT


def bytes_to_words(codes: jax.Array) -> jax.Array:
    """Bytes (any dtype of one byte) `[..., 4 * R, N]` -> int32 `[..., R, N]`, little-endian."""
    if codes.dtype != jnp.uint8:
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
    *lead, rows, n = codes.shape
    parts = codes.reshape(*lead, rows // 4, 4, n).astype(jnp.uint32)
    word = parts[..., 0, :]
    for i in range(1, 4):
        word = word | (parts[..., i, :] << jnp.uint32(8 * i))
    return lax.bitcast_convert_type(word, jnp.int32)


def words_to_bytes(words: jax.Array) -> jax.Array:
    """The inverse of `bytes_to_words`; uint8."""
    *lead, rows, n = words.shape
    word = lax.bitcast_convert_type(words, jnp.uint32)
    parts = [(word >> jnp.uint32(8 * i)).astype(jnp.uint8) for i in range(4)]
    return jnp.stack(parts, axis=-2).reshape(*lead, 4 * rows, n)


def turned_bytes(words: jax.Array, dtype: Any) -> jax.Array:
    """int32 words `[R, N]` -> their bytes, K innermost: `[N, 4 * R]` of a dtype of one byte.

    In one pass, which writes a copy: how tensor cores and libraries want bytes.
    """
    return lax.bitcast_convert_type(words.T, jnp.dtype(dtype)).reshape(words.shape[1], -1)


def rows_together(x: jax.Array, order: Sequence[Sequence[int]]) -> jax.Array:
    """Rows of units `[..., rows]` -> `[..., words, rows of a word]`, word i of the rows `order[i]`.

    Rows at equal distances, as most formats have them, are a transpose: XLA quantizes, turns and
    puts them together in one launch.
    """
    rows = np.asarray(order)
    if np.array_equal(rows.T.ravel(), np.arange(rows.size)):
        return jnp.swapaxes(x.reshape(*x.shape[:-1], *rows.T.shape), -1, -2)
    words = [jnp.stack([x[..., row] for row in some], axis=-1) for some in order]
    return jnp.stack(words, axis=-2)


def shift_right(word: jax.Array, bits: int) -> jax.Array:
    """Logical shift of int32."""
    return lax.shift_right_logical(word, jnp.full_like(word, bits))


def linear_bits(bits: jax.Array, interpreted: bool) -> jax.Array:
    """int32 in `0 .. 2^24 - 1` -> float32 of that integer, times 2^-149 unless interpreted."""
    if interpreted:
        return bits.astype(jnp.float32)
    return lax.bitcast_convert_type(bits, jnp.float32)


def linear_field(word: jax.Array, position: int, bits: int, interpreted: bool) -> jax.Array:
    """The field `position .. position + bits - 1` (at most 24) of a word as linear bits.

    Its value is the field times `2**position`, times 2^-149 unless interpreted.
    """
    mask = ((1 << bits) - 1) << position
    return linear_bits(word & jnp.int32(mask), interpreted)
