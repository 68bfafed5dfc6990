"""Settings that every test runs under: strict promotion, 8 CPU devices, seeds from names."""

import gc
import os
import zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import annotations
import jax
import numpy as np
import pytest

annotations.check_calls()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what takes longer")
    parser.addoption("--longest", action="store_true", help="also run what CI has no time for")


# Minutes each: whoever is handed one of these files last works on while the others are done.
LONGEST = (
    "tests/test_docs.py",
    "tests/test_notebooks.py",
    "tests/benchmarks/",
    "tests/pallas_kernels/aot/",
)


def pytest_collection_finish():
    """Modules and tests live to the end: the collector need not go through them again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    has_gpu = any(device.platform == "gpu" for device in jax.devices())
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "longest" in item.keywords and not config.getoption("--longest"):
            item.add_marker(pytest.mark.skip(reason="takes longest; run with --slow --longest"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes longer; run with --slow"))


MANY_MAPS = 15_000  # Linux allows 65,530, of which each program of XLA's takes several

# What compares numbers with another definition of them is compiled as users compile it, and so is
# what counts instructions. Most of the time of the rest is XLA's, whose optimizations are none of
# its business.
OPTIMIZED = (
    "benchmarks",
    "formats/test_distortion.py",
    "formats/test_other_libraries.py",
    "formats/test_trellis.py",
    "ops/test_activation.py",
    "ops/test_attention.py",
    "ops/test_matmul.py",
    "ops/test_matmul_dtypes.py",
    "ops/test_rope_append.py",
    "pallas_kernels/aot",
    "pallas_kernels/append",
    "pallas_kernels/test_on_gpu.py",
    "quantizers/test_fastdeploy_rounding.py",
)


@pytest.fixture(autouse=True)
def optimizations(request):
    """Compiles most tests with few of XLA's optimizations."""
    path = request.path.relative_to(request.config.rootpath / "tests").as_posix()
    jax.config.update("jax_disable_most_optimizations", not path.startswith(OPTIMIZED))


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Programs of a module go with it where the process has too many pieces of memory."""
    yield
    try:
        with open("/proc/self/maps") as maps:
            count = sum(1 for _ in maps)
    except OSError:
        return
    if count > MANY_MAPS:
        jax.clear_caches()


@pytest.fixture
def rng(request) -> np.random.Generator:
    """A generator seeded from the test's name: fresh per test, the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
