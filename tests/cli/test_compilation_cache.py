"""Commands keep what they compile; `import fdq` never does."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import fdq.cli
from fdq.cli import compilation_cache

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def config():
    """JAX's settings, as they were before and will be after."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FDQ_CACHE_DIR": "/a/b"}, "/a/b"),
        ({"FDQ_CACHE_DIR": "", "XDG_CACHE_HOME": "/x"}, None),
        ({"XDG_CACHE_HOME": "/x"}, "/x/fdq"),
        ({"HOME": "/home/me"}, "/home/me/.cache/fdq"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/fdq"),
    ],
)
def test_where_the_cache_is(environment, expected, monkeypatch):
    for name in ("FDQ_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert compilation_cache.user_cache() == (expected and pathlib.Path(expected))


def test_what_the_user_has_set_stays(config, monkeypatch, tmp_path):
    monkeypatch.setenv("FDQ_CACHE_DIR", str(tmp_path / "ours"))
    config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    compilation_cache.use()
    assert config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not (tmp_path / "ours").exists()


def test_a_place_that_cannot_be_written_is_no_error(config, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FDQ_CACHE_DIR", str(tmp_path / "file"))
    compilation_cache.use()
    assert config.jax_compilation_cache_dir is None


def test_a_command_sets_it(config, monkeypatch, tmp_path):
    monkeypatch.setenv("FDQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fdq", "--version"])
    with pytest.raises(SystemExit):
        fdq.cli.main()
    assert pathlib.Path(config.jax_compilation_cache_dir).parent == tmp_path / "compiled"


SCRIPT = """
import logging, jax, jax.numpy as jnp
import fdq
assert jax.config.jax_compilation_cache_dir is None, "import fdq must not"
from fdq.cli import compilation_cache
compilation_cache.use()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda name, **k: events.append(name))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
print(sum(name.endswith("cache_hits") for name in events))
"""


@pytest.mark.slow
def test_a_second_process_does_not_compile_again(monkeypatch, tmp_path):
    monkeypatch.setenv("FDQ_CACHE_DIR", str(tmp_path))
    hits = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        hits.append(int(run.stdout))
    assert hits[0] == 0 < hits[1]
    assert jnp.ones(1).sum() == 1
