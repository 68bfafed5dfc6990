"""Who may import whom, and what `import fdq` is allowed to need."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ["pallas_kernels", "fdq", "fdq_checkpoints", "benchmarks", "examples"]

# Inside fdq, a module may import modules of its own layer or of an earlier one.
LAYERS = [
    {"registry"},
    {"schemes", "formats"},
    {"cache", "ops", "quantizers"},
    {"nn"},
    {"models"},
    {"calibration", "decoding"},
    {"linen", "analysis"},
    {"storage"},
    {"cli"},
]
LAYER_OF = {name: depth for depth, names in enumerate(LAYERS) for name in names}


def imports(path: pathlib.Path, *, top_level_only: bool):
    """Yields (line, dotted module) of the absolute imports in a file."""
    tree = ast.parse(path.read_text())
    inside_functions = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if top_level_only and node in inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            if node.module in PACKAGES:  # `from fdq import nn` imports fdq.nn
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def folder(package: str) -> pathlib.Path:
    return ROOT / "checkpoints" / package if package == "fdq_checkpoints" else ROOT / package


def sources(package: str):
    return sorted(folder(package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_downwards(package):
    allowed = PACKAGES[: PACKAGES.index(package) + 1]
    for path in sources(package):
        for line, module in imports(path, top_level_only=True):
            top = module.split(".")[0]
            assert top not in PACKAGES or top in allowed, f"{path}:{line} imports {module}"


def test_only_load_save_and_the_command_import_checkpoints():
    for path in sources("fdq"):
        name = path.relative_to(ROOT / "fdq").parts[0].removesuffix(".py")
        if name in {"__init__", "cli", "storage", "analysis"}:
            continue
        for line, module in imports(path, top_level_only=False):
            assert module.split(".")[0] != "fdq_checkpoints", f"{path}:{line} imports {module}"


def test_kernels_need_only_jax_and_numpy():
    """pallas_kernels takes arrays and returns arrays: nothing of Flax, Orbax or the extras."""
    allowed = {"jax", "jaxlib", "numpy", "ml_dtypes", "pallas_kernels"} | sys.stdlib_module_names
    for path in sources("pallas_kernels"):
        for line, module in imports(path, top_level_only=False):
            assert module.split(".")[0] in allowed, f"{path}:{line} imports {module}"


def test_nothing_needs_private_modules_of_jax():
    for package in PACKAGES:
        for path in sources(package):
            for line, module in imports(path, top_level_only=False):
                assert not module.startswith("jax._src"), f"{path}:{line} imports {module}"


def test_modules_of_fdq_import_only_earlier_layers():
    for path in sources("fdq"):
        name = path.relative_to(ROOT / "fdq").parts[0].removesuffix(".py")
        if name == "__init__" or path.stem in {"quantization", "modules", "comparison"}:
            continue
        assert name in LAYER_OF, f"{path}: fdq/{name} has no place in LAYERS of this test"
        for line, module in imports(path, top_level_only=True):
            parts = module.split(".")
            if parts[0] == "fdq" and len(parts) > 1 and parts[1] in LAYER_OF:
                assert LAYER_OF[parts[1]] <= LAYER_OF[name], f"{path}:{line} imports {module}"


def test_import_needs_only_the_five_dependencies():
    """`import fdq` must not pull in anything of the extras, nor touch a device."""
    script = (
        "import sys, fdq; extras = {'typer', 'rich', 'tokenizers', 'matplotlib', 'safetensors',"
        " 'hypothesis', 'torch', 'transformers', 'fdq_checkpoints'};"
        "print(sorted(extras & {name.split('.')[0] for name in sys.modules}));"
        "import jax; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    # rich is imported by flax when it is installed; it is no dependency of ours.
    assert run.stdout.replace("'rich'", "").split() == ["[]", "False"], run.stdout
