"""How a tool stores quantized linear layers in safetensors: one `Codec` a tool."""

import abc
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import ml_dtypes  # and makes NumPy know bfloat16 by name
import numpy as np

from fdq.schemes.scheme import CacheSpec, WeightSpec
from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.readers.safetensors_reader import TensorInfo
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources.stored_cache import StoredCache
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

SCALE_DTYPES = ("float32", "bfloat16", "float16")
_LONGEST_PATTERN, _LONGEST_NAME = 512, 160
# No repetition of a group and so many of characters: at worst a cubic number of steps a name.
MOST_REPETITIONS = 3


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of somebody's config, read key by key; `where` is the file and what leads there."""

    content: Mapping[str, Any]
    where: str

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number; CheckpointError if it is something else, or missing without a default."""
        value = self.content.get(key)
        value = default if value is None else value
        if type(value) is not int:
            raise self.wrong(key, "a whole number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.content.get(key)
        if value is not None and type(value) is not bool:
            raise self.wrong(key, "true or false")
        return default if value is None else value

    def one_of(self, key: str, known: tuple[Any, ...], default: Any = None) -> Any:
        """One of some values; null and missing count as `default`."""
        value = self.content.get(key)
        value = default if value is None else value
        if not any(type(value) is type(one) and value == one for one in known):
            raise self.wrong(key, " or ".join(map(repr, known)))
        return value

    def pair(self, key: str) -> tuple[int, int]:
        """Two sizes above zero."""
        value = self.content.get(key)
        sizes = value if isinstance(value, list) else []
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise self.wrong(key, "two sizes, of out and in")
        return sizes[0], sizes[1]

    def names(self, *keys: str) -> tuple[str, ...]:
        """The lists of strings under these keys, as one; empty without any."""
        found: list[str] = []
        for key in keys:
            value = self.content.get(key)
            if value is None:
                continue
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise self.wrong(key, "a list of names")
            found += value
        return tuple(found)

    def part(self, key: str) -> "Section | None":
        """An object under a key; None without one."""
        value = self.content.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Section(value, f"{self.where}: {key}")

    def parts(self) -> Iterator["Section"]:
        """The objects under all keys."""
        for key in self.content:
            part = self.part(key)
            if part is None:
                raise self.wrong(key, "an object")
            yield part

    def absent(self, *keys: str, because: str) -> None:
        """Refuses a key that says something: anything but null, false or nothing at all."""
        for key in keys:
            if self.content.get(key):
                raise self.wrong(key, f"nothing: {because}")

    def only(self, *keys: str) -> None:
        """Refuses keys that are not among these."""
        for key in self.content:
            if key not in keys:
                raise self.wrong(key, "no such key: it is not read")

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """What to raise about a value."""
        return CheckpointError(
            f"{self.where}: {key} = {self.content.get(key)!r:.80}, expected {expected}."
        )


class Codec(abc.ABC):
    """The quantized layers of an open directory, as its config says."""

    methods: ClassVar[tuple[str, ...]]
    """The `quant_method` that it reads."""
    codes: ClassVar[tuple[str, ...]]
    """How the names of tensors of codes end, after the module's."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Ends of names of tensors that say nothing about weights."""
    out_first: ClassVar[bool] = True
    """Whether floats beside the codes are `[out, in]`."""
    floats_are_meant: bool = False
    """Whether a directory may be without any codes."""

    def __init__(self, directory: SourceDirectory, section: Section):
        self.directory, self.section = directory, section

    @abc.abstractmethod
    def linear(self, module: str) -> Linear | None:
        """A module that has codes; None for one of plain floats after all.

        CheckpointError says what of it is missing, or of another shape than its codes.
        """

    @abc.abstractmethod
    def read(self, linear: Linear) -> StoredWeight:
        """Its weight; of a stack that of its `expert`."""

    def stored(self, linear: Linear) -> StoredWeight:
        """As `read`; CheckpointError where all scales are 0 and the codes are not those of zeros.

        A single scale of 0 may be that of a group too small for its dtype.
        """
        weight = self.read(linear)
        scale, codes = weight.arrays.get("scale"), weight.codes
        if scale is None or weight.spec.zero_point == "offset":
            return weight
        if not scale.astype(np.float32).any() and (codes != codes.flat[0]).any():
            raise CheckpointError(
                f"{self.directory.file_name(linear.names[0])}: all scales of "
                f"{shown(linear.module)} are 0, its codes are not. Download it again, or take the "
                "float original."
            )
        return weight

    def linears(self) -> dict[str, Linear]:
        """All quantized modules by name, stacks by the name of their weight in floats."""
        found = {}
        for name in self.directory.tensors:
            module, _, end = name.rpartition(".")
            if end in self.codes and (linear := self.linear(module)) is not None:
                found[module] = linear
        return found

    def leaves(self, module: str) -> bool:
        """Whether the config says that a module is in floats, or says nothing of the kind."""
        del module
        return True

    def cache(self, config: Any) -> StoredCache | CacheSpec | None:
        """How keys and values are to be stored, with scales where these are static.

        `config` is that of fdq's model.
        """
        del config
        return None

    def unused_biases(self, modules: Iterable[str]) -> tuple[str, ...]:
        """Names of biases that a model need not have: those that say nothing."""
        del modules
        return ()

    def info(self, module: str, end: str) -> TensorInfo:
        """A tensor of a module; CheckpointError if it is missing."""
        name = f"{module}.{end}"
        if name not in self.directory.tensors:
            raise CheckpointError(
                f"{self.directory.path}: tensor {shown(name)} is missing beside the codes of "
                f"{shown(module)}. Download the model again."
            )
        return self.directory.tensors[name]

    def matrix(self, module: str, end: str) -> TensorInfo:
        """A tensor of a module that has two axes; CheckpointError if it is missing, or has not."""
        info = self.info(module, end)
        if len(info.shape) != 2:
            raise self.shape_problem(module, f"{info.shape} is no matrix")
        return info

    def has(self, module: str, end: str) -> bool:
        """Whether a module has such a tensor."""
        return f"{module}.{end}" in self.directory.tensors

    def check(self, module: str, end: str, shape: tuple[int, ...], *dtypes: str) -> TensorInfo:
        """A tensor of a module, of this shape and one of these dtypes."""
        info = self.info(module, end)
        if info.shape != shape or info.dtype.name not in dtypes:
            raise CheckpointError(
                f"{self.directory.file_name(info.name)}: tensor {shown(info.name)} is "
                f"{info.dtype} {info.shape}, expected {' or '.join(dtypes)} {shape} beside the "
                "codes."
            )
        return info

    def read_end(self, linear: Linear, end: str) -> np.ndarray:
        """A tensor of a module."""
        return self.directory.read(f"{linear.stored_as}.{end}")

    def scale_of(self, linear: Linear, end: str, *, signed: bool = False) -> np.ndarray:
        """A tensor of scales; CheckpointError where one is not finite, or negative.

        With `signed` they may be negative.
        """
        scale = self.read_end(linear, end)
        wide = scale.astype(np.float32)
        if not np.isfinite(wide).all() or (not signed and (wide < 0).any()):
            kind = "not finite" if signed else "negative or not finite"
            raise self.bad(linear, end, f"a scale that is {kind}")
        return scale

    def power_of(self, linear: Linear, end: str) -> np.ndarray:
        """Scales in e8m0, stored so or as bytes; CheckpointError where one is NaN."""
        scale = self.read_end(linear, end).view(np.uint8)
        if (scale == 0xFF).any():
            raise self.bad(linear, end, "NaN")
        return scale.view(ml_dtypes.float8_e8m0fnu)

    def float8_scale_of(self, linear: Linear, end: str) -> np.ndarray:
        """Scales in e4m3; CheckpointError where one is negative or NaN."""
        scale = self.float8_of(linear, end)
        if (scale.view(np.uint8) & np.uint8(0x80)).any():
            raise self.bad(linear, end, "a scale that is negative")
        return scale

    def float8_of(self, linear: Linear, end: str) -> np.ndarray:
        """Codes of e4m3, stored so or as bytes; CheckpointError where one is NaN."""
        codes = self.read_end(linear, end).view(ml_dtypes.float8_e4m3fn)
        if ((codes.view(np.uint8) & np.uint8(0x7F)) == 0x7F).any():
            raise self.bad(linear, end, "NaN")
        return codes

    def static_input(self, module: str, *ends: str) -> str:
        """Which of some ends is that of the scale of a module's input: one number."""
        end = next((end for end in ends if self.has(module, end)), ends[0])
        info = self.info(module, end)
        if info.shape not in ((), (1,)) or info.dtype.name not in SCALE_DTYPES:
            raise CheckpointError(
                f"{self.directory.file_name(info.name)}: tensor {shown(info.name)} is "
                f"{info.dtype} {info.shape}, expected one number, the scale of the input."
            )
        return end

    def whole_scale(self, module: str, end: str) -> float:
        """The scale of a module's whole matrix: one number above 0."""
        name = self.check(module, end, self.info(module, end).shape, "float32").name
        found = self.directory.read(name)
        usable = np.isfinite(found).all() and (found >= np.finfo(np.float32).tiny).all()
        if found.size != 1 or not usable:
            raise CheckpointError(
                f"{self.directory.file_name(name)}: tensor {shown(name)} holds "
                f"{found.tolist()!r:.80}, expected one number above 0."
            )
        return found.item()

    def input_scale_of(self, linear: Linear) -> np.float32:
        """The scale of a layer's input; CheckpointError where it is none."""
        assert linear.input_scale is not None
        scale = np.float32(self.scale_of(linear, linear.input_scale).reshape(()))
        if not scale > 0:
            raise self.bad(linear, linear.input_scale, "0, which is no scale")
        return scale

    def factor_of(self, linear: Linear) -> np.ndarray:
        """What multiplies a layer's input, float32 `[in]`; CheckpointError where it is not finite.

        The weight that has it in its rows multiplies the input itself.
        """
        assert linear.input_factor is not None
        factor = self.read_end(linear, linear.input_factor).astype(np.float32)
        if not np.isfinite(factor).all():
            raise self.bad(linear, linear.input_factor, "NaN or infinity")
        return factor

    def bad(self, linear: Linear, end: str, what: str) -> CheckpointError:
        """What to raise about the content of a tensor."""
        name = f"{linear.stored_as}.{end}"
        return CheckpointError(
            f"{self.directory.file_name(name)}: tensor {shown(name)} holds {what}. Download it "
            "again, or take the float original."
        )

    def shape_problem(self, module: str, what: str) -> CheckpointError:
        """What to raise where the shape of codes cannot be."""
        return CheckpointError(f"{self.directory.path}: the codes of {shown(module)}: {what}.")


def check_ignored(directory: SourceDirectory, found: Mapping[str, Any], ignored: "Names") -> None:
    """A module that the config leaves in floats must not have codes."""
    for module in found:
        if ignored.match(module):
            raise codes_of_ignored(directory, module)


def codes_of_ignored(directory: SourceDirectory, module: str) -> CheckpointError:
    """What to raise about a module that should have none."""
    return CheckpointError(
        f"{directory.path}: {shown(module)} has codes, but config.json leaves it in floats. Check "
        "that they belong together."
    )


@dataclasses.dataclass(frozen=True)
class Names:
    """Modules by name or, after `re:`, by a regular expression that their names match.

    A file may say anything: expressions are held to few repetitions, and all matches to seconds.
    """

    patterns: tuple[str, ...]
    where: str

    def match(self, module: str) -> bool:
        """Whether a module is among them, or below one of them."""
        return any(self._matches(pattern, module) for pattern in self.patterns)

    def _matches(self, pattern: str, module: str) -> bool:
        if not pattern.startswith("re:"):
            return module == pattern or module.startswith(pattern + ".")
        return matcher(pattern.removeprefix("re:"), module, self.where).match(module) is not None


def matcher(
    expression: str, name: str, where: str, *, repetitions: int = MOST_REPETITIONS
) -> re.Pattern[str]:
    """A regular expression of a file, compiled; CheckpointError if `name` may take it for ever."""
    if len(name) > _LONGEST_NAME or not _is_safe(expression, repetitions):
        raise CheckpointError(
            f"{where}: the pattern {expression!r:.80} is too long, or repeats too much to be "
            "matched safely. Write the modules' names in its place."
        )
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: the pattern {expression!r:.80} is no regular expression: {error}."
        ) from None


@functools.lru_cache(maxsize=8192)
def _is_safe(expression: str, repetitions: int) -> bool:
    """Whether a regular expression is matched in few steps, whatever the name."""
    repeated = len(re.findall(r"(?<!\\)[*+]|\{\d*,\d*\}", expression))
    few = len(expression) <= _LONGEST_PATTERN and repeated <= repetitions
    return few and not re.search(r"\)\s*[*+{]", expression)


def scale_dtype(info: TensorInfo, directory: SourceDirectory) -> str:
    """The dtype of a tensor of float scales, as specs name it."""
    if info.dtype.name not in SCALE_DTYPES:
        raise CheckpointError(
            f"{directory.file_name(info.name)}: tensor {shown(info.name)} is {info.dtype}, "
            f"expected scales in {', '.join(SCALE_DTYPES)}."
        )
    return info.dtype.name


def integer_spec(bits: int, group: int | None, **fields: Any) -> WeightSpec:
    """Integers with a scale per group of rows, or per channel where `group` is None."""
    granularity = "channel" if group is None else "group"
    return WeightSpec(format=f"int{bits}", granularity=granularity, group_size=group, **fields)
