"""Tokens a second against the batch, as far as it fits: a picture of plans."""

import dataclasses
from collections.abc import Sequence

from fdq.analysis import chart
from fdq.analysis.device_plan import DevicePlan, Sharded
from fdq.analysis.roofline import LINKS, step_time


@dataclasses.dataclass(frozen=True)
class Curve:
    """Batches that fit and the speed of each; `name` is that of the GPU and the scheme."""

    name: str
    batches: tuple[int, ...]
    tokens_per_second: tuple[float, ...]


def curve(sharded: Sharded, plan: DevicePlan) -> Curve:
    """Of a plan with a GPU: batches of 1, 2, 4 ... up to the largest; none where none fits."""
    assert plan.gpu is not None and plan.largest_batch is not None
    batches, unit, most = [], sharded.rows_apart, plan.largest_batch
    while unit * 2 ** len(batches) < most:
        batches.append(unit * 2 ** len(batches))
    batches += [most] if most else []
    bandwidth = plan.gpu.measured_bandwidth or plan.gpu.bandwidth
    speeds = []
    for batch in batches:
        step = sharded.step(batch, plan.context)
        time = step_time(step, bandwidth=bandwidth, link=LINKS[plan.gpu.name])
        speeds.append(batch / time.total)
    return Curve(f"{plan.gpu.name}, {plan.scheme}", tuple(batches), tuple(speeds))


def draw(curves: Sequence[Curve]) -> str:
    """The picture as SVG, both axes logarithmic."""
    series = {
        one.name if one.batches else f"{one.name}: does not fit": list(
            zip(one.batches, one.tokens_per_second, strict=True)
        )
        for one in curves
    }
    label = "tokens/s at the roofline"
    return chart.lines(series, x="sequences", y=label, log_x=True, log_y=True)
