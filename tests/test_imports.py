"""Who may import whom, how long a file may be, and what `import fdq` is allowed to need."""

import ast
import collections
import subprocess
import sys

from docs import import_graph
from docs.import_graph import ROOT

LIBRARY = ("pallas_kernels", "fdq", "fdq_checkpoints")
LONGEST_FILE = 400


def library_files():
    """Names and paths of the modules of the three packages."""
    for module, path in import_graph.files().items():
        if module.split(".")[0] in LIBRARY:
            yield module, path


def test_modules_import_only_their_own_room_and_lower_ones():
    wrong = []
    for one in import_graph.own_imports():
        here, there = import_graph.room(one.importer), import_graph.room(one.module)
        allowed = here == there or import_graph.height(there) < import_graph.height(here)
        if not allowed and not import_graph.goes_up(one):
            wrong.append(f"{one}; {there} is no room below {here} (LEVELS of docs/import_graph.py)")
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_circles():
    """No module imports itself by way of others: at import, inside functions or in `__init__`."""
    wrong = import_graph.circles()
    assert not wrong, "\n" + "\n".join(" -> ".join(circle) for circle in wrong)


def test_no_public_function_has_the_name_of_a_module():
    """`import fdq.evaluate as ev` must never give a function, nor `fdq.matmul` a module."""
    known = import_graph.files()
    for package, path in library_files():
        if path.stem != "__init__":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                named = {alias.asname or alias.name: f"{node.module}.{alias.name}"
                         for alias in node.names}  # fmt: skip
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                named = {node.name: ""}
            else:
                continue
            for name, origin in named.items():
                module = f"{package}.{name}"
                assert module not in known or origin == module, f"{package}: {name} hides {module}"


def test_no_two_files_of_a_folder_differ_by_an_s():
    names = collections.defaultdict(set)
    for module, path in library_files():
        names[module.rpartition(".")[0]].add(
            path.parent.name if path.stem == "__init__" else path.stem
        )
    for package, stems in names.items():
        pairs = [stem for stem in stems if f"{stem}s" in stems]
        assert not pairs, f"{package}: {pairs} and the same with an s"


def test_no_file_is_too_long():
    for _, path in library_files():
        length = path.read_text().count("\n")
        assert length <= LONGEST_FILE, f"{path}: {length} lines"


def test_kernels_need_only_jax_and_numpy():
    """pallas_kernels takes arrays and returns arrays: nothing of Flax, Orbax or the extras."""
    allowed = {"jax", "jaxlib", "numpy", "ml_dtypes", "pallas_kernels"} | sys.stdlib_module_names
    for one in import_graph.imports():
        if one.importer == "pallas_kernels.typing" and one.module == "jaxtyping":
            continue  # where it is imported already
        if one.importer.startswith("pallas_kernels"):
            assert one.module.split(".")[0] in allowed, one


def test_nothing_needs_private_modules_of_jax():
    for one in import_graph.imports():
        assert not one.module.startswith("jax._src"), one


def test_import_needs_only_the_five_dependencies():
    """`import fdq` must not pull in anything of the extras, nor touch a device."""
    script = (
        "import sys, fdq; extras = {'typer', 'rich', 'tokenizers', 'matplotlib', 'safetensors',"
        " 'hypothesis', 'jaxtyping', 'beartype', 'torch', 'transformers', 'fdq_checkpoints'};"
        "print(sorted(extras & {name.split('.')[0] for name in sys.modules}));"
        "import jax; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    # rich is imported by flax when it is installed; it is no dependency of ours.
    assert run.stdout.replace("'rich'", "").split() == ["[]", "False"], run.stdout
