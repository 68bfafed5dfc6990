"""Makes `formats/paddle.npz`: WINT8 and WINT4 as Paddle's `weight_quantize` encodes them on CPU.

    python make_paddle.py            # make and verify
    python make_paddle.py --check    # only verify what is there

Paddle returns its codes in the layout of a GPU kernel. `logical_codes` undoes that layout; the
check compares the result with the rounding rule, so a wrong permutation cannot pass.
"""

import argparse
import json
import pathlib

import ml_dtypes
import numpy as np

PATH = pathlib.Path(__file__).resolve().parent / "formats" / "paddle.npz"
ARCH = 80
BOUND = {"int8": 127, "int4": 7}
FLOATS = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}
WEIGHTS = {"normal": ("int8", "int4"), "ties_int8": ("int8",), "ties_int4": ("int4",)}
NOTES = {
    "<weight>/<float>/w": "[k, n] uint16, bits of the bfloat16 or float16 weight given to Paddle",
    "<weight>/<float>/<type>_g<group>/raw": "int8 buffer as returned: [n, k] or [n/2, k]",
    "<weight>/<float>/<type>_g<group>/codes": "[k, n] int8, logical codes, layout undone",
    "<weight>/<float>/<type>_g<group>/scale": "[ceil(k/group), n] uint16, bits of the scale",
    "group": "-1 is one scale per column; llm_int8 has float32 scales and the plain [n, k] layout",
    "zero column": "column 0 of `normal`: scale 0 and codes +127 or -7, which decode to 0",
}


def weights(name: str) -> np.ndarray:
    """[k, n] float32; the `ties` matrices hold w / scale = j + 1/2 exactly."""
    rng = np.random.default_rng(sum(name.encode()))
    if name == "normal":  # k=192 leaves half a group of 128
        w = rng.standard_normal((192, 32)) * np.exp2(rng.integers(-8, 3, (1, 32)))
        w[:, 0] = 0
    else:
        bound = BOUND[name.removeprefix("ties_")]
        w = rng.integers(-bound, bound, (128, 16)) + 0.5
        w[::64] = bound  # the maximum of every group, so that every scale is a power of two
        w *= np.exp2(rng.integers(-10, 1, (1, 16)))
    return w.astype(np.float32)


def logical_codes(raw: np.ndarray, k: int, n: int, kind: str) -> np.ndarray:
    """Undoes the layout of Paddle's mixed GEMM (arch 75 to 90): [k, n] int8 codes.

    Forward it is: permute rows within 16 (int8) or 32 (int4), transpose, interleave 2 or 4
    columns per 64 rows, add 128 or 8, then swap bytes 1 and 2 of four, or order nibbles 02461357.
    """
    if kind == "int8":
        flat = raw.view(np.uint8).reshape(-1, 4)[:, [0, 2, 1, 3]]
        columns, bias, tile, register = 2, 128, 16, 4
    else:
        data = raw.view(np.uint8).reshape(-1)
        flat = np.stack([data & 15, data >> 4], axis=-1).reshape(-1, 8)
        flat = flat[:, np.argsort([0, 2, 4, 6, 1, 3, 5, 7])]
        columns, bias, tile, register = 4, 8, 32, 8
    codes = flat.astype(np.int16).reshape(n // columns, k // 64, columns, 64) - bias
    codes = codes.transpose(0, 2, 1, 3).reshape(n, k // tile, tile)
    row = np.arange(tile)
    source = 8 * (row % register // 2) + row % 2 + 2 * (row // register)
    return codes[:, :, np.argsort(source)].reshape(n, k).T.astype(np.int8)


def groups_of(k: int, group: int) -> np.ndarray:
    """[k] index of the scale of each row."""
    return np.arange(k) // (k if group == -1 else group)


def rule(w: np.ndarray, group: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The rounding rule in NumPy: scale rounded to the weight's dtype, then half away from zero."""
    index, magnitude = groups_of(len(w), group), np.abs(w.astype(np.float32))
    peak = np.stack([magnitude[index == g].max(axis=0) for g in range(index[-1] + 1)])
    scale = (peak / np.float32(BOUND[kind])).astype(w.dtype)
    with np.errstate(invalid="ignore"):
        ratio = magnitude / scale.astype(np.float32)[index]
    codes = np.sign(w.astype(np.float32)) * np.floor(ratio + np.float32(0.5))
    return np.clip(codes, -BOUND[kind], BOUND[kind]), scale


def make() -> None:
    """Runs Paddle over every case and writes `formats/paddle.npz`."""
    import paddle
    from paddle.nn.quant import weight_quantize

    arrays = {}
    for name, kinds in WEIGHTS.items():
        for short, dtype in FLOATS.items():
            w = weights(name).astype(dtype)
            k, n = w.shape
            arrays[f"{name}/{short}/w"] = w.view(np.uint16)
            paddle_dtype = {"bf16": "bfloat16", "fp16": "float16"}[short]
            x = paddle.to_tensor(w.astype(np.float32)).cast(paddle_dtype)
            for kind in kinds:
                for group in (-1, 64, 128):
                    case = f"{name}/{short}/{kind}_g{group}"
                    raw, scale = weight_quantize(
                        x, algo=f"weight_only_{kind}", arch=ARCH, group_size=group
                    )
                    scale = scale.cast("float32").numpy().reshape(-1, n).astype(dtype)
                    arrays[f"{case}/raw"] = raw.numpy()
                    arrays[f"{case}/codes"] = logical_codes(raw.numpy(), k, n, kind)
                    arrays[f"{case}/scale"] = scale.view(np.uint16)
            if name == "normal":
                raw, scale = weight_quantize(x[:, 1:17], algo="llm.int8", arch=ARCH)
                arrays[f"{name}/{short}/llm_int8/raw"] = raw.numpy()  # columns 1 to 16 only
                arrays[f"{name}/{short}/llm_int8/codes"] = raw.numpy().T
                arrays[f"{name}/{short}/llm_int8/scale"] = scale.numpy().reshape(1, -1)
    about = {"made_by": f"paddlepaddle {paddle.__version__} CPU, arch={ARCH}", "keys": NOTES}
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, description=np.array(json.dumps(about)), **arrays)


def check() -> None:
    """Reloads `formats/paddle.npz` and compares it with the rule and with the weights."""
    arrays = dict(np.load(PATH))
    about = json.loads(str(arrays.pop("description")))
    ties = 0
    for case in sorted({k.rpartition("/")[0] for k in arrays if k.endswith("codes")}):
        name, short, kind = case.split("/")
        w = arrays[f"{name}/{short}/w"].view(FLOATS[short])
        codes, scale = arrays[f"{case}/codes"], arrays[f"{case}/scale"]
        if kind == "llm_int8":
            w = w[:, 1:17].astype(np.float32)
            index, live = groups_of(len(w), -1), slice(None)
            want, want_scale = rule(w, -1, "int8")
        else:
            kind, _, group = kind.partition("_g")
            index, live = groups_of(len(w), int(group)), np.abs(w.astype(np.float32)).max(0) > 0
            want, want_scale = rule(w, int(group), kind)
            scale = scale.view(FLOATS[short])
            assert np.array_equal(
                logical_codes(arrays[f"{case}/raw"], *w.shape, kind), arrays[f"{case}/codes"]
            )
        np.testing.assert_array_equal(codes[:, live], want[:, live], err_msg=case)
        np.testing.assert_array_equal(scale, want_scale, err_msg=case)
        step, x = scale.astype(np.float32)[index], w.astype(np.float32)
        slack = 0.5 + (BOUND[kind.removeprefix("llm_")]) * 2.0**-8  # the scale itself is rounded
        assert (np.abs(codes * step - x) <= slack * step).all(), case
        if name.startswith("ties"):
            half = np.abs(x / step) % 1 == 0.5
            ties += half.sum()
            np.testing.assert_array_equal(np.abs(codes[half]), np.abs(x / step)[half] + 0.5)
    assert ties > 1000
    print(f"{PATH.name}: {about['made_by']}, {len(arrays)} arrays, {PATH.stat().st_size} bytes, ok")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        make()
    check()
