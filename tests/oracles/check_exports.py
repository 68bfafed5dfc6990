"""Loads what `make_exports.py` exported with the code that owns the formats, and compares.

    python check_exports.py DIR              # every case that is there
    python check_exports.py DIR gptq-w4      # some

Three things are compared with the twin of floats (`<case>-dense`): the weights, decoded by the
class of compressed-tensors or bitsandbytes itself or read out of the model that was loaded; the
logits of transformers' model, inputs not rounded; and the twin's logits with those that fdq has.
Prints the largest differences, of the largest number; fails where one is larger than rounding in
the owner's code explains.
"""

import argparse
import json
import pathlib
import sys
import warnings

import numpy as np
import torch
import transformers
from safetensors import safe_open

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
LOGITS, BFLOAT16 = 5e-5, 2e-2
MODEL = transformers.AutoModelForCausalLM


def tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Of one forward pass, in float32."""
    with torch.no_grad():
        return model.eval()(torch.tensor(ids, dtype=torch.long)).logits.float().numpy()


def by_compressed_tensors(
    folder: pathlib.Path, said: dict, *, wide: bool
) -> dict[str, torch.Tensor]:
    """Weights by module, decoded by compressed-tensors' own classes, by its own matching of names.

    It multiplies in the dtype of the scales, if they are not made float32 first (`wide`).
    """
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import is_match

    config = QuantizationConfig.model_validate(said)
    stored = tensors(folder)
    modules = {
        n.rpartition(".")[0] for n in stored if n.endswith((".weight_packed", ".weight_scale"))
    }
    decoded = {}
    for path in sorted(modules):
        linear = torch.nn.Linear(1, 1)
        assert not is_match(path, linear, config.ignore or []), f"{path} is ignored and has codes"
        fitting = [s for s in config.config_groups.values() if is_match(path, linear, s.targets)]
        assert len(fitting) == 1, f"{path}: {len(fitting)} groups fit"
        names = [name for name in stored if name.startswith(path + ".")]
        own = {name.removeprefix(path + "."): stored[name] for name in names}
        if wide and own["weight_scale"].dtype in (torch.bfloat16, torch.float16):
            own["weight_scale"] = own["weight_scale"].float()
        kind = BaseCompressor.get_value_from_registry(fitting[0].format)
        decoded[path] = kind.decompress(own, fitting[0])["weight"].float()
    for name, tensor in stored.items():  # what has no codes must not be of a group
        path, _, end = name.rpartition(".")
        if end == "weight" and path not in modules and tensor.ndim == 2 and "embed" not in path:
            linear = torch.nn.Linear(1, 1)
            ignored = is_match(path, linear, config.ignore or [])
            groups = [s for s in config.config_groups.values() if is_match(path, linear, s.targets)]
            assert ignored or not groups, f"{path} has no codes and is not ignored"
    return decoded


def by_bitsandbytes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of a loaded model."""
    from bitsandbytes.functional import dequantize_4bit

    return {
        path: dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        for path, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }


def by_gptqmodel(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of a loaded model, before it is run."""
    return {
        path: module.dequantize_weight().T.float()
        for path, module in model.named_modules()
        if hasattr(module, "qzeros")
    }


def by_autoawq(folder: pathlib.Path, said: dict) -> dict[str, torch.Tensor]:
    """Weights by module, by compressed-tensors' reader of AutoAWQ's files, in float32."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert import AutoAWQConverter

    stored, decoded = tensors(folder), {}
    converter = AutoAWQConverter.from_autoawq_config(said)
    modules = {name.rpartition(".")[0] for name in stored if name.endswith(".qweight")}
    found = converter.process(stored)
    for path in sorted(modules):
        assert not any(part in path for part in said["modules_to_not_convert"] or ()), path
        shape = found[f"{path}.weight_shape"].tolist()
        codes = unpack_from_int32(found[f"{path}.weight_packed"], 4, torch.Size(shape)).float()
        scale = found[f"{path}.weight_scale"].float()
        zero = unpack_from_int32(
            found[f"{path}.weight_zero_point"], 4, scale.shape, packed_dim=0
        ).float()
        times = shape[1] // scale.shape[1]
        wide = [part.repeat_interleave(times, 1) for part in (scale, zero)]
        decoded[path] = (codes - wide[1]) * wide[0]
    return decoded


def load(folder: pathlib.Path, said: dict) -> torch.nn.Module:
    """By transformers; decoded where it can decode, so that inputs are not rounded."""
    method = said["quant_method"]
    options: dict = {"dtype": torch.float32}
    if method == "compressed-tensors":
        # It decodes models of one group while it loads them, others when they are run first.
        whole = len(said["config_groups"]) == 1
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=whole)
    elif method == "fp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    elif (
        method == "gptq" and "moe" in json.loads((folder / "config.json").read_text())["model_type"]
    ):
        # transformers leaves experts in GPTQ's layout at random; the layout's owner reads them.
        from gptqmodel import BACKEND, GPTQModel

        return GPTQModel.load(
            str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16
        ).model
    elif method in ("gptq", "awq"):
        options |= {"dtype": "auto", "device_map": "cpu"}
    elif method == "bitsandbytes":
        options["device_map"] = "cpu"
    return MODEL.from_pretrained(folder, **options)


def check(folder: pathlib.Path) -> tuple[str, bool]:
    """A line about one case, and whether all of it agrees."""
    twin = folder.with_name(folder.name + "-dense")
    wanted, given = tensors(twin), np.load(twin / "logits.npz")
    floats = MODEL.from_pretrained(twin, dtype=torch.float32)
    theirs = logits(floats, given["ids"])
    said, good = [], True

    def compare(what: str, difference: float, most: float) -> None:
        nonlocal good
        good &= bool(difference <= most)
        said.append(f"{what} {difference:.1e}" + ("" if difference <= most else " TOO MUCH"))

    compare("twin's logits", np.abs(theirs - given["logits"]).max(), LOGITS)
    config = json.loads((folder / "config.json").read_text())
    quantization = config.get("quantization_config")
    if quantization is None:
        return f"{folder.name}: {', '.join(said)}", good
    decoded, model = {}, None
    method = quantization["quant_method"]
    if method == "compressed-tensors":
        decoded = by_compressed_tensors(folder, quantization, wide=True)
        for path, weight in by_compressed_tensors(folder, quantization, wide=False).items():
            stored = floats.state_dict().get(f"{path}.weight")
            if stored is not None:  # experts are stacked
                stored.copy_(weight)
        if len(quantization["config_groups"]) == 1:  # or the model's own scales are float32
            theirs = logits(floats, given["ids"])
    try:
        model = load(folder, quantization)
    except Exception as error:
        said.append(f"transformers does not load it: {type(error).__name__}: {str(error)[:160]}")
    if model is not None and method == "bitsandbytes":
        decoded = by_bitsandbytes(model)
    elif model is not None and method == "gptq":
        decoded = by_gptqmodel(model)
    elif method == "awq":
        decoded = by_autoawq(folder, quantization)
    elif model is not None and method == "fp8":
        state = model.state_dict()
        decoded = {
            name.removesuffix(".weight"): state[name]
            for name in wanted
            if name.endswith("proj.weight") and name in state
        }
    coarse = any(name in folder.name for name in ("nvfp4", "bf16"))
    if decoded:
        relative = [
            (
                (weight - wanted[f"{path}.weight"]).abs().max()
                / wanted[f"{path}.weight"].abs().max()
            ).item()
            for path, weight in decoded.items()
        ]
        most = 8e-3 if coarse else 1e-3 if method == "gptq" else 2e-6
        compare(f"{len(decoded)} weights", max(relative), most)
    if model is not None:
        difference = np.abs(logits(model, given["ids"]) - theirs).max() / np.abs(theirs).max()
        # These compute in 16 bits, some with a kernel that has bfloat16 alone.
        short = coarse or method in ("gptq", "awq", "bitsandbytes")
        compare("logits", difference, BFLOAT16 if short else LOGITS)
    return f"{folder.name}: {', '.join(said)}", good and bool(decoded)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("cases", nargs="*")
    arguments = parser.parse_args()
    there = sorted(p.name.removesuffix("-dense") for p in arguments.folder.glob("*-dense"))
    failed = 0
    for one in arguments.cases or there:
        line, agrees = check(arguments.folder / one)
        failed += not agrees
        print(line, flush=True)
    sys.exit(bool(failed))
