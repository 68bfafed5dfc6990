"""Makes `quantized/<name>/`: tiny models quantized and saved by the code that owns the format.

    python make_quantized.py                # all of them
    python make_quantized.py nf4            # some; gptq_order needs requirements-gptq.txt
    python make_quantized.py --check        # only reload and verify what is there

Beside each checkpoint stands `expected.npz`: what the owner's code decodes two layers to, and the
logits of a float model with all its weights decoded so.
"""

import argparse
import os
import pathlib
import shutil
import warnings

import numpy as np
import torch
import transformers
from safetensors import safe_open

warnings.filterwarnings("ignore")
HERE = pathlib.Path(__file__).resolve().parent / "quantized"
CONFIG = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    attn_implementation="eager",
)
IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(7))
SHOWN = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")

INT = {"type": "int", "symmetric": True}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN = {"strategy": "token", "dynamic": True}
TENSOR = {"strategy": "tensor", "dynamic": False}
# weights and inputs of a compressed-tensors scheme
COMPRESSED = {
    "w4": (INT | {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "w4_asym": (
        INT | {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        None,
    ),
    "w3": (INT | {"num_bits": 3, "strategy": "group", "group_size": 64}, None),
    "w6": (INT | {"num_bits": 6, "strategy": "group", "group_size": 32}, None),
    "w5_asym": (
        INT | {"num_bits": 5, "strategy": "group", "group_size": 64, "symmetric": False},
        None,
    ),
    "w8": (INT | {"num_bits": 8, "strategy": "channel"}, None),
    "w8a8": (
        INT | {"num_bits": 8, "strategy": "channel"},
        INT | {"num_bits": 8} | TOKEN,
    ),
    "w8a8_static": (
        INT | {"num_bits": 8, "strategy": "channel"},
        INT | {"num_bits": 8} | TENSOR,
    ),
    "fp8": (FLOAT | {"strategy": "channel"}, FLOAT | TOKEN),
    "fp8_static": (FLOAT | {"strategy": "tensor"}, FLOAT | TENSOR),
    "fp8_block": (FLOAT | {"strategy": "block", "block_structure": [128, 128]}, None),
    "nvfp4": (
        FLOAT | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16},
        None,
    ),
}
BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_twice": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
GPTQ = {
    "gptq_order": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": True,
        "checkpoint_format": "gptq",
        "lm_head": True,
        "dynamic": {
            "+:.*down_proj.*": {"bits": 8, "group_size": 64},
            "lm_head": {"bits": 8, "desc_act": False},
            r"-:.*\.1\.self_attn\.o_proj": {},
        },
    }
}
MAKERS = dict.fromkeys(COMPRESSED, "compressed") | dict.fromkeys(BITSANDBYTES, "bitsandbytes")
MAKERS |= dict.fromkeys(GPTQ, "gptq")
INPUT_SCALE = 0.02


def floats(seed: int = 0) -> transformers.LlamaForCausalLM:
    """The same random model each time."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(CONFIG).to(torch.float32).eval()


def _ranges(weight: torch.Tensor, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight of what shares a scale."""
    strategy = getattr(args.strategy, "value", args.strategy)
    if strategy in ("group", "tensor_group"):
        parts = weight.reshape(len(weight), -1, args.group_size)
        return parts.amin(-1), parts.amax(-1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "block":
        rows, columns = args.block_structure
        missing = (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        whole = torch.nn.functional.pad(weight, missing)
        parts = whole.reshape(whole.shape[0] // rows, rows, whole.shape[1] // columns, columns)
        return parts.amin((1, 3)), parts.amax((1, 3))
    return weight.amin().reshape(1), weight.amax().reshape(1)


def compressed(name: str, folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """Saves a model by compressed-tensors; its decoded weights by module."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    weights, inputs = COMPRESSED[name]
    model = floats()
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    schemes = {}
    for path, module in model.named_modules():
        if not hasattr(module, "weight_scale"):
            continue
        schemes[path] = module.quantization_scheme
        args, whole = module.quantization_scheme.weights, None
        low, high = _ranges(module.weight.data, args)
        if hasattr(module, "weight_global_scale"):
            whole = (448 * 6 / module.weight.abs().max()).reshape(1).detach()
            module.weight_global_scale.data = whole
        scale, zero = calculate_qparams(low, high, args, global_scale=whole)
        for key, value in (("weight_scale", scale), ("weight_zero_point", zero)):
            if hasattr(module, key):
                old = getattr(module, key).data
                getattr(module, key).data = value.reshape(old.shape).to(old.dtype)
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(INPUT_SCALE)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    decoded = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for path, scheme in schemes.items():
            names = [name for name in file.keys() if name.startswith(path + ".")]  # noqa: SIM118
            ends = [name.removeprefix(path + ".") for name in names]
            stored = {end: file.get_tensor(f"{path}.{end}") for end in ends}
            kind = BaseCompressor.get_value_from_registry(scheme.format)
            decoded[path] = kind.decompress(stored, scheme)["weight"].float()
    return decoded


def bitsandbytes(name: str, folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """Saves a model by transformers with bitsandbytes; its decoded weights by module."""
    from bitsandbytes.functional import dequantize_4bit

    source = folder.with_name(folder.name + "-floats")
    floats().save_pretrained(source)
    config = transformers.BitsAndBytesConfig(**BITSANDBYTES[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    shutil.rmtree(source)
    model.save_pretrained(folder)
    decoded = {}
    for path, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            decoded[path] = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        elif type(module).__name__ == "Linear8bitLt":
            decoded[path] = module.weight.CB.float() * module.weight.SCB[:, None] / 127
    return decoded


def gptq(name: str, folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """Packs a model by gptqmodel, rows in an order; its decoded weights by module.

    `dynamic` gives some layers other bits and groups, one stays in floats, the head is quantized.
    """
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # do not compile anything
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import dynamic_get
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
    from safetensors.torch import save_file

    model, config = floats(), GPTQ[name]
    state, decoded = dict(model.state_dict()), {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if dynamic_get(config["dynamic"], path) is False:
            continue
        settings = {
            key: dynamic_get(config["dynamic"], path, key, config[key])
            for key in ("bits", "group_size", "sym", "desc_act")
        }
        bits, rows = settings["bits"], module.in_features
        group = rows if settings["group_size"] == -1 else settings["group_size"]
        g_idx = torch.arange(rows) // group
        if settings["desc_act"]:  # one order for all layers of an input
            generator = torch.Generator().manual_seed(rows + ("o_proj" in path))
            g_idx = g_idx[torch.randperm(rows, generator=generator)]
        parts = module.weight.data[:, torch.argsort(g_idx, stable=True)]
        parts = parts.reshape(len(parts), -1, group)
        scale = (parts.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).half().float()
        zero = torch.full_like(scale, 2 ** (bits - 1))
        linear = TorchLinear(
            *(bits, settings["group_size"], settings["sym"], settings["desc_act"]),
            *(rows, module.out_features),
            bias=False,
        )
        linear.pack_block(module, scale, zero, g_idx.to(torch.int32))
        linear.post_init()
        stored, linear.scales = linear.scales, linear.scales.float()
        decoded[path] = linear.dequantize_weight().float().T.contiguous()
        convert_gptq_v2_to_v1_format_module(linear, linear)  # it reads bits, pack_dtype
        del state[f"{path}.weight"]
        state |= {f"{path}.{key}": getattr(linear, key) for key in ("qweight", "qzeros", "g_idx")}
        state[f"{path}.scales"] = stored
    model.config.quantization_config = config
    model.config.save_pretrained(folder)
    tensors = {key: value.contiguous() for key, value in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return decoded


def _with(decoded: dict[str, torch.Tensor]) -> transformers.LlamaForCausalLM:
    """The float model with decoded weights in it."""
    model = floats()
    for path, weight in decoded.items():
        module = model.get_submodule(path)
        assert module.weight.shape == weight.shape
        module.weight.data = weight
    return model


def expected(decoded: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Two decoded layers, and the logits of a float model with all of them."""
    with torch.no_grad():
        logits = _with(decoded)(IDS).logits
    shown = {path: decoded[path].numpy() for path in SHOWN}
    return shown | {"ids": IDS.numpy(), "logits": logits.numpy()}


def make(name: str) -> None:
    """Writes one checkpoint and what is expected of it."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    decoded = globals()[MAKERS[name]](name, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "expected.npz", **expected(decoded))
    check(name)


def check(name: str) -> None:
    """The codes are there and the logits are those of the decoded weights, not of the originals."""
    found = np.load(HERE / name / "expected.npz")
    with torch.no_grad():
        original = floats()(IDS).logits.numpy()
    assert np.isfinite(found["logits"]).all()
    assert not np.array_equal(found["logits"], original)
    print(f"{name}: {sum(file.stat().st_size for file in (HERE / name).iterdir()):,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    for one in arguments.names or MAKERS:
        (check if arguments.check else make)(one)
