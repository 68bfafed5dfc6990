"""Quantizing a model tensor by tensor while it is read: what ``load`` and ``convert`` share.

At any time one source tensor, one float32 copy of it inside the quantizer and one quantized result
are in memory; a stack of experts is read and quantized one expert at a time.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - makes NumPy know bfloat16 by name
import numpy as np

from fdq import models
from fdq.formats.qtensor import QTensor
from fdq.quantizers.quantization import quantize
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import ActivationSpec, Scheme, WeightSpec
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import huggingface, paddle, tensor_names
from fdq_checkpoints.tree_paths import Path, Tensor, dotted

# What reading a config raises when it holds, say, a list in place of a number.
_WRONG_KIND = (TypeError, KeyError, AttributeError, IndexError, ArithmeticError)

_FINITE_CHECK_ELEMENTS = 2**24

Progress = Callable[[int, int, str], None]
"""Called after each tensor with (bytes read so far, bytes in all, path)."""


class FloatSource(Protocol):
    """Float tensors by path of the tree that will hold them."""

    def read(self, path: Path, index: int | None = None) -> np.ndarray:
        """The tensor at `path`, or ``tensor[index]``."""
        ...


@dataclasses.dataclass
class ModelSource:
    """A Hugging Face or Paddle directory, seen as the tensors of an fdq model.

    Attributes:
      directory: the open files.
      config: of the model.
      model: abstract and not quantized; its leaves say shapes and dtypes.
    """

    directory: SourceDirectory
    config: models.DecoderConfig
    model: models.Decoder
    sources: Mapping[Path, tensor_names.Source]

    def read(self, path: Path, index: int | None = None) -> np.ndarray:
        """The tensor at `path`, or one expert of it, in the stored dtype."""
        if path not in self.sources:
            raise needs_calibration(path)
        return self.sources[path].read(self.directory, index)


MODEL_DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: Any) -> None:
    """Raises ValueError unless `dtype` is None or a dtype that models compute in."""
    try:
        known = dtype is None or jnp.dtype(dtype).name in MODEL_DTYPES
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype (={dtype!r}) must be one of {', '.join(MODEL_DTYPES)}.")


def open_model(directory: SourceDirectory, dtype: Any = None) -> ModelSource:
    """Look at all names, shapes and dtypes of a directory; read no weights.

    Args:
      directory: open.
      dtype: of what will not be quantized; by default that of config.json, or else of the file.

    Raises:
      CheckpointError: the model is not supported, is quantized already, or a tensor is missing,
        unexpected, or of a wrong shape or dtype.
    """
    _refuse_quantized(directory)
    hf_config = directory.config
    try:
        config = models.from_huggingface(hf_config)
    except ValueError as error:
        raise CheckpointError(f"{directory.path / 'config.json'}: {error}") from error
    except _WRONG_KIND as error:
        raise CheckpointError(
            f"{directory.path / 'config.json'}: a value of a wrong kind ({error})."
        ) from error
    is_paddle = any(name.startswith("ernie.") for name in directory.tensors)
    names = paddle if is_paddle else huggingface
    own = () if is_paddle else models.FAMILIES[config.model_type].tensor_names
    if dtype is None and not ({"dtype", "torch_dtype"} & hf_config.keys()):
        embedding = directory.tensors.get(names.EMBEDDING)
        dtype = None if embedding is None else embedding.dtype
    try:
        model = models.abstract(config, dtype)
    except ArithmeticError as error:  # a width of zero
        raise CheckpointError(
            f"{directory.path / 'config.json'}: its sizes make no model ({error})."
        ) from error
    targets = {tensor.path: tensor.value for tensor in tree_paths.flatten(model)}
    head_dim = model.config.head_dim
    q, kv = model.config.num_heads * head_dim, model.config.num_kv_heads * head_dim
    tied = config.tie_word_embeddings and names.HEAD in directory.tensors
    sources = tensor_names.sources(
        directory,
        (*own, *names.RULES),
        targets,
        qkv_widths=(q, kv, kv),
        also_used=(names.HEAD,) if tied else (),
    )
    if tied:
        tensor_names.check_tied_head(directory, names.HEAD, names.EMBEDDING)
    return ModelSource(directory, model.config, model, sources)


def quantized(
    source: FloatSource,
    tensors: Iterable[Tensor],
    *,
    method: str | None = None,
    compat: str | None = None,
    progress: Progress | None = None,
    skip: frozenset[Path] = frozenset(),
) -> Iterator[Tensor]:
    """Read, quantize or cast, and yield each tensor, on the host for stacks and plain arrays.

    Args:
      source: where floats come from.
      tensors: abstract: a QTensor says how to quantize, a ``ShapeDtypeStruct`` what to cast to.
      method: how scales are chosen, as in ``fdq.quantize``.
      compat: as in ``fdq.quantize``.
      progress: called after each tensor.
      skip: paths to leave out.

    Raises:
      CheckpointError: a tensor holds NaN or infinity, or needs calibration.
    """
    tensors = list(tensors)
    total = sum(_float_bytes(tensor) for tensor in tensors)
    done = 0
    for tensor in tensors:
        done += _float_bytes(tensor)
        if tensor.path in skip:
            continue
        if isinstance(tensor.value, QTensor):
            value = _quantize(source, tensor, method=method, compat=compat)
        else:
            value = _cast(source.read(tensor.path), tensor)
        yield dataclasses.replace(tensor, value=value)
        del value
        if progress is not None:
            progress(done, total, dotted(tensor.path))


def needs_calibration(path: Path) -> CheckpointError:
    """What to say about a static scale that no float checkpoint has."""
    return CheckpointError(
        f"{dotted(path)}: a static scale must be calibrated. Load the float model, run "
        "fdq.calibrate, and pass what it returns as calibration=; or use a dynamic scheme."
    )


def exact_recipe(
    tensors: Iterable[tuple[Path, WeightSpec | None, ActivationSpec | None]],
) -> Recipe:
    """A recipe that stores each of these tensors by its spec, and leaves all others."""
    return Recipe(
        [
            (path_pattern_of(path), Scheme(weight=spec, activation=activation))
            for path, spec, activation in tensors
        ]
    )


def path_pattern_of(path: Path) -> str:
    """The recipe pattern that matches just this path."""
    return "".join(f"[{char}]" if char in "*?[{" else char for char in dotted(path))


def _quantize(
    source: FloatSource, tensor: Tensor, *, method: str | None, compat: str | None
) -> QTensor:
    target: QTensor = tensor.value
    shape = tuple(target.shape)
    # A tree of one leaf: fdq.quantize then treats it, and names it in errors, as in its model.
    # Recipes do not see Linen's outer "params", so the tree goes without it.
    path = tensor.path[1:] if tensor.path[0] == "params" and len(tensor.path) > 1 else tensor.path
    recipe = exact_recipe([(path, target.spec, tensor.activation)])

    def quantized(array: np.ndarray) -> QTensor:
        tree = tree_paths.nested({path: array})
        tree = quantize(tree, recipe, method=method, compat=compat, quiet=True)
        return tree_paths.flatten(tree)[0].value

    if len(shape) == 2:
        return quantized(source.read(tensor.path))
    arrays: dict[str, np.ndarray] = {}
    for index in range(shape[0]):
        for name, array in quantized(source.read(tensor.path, index)).arrays().items():
            host = np.asarray(array)
            if index == 0:
                arrays[name] = np.empty((shape[0], *host.shape), host.dtype)
            arrays[name][index] = host
    return target.replace(**arrays)


def _cast(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _FINITE_CHECK_ELEMENTS):
        piece = flat[start : start + _FINITE_CHECK_ELEMENTS]
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(piece).all():
            position = start + int(np.argmin(np.isfinite(piece)))
            raise CheckpointError(
                f"{dotted(tensor.path)}: NaN or infinity, first at "
                f"{list(map(int, np.unravel_index(position, array.shape)))}. Expected finite "
                "weights; check the checkpoint that they come from."
            )
    result = array.astype(tensor.value.dtype, copy=False)
    if tensor.value.dtype == jnp.float16 and not np.isfinite(result).all():
        raise CheckpointError(
            f"{dotted(tensor.path)}: values beyond the range of float16. Use dtype='bfloat16'."
        )
    return result


def _float_bytes(tensor: Tensor) -> int:
    return 2 * int(np.prod(tensor.value.shape, dtype=np.int64))


def _refuse_quantized(directory: SourceDirectory) -> None:
    quantization = directory.config.get("quantization_config")
    if quantization is not None:
        method = "?"
        if isinstance(quantization, dict):
            method = quantization.get("quant_method", quantization.get("quantization", "?"))
        raise CheckpointError(
            f"{directory.path / 'config.json'}: quantization_config ({method}): the weights are "
            "quantized already. fdq reads float checkpoints; use the original release."
        )
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        if os.path.lexists(directory.path / name):
            raise CheckpointError(
                f"{directory.path / name}: says that the weights are quantized already. fdq reads "
                "float checkpoints; use the original release."
            )


def put(value: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """A host array on devices; each device (and process) takes its own part only.

    What JAX would cut to 32 bits (unless ``jax_enable_x64``) stays a NumPy array.
    """
    if isinstance(value, jax.Array) and sharding is None:
        return value
    host = np.asarray(value)
    if jax.dtypes.canonicalize_dtype(host.dtype) != host.dtype:
        return host
    if sharding is None:
        return jnp.asarray(host)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
