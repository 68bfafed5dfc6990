"""Small models to export, and what was written of them."""

import json

import numpy as np
from flax import nnx

import fdq
from fdq import models
from fdq.nn.rotary import RotaryConfig
from fdq_checkpoints import tree_paths
from fdq_checkpoints.tree_paths import dotted
from tests.checkpoints import builders

WIDE = models.DecoderConfig(
    model_type="llama",
    vocab_size=32,
    hidden_size=128,
    intermediate_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    rms_norm_epsilon=1e-5,
    rotary=RotaryConfig(),
    dtype="float32",
)
NARROW = WIDE.replace(
    hidden_size=32, intermediate_size=64, num_heads=2, num_kv_heads=2, head_dim=16
)


def model_of(config=NARROW, scheme=None, seed=0, **options):
    """A random model; codes by the rule that compiles soonest where there is one."""
    floats = models.Decoder(config, rngs=nnx.Rngs(seed))
    return floats if scheme is None else fdq.quantize(floats, scheme, **options)


def stored(folder):
    """All tensors of a directory, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= builders.tensors_of(file)
    return found


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def differences(one, other):
    """Paths of tensors that are not the same, array by array, and in what."""
    mine, theirs = ({t.path: t for t in tree_paths.flatten(m)} for m in (one, other))
    assert mine.keys() == theirs.keys()
    found = {}
    for path, tensor in mine.items():
        a, b = tensor.value, theirs[path].value
        if tensor.activation != theirs[path].activation:
            found[dotted(path)] = "activation"
        if getattr(a, "spec", None) != getattr(b, "spec", None):
            found[dotted(path)] = "spec"
            continue
        for name, array in tree_paths.arrays_of(a).items():
            x, y = np.asarray(array), np.asarray(tree_paths.arrays_of(b)[name])
            if (x.dtype, x.shape, x.tobytes()) != (y.dtype, y.shape, y.tobytes()):
                found[dotted(path)] = name
    return found
