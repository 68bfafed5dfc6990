"""Plans of the devices of a mesh: against arrays, compiled programs, and arithmetic by hand."""

import json

import jax
import pytest

from docs import memory_report
from fdq.analysis import compiled_plan, device_plan, plan_plot, roofline
from fdq.analysis.device_plan import Sharded, of_sharded
from fdq.models import CONFIGS
from fdq.schemes.mesh_rules import abstract_mesh, make_mesh
from fdq.sharding import shard
from tests.covering import longest, slow
from tests.sharding.many_devices import config_of, model_of


def on_first_device(tree):
    """Bytes of the arrays of a tree that the first device has."""
    first = jax.devices()[0]
    shards = (s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards)
    return sum(s.data.nbytes for s in shards if s.device == first)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [slow("llama", {"tensor": 4, "data": 2}), longest("ernie4_5_moe", {"tensor": 4, "expert": 2})],
)
def test_planned_is_what_arrays_take(name, sizes):
    """Of a model on eight devices, and of its cache."""
    many = shard(model_of(name, "W8A16C8"), make_mesh(sizes))
    plan = of_sharded(
        Sharded.of(config_of(name), "W8A16C8", abstract_mesh(sizes)), context=64, batch=2
    )
    # Models of tests compute in float32, which plans count as bfloat16; so may be some of these.
    wide = [leaf for leaf in jax.tree.leaves(many) if leaf.dtype == "float32"]
    held = on_first_device(many)
    assert held - on_first_device(wide) / 2 <= plan.weight_bytes <= held
    assert plan.cache_bytes == on_first_device(many.init_cache(2, 64))


def test_the_time_of_a_step_by_hand():
    """Two layers of Llama 3 8B over two devices, all of it counted from the published sizes."""
    config = CONFIGS["llama-3-8b"].replace(num_layers=2)
    plan = device_plan.device_plan(
        config, "W8A16C8", mesh={"tensor": 2}, gpu="h100", context=1024, batch=4
    )
    hidden, inner, vocabulary, heads, kv = 4096, 14336, 128256, 32, 8
    matrices = hidden * (heads + 2 * kv) * 128 + hidden * hidden + 3 * hidden * inner
    weights = (2 * matrices) / 2
    head = 2 * hidden * vocabulary / 2
    cache = 2 * 2 * 4 * 1024 * kv * 128 / 2
    # Scales, norms and a head in 8 bits or 16 are what is left.
    read = plan.time.memory * 3352e9
    assert weights + head / 2 + cache < read < (weights + head + cache) * 1.03
    attention = 2 * 1024 * heads * 2 * 128 / 2  # scores and sums of values, of two layers
    products = 2 * matrices / 2 + attention + hidden * vocabulary / 2
    assert plan.time.matrix == pytest.approx(2 * 4 * products / 989e12, rel=0.001)
    sums = 1 + 2 * 2
    moved = sums * 4 * 4 * hidden  # over two devices each sends what it has once
    assert plan.time.links == pytest.approx(sums * 8e-6 + moved / 450e9)
    assert plan.time.launches == pytest.approx((2 * 11 + 12) * 2e-6)
    assert plan.fits and plan.tokens_per_second == pytest.approx(4 / plan.time.total)


def test_the_largest_batch_fits_and_the_next_does_not():
    config = CONFIGS["llama-3-8b"].replace(num_layers=2)
    sharded = Sharded.of(config, "W4A16C8", abstract_mesh({"tensor": 2, "data": 2}))
    most = of_sharded(sharded, gpu="l4", context=65536, batch=2).largest_batch
    assert most > 2 and most % 2 == 0
    assert of_sharded(sharded, gpu="l4", context=65536, batch=most).fits
    assert not of_sharded(sharded, gpu="l4", context=65536, batch=most + 2).fits
    curve = plan_plot.curve(sharded, of_sharded(sharded, gpu="l4", context=65536, batch=2))
    assert curve.batches[-1] == most and list(curve.batches) == sorted(curve.batches)
    assert list(curve.tokens_per_second) == sorted(curve.tokens_per_second)


def test_what_was_compiled_is_counted_in_the_largest_batch():
    config = CONFIGS["llama-3-8b"].replace(num_layers=2)
    sharded = Sharded.of(config, "W4A16C8", abstract_mesh({"tensor": 2}))
    plan = of_sharded(sharded, gpu="l4", context=65536, batch=8)
    more = of_sharded(
        sharded, gpu="l4", context=65536, batch=8, temporary_bytes=plan.temporary_bytes + 2 * 10**9
    )
    assert 8 <= more.largest_batch < plan.largest_batch
    full = plan.total_bytes - plan.temporary_bytes
    held = plan.usable_bytes - full
    for bytes_held, fits in ((held, True), (held + 1, False)):
        found = of_sharded(sharded, gpu="l4", context=65536, batch=8, temporary_bytes=bytes_held)
        assert found.fits is fits


def test_a_gpu_with_room_reads_longer_chunks():
    """As `fdq.prefill` does, which halves them where memory is short."""
    config = CONFIGS["llama-3-8b"].replace(num_layers=2)
    sharded = Sharded.of(config, "W4A16C8", abstract_mesh({"tensor": 1}))
    usable = device_plan.usable_bytes("l4")
    assert sharded.chunk(1, 4096, None) == 512 < sharded.chunk(1, 4096, usable) == 2048
    plan = of_sharded(sharded, gpu="l4", context=4096, batch=1)
    assert plan.temporary_bytes == sharded.temporary_bytes(1, 4096, 2048)
    assert sharded.chunk(plan.largest_batch, 4096, usable) == 512


def test_experts_that_are_read():
    assert roofline.share_of_experts(64, 8, 1) == pytest.approx(1 / 8)
    assert roofline.share_of_experts(64, 8, 8) == pytest.approx(42 / 64, abs=0.01)
    # The busiest of eight devices reads more than the mean, and all of it in the end.
    assert 2 / 8 < roofline.share_of_experts(64, 8, 1, groups=8) < 4 / 8
    assert roofline.share_of_experts(64, 8, 512, groups=8) == 1.0


def test_every_gpu_has_links():
    from pallas_kernels.aot.gpu_targets import GPUS

    assert roofline.LINKS.keys() == GPUS.keys()
    assert all(0 < link.bandwidth < GPUS[name].bandwidth for name, link in roofline.LINKS.items())


def test_wrong_arguments():
    for arguments, said in (
        ({"mesh": {"tensor": 3}}, "over tensor=3 does not divide"),
        ({"mesh": {"x": 2}}, "no rule uses the axis 'x'"),
        ({"batch": 0}, "must be positive"),
        ({"gpu": "h10"}, "Did you mean"),
        ({"mesh": {"data": 2}, "batch": 3}, "3 sequences over data=2"),
    ):
        with pytest.raises(ValueError, match=said):
            device_plan.device_plan(config_of("llama"), "W8A16", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "scheme", "sizes"),
    [
        longest("ernie-4.5-300b-a47b", "W4A8C8", {"tensor": 8}),
        longest("ernie-4.5-21b-a3b", "W4A16C8", {"tensor": 2}),
    ],
)
def test_the_plan_is_what_the_compiler_says(model, scheme, sizes):
    """Within 5 %, at the full width, with as many layers as there are kinds."""
    settings = {"mesh": sizes, "context": 32768, "batch": 8}
    found = compiled_plan.compiled(model, scheme, prompts=False, **settings)
    config = CONFIGS[model].replace(num_layers=found.layers)
    plan = device_plan.device_plan(config, scheme, **settings)
    assert plan.weight_bytes + plan.cache_bytes == found.planned_bytes
    assert found.argument_bytes == pytest.approx(found.planned_bytes, rel=0.01)
    held = found.argument_bytes + found.step_bytes
    sharded = Sharded.of(config, scheme, abstract_mesh(sizes))
    # A step reads one token of each sequence.
    planned = found.planned_bytes + sharded.temporary_bytes(8, 32768, tokens=1)
    assert planned == pytest.approx(held, rel=0.05)


@pytest.mark.slow
def test_a_compiled_program_in_this_process():
    """Of a small model: arguments of the step are the weights and the cache that are planned."""
    sizes = {"tensor": 4, "data": 2}
    sharded = Sharded.of(config_of("llama"), "W8A16C8", make_mesh(sizes))
    found = compiled_plan.compile_here(sharded, 2048, 4, prompts=False)
    assert found.planned_bytes <= found.argument_bytes < 1.02 * found.planned_bytes
    assert found.step_bytes > 0


@pytest.mark.slow
@pytest.mark.longest
def test_the_report_is_what_the_plans_are():
    """docs/several_devices.md: nobody has changed a figure, and no change has left it behind."""
    plans = memory_report.plans()
    assert memory_report.table(plans) in memory_report.PAGE.read_text("utf-8")
    assert all(plan.fits for plan in plans)
    stored = json.loads(memory_report.REPORT.read_text("utf-8"))
    assert stored == json.loads(json.dumps([plan.to_dict() for plan in plans]))
    steps = json.loads(memory_report.COMPILED.read_text("utf-8"))
    assert memory_report.compiled_table(steps, plans) in memory_report.PAGE.read_text("utf-8")


def test_compiled_steps_of_large_models_hold_what_is_planned():
    """What the compiler said of each, as it stands beside the page: no weight is made anew."""
    plans, steps = (
        json.loads(file.read_text("utf-8"))
        for file in (memory_report.REPORT, memory_report.COMPILED)
    )
    assert len(plans) == len(steps) == len(memory_report.CASES)
    for plan, step in zip(plans, steps, strict=True):
        assert (plan["model"], plan["context"], plan["batch"], plan["gpu"]) == (
            step["model"], step["context"], step["batch"], step["gpu"],
        )  # fmt: skip
        planned = plan["weight_bytes"] + plan["cache_bytes"]
        assert abs(step["argument_bytes"] + step["temp_bytes"] - planned) < 0.05 * planned
        assert step["weight_copies"] == step["unknown_loops"] == 0
