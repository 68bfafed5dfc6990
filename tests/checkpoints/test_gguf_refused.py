"""GGUF files that are damaged, hostile or unknown: each is refused in one line."""

import struct
import time

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from fdq_checkpoints import CheckpointError, load
from fdq_checkpoints.readers.gguf_reader import GgufFile
from tests.checkpoints import gguf_files


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def file_of(*, version=3, values=(), tensors=(), counts=None, data=b""):
    """A file of keys with packed values and of packed infos."""
    counts = counts or (len(tensors), len(values))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    head += b"".join(string(key) + value for key, value in values) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def info(name="a", dims=(32,), kind=0, offset=0):
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return string(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def array_of(kind, count, content=b""):
    return struct.pack("<IIQ", 9, kind, count) + content


DEEP = array_of(9, 1) + b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000))
HOSTILE = {
    "version 1": (file_of(version=1), "GGUF of version 1"),
    "big-endian": (file_of(version=3 << 24), "GGUF of big-endian"),
    "too many tensors": (file_of(counts=(2**63, 0)), "tensors and 0 values of metadata, more"),
    "too many values": (file_of(counts=(0, 2**63)), "values of metadata, more than"),
    "fewer than said": (file_of(counts=(3, 0)), "the name of a tensor is '', expected printable"),
    "a long string": (file_of(values=[("a", struct.pack("<IQ", 8, 2**60))]), "a string of 115"),
    "a string past the end": (file_of(values=[("a", struct.pack("<IQ", 8, 999))]), "truncated"),
    "no UTF-8": (file_of(values=[("a", struct.pack("<IQ", 8, 2) + b"\xff\xff")]), "not UTF-8"),
    "an unknown type": (
        file_of(values=[("a", struct.pack("<I", 13))]),
        "type 13, which is unknown",
    ),
    "a large array": (file_of(values=[("a", array_of(10, 2**61))]), "truncated"),
    "many strings": (file_of(values=[("a", array_of(8, 2**61))]), "too many entries"),
    "an array of unknowns": (file_of(values=[("a", array_of(99, 1))]), "an array of type 99"),
    "arrays in arrays": (file_of(values=[("a", DEEP)]), "arrays in arrays, too deep"),
    "a boolean of 2": (file_of(values=[("a", struct.pack("<IB", 7, 2))]), "a boolean of 2"),
    "a key twice": (file_of(values=[("a", struct.pack("<IB", 0, 2))] * 2), "'a' is there twice"),
    "an odd alignment": (
        file_of(values=[("general.alignment", struct.pack("<II", 4, 3))]),
        "general.alignment = 3 is not a power of two",
    ),
    "a tensor twice": (file_of(tensors=[info()] * 2, data=bytes(256)), "'a' is there twice"),
    "a path as a name": (file_of(tensors=[info("../a")]), "expected printable characters"),
    "many dimensions": (file_of(tensors=[info(dims=(1,) * 9)]), "9 dimensions"),
    "no dimension": (file_of(tensors=[info(dims=())]), "0 dimensions"),
    "a size of 0": (file_of(tensors=[info(dims=(0,))]), "not one of sizes"),
    "a huge size": (file_of(tensors=[info(dims=(2**62, 2**62))]), "not one of sizes"),
    "an unknown type of tensor": (file_of(tensors=[info(kind=4)]), "type 4 is unknown"),
    "half a block": (file_of(tensors=[info(kind=8, dims=(33,))]), "not whole blocks of Q8_0"),
    "past the end": (file_of(tensors=[info()], data=bytes(100)), "truncated: it ends at byte"),
    "far past the end": (file_of(tensors=[info(offset=2**62)]), "truncated"),
    "over another": (
        file_of(tensors=[info(), info("b", offset=32)], data=bytes(256)),
        "'b': its bytes overlap another's",
    ),
    "not aligned": (file_of(tensors=[info(offset=4)], data=bytes(256)), "offset 4 is not aligned"),
    "no metadata": (file_of(), "metadata general.architecture = None, expected a string"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_and_hostile_files_are_refused_in_one_line(case, tmp_path):
    content, message = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as raised:
        load(path)
    assert time.perf_counter() - started < 2
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_every_cut_of_a_file_is_refused(tmp_path):
    path, whole = tmp_path / "model.gguf", (gguf_files.ORACLES / "llama_k.gguf").read_bytes()
    for size in (*range(0, 2000, 37), len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated|not GGUF"):
            GgufFile(path)


WRONG = {
    "general.architecture": ("gemma3", "architecture 'gemma3' is not supported; .* llama, qwen2"),
    "general.type": ("adapter", "general.type = 'adapter', expected a model"),
    "llama.block_count": (
        3,
        r"'blk.2.attn_norm.weight' are .* and missing, expected .* all of 3 la",
    ),
    "llama.attention.head_count": (0, "head_count = 0, expected a whole number of at least 1"),
    "llama.attention.value_length": (32, "value_length = 32, expected 64"),
    "llama.expert_count": (8, "llama.expert_count = 8, expected 0"),
    "llama.logit_scale": (2.0, "'llama.logit_scale' = 2.0 is not known to fdq, and may change"),
    "llama.rope.scaling.type": ("ntk", "rope.scaling.type = 'ntk', expected none, linear"),
    "llama.embedding_length": (128, "expected rows of 128 in all of 1 layers"),
    "llama.feed_forward_length": (
        2**31 - 1,
        "intermediate_size = 2147483647 is not a whole number",
    ),
}


@pytest.mark.parametrize("key", WRONG)
def test_metadata_that_fdq_does_not_know_is_refused(key, tmp_path):
    value, message = WRONG[key]
    path = tmp_path / "model.gguf"
    gguf_files.rewritten(gguf_files.ORACLES / "llama_k.gguf", path, {key: value})
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_tensors_that_fdq_does_not_know_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    source = gguf_files.ORACLES / "qwen3_blocks.gguf"
    gguf_files.rewritten(source, path, {}, drop=["blk.1.ffn_down.weight"])
    with pytest.raises(CheckpointError, match=r"'blk.1.ffn_down.weight' is missing, which layers"):
        load(path)
    gguf_files.rewritten(source, path, {"qwen3.block_count": 1})
    with pytest.raises(CheckpointError, match=r"'blk.1.*not part of a qwen3 model with this meta"):
        load(path)
    # As large as Q4_0.
    gguf_files.rewritten(source, path, {}, types={"blk.0.attn_q.weight": Type.IQ4_NL})
    with pytest.raises(CheckpointError, match=r"'blk.0.attn_q.weight' is IQ4_NL, which fdq does n"):
        load(path)


def test_scales_that_are_not_finite_are_refused(tmp_path):
    content = bytearray((gguf_files.ORACLES / "llama_k.gguf").read_bytes())
    with GgufFile(gguf_files.ORACLES / "llama_k.gguf") as file:
        start = file.tensors["blk.0.ffn_down.weight"].start
    content[start : start + 2] = np.float16(np.inf).tobytes()
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ffn_down.weight' holds a scale that is not finite"):
        load(tmp_path / "model.gguf")
