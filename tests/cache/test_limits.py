"""A cache that does not fit is refused before it is made, and the error says what would fit."""

import math
import re
import types

import jax
import jax.numpy as jnp
import pytest

from fdq.cache import KVCache, LayerScales, limits
from fdq.schemes.scheme import CacheSpec

CONFIG = types.SimpleNamespace(num_layers=4, num_kv_heads=2, head_dim=64, dtype="bfloat16")
# Bytes of a token of one sequence.
C16 = 4 * 2 * 2 * 64 * 2
C8 = 4 * 2 * 2 * (64 + 4)


@pytest.fixture
def nothing_large(monkeypatch):
    """Nothing large is allocated, not even for the length of an error."""
    real = jnp.zeros

    def zeros(shape, *args, **kwargs):
        assert math.prod(shape) < 10**6
        return real(shape, *args, **kwargs)

    monkeypatch.setattr(jnp, "zeros", zeros)


@pytest.mark.parametrize(
    ("format", "batch", "a_token"), [("C16", 1, C16), ("C16", 3, 3 * C16), ("C8", 1, C8)]
)
@pytest.mark.usefixtures("nothing_large")
def test_the_error_says_how_many_tokens_would_fit(format, batch, a_token, monkeypatch):
    monkeypatch.setattr(limits, "available_bytes", lambda device=None: 1_000_000_000)
    with pytest.raises(ValueError, match="would fit") as error:
        KVCache.init(CONFIG, batch, 10**7, format)
    message = str(error.value)
    assert message.startswith("max_length=10,000,000: ")
    assert "1.00 GB of memory are free" in message
    fit = int(re.search(r"([\d,]+) tokens would fit", message)[1].replace(",", ""))
    assert fit == 1_000_000_000 // a_token


def test_scales_of_layers_do_not_count_as_tokens(monkeypatch):
    monkeypatch.setattr(limits, "available_bytes", lambda device=None: 1_000_000_000)
    spec = CacheSpec.parse("C8-kvchannel")
    scales = [LayerScales(k=jnp.ones((2, 64)), v=jnp.ones((2, 64)))] * 4
    with pytest.raises(ValueError, match=f"{10**9 // (4 * 2 * 2 * 64):,} tokens would fit"):
        KVCache.init(CONFIG, 1, 10**7, spec, scales=scales)


def test_layers_may_differ(monkeypatch):
    monkeypatch.setattr(limits, "available_bytes", lambda device=None: 1_000_000_000)
    with pytest.raises(ValueError, match=f"{10**9 // ((C16 + C8) // 2):,} tokens would fit"):
        KVCache.init(CONFIG, 1, 10**7, ["C16", "C8", "C8", "C16"])


def test_shapes_alone_and_small_caches_are_never_refused(monkeypatch):
    def unasked(device=None):
        raise AssertionError("nobody asks for this")

    monkeypatch.setattr(limits, "available_bytes", unasked)
    abstract = jax.eval_shape(lambda: KVCache.init(CONFIG, 1, 10**9, "C8"))
    assert abstract.nbytes == pytest.approx(C8 * 10**9, rel=1e-6)
    assert KVCache.init(CONFIG, 1, 64, "C8").max_length == 64


def test_memory_of_accelerators_is_what_their_allocator_has_left():
    stats = {"bytes_limit": 1000, "bytes_in_use": 300}
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert limits.available_bytes(gpu) == 700
    silent = types.SimpleNamespace(platform="tpu", memory_stats=lambda: None)
    assert limits.available_bytes(silent) is None
    limits.refuse_what_does_not_fit(10**12, 1.0, silent)  # nothing known, nothing refused
    with pytest.raises(ValueError, match="700 tokens would fit"):
        limits.refuse_what_does_not_fit(701, 1.0, gpu)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8_000_000),
        ({"memory.max": "max"}, 8_000_000),
        (
            {"memory.max": "5000", "memory.current": "3000", "memory.stat": "inactive_file 500"},
            2500,
        ),
        ({"memory.max": "50000000", "memory.current": "0", "memory.stat": ""}, 8_000_000),
        (
            {
                "memory/memory.limit_in_bytes": "4000",
                "memory/memory.usage_in_bytes": "3000",
                "memory/memory.stat": "cache 7\ntotal_inactive_file 11",
            },
            1011,
        ),
    ],
)
def test_memory_of_the_cpu_is_the_least_of_machine_and_container(
    files, expected, tmp_path, monkeypatch
):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 16000 kB\nMemAvailable:    7813 kB\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    if files == {"memory.max": "max"}:
        (tmp_path / "memory.current").write_text("1")
        (tmp_path / "memory.stat").write_text("")
    monkeypatch.setattr(limits, "_CGROUP", tmp_path)
    monkeypatch.setattr(limits, "_MEMINFO", meminfo)
    cpu = types.SimpleNamespace(platform="cpu")
    assert limits.available_bytes(cpu) == pytest.approx(expected, rel=1e-3)


def test_this_machine_has_memory():
    assert limits.available_bytes() > 10**6
