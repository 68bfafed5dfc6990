"""What is said of the seconds before the first token."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from fdq.analysis.startup_time import measured
from fdq.ops import self_check


def test_what_jax_does_is_counted_while_it_is_listened_to():
    def program(x):
        return jax.jit(lambda y: jnp.sin(y) + 41.0)(x) * 3.0

    with measured() as spent:
        jax.block_until_ready(jax.jit(program)(jnp.ones(7)))
    assert spent.lowering > 0
    assert spent.compiling > 0
    assert spent.self_check == 0
    before = (spent.lowering, spent.compiling)
    jax.block_until_ready(jax.jit(lambda x: program(x) - 2.0)(jnp.ones(9)))
    assert (spent.lowering, spent.compiling) == before


def test_a_trace_inside_of_another_counts_once(monkeypatch):
    event = "/jax/core/compile/jaxpr_trace_duration"
    now = iter((10.0, 11.0, 13.0, 20.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    with measured() as spent:
        jax.monitoring.record_event_duration_secs(event, 1.0)  # 9 to 10
        jax.monitoring.record_event_duration_secs(event, 3.0)  # 8 to 11, around it
        jax.monitoring.record_event_duration_secs(event, 2.5)  # 10.5 to 13
        jax.monitoring.record_event_duration_secs(event, 1.0)  # 19 to 20
    assert spent.lowering == 6.0


def test_what_a_self_check_compiles_is_its_own(monkeypatch):
    monkeypatch.setattr(self_check, "_RESULTS", {})

    def case():
        y = jax.jit(lambda x: jnp.cos(x) * 17.0)(jnp.ones(11))
        return y, np.cos(np.ones(11)) * 17.0

    with measured() as spent:
        assert self_check.failure("a kernel", "int4", jax.devices("cpu")[0], case) is None
    assert spent.self_check > 0
    assert spent.lowering == spent.compiling == 0
