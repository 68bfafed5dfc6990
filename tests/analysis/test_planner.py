"""`fdq.plan`: the bytes of large models from shapes, and of small ones against real arrays."""

import dataclasses
import json

import jax
import pytest
from flax import nnx

from fdq.analysis import planner
from fdq.analysis.planner import cache_bytes, parameter_count, plan, weight_table
from fdq.cache.kv_cache import KVCache
from fdq.models import CONFIGS, Decoder, MoEConfig, Part, abstract
from fdq.models.parts import SwiGLU
from fdq.quantizers.quantization import quantize
from fdq.schemes.scheme import CacheSpec
from tests.covering import slow
from tests.fastdeploy_configs import WINT2

ERNIE_300B = "ernie-4.5-300b-a47b"


def test_the_unquantized_model_has_its_published_size():
    result = plan(ERNIE_300B, "bf16")
    assert result.weights.parameters == pytest.approx(300e9, rel=0.01)
    assert result.weights.bytes == pytest.approx(597e9, rel=0.001)  # of the published files


@pytest.mark.parametrize(
    "model", ["ernie-4.5-0.3b", "qwen2.5-0.5b", "qwen3-8b", "ernie-4.5-21b-a3b", "qwen3-30b-a3b"]
)
def test_parameters_counted_by_kinds_of_layers_are_those_of_the_whole(model):
    assert parameter_count(CONFIGS[model]) == weight_table(abstract(CONFIGS[model])).parameters


def test_layers_that_differ_are_counted_one_by_one():
    @dataclasses.dataclass(frozen=True)
    class Growing(Part):
        name = "growing"

        def build(self, config, layer, *, dtype, rngs):
            wider = config.replace(intermediate_size=config.intermediate_size * (1 + layer))
            return SwiGLU().build(wider, layer, dtype=dtype, rngs=rngs)

    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=32, layers=(1, 4))
    config = CONFIGS["ernie-4.5-0.3b"].replace(num_layers=5, mlp=Growing(), moe=moe)
    assert parameter_count(config) == weight_table(abstract(config)).parameters
    same = config.replace(mlp=SwiGLU())
    assert parameter_count(config) > parameter_count(same)


def test_listing_the_models_builds_no_whole_model(monkeypatch):
    """It takes a second, not ten."""
    built = []
    real = planner.abstract

    def counted(config):
        built.append(config.num_layers)
        return real(config)

    monkeypatch.setattr(planner, "abstract", counted)
    known = planner.known_models()
    assert set(built) == {0} and list(known) == list(CONFIGS)
    assert known["ernie-4.5-300b-a47b"]["parameters"] == pytest.approx(300e9, rel=0.01)


def test_wint2_takes_what_fastdeploy_publishes():
    result = plan(ERNIE_300B, WINT2)
    # "About 89 GB" is published; which layers' side data and head it counts is not.
    assert result.weights.bytes == pytest.approx(89e9, rel=0.05)
    kinds = {kind: formats for kind, _, _, formats in result.rows()}
    assert kinds["routed experts"] == "cc2, int4"
    assert kinds["attention"] == kinds["dense mlp"] == "int8"
    assert kinds["router"] == "float32"
    assert kinds["embeddings"] == kinds["norms"] == "bfloat16"


@pytest.mark.parametrize("model", [slow("ernie-4.5-21b-a3b"), ERNIE_300B])
@pytest.mark.parametrize(
    ("scheme", "bits"),
    [slow("WINT8", 8.0), slow("WINT4", 4.125), slow("block_wise_fp8", 8.0019), ("WINT2", 2.0625)],
)
def test_bits_per_weight_of_whole_models(model, scheme, bits):
    result = plan(model, scheme)
    # Per-channel side data adds up to 80 bits a column; K is 1536 at least.
    weights = result.weights
    assert bits <= weights.quantized_bits_per_weight <= bits + 80 / 1536
    assert (
        weights.quantized_bits_per_weight
        < weights.bits_per_weight
        == pytest.approx(8 * weights.bytes / weights.parameters)
    )
    assert sum(size for _, _, size, _ in result.rows()) == result.weights.bytes


def test_mix_quant_gives_each_kind_its_own():
    result = plan("ernie-4.5-21b-a3b", "mix_quant", context=32768)
    kinds = {kind: formats for kind, _, _, formats in result.rows()}
    assert kinds["routed experts"] == "int4"
    assert kinds["attention"] == kinds["shared experts"] == "int8"
    assert result.cache == "C8"


@pytest.mark.slow
def test_planned_bytes_are_those_of_arrays():
    config = CONFIGS["ernie-4.5-21b-a3b"]
    assert config.moe is not None
    moe = dataclasses.replace(
        config.moe, num_experts=4, top_k=2, intermediate_size=128, shared_intermediate_size=128
    )
    config = config.replace(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_layers=2, moe=moe
    )
    planned = plan(config, "W4A16C8", context=10, batch=3)
    model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))()
    assert weight_table(model).parameters == planned.weights.parameters
    quantized = quantize(model, "W4A16C8")
    assert weight_table(quantized) == planned.weights
    held = sum(x.nbytes for x in jax.tree.leaves(nnx.state(quantized)))
    assert held == planned.weights.bytes
    cache = KVCache.init(config, batch=3, max_length=10, format="C8")
    assert (
        planned.cache_bytes
        == cache.nbytes
        == cache_bytes(config, CacheSpec.parse("C8"), batch=3, context=10)
    )


def test_a_directory_and_json(tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = plan(tmp_path, "W8A16")
    content = json.loads(result.to_json())
    assert content["weights"]["kinds"]["head"]["bytes"] == 32 * 128 * 2
    assert content["total_bytes"] == result.total_bytes
    assert "head" in str(result)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("ernie-4.5-0.3", "W4A16"), {}, "Did you mean 'ernie-4.5-0.3b'"),
        (("/absent", "W4A16"), {}, "neither a directory"),
        (("ernie-4.5-0.3b", "W4A16C9"), {}, "Did you mean"),
        (("ernie-4.5-0.3b", "W4A16"), {"context": 0}, "`context`"),
        (("ernie-4.5-0.3b", "W4A16-g96"), {}, "96"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        plan(*arguments, **options)
