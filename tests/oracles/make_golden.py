"""A golden checkpoint of the format as it is now: what every later version must read the same.

    python -m tests.oracles.make_golden /golden/v1_checksums    # then moved to tests/oracles/golden

It is made once for each change of the format, and never again: see `tests/checkpoints/test_golden`.
Orbax notes where it wrote, so that is a directory like any other's.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import fdq
from fdq.formats import FORMATS
from fdq.quantizers import quantize_array
from fdq.schemes.scheme import WeightSpec

GOLDEN = pathlib.Path(__file__).with_name("golden")
SPECS = (
    *("W8", "W8-g64", "W4", "W4-g64-asym", "W3-g64", "W2-g64", "WNF4", "WNF4-dq", "Wfp8"),
    *("Wfp8-b128", "WMXFP4", "WMXFP8", "WNVFP4", "WCC2"),
)


def main(folder: pathlib.Path) -> None:
    """Writes the tree, what its weights decode to, and a model of two layers."""
    rng = np.random.default_rng(2026)
    folder.mkdir(parents=True)
    tree, decoded = {}, {}
    for text in SPECS:
        spec = WeightSpec.parse(text)
        w = (0.05 * rng.standard_normal((256, 16))).astype(np.float32)
        q = quantize_array(w, spec, method=None if text == "WCC2" else "absmax")
        tree[text], decoded[text] = q, np.asarray(fdq.dequantize(q))
    stack = rng.standard_normal((3, 128, 16)).astype(np.float32)
    tree["stack"] = quantize_array(stack, WeightSpec.parse("W4"), method="absmax")
    decoded["stack"] = np.asarray(fdq.dequantize(tree["stack"]))
    plain = {
        "float32": rng.standard_normal((3, 5)).astype(np.float32),
        "int32": rng.integers(-9, 9, (4,)).astype(np.int32),
        "bool": np.array([True, False]),
        "empty": np.empty((0, 4), np.float32),
        "scalar": np.float32(0.5).reshape(()),
    }
    tree["plain"] = plain | {"bfloat16": jnp.asarray(plain["float32"], jnp.bfloat16)}
    tree["key"] = jax.random.key(7)
    fdq.save(tree, folder / "tree")
    np.savez(folder / "expected.npz", **decoded, **{f"plain.{k}": v for k, v in plain.items()})
    source = GOLDEN.parent / "models" / "qwen3"
    fdq.convert(source, folder / "model", "W4A8C8-g16")
    tokens = jnp.array([[1, 5, 9, 2, 8, 3]])
    np.save(folder / "logits.npy", np.asarray(fdq.load(folder / "model")(tokens)))
    assert set(FORMATS) >= {WeightSpec.parse(text).format for text in SPECS}


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
