"""The instructions that decode on a GPU, compiled and then run in NumPy."""

import re

import decode_programs
import jax.numpy as jnp
import numpy as np
import pytest
from compiling_program import printed
from covering import slow
from jax import lax
from ptx_machine import Machine

from fdq.formats import FORMATS
from fdq.formats.convolutional import SHIFTS
from pallas_kernels.aot.ahead_of_time import unavailable
from pallas_kernels.weights.formats import WORD_FORMATS

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

COLUMNS = decode_programs.COLUMNS


@pytest.fixture(scope="module", params=[slow("t4"), slow("h200")])
def ptx(request, tmp_path_factory) -> dict[str, str]:
    """PTX of the decoding kernel of each format."""
    directory = tmp_path_factory.mktemp(request.param)
    printed("decode_programs.py", request.param, directory, *WORD_FORMATS)
    return {name: (directory / f"{name}.ptx").read_text() for name in WORD_FORMATS}


def run(ptx: dict[str, str], name: str, words: np.ndarray, *constants: np.ndarray) -> np.ndarray:
    """float64 rows of one unit `[rows, 512]`, bias applied."""
    format = WORD_FORMATS[name]
    out = np.zeros((format.rows, COLUMNS), np.float32)
    parameters = [np.ascontiguousarray(a) for a in (words, *constants)]
    Machine([*parameters, out]).run(ptx[name])
    powers = np.asarray(format.exponents(False)) + format.exponent(False)
    return np.ldexp(out.astype(np.float64), powers[:, None]) - format.bias("none")


def stream(rng, name: str) -> np.ndarray:
    """Canonical bytes of one unit of 512 columns; all codes are there, no NaN."""
    stored = rng.permuted(np.arange(4 * WORD_FORMATS[name].words * COLUMNS) % 256)
    if "e4m3" in name or name == "mxfp8":
        stored[(stored & 0x7F) == 0x7F] = 0
    if "e5m2" in name:
        stored[(stored & 0x7F) >= 0x7C] = 0
    return stored.reshape(-1, COLUMNS).astype(np.uint8)


def unpacked(stored: np.ndarray, bits: int) -> np.ndarray:
    """Codes of a little-endian bit stream of each column."""
    flags = np.unpackbits(stored, axis=0, bitorder="little")
    codes = flags.reshape(-1, bits, stored.shape[-1]).astype(np.int64)
    return np.sum(codes << np.arange(bits)[:, None], axis=1)


@pytest.mark.parametrize("name", sorted(set(WORD_FORMATS) - {"cc2"}))
def test_compiled_instructions_decode_to_the_meaning(ptx, name, rng):
    format = WORD_FORMATS[name]
    stored = stream(rng, name)
    words = np.asarray(format.pack(jnp.asarray(stored)))
    codes = unpacked(stored, 32 * format.words // format.rows)
    if name.startswith("int"):
        expected = codes - format.bias("none")
    else:
        stored_codes = jnp.asarray(codes.astype(np.uint8))
        if format.rows == 4:
            kind = jnp.float8_e5m2 if name.endswith("e5m2") else jnp.float8_e4m3fn
            stored_codes = lax.bitcast_convert_type(stored_codes, kind)
        expected = np.asarray(FORMATS[name].from_codes(stored_codes, None, None), np.float64)
    np.testing.assert_array_equal(run(ptx, name, words), expected)


@pytest.mark.parametrize("kind", ["any", "ties"])
def test_compiled_instructions_round_cc2_as_its_definition(ptx, kind, rng):
    shape = (1, COLUMNS)
    scale, offset = rng.uniform(40, 128.4, shape), rng.uniform(-500, 3000, shape)
    if kind == "ties":
        scale, offset = np.round(4 * scale) / 4, np.round(2 * offset) / 2
    scale, offset = scale.astype(np.float32), offset.astype(np.float32)
    stored = stream(rng, "cc2")
    words = np.asarray(WORD_FORMATS["cc2"].pack(jnp.asarray(stored)))
    state = np.floor(stored.astype(np.float32) * scale + offset + np.float32(0.5)).astype(int)
    expected = np.stack([(state >> s & 63) - 32 for s in SHIFTS], axis=1).reshape(16, COLUMNS)
    np.testing.assert_array_equal(run(ptx, "cc2", words, scale, offset), expected)


@pytest.mark.parametrize("name", sorted(WORD_FORMATS))
def test_no_instruction_flushes_subnormals(ptx, name):
    """Linear bits are subnormal float32 numbers; a flag of the compiler could flush them."""
    assert not re.search(r"\.ftz\b", ptx[name])
