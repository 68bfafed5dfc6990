"""What public functions say of their arrays is checked in these tests, and costs users nothing."""

import subprocess
import sys

import annotations
import jax.numpy as jnp
import jaxtyping
import pytest

import fdq
from docs.import_graph import ROOT
from fdq.decoding.sampling import sample
from fdq.ops.rope_append.api import rope_append
from fdq.ops.route.api import route
from pallas_kernels.append.cache_update import append
from pallas_kernels.attention.decode_attention import decode_attention
from pallas_kernels.matmul.gathered import gathered_matrix_vector
from pallas_kernels.matmul.integer import integer_matrix_vector
from pallas_kernels.matmul.matrix_vector import matrix_vector
from pallas_kernels.router.routing import router_logits, top_k_experts

SAID = [
    fdq.attention,
    fdq.grouped_matmul,
    fdq.matmul,
    rope_append,
    route,
    append,
    decode_attention,
    gathered_matrix_vector,
    integer_matrix_vector,
    matrix_vector,
    router_logits,
    top_k_experts,
]


@pytest.mark.parametrize("function", SAID, ids=lambda function: function.__name__)
def test_ops_and_kernels_say_shapes(function):
    assert f"{function.__module__}.{function.__qualname__}" in annotations.CHECKED


def test_a_wrong_shape_is_found_where_the_function_itself_finds_nothing():
    with pytest.raises(jaxtyping.TypeCheckError, match="logits"):
        sample(jnp.zeros((2, 3, 8)), None, None)
    with pytest.raises(ValueError, match="matmul expects x"):  # its own message comes first
        fdq.matmul(jnp.zeros((2, 3)), jnp.zeros((4, 5)))


def test_without_jaxtyping_annotations_are_arrays():
    script = (
        "import sys, typing, fdq; print('jaxtyping' in sys.modules);"
        "print(typing.get_type_hints(fdq.nn.rotary_angles)['positions'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.split("\n")[:2] == ["False", "<class 'jax.Array'>"], run.stdout
