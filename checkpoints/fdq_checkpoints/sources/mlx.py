"""MLX: integers of 2, 3, 4, 5, 6 and 8 bits with a scale and a bias per group, MXFP4, MXFP8, NVFP4.

=========  ================================  =================================  =================
`mode`     `weight` of a layer `[out, in]`   `scales`                           value
=========  ================================  =================================  =================
`affine`   uint32 `[out, in bits / 32]`      floats `[out, G]`, also `biases`   code scale + bias
`mxfp4`    the same, e2m1                    e8m0 as uint8, groups of 32
`mxfp8`    the same, e4m3                    the same
`nvfp4`    the same, e2m1                    e4m3 as uint8, groups of 16
=========  ================================  =================================  =================

Codes are dense little-endian streams. fdq has no integers of 5 and 6 bits: theirs are held as codes
of 8. Experts are one tensor `[experts, out, in]` (`switch_mlp`). The config has one setting for all
and others by module, in which what is missing is MLX's default. Source: mlx 0.32 (`quantize`).
"""

import dataclasses

import numpy as np

from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import bits as packing
from fdq_checkpoints.sources.codec import Codec, Section, integer_spec, scale_dtype
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_WORD = 32
_BITS = (2, 3, 4, 5, 6, 8)
# By mode: bits and rows of a group, fdq's format, dtype of the scales.
_FLOATS = {
    "mxfp4": (4, 32, "mxfp4", "float8_e8m0fnu"),
    "mxfp8": (8, 32, "mxfp8", "float8_e8m0fnu"),
    "nvfp4": (4, 16, "nvfp4", "float8_e4m3fn"),
}
_DEFAULTS = {"affine": (4, 64)} | {mode: known[:2] for mode, known in _FLOATS.items()}
_STACK, _EXPERT = ".switch_mlp.", ".experts.{}."
_MOST_EXPERTS = 2**16


@dataclasses.dataclass(frozen=True)
class _Setting:
    """How a module is stored: `bits` of a code, `group` rows of a scale."""

    mode: str
    bits: int
    group: int

    @classmethod
    def of(cls, section: Section) -> "_Setting":
        mode = section.one_of("mode", tuple(_DEFAULTS), "affine")
        bits, group = _DEFAULTS[mode]
        setting = cls(mode, section.whole("bits", bits), section.whole("group_size", group))
        if setting.bits not in (_BITS if mode == "affine" else (bits,)):
            raise section.wrong("bits", f"{_BITS if mode == 'affine' else bits}")
        if setting.group < 1 or (mode != "affine" and setting.group != group):
            raise section.wrong(
                "group_size", "a number of rows" if mode == "affine" else f"{group}"
            )
        return setting


class Mlx(Codec):
    """What mlx-lm writes; embeddings have codes too, which fdq decodes."""

    methods = ("mlx",)
    codes = ("scales",)

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        self.default = _Setting.of(section)

    def linears(self) -> dict[str, Linear]:
        """All modules with codes, experts one by one."""
        found: dict[str, Linear] = {}
        for name, one in super().linears().items():
            info = self.info(name, "weight")
            if len(info.shape) == 2:
                found[name] = one
                continue
            for expert in range(info.shape[0]):
                module = name.replace(_STACK, _EXPERT.format(expert))
                found[module] = dataclasses.replace(one, module=module, stack=name)
        self._whole(found)
        return found

    def _whole(self, found: dict[str, Linear]) -> None:
        """CheckpointError where words or biases are left over, or codes are said to be none."""
        seen = {one.stored_as for one in found.values()}
        for name, info in self.directory.tensors.items():
            module, _, end = name.rpartition(".")
            alone = end == "biases" or (end == "weight" and info.dtype.kind == "u")
            if alone and module not in seen:
                raise CheckpointError(
                    f"{self.directory.file_name(name)}: tensor {name} is without scales. Download "
                    "the model again."
                )
        for module in seen:
            if self.section.content.get(module) is False:
                raise CheckpointError(
                    f"{self.directory.path}: {module} has codes, but {self.section.where} leaves "
                    "it in floats. Check that they belong together."
                )

    def _setting(self, module: str) -> _Setting:
        """What the config says of a module; false counts as nothing."""
        own = self.section.content.get(module)
        if not isinstance(own, dict):
            return self.default
        return _Setting.of(Section(own, f"{self.section.where}: {module}"))

    def linear(self, module: str) -> Linear:
        """By the shape of the codes and what the config says of it."""
        info, setting = self.info(module, "weight"), self._setting(module)
        stacked = len(info.shape) == 3 and _STACK in module
        if len(info.shape) != 2 and not stacked:
            raise self.shape_problem(module, f"{info.shape} is no matrix")
        self.check(module, "weight", info.shape, "uint32")
        *lead, n, words = info.shape
        if not all(info.shape) or max(lead, default=1) > _MOST_EXPERTS:
            raise self.shape_problem(module, f"{info.shape} is no matrix")
        k = words * _WORD // setting.bits
        if words * _WORD % setting.bits or k % setting.group:
            raise self.shape_problem(
                module,
                f"{info.shape} words hold no rows of {setting.bits}-bit codes in groups of "
                f"{setting.group}",
            )
        shape = (*lead, n, k // setting.group)
        spec, ends, whole = self._spec(module, setting, shape, k)
        return Linear(
            module=module, shape=(n, k), spec=spec, activation=None, ends=ends, whole=whole
        )

    def _spec(
        self, module: str, setting: _Setting, shape: tuple[int, ...], k: int
    ) -> tuple[WeightSpec, tuple[str, ...], float | None]:
        if setting.mode != "affine":
            self.check(module, "scales", shape, "uint8")
            if self.has(module, "biases"):
                raise self.shape_problem(module, f"mode {setting.mode} has no biases")
            _, group, format, dtype = _FLOATS[setting.mode]
            spec = WeightSpec(
                format=format, granularity="group", group_size=group, scale_dtype=dtype
            )
            return spec, ("weight", "scales"), 1.0 if format == "nvfp4" else None
        scales = self.check(module, "scales", shape, "float32", "bfloat16", "float16")
        self.check(module, "biases", shape, scales.dtype.name)
        spec = integer_spec(
            setting.bits if setting.bits < 5 else 8,
            None if setting.group == k else setting.group,
            zero_point="offset",
            scale_dtype=scale_dtype(scales, self.directory),
        )
        return spec, ("weight", "scales", "biases"), None

    def read_end(self, linear: Linear, end: str) -> np.ndarray:
        """A tensor of a module, or an expert's part of it."""
        if linear.stack is None:
            return super().read_end(linear, end)
        before, after = linear.stack.split(_STACK)
        expert = int(linear.module[len(before) : -len(after)].split(".")[2])
        return self.directory.read_rows(f"{linear.stack}.{end}", expert, expert + 1)[0]

    def read(self, linear: Linear) -> StoredWeight:
        """Turned from `[out, in]` to `[in, out]`."""
        (_, k), spec = linear.shape, linear.spec
        if spec.format.startswith("int"):
            words, bits = self.read_end(linear, "weight"), self._setting(linear.stored_as).bits
            if bits in (5, 6):
                codes = np.ascontiguousarray(packing.words_unpacked(words, k, bits).T)
            else:
                codes = packing.along_in(words, k, bits)
            scale, offset = (self.scale_of(linear, e, signed=True).T for e in linear.ends[1:])
            arrays = {"scale": scale, "offset": offset}
        else:
            is_float8 = spec.format == "mxfp8"
            read = self.float8_of if is_float8 else self.read_end
            codes = read(linear, "weight")
            codes = codes if is_float8 else codes.view(np.uint8)
            codes = np.ascontiguousarray(codes.T)
            if spec.format == "nvfp4":
                scale = self.float8_scale_of(linear, "scales").T
                arrays = {"scale": scale, "global_scale": np.ones((1, 1), np.float32)}
            else:
                arrays = {"scale": self.power_of(linear, "scales").T}
        held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return StoredWeight(spec, k, codes, held)
