"""What every weight format provides: `Format`, and its common case `ScaledFormat`.

A format turns a weight `[..., K, N]` into a dict of arrays (the fields of a `QTensor`) and
back. Choosing codes is split in two, so that every quantizer can do the first part its own way:

1. *parameters* (`scale`, `zero` ...), from `fit` (closed form) or from a search over
   `candidates`; always as stored, that is already rounded to their dtype;
2. *codes* for given parameters: `encode`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import distortion, exact_arithmetic, grouping, packing, row_order
from fdq.schemes.kinds import WEIGHT_FORMATS as FORMATS
from fdq.schemes.scheme import WeightSpec

Arrays = dict[str, Any]
Unit = list[jax.Array]
Tables = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Parameters to try in a search for the least squared error."""

    count: int
    at: Callable[[jax.Array], Arrays]  # maps an int32 index to parameters as stored
    refit: bool = True  # the best scale may be replaced by the least-squares scale of its codes

    @classmethod
    def of_fractions(
        cls, ends: tuple[float, float], count: int, at: Callable[[jax.Array], Arrays]
    ) -> Candidates:
        """Parameters `at` evenly spaced float32 fractions (of some largest scale)."""
        start, step = ends[0], (ends[1] - ends[0]) / (count - 1)

        def fraction(i: jax.Array) -> jax.Array:
            # Under jax.disable_jit the index of a loop is a Python number.
            return jnp.float32(start) + jnp.float32(step) * jnp.asarray(i, jnp.float32)

        return cls(count, lambda i: at(fraction(i)))


class Format(abc.ABC):
    """One way to store a weight; a member of `FORMATS`, which users may add to.

    Attributes:
      name: the `WeightSpec.format` that it reads.
      grammar_name: its type in the name of a scheme: the `NF4` of `WNF4A16`.
      synonyms: what its type is called besides.
      aliases: names, in lower case, that stand for the scheme `W<grammar_name>A16C16`.
      bits: bits of one code, without scales.
      closed_form: `fit` has a formula for parameters.
      searchable: there are parameters to try: `candidates`, or a `search` of the format's own.
      granularities: what may share a scale.
      group_size: rows of a group by default; None where one scale per channel is the default.
      zero_points: the kinds of zero points that a spec may ask for, the default first.
      scale_dtypes: what scales may be stored in.
      fixed: group size and dtype of the scale are part of the format's definition.
      double_quantization: a spec may ask for scales in 8 bits.
      row_order: codes in groups may come with the order of their rows.
      unit_factor: a power of two that is missing in the values of `decode_unit`.
    """

    name: str
    grammar_name: str
    synonyms: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    bits: int
    closed_form: bool = True
    searchable: bool = False
    granularities: tuple[str, ...] = ("group",)
    group_size: int | None = None
    zero_points: tuple[str, ...] = ("none",)
    scale_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    fixed: bool = False
    double_quantization: bool = False
    row_order: bool = False
    unit_factor: float = 1.0

    def spec_fields(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All fields of a `WeightSpec`: the format's defaults, with those `given` in their place.

        The default scale is bfloat16 for groups of at most 128 rows (published bits per weight
        count 16 bits a group) and float32 for coarser scales.
        """
        group = self.group_size
        default = {"granularity": "group" if group else "channel", "group_size": group}
        if "granularity" in given:
            default["group_size"] = None
        fields = {"format": self.name, **default, "zero_point": self.zero_points[0], **given}
        small = fields["granularity"] == "group" and (fields["group_size"] or 0) <= 128
        scale_dtype = "bfloat16" if small else "float32"
        if scale_dtype not in self.scale_dtypes:
            scale_dtype = self.scale_dtypes[0]
        return {"scale_dtype": scale_dtype, **fields}

    def spec_problem(self, spec: WeightSpec) -> str | None:
        """What is wrong with a spec of this format and one of its granularities, or None."""
        stored = (spec.group_size, spec.scale_dtype)
        defined = (self.group_size, self.scale_dtypes[0])
        if self.fixed and stored != defined:
            sizes = "group_size={} with {} scales; the format is defined with groups of {} and {}"
            return sizes.format(*stored, *defined) + " scales"
        if spec.scale_dtype not in self.scale_dtypes:
            takes = str(self.scale_dtypes).strip("(,)")
            return f"scale_dtype {spec.scale_dtype!r}; this format takes {takes}"
        if spec.zero_point not in self.zero_points:
            return f"zero_point {spec.zero_point!r}; only integer formats have zero points"
        if spec.double_quantization and not self.double_quantization:
            able = (format.name for format in FORMATS.values() if format.double_quantization)
            return f"double_quantization is for {', '.join(able)} only"
        if spec.row_order and not (self.row_order and spec.granularity == "group"):
            return "row_order is for integers in groups only"
        return None

    def reach(self, spec: WeightSpec) -> float:
        """The largest magnitude of a level: how often the scale a weight may be."""
        return 1.0

    def magnitudes(self, spec: WeightSpec) -> tuple[float, float]:
        """Between which the largest magnitude of a weight must be for its scales to hold it.

        Smaller scales would be flushed to zero (or have less than 7 bits), with a factor of 512
        for groups of smaller weights; larger ones, or sums of weights, would overflow. A weight of
        zeros needs no scale.
        """
        if spec.scale_dtype == "float16":
            return self.reach(spec) * 2.0**-17, self.reach(spec) * 65504.0
        # Ops multiply scales by the factor that is missing in the values.
        return self.reach(spec) * 2.0**-117, 2.0**126 / max(1.0, self.unit_factor)

    def check(self, spec: WeightSpec, k: int, n: int, path: str = "<array>") -> None:
        """Raises ValueError if a `[k, n]` weight cannot be grouped as `spec` says."""
        grouping.check_shape(spec, k, n, path)

    def array_names(self, spec: WeightSpec) -> tuple[str, ...]:
        """What a `QTensor` of such a spec holds, in the order of its pytree."""
        beside = {"integer": ("zero",), "offset": ("offset",)}
        names = ("codes", "scale", *beside.get(spec.zero_point, ()))
        return (*names, "row_order") if spec.row_order else names

    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """Parameters of a float32 weight `[..., K, N]` from its largest magnitudes."""
        raise NotImplementedError(f"Format {self.name} has no closed form.")

    @abc.abstractmethod
    def encode(self, w: jax.Array, spec: WeightSpec, parameters: Arrays | None = None) -> Arrays:
        """A float32 weight `[..., K, N]` -> every array of the format, `codes` included."""

    def search(self, w: jax.Array, spec: WeightSpec, importance: jax.Array | None = None) -> Arrays:
        """Encodes `[K, N]` with a search of the format's own; `ScaledFormat`s share one."""
        raise NotImplementedError(f"Format {self.name} has no search of its own.")

    @abc.abstractmethod
    def decode(
        self, arrays: Arrays, spec: WeightSpec, *, padding: int = 0, dtype: Any = jnp.float32
    ) -> jax.Array:
        """The arrays -> `[..., K, N]`; formed in float32, then cast to `dtype`."""

    # How an op reads a weight without decoding it first, if the format has a `unit`. Invariant:
    # decode[k, n] = unit_factor * (decode_unit[k, n] - zero[k // g, n]) * multiplier[k // g, n]
    #                + offset[k // g, n]

    @property
    def unit(self) -> tuple[int, int] | None:
        """Elements of `codes` and rows of K in the smallest whole number of bytes of whole codes.

        None (the default) where ops cannot read such units and decode the weight instead.
        """
        return None

    def decode_unit(self, unit: Unit, spec: WeightSpec, tables: Tables = ()) -> Unit:
        """Values of the rows of a packed unit, before zero point and scales.

        Element-wise, by shifts, masks and conversions only, so that XLA fuses it into whatever
        consumes the rows and the decoded weight never reaches memory. From the elements of a unit
        (arrays of one shape, float8 codes as uint8) and what `unit_tables` returned (in shapes that
        broadcast to that one) it makes float32 arrays of that shape, one a row.
        """
        raise NotImplementedError(f"Format {self.name} has no packed units.")

    def unit_tables(self, arrays: Arrays, spec: WeightSpec) -> Tables:
        """Arrays `[1, N]` that `decode_unit` needs beside the codes (default: none)."""
        return ()

    def multiplier(self, parameters: Arrays, spec: WeightSpec) -> jax.Array:
        """The float32 number `[..., G, M]` that multiplies the values of each group."""
        return parameters["scale"].astype(jnp.float32)

    def integer_offset(self, spec: WeightSpec) -> float | None:
        """What to subtract from stored codes to get values; None where these are not integers.

        Integers and a half count as integers: products with int8 are exact in both.
        """
        return None

    @abc.abstractmethod
    def shape_from_codes(self, codes: tuple[int, ...], padding: int) -> tuple[int, ...]:
        """Shape of the codes -> shape of the weight."""

    @abc.abstractmethod
    def padding(self, k: int) -> int:
        """Unused rows of the last packed unit of a weight with `k` rows."""

    def columns_apart(self, spec: WeightSpec) -> bool:
        """Whether columns `[K, n]` of a weight encode to the columns of its arrays."""
        return False

    def search_distortion(self, spec: WeightSpec, k: int) -> float:
        """E|w - w'|^2 of a search, for a weight `[k, N]` of independent N(0, 1) numbers."""
        raise NotImplementedError(f"Format {self.name} has no search of its own.")

    def abstract(self, shape: tuple[int, ...], spec: WeightSpec) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays of a weight of `shape`, without computing anything."""
        w = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        arrays = jax.eval_shape(lambda w: self.encode(w, spec), w)
        return arrays | row_order.abstract(shape, spec)

    def bits_per_weight(self, spec: WeightSpec, shape: tuple[int, ...]) -> float:
        """Stored bits, codes and everything beside them, by the number of weights in `shape`."""
        arrays = self.abstract(shape, spec)
        stored = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays.values())
        return 8 * stored / math.prod(shape)


class ScaledFormat(Format):
    """A format with levels of its own and one scale per group: `w ~= scale * level (+ offset)`.

    Subclasses say what the levels are (`project`), how a level is stored (`to_codes` and
    `from_codes`) and which scales to try.
    """

    @abc.abstractmethod
    def project(self, u: jax.Array, spec: WeightSpec, zero: Any = None) -> jax.Array:
        """The level nearest to `u = (w - offset) / scale` (float32); `zero` broadcasts."""

    @abc.abstractmethod
    def to_codes(self, levels: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Levels `[..., K, N]` as returned by `project` -> codes, not yet packed."""

    @abc.abstractmethod
    def from_codes(self, codes: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Inverse of `to_codes`, float32; before the zero point is subtracted if it is None."""

    @property
    def unit(self) -> tuple[int, int]:
        """Bytes and rows of K of a packed unit."""
        return packing.UNITS[self.bits]

    def decode_unit(self, unit: Unit, spec: WeightSpec, tables: Tables = ()) -> Unit:
        """Levels of the rows of a packed unit."""
        return [self.from_codes(c, spec, None) for c in packing.unit_codes(unit, self.bits)]

    def candidates(self, w: jax.Array, spec: WeightSpec) -> Candidates:
        """The parameters that a search tries; ValueError where the format has no search."""
        raise ValueError(f"Format {self.name} has no search.")

    def lopsided(self, spec: WeightSpec) -> bool:
        """Whether a negative scale gives other levels than a positive one."""
        return False

    def with_multiplier(self, parameters: Arrays, scale: jax.Array, spec: WeightSpec) -> Arrays:
        """`parameters` with their scale replaced by `scale`, rounded to what is stored."""
        stored = grouping.round_scale(scale, spec.scale_dtype).astype(spec.scale_dtype)
        return {**parameters, "scale": stored}

    def finish(self, parameters: Arrays, spec: WeightSpec) -> Arrays:
        """The last step after `fit` or a search, before codes are chosen (default: none)."""
        return parameters

    def encode(self, w: jax.Array, spec: WeightSpec, parameters: Arrays | None = None) -> Arrays:
        """A float32 weight `[..., K, N]` -> every array of the format, `codes` included."""
        k, n = w.shape[-2:]
        if parameters is None:
            parameters = self.finish(self.fit(w, spec), spec)
        # XLA may leave out a rounding to a short dtype that is followed by a conversion back.
        stored: Arrays = jax.lax.optimization_barrier(parameters)
        scale = grouping.expand(self.multiplier(stored, spec), spec, k, n)
        zero, offset = (_expanded(stored, name, spec, k, n) for name in ("zero", "offset"))
        above = w if offset is None else w - offset
        levels = self.project(exact_arithmetic.quotient(above, scale), spec, zero)
        codes = self.to_codes(levels, spec, zero)
        return {"codes": packing.pack(codes, self.bits), **stored}

    def decode(
        self, arrays: Arrays, spec: WeightSpec, *, padding: int = 0, dtype: Any = jnp.float32
    ) -> jax.Array:
        """The arrays -> `[..., K, N]`; formed in float32, then cast to `dtype`."""
        codes = packing.unpack(arrays["codes"], self.bits, padding)
        k, n = codes.shape[-2:]
        scale = grouping.expand(self.multiplier(arrays, spec), spec, k, n)
        zero, offset = (_expanded(arrays, name, spec, k, n) for name in ("zero", "offset"))
        levels = self.from_codes(codes, spec, zero)
        if offset is None:
            return (levels * scale).astype(dtype)
        return (exact_arithmetic.product(levels, scale) + offset).astype(dtype)

    def shape_from_codes(self, codes: tuple[int, ...], padding: int) -> tuple[int, ...]:
        """Shape of the codes -> shape of the weight."""
        *lead, rows, n = codes
        return (*lead, packing.unpacked_rows(rows, self.bits, padding), n)

    def padding(self, k: int) -> int:
        """Rows that fill it."""
        return packing.padding_rows(k, self.bits)

    def columns_apart(self, spec: WeightSpec) -> bool:
        """Unless a scale serves several columns."""
        return spec.granularity in ("channel", "group") and not spec.double_quantization

    def search_distortion(self, spec: WeightSpec, k: int) -> float:
        """Simulated: the best candidate of every group of a seeded sample."""
        return distortion.searched(self, spec, k)


def _expanded(parameters: Arrays, name: str, spec: WeightSpec, k: int, n: int) -> Any:
    """A float32 array beside the scale as it meets a `[..., k, n]` weight; None without one."""
    found = parameters.get(name)
    return None if found is None else grouping.expand(found.astype(jnp.float32), spec, k, n)
