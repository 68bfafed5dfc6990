"""Makes `quantized/<name>/` and `layers/<name>.safetensors` of MLX, HQQ, torchao and Gemma.

    python make_quantized_more.py           # all of them; needs requirements-more.txt
    python make_quantized_more.py mlx4      # some

As `make_quantized.py` does: tiny models and single layers that the owners' code quantized, and what
it decodes them to. A layer's file has the tensors of `layer`, the `decoded` weight and, in its
metadata, the `quantization_config`; decoded is in float32, which MLX and HQQ do when scales are.
"""

import argparse
import json
import pathlib
import shutil
import tempfile

import make_quantized
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

HERE = make_quantized.HERE
LAYERS = HERE.parent / "layers"
DOWN, KEPT = "down_proj", "model.layers.1.self_attn.o_proj"


def weight(n: int = 24, k: int = 128) -> torch.Tensor:
    """Of a layer; groups differ in size, and some have only one sign."""
    rng = np.random.default_rng(n * k)
    w = rng.standard_normal((n, k)) * np.exp2(rng.uniform(-3, 3, (n, 1)))
    w[:4] = abs(w[:4])
    return torch.from_numpy(w.astype(np.float32) * 0.05)


# MLX


def mlx_model(name: str, folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """By mlx-lm, from a model in bfloat16; some layers in 6 bits and one in floats."""
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    def choose(path: str, module: object) -> bool | dict[str, int]:
        if path == KEPT or not hasattr(module, "to_quantized"):
            return False
        return {"bits": 6, "group_size": 32} if path.endswith(DOWN) else True

    with tempfile.TemporaryDirectory() as source:
        make_quantized.floats().to(torch.bfloat16).save_pretrained(source)
        make_quantized.CONFIG.dtype = "float32"  # which saving has changed
        model, config = load_model(pathlib.Path(source))
        if name == "mlx4":
            model, config = quantize_model(model, config, 64, 4, quant_predicate=choose)
            config["quantization"][KEPT] = False  # as other versions say it
            config["quantization_config"] = config["quantization"]
        else:
            model, config = quantize_model(model, config, None, None, mode="nvfp4")
        save_model(folder, model)
        config["dtype"] = "float32"  # what fdq computes in: the logits are those of float32
        save_config(config, folder / "config.json")
    for extra in folder.glob("*.index.json"):
        extra.unlink()
    decoded = {}
    for path, module in model.named_modules():
        if hasattr(module, "scales"):
            biases = module.get("biases")
            decoded[path] = torch.from_numpy(np.array(mx.dequantize(
                module.weight,
                module.scales if biases is None else module.scales.astype(mx.float32),
                None if biases is None else biases.astype(mx.float32),
                group_size=module.group_size,
                bits=module.bits,
                mode=module.mode,
                dtype=mx.float32,
            )))  # fmt: skip
        elif path == KEPT:
            decoded[path] = torch.from_numpy(np.array(module.weight.astype(mx.float32)))
    return decoded


def mlx_layer(bits: int, group: int, mode: str = "affine", dtype: str = "float16") -> tuple:
    import mlx.core as mx

    settings = {"group_size": group, "bits": bits, "mode": mode}
    w = mx.array(weight().numpy())
    if mode == "affine":
        codes, scales, biases = mx.quantize(w.astype(getattr(mx, dtype)), **settings)
        wide = scales.astype(mx.float32), biases.astype(mx.float32)
        held = {"scales": scales, "biases": biases}
        decoded = mx.dequantize(codes, *wide, **settings)
    else:
        codes, scales = mx.quantize(w, **settings)
        held = {"scales": scales}
        decoded = mx.dequantize(codes, scales, None, dtype=mx.float32, **settings)
    tensors = {name: _torch(array) for name, array in held.items()}
    words = torch.from_numpy(np.array(codes).view(np.int32)).view(torch.uint32)
    config = {key: value for key, value in settings.items() if mode != "affine" or key != "mode"}
    return {"weight": words, **tensors}, torch.from_numpy(np.array(decoded)), config, {}


def _torch(array: object) -> torch.Tensor:
    import mlx.core as mx

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.astype(mx.float32))).to(torch.bfloat16)
    return torch.from_numpy(np.array(array))


# HQQ


def hqq_model(name: str, folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """By HQQ, with the config that transformers writes."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    model, config = make_quantized.floats(), BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    AutoHQQHFModel.quantize_model(
        model, quant_config=config, compute_dtype=torch.float32, device="cpu"
    )
    AutoHQQHFModel.save_to_safetensors(model, f"{folder}/")
    path = folder / "config.json"
    said = {"quant_config": config, "quant_method": "hqq", "skip_modules": ["lm_head"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    return {
        path: module.dequantize().float()
        for path, module in model.named_modules()
        if isinstance(module, HQQLinear)
    }


def hqq_layer(bits: int, group: int | None, axis: int = 1) -> tuple:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = torch.nn.Linear(128, 24, bias=False)
    linear.weight.data = weight()
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    held = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    tensors = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    # Decoded in float32 from the scales of float16 that are stored.
    held.meta |= {key: held.meta[key].float() for key in ("scale", "zero")}
    held.meta["compute_dtype"] = held.compute_dtype = torch.float32
    said = {"quant_config": config, "quant_method": "hqq", "skip_modules": ["lm_head"]}
    return tensors, held.dequantize().float(), said, {}


# torchao


def torchao_model(name: str, folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """By transformers."""
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
    )

    config = {
        "torchao_int4": lambda: IntxWeightOnlyConfig(
            weight_dtype=torch.int4,
            granularity=PerGroup(32),
            mapping_type=MappingType.ASYMMETRIC,
        ),
        "torchao_w8a8": Int8DynamicActivationInt8WeightConfig,
        "torchao_nvfp4": NVFP4WeightOnlyConfig,
    }[name]()
    with tempfile.TemporaryDirectory() as source:
        make_quantized.floats().save_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=transformers.TorchAoConfig(config),
            dtype=torch.float32,
        )
    model.save_pretrained(folder)
    return {
        path: module.weight.dequantize().float()
        for path, module in model.named_modules()
        if hasattr(getattr(module, "weight", None), "qdata")
    }


def torchao_layer(make: object) -> tuple:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    made = make(weight())
    stored, metadata = flatten_tensor_state_dict({"layer.weight": made})
    tensors = {name.removeprefix("layer."): tensor for name, tensor in stored.items()}
    said = {"quant_method": "torchao", "quant_type": {"default": {"mapping": "ASYMMETRIC"}}}
    if not getattr(made, "zero_point", torch.zeros(1)).any():
        said["quant_type"] = {"default": {"mapping": "SYMMETRIC"}}
    return tensors, made.dequantize().float(), said, metadata


def _quantized_by(config: object) -> object:
    def make(w: torch.Tensor) -> torch.Tensor:
        from torchao.quantization import quantize_

        linear = torch.nn.Linear(*reversed(w.shape), bias=False)
        linear.weight.data = w
        quantize_(linear, config())
        return linear.weight

    return make


def _torchao_layers() -> dict[str, object]:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization import (
        Float8Tensor,
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerBlock,
        PerGroup,
        PerTensor,
    )

    def intx(kind: torch.dtype, granularity: object, mapping: object) -> object:
        return _quantized_by(lambda: IntxWeightOnlyConfig(
            weight_dtype=kind, granularity=granularity, mapping_type=mapping
        ))  # fmt: skip

    return {
        "torchao-int8": _quantized_by(Int8WeightOnlyConfig),
        "torchao-int8-g32": _quantized_by(lambda: Int8WeightOnlyConfig(granularity=PerGroup(32))),
        "torchao-int8-tensor": _quantized_by(
            lambda: Int8WeightOnlyConfig(granularity=PerTensor())
        ),
        "torchao-int4-g64-asym": intx(torch.int4, PerGroup(64), MappingType.ASYMMETRIC),
        "torchao-int3": intx(torch.int3, PerAxis(0), MappingType.SYMMETRIC),
        "torchao-int2-g32-asym": intx(torch.int2, PerGroup(32), MappingType.ASYMMETRIC),
        "torchao-fp8": _quantized_by(Float8WeightOnlyConfig),
        "torchao-fp8-tensor": lambda w: Float8Tensor.from_hp(w, granularity=PerTensor()),
        "torchao-fp8-block": lambda w: Float8Tensor.from_hp(
            w[:16], granularity=PerBlock([16, 64])
        ),
        "torchao-mxfp4": lambda w: MXTensor.to_mx(
            w, torch.float4_e2m1fn_x2, 32, is_swizzled_scales=True
        ),
        "torchao-mxfp8": lambda w: MXTensor.to_mx(w, torch.float8_e4m3fn, 32),
        "torchao-nvfp4": lambda w: NVFP4Tensor.to_nvfp4(w),
        "torchao-nvfp4-whole": lambda w: NVFP4Tensor.to_nvfp4(
            torch.cat([w] * 6), per_tensor_scale=torch.tensor(0.003), is_swizzled_scales=True
        ),
    }  # fmt: skip


# Gemma


def gemma_model(name: str, folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """A Llama with the layers that transformers gives Gemma's releases."""
    from transformers.integrations.gemma_quant import replace_with_quant_layers
    from transformers.utils.quantization_config import GemmaQuantizationConfig

    config = GemmaQuantizationConfig(
        num_bits=4,
        quantize_embeddings=True,
        module_quant_configs={"down_proj": {"num_bits": 8}, r"layers\.1\.mlp": {"num_bits": 2}},
        modules_to_not_convert=["lm_head"],
    )
    model, source = make_quantized.floats(), make_quantized.floats()
    replace_with_quant_layers(model, config, ["lm_head"])
    decoded = {}
    for path, module in model.named_modules():
        if not hasattr(module, "num_bits"):
            continue
        bits, w = module.num_bits, source.get_submodule(path).weight.data
        scale = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        levels = torch.clamp(torch.round(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes = levels.to(torch.int8)
        if bits < 8:
            each = 8 // bits
            parts = (levels.to(torch.int64) + 2 ** (bits - 1)).reshape(len(w), -1, each)
            shifts = bits * torch.arange(each)
            codes = (parts << shifts).sum(-1).to(torch.uint8)
        is_table = hasattr(module, "embedding_quantized")
        (module.embedding_quantized if is_table else module.weight).data = codes
        (module.embedding_scale if is_table else module.weight_scale).data = scale
        decoded[path] = module.weight if is_table else module._dequantize_weights()
    model.save_pretrained(folder)
    path = folder / "config.json"
    said = {"quantization_config": config.to_dict()}
    path.write_text(json.dumps(json.loads(path.read_text()) | said, default=str))
    return {path: one.float() for path, one in decoded.items()}


MODELS = {
    "mlx4": mlx_model,
    "mlx_nvfp4": mlx_model,
    "hqq4": hqq_model,
    "torchao_int4": torchao_model,
    "torchao_w8a8": torchao_model,
    "torchao_nvfp4": torchao_model,
    "gemma": gemma_model,
}


def layers() -> dict[str, object]:
    """By name, what makes a layer."""
    mlx = {
        **{f"mlx-{bits}-g{group}": (bits, group) for bits, group in (
            (2, 32), (3, 64), (4, 128), (4, 32), (5, 64), (6, 32), (8, 64)
        )},
        "mlx-mxfp4": (4, 32, "mxfp4"),
        "mlx-mxfp8": (8, 32, "mxfp8"),
        "mlx-nvfp4": (4, 16, "nvfp4"),
        "mlx-4-g64-bf16": (4, 64, "affine", "bfloat16"),
        "mlx-3-g32-f32": (3, 32, "affine", "float32"),
    }  # fmt: skip
    hqq = {
        "hqq-8-g64": (8, 64),
        "hqq-4-g32": (4, 32),
        "hqq-3-g64": (3, 64),
        "hqq-2-g16": (2, 16),
        "hqq-4": (4, None),
        "hqq-4-g32-axis0": (4, 32, 0),
    }
    return {
        **{name: lambda a=a: mlx_layer(*a) for name, a in mlx.items()},
        **{name: lambda a=a: hqq_layer(*a) for name, a in hqq.items()},
        **{name: lambda m=m: torchao_layer(m) for name, m in _torchao_layers().items()},
    }


def make(name: str) -> None:
    """Writes one model or layer and what is expected of it."""
    if name in MODELS:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        decoded = MODELS[name](name, folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "expected.npz", **make_quantized.expected(decoded))
        make_quantized.check(name)
        return
    tensors, decoded, config, metadata = layers()[name]()
    LAYERS.mkdir(exist_ok=True)
    held = {f"layer.{end}": tensor.contiguous() for end, tensor in tensors.items()}
    file = LAYERS / f"{name}.safetensors"
    said = {"quantization_config": json.dumps(config)} | metadata
    save_file(held | {"decoded": decoded.contiguous()}, file, said)
    assert torch.isfinite(decoded).all()
    print(f"{name}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    for one in parser.parse_args().names or (*MODELS, *layers()):
        make(one)
