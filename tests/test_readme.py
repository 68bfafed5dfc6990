"""The README's scripts run, in a directory whose own modules are named like rooms of fdq."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from docs.import_graph import ROOT
from fdq.analysis.shipped_model import shipped_model_path
from tests.covering import slow

# What the README leaves to its reader.
BEFORE = """
import flax, jax, jax.numpy as jnp
from flax import nnx
w, x = jnp.ones((256, 128)), jnp.ones((4, 256))
my_nnx_model = nnx.Linear(256, 128, rngs=nnx.Rngs(0))
module = flax.linen.Dense(128)
linen_params = module.init(jax.random.key(0), x)
tokens = jnp.arange(24).reshape(1, 24)
"""


@pytest.mark.parametrize("scripts", [1, slow(2)])
def test_readme_scripts_run_beside_files_of_the_same_names(tmp_path, scripts):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 3
    assert blocks[0].count('"ERNIE-4.5-21B-A3B-PT"') == 1
    script = BEFORE + "\n".join(blocks[:scripts])
    script = script.replace("ERNIE-4.5-21B-A3B-PT", str(shipped_model_path()))
    (tmp_path / "script.py").write_text(script)
    for name in ("checkpoints", "models", "ops", "formats", "cache", "docs", "tests", "benchmarks"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this is the user\\'s module')\n")
    # Where fdq is not installed, it is found where this process finds it.
    places = [str(ROOT), str(ROOT / "checkpoints"), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert pathlib.Path(tmp_path, "ernie-w4a16c8", "fdq.json").is_file()
