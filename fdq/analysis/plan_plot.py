"""Tokens a second against the batch, as far as it fits: a picture of plans."""

import dataclasses
import os
from collections.abc import Sequence

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


def draw(curves: Sequence[Curve], path: str | os.PathLike[str]) -> None:
    """A picture in the format of the path's ending.

    Raises:
      ModuleNotFoundError: without the package `matplotlib`.
      ValueError: an ending that is of no picture.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A picture needs the package `matplotlib`: pip install matplotlib.", name=error.name
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for one in curves:
        label = one.name if one.batches else f"{one.name}: does not fit"
        axes.plot(one.batches, one.tokens_per_second, "o-", markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("sequences")
    axes.set_ylabel("tokens/s at the roofline")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
