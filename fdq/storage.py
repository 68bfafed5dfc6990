"""``fdq.load`` and ``fdq.save``: the door to ``checkpoints``, imported only when it is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def load(
    path: str | os.PathLike[str],
    scheme: Any = None,
    *,
    dtype: Any = None,
    sharding: Any = None,
    template: Any = None,
    calibration: Any = None,
    method: str | None = None,
    compat: str | None = None,
    verify: bool = True,
    quiet: bool = False,
    prepare: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Any:
    """Loads a checkpoint, quantizing it on the way if a scheme is given.

    Args:
      path: a directory: a float model as Hugging Face or Paddle publish it, or an fdq checkpoint.
      scheme: anything that ``fdq.quantize`` takes. From a float directory each tensor is
        quantized as it is read, so that the float model is never in memory as a whole.
      dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"`` of a model's activations and of its
        parameters that are not quantized; by default the checkpoint's.
      sharding: where arrays go: one ``jax.sharding.Sharding``, a mapping from dotted array paths
        (``layers.0.mlp.down_proj.kernel.codes``), or a function of that path and a
        ``jax.ShapeDtypeStruct``. By default the default device.
      template: for checkpoints of your own modules and pytrees, an object of the same structure
        (abstract or not, quantized or not). Without one these come back as nested dicts.
      calibration: for schemes with static scales: what ``fdq.calibrate`` returned, or sample
        tokens ``[batch, length]`` to calibrate with. The float model is then in memory as a whole.
      method: how scales are chosen, as in ``fdq.quantize``.
      compat: as in ``fdq.quantize``.
      verify: compare checksums of fdq checkpoints.
      quiet: do not print what was quantized and what was left.
      prepare: put quantized weights of a model into the layout that its device wants
        (``fdq.prepare``). They are saved in the canonical layout all the same.
      progress: called after each tensor with (bytes done, bytes in all, path).

    Returns:
      An ``fdq.models.Decoder``; or for an fdq checkpoint of something else, the template filled,
      or nested dicts of arrays and QTensors.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      fdq_checkpoints.CheckpointError: the checkpoint is refused; the message says what is wrong.

    Examples:
      >>> model = fdq.load("ERNIE-4.5-0.3B-PT", "W4A16C8")  # doctest: +SKIP
    """
    import fdq_checkpoints
    from fdq import models
    from fdq.ops.layouts import prepare_in_place

    loaded = fdq_checkpoints.load(
        path,
        scheme,
        dtype=dtype,
        sharding=sharding,
        template=template,
        calibration=calibration,
        method=method,
        compat=compat,
        verify=verify,
        quiet=quiet,
        progress=progress,
    )
    if prepare and sharding is None and isinstance(loaded, models.Decoder):
        prepare_in_place(loaded)
    return loaded


def save(
    obj: Any,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    files: Iterable[str | os.PathLike[str]] = (),
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Saves a model, an NNX module of yours, or any pytree of arrays and QTensors.

    What was prepared for a device is saved in the canonical layout.

    Args:
      obj: an fdq model (loads without anything else), or any ``nnx.Module`` or pytree (loads into
        a template, or as nested dicts).
      path: the directory to make. It appears when it is complete, and not before.
      overwrite: replace an fdq checkpoint that is there.
      files: files to put beside the weights, such as tokenizer.json.
      provenance: JSON values to keep in fdq.json.

    Raises:
      FileExistsError: ``path`` exists.
      fdq_checkpoints.CheckpointError: a leaf is not an array, or the disk is too small.

    Examples:
      >>> fdq.save(model, "ernie-w4a16c8")  # doctest: +SKIP
    """
    import fdq_checkpoints

    fdq_checkpoints.save(obj, path, overwrite=overwrite, files=files, provenance=provenance)
