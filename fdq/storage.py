"""`load`, `convert`, `save` and `export`: the door to `fdq_checkpoints`, imported when used."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def _from_checkpoints[F: Callable[..., Any]](function: F) -> F:
    """The function of this name in `fdq_checkpoints`, with this signature and documentation."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        import fdq_checkpoints

        return getattr(fdq_checkpoints, function.__name__)(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]


def load(
    path: str | os.PathLike[str],
    scheme: Any = None,
    *,
    dtype: Any = None,
    sharding: Any = None,
    mesh: Any = None,
    mesh_rules: Any = None,
    template: Any = None,
    calibration: Any = None,
    method: str | None = None,
    compat: str | None = None,
    config: Any = None,
    subtree: str | None = None,
    verify: bool = True,
    verbose: bool = False,
    prepare: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Any:
    """Loads a checkpoint, quantizing it on the way if a scheme is given.

    Args:
      path: a directory: a float model as Hugging Face or Paddle publish it, an fdq checkpoint, or
        an Orbax checkpoint of yours (see `convert`). Or `hf://owner/name[@revision]`, a model on
        the Hugging Face hub, of which what is needed is downloaded (extra `hub`).
      scheme: anything that `fdq.quantize` takes. Each tensor is quantized as it is read, so that
        the float model is never in memory as a whole.
      dtype: `"float32"`, `"bfloat16"` or `"float16"` of a model's activations and of its
        parameters that are not quantized; by default the checkpoint's.
      sharding: where arrays go: one `jax.sharding.Sharding`, a mapping from dotted array paths
        (`layers.0.mlp.down_proj.kernel.codes`), or a function of that path and a
        `jax.ShapeDtypeStruct`. By default the default device.
      mesh: puts a model on the devices of `jax.make_mesh((4, 2), ("tensor", "expert"))`, as
        `fdq.shard` does: each tensor goes to its devices as it is read; of several processes each
        keeps its own part, and of an fdq checkpoint reads no more.
      mesh_rules: which axes of the mesh cut what, see `fdq.sharding.Rules`.
      template: for checkpoints of your own modules and pytrees, an object of the same structure
        (abstract or not, in an fdq checkpoint quantized or not). Without one these come back as
        nested dicts.
      calibration: statistics for quantizers that use them and for static scales: what
        `fdq.calibrate` returned, or sample tokens `[batch, length]` to calibrate with; with tokens
        the float model is in memory as a whole while it runs over them.
      method: what chooses the codes, as in `fdq.quantize`.
      compat: as in `fdq.quantize`.
      config: as in `convert`.
      subtree: as in `convert`.
      verify: compare checksums of fdq checkpoints.
      verbose: prints what was quantized, and what was left and why.
      prepare: put quantized weights of a model into the layout that its device wants
        (`fdq.prepare`); with `sharding`, deal the columns of fused weights out to the shards. They
        are saved in the canonical layout all the same.
      progress: called after each tensor with (bytes done, bytes in all, path).

    Returns:
      An `fdq.models.Decoder`; or for a checkpoint of something else, the template filled, or
      nested dicts of arrays and QTensors.

    Raises:
      FileNotFoundError: `path` does not exist.
      fdq_checkpoints.CheckpointError: the checkpoint is refused; the message says what is wrong.
      ValueError: a dtype that models do not compute in.

    Examples:
      >>> model = fdq.load("ERNIE-4.5-0.3B-PT", "W4A16C8")  # doctest: +SKIP
    """
    import fdq_checkpoints
    from fdq import models
    from fdq.ops.interleaved_weight import interleave_in_place
    from fdq.ops.preparation import prepare_in_place
    from fdq.sharding import distribution

    loaded = fdq_checkpoints.load(
        path,
        scheme,
        dtype=dtype,
        sharding=sharding,
        mesh=mesh,
        mesh_rules=mesh_rules,
        template=template,
        calibration=calibration,
        method=method,
        compat=compat,
        config=config,
        subtree=subtree,
        verify=verify,
        verbose=verbose,
        progress=progress,
    )
    if prepare and isinstance(loaded, models.Decoder):
        if mesh is not None:
            distribution.prepare(loaded)
        elif sharding is None:
            prepare_in_place(loaded)
        else:
            interleave_in_place(loaded)
    return loaded


@_from_checkpoints
def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    scheme: Any,
    *,
    dtype: Any = None,
    method: str | None = None,
    compat: str | None = None,
    calibration: Any = None,
    config: Any = None,
    subtree: str | None = None,
    overwrite: bool = False,
    verbose: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Any:
    """Quantizes the checkpoint at `src` into a new fdq checkpoint at `dst`, tensor by tensor.

    Peak memory is about one layer. The same call goes on where a killed conversion was.

    Args:
      src: a directory, or `hf://owner/name[@revision]` as in `load`: Hugging Face or Paddle (a
        model comes out), an fdq checkpoint of floats, or an Orbax checkpoint of yours, written by
        either of its APIs from an NNX state, Linen params or any tree (a tree comes out, in which
        lists have become dicts). Of the directory of a CheckpointManager, the last step is taken;
        the trees of a step that has several are below their names.
      dst: the directory to make.
      scheme: anything that `fdq.quantize` takes; None keeps the floats.
      dtype: of a model's tensors that are not quantized; by default that of the source.
      method: what chooses the codes, as in `fdq.quantize`.
      compat: as in `fdq.quantize`.
      calibration: as in `load`.
      config: makes a model of an Orbax checkpoint of an fdq model's tree: its
        `fdq.models.DecoderConfig`, what its config.json holds, or the path of config.json or of
        its directory, whose tokenizer is then copied.
      subtree: of an Orbax checkpoint, only what is below this dotted path (`params`).
      overwrite: replace an fdq checkpoint at `dst`.
      verbose: prints what was quantized, and what was left and why.
      progress: called after each tensor with (bytes done, bytes in all, path).

    Returns:
      An `fdq_checkpoints.Inspection`: the table of the new checkpoint, which prints itself.

    Raises:
      FileExistsError: `dst` exists.
      FileNotFoundError: `src` does not exist.
      fdq_checkpoints.CheckpointError: the source is refused, or the disk is too small. Nothing is
        left behind.
      ValueError: a dtype that models do not compute in.

    Examples:
      >>> fdq.convert("ERNIE-4.5-0.3B-PT", "ernie-w4a16c8", "W4A16C8")  # doctest: +SKIP
    """


@_from_checkpoints
def save(
    obj: Any,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    files: Iterable[str | os.PathLike[str]] = (),
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Saves a model, an NNX module of yours, or any pytree of arrays and QTensors.

    What was prepared for a device is saved in the canonical layout. PRNG keys are saved too. Of
    several processes (`jax.distributed`) all call this, with a path that all see: each gathers a
    tensor at a time, and process 0 writes.

    Args:
      obj: an fdq model (loads without anything else), or any `nnx.Module` or pytree (loads into
        a template, or as nested dicts). Modules around a model's layers (`nnx.LoRA`) and whatever
        else its config does not know are stored beside it: `load(path)` gives the model without
        them, `load(path, template=model)` all, `load(path + "/adapters")` them alone.
      path: the directory to make. It appears when it is complete, and not before.
      overwrite: replace an fdq checkpoint that is there.
      files: files to put beside the weights, such as tokenizer.json.
      provenance: JSON values to keep in fdq.json.

    Raises:
      FileExistsError: `path` exists.
      fdq_checkpoints.CheckpointError: a leaf is not an array, the disk is too small, or a model
        lacks a tensor that its config asks for.

    Examples:
      >>> fdq.save(model, "ernie-w4a16c8")  # doctest: +SKIP
    """


def export(
    model: Any,
    dst: str | os.PathLike[str],
    *,
    to: str,
    dtype: Any = None,
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Any:
    """Writes a model as transformers, vLLM and others load it, its codes repacked bit for bit.

    Nothing is quantized again: what the layout cannot hold exactly is refused before anything is
    written. Of a checkpoint about one tensor is in memory.

    Args:
      model: the path of an fdq checkpoint (or of anything else that fdq loads as a model), or an
        fdq model.
      dst: the directory to make, beside the checkpoint. It appears when it is complete.
      to: `"compressed-tensors"`, `"gptq"`, `"gptq_v2"`, `"awq"`, `"mxfp4"`, `"nvfp4"`,
        `"fp8"`, `"bitsandbytes"` (NF4), `"gguf"`, `"dense"` (decoded), or another of
        `fdq_checkpoints.export.EXPORTERS`.
      dtype: with `"dense"` `"float32"`, `"bfloat16"` or `"float16"` of what is decoded; by default
        that of the model.
      shard_bytes: the most bytes of tensors in one file.
      overwrite: replace an earlier export at `dst`.
      progress: called after each tensor with (bytes done, bytes in all, path).

    Returns:
      An `fdq_checkpoints.exporting.Exported`: path, bytes, what is stored how, and notes.

    Raises:
      FileExistsError: `dst` exists.
      FileNotFoundError: there is no such checkpoint.
      fdq_checkpoints.CheckpointError: a tensor that the layout cannot hold (the message names one
        that can), a damaged checkpoint, a disk that is too small. Nothing is left behind.
      ValueError: an unknown `to` or dtype.

    Examples:
      >>> fdq.export("qwen3-w4", "qwen3-gptq", to="gptq")  # doctest: +SKIP
    """
    from fdq_checkpoints import exporting

    return exporting.export(
        model,
        dst,
        to=to,
        dtype=dtype,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def save_lora(
    model: Any,
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters of a model as PEFT does: adapter_config.json, adapter_model.safetensors.

    PEFT, vLLM and others load them onto the original model; `load_lora` onto any of its layers'
    schemes. Adapters of an fdq model have the names of its family's published checkpoints, those
    of your own modules the paths of their layers. Of experts each has its own, as vLLM reads them;
    transformers 5, in which experts are no linear layers, does not take those.

    Args:
      model: what `fdq.lora` or `load_lora` made.
      path: the directory to make. It appears when it is complete, and not before.
      base: the name of the model that they are for, which PEFT's AutoPeftModel loads first.
      overwrite: replace adapters that are there.

    Raises:
      FileExistsError: `path` exists.
      ValueError: the model has no adapters.
      fdq_checkpoints.CheckpointError: PEFT has no place for one of them (experts that a family
        stores as one tensor); the disk is too small.

    Examples:
      >>> fdq.save_lora(tuned, "adapters", base="Qwen/Qwen3-0.6B")  # doctest: +SKIP
    """
    from fdq_checkpoints.peft import writing

    writing.save_lora(model, path, base=base, overwrite=overwrite)


def load_lora(model: Any, path: str | os.PathLike[str]) -> Any:
    """A new model with the adapters of a directory, which `save_lora` or PEFT wrote.

    Their dtype stays; `lora_dropout` does not count. See `fdq.lora` for what they do.

    Args:
      model: an fdq model or a module of yours, quantized or not, without adapters.
      path: the directory.

    Raises:
      FileNotFoundError: there is no such directory.
      fdq_checkpoints.CheckpointError: something else than plain LoRA of linear layers (DoRA,
        biases, trained embeddings ...), a layer that the model does not have, another shape.
      ValueError: the model has adapters already.

    Examples:
      >>> tuned = fdq.load_lora(fdq.load("Qwen3-0.6B", "W4A16C8"), "adapters")  # doctest: +SKIP
    """
    from fdq_checkpoints.peft import reading

    return reading.load_lora(model, path)
