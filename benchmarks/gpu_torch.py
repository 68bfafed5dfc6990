"""The same products and attention by torch's built-in kernels, and by gemlite if installed.

Timed as JAX's are: CUDA graphs of n and of 2n launches over operands that exceed the L2 cache four
times, random data, the median of slopes. torch runs in a process of its own, without JAX.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_child import Emit, Settings, run_cases, section_main
from benchmarks.gpu_timing import l2_ratio, links_for, reason

_GROUP = 128
_REPETITIONS = 20
_TOLERANCE = 2e-2

# Kernel and sizes -> entry: formats of the same sizes share a peer.
_MEASURED: dict[tuple[str, tuple[Any, ...]], dict[str, Any]] = {}


@dataclasses.dataclass(frozen=True)
class Peer:
    """A case that JAX has measured, to be measured by somebody else.

    Attributes:
      key: of the case.
      fields: of its report.
    """

    key: str
    fields: dict[str, Any]


def run(settings: Settings, emit: Emit) -> None:
    """Reports ``{"case", "entries"}`` for the cases in ``more["cases"]``.

    ``more["library"]`` is ``torch`` or ``gemlite``.
    """
    try:
        import torch

        if settings.more["library"] == "gemlite":
            import gemlite  # type: ignore[import-not-found] # noqa: F401
    except Exception as error:
        emit({"unavailable": reason(error)})
        return
    if not torch.cuda.is_available():
        emit({"unavailable": f"torch {torch.__version__} sees no CUDA device"})
        return
    cases = [Peer(fields["case"], fields) for fields in settings.more["cases"]]
    run_cases(cases, settings, emit, measure)


def measure(case: Peer, settings: Settings) -> dict[str, Any]:
    """Entries of one case: each kernel in its own try."""
    fields = case.fields
    if fields["section"] == "attention":
        kernels: dict[str, Callable[..., Any]] = {"torch SDPA": _sdpa}
    elif settings.more["library"] == "gemlite":
        kernels = {"gemlite": _gemlite}
    else:
        kernels = {"torch 16-bit": _dense}
        extra = {
            "W4A16": ("torch int4pack", _int4pack),
            "W8A16": ("torch int8pack", _int8pack),
            "W8A8": ("torch _int_mm", _int_mm),
        }
        if fields["scheme"] in extra:
            name, kernel = extra[fields["scheme"]]
            kernels[name] = kernel
    sizes = tuple(fields.get(name) for name in ("m", "k", "n", "slots", "heads", "kv_heads"))
    entries = {}
    for name, kernel in kernels.items():
        if (name, sizes) not in _MEASURED:
            try:
                _MEASURED[name, sizes] = kernel(fields, settings)
            except Exception as error:
                _MEASURED[name, sizes] = {"error": reason(error)}
        entries[name] = _MEASURED[name, sizes]
    return {"entries": entries}


def time_graph(step: Callable[[Any], Any], operands: list[Any]) -> dict[str, Any]:
    """Seconds of ``step(operand)`` from graphs over all operands once and twice."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for operand in operands[:2] * 2:  # autotuning and workspaces before the capture
            step(operand)
    torch.cuda.synchronize()
    graphs = []
    for turns in (1, 2):
        graph = torch.cuda.CUDAGraph()
        kept = []
        with torch.cuda.graph(graph):
            kept.extend(step(operand) for operand in operands * turns)
        graphs.append((graph, kept))
    slopes = []
    for repetition in range(_REPETITIONS + 3):
        spent = []
        for graph, _ in graphs:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            spent.append(begin.elapsed_time(end) / 1e3)
        if repetition >= 3:
            slopes.append((spent[1] - spent[0]) / len(operands))
    low, seconds, high = statistics.quantiles(slopes, n=4)
    if seconds <= 0:
        return {"error": f"too noisy to time: slopes between {low:.3g} and {high:.3g} s"}
    spread = round((high - low) / 2 / seconds, 4)
    return {"seconds": seconds, "spread": spread, "links": len(operands)}


def _checked(step: Callable[[Any], Any], operands: list[Any], expected: Any) -> dict[str, Any]:
    """The time of ``step``, if its first result is right."""
    found = step(operands[0]).float()
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst <= _TOLERANCE:
        return {"difference": worst, "error": f"wrong: differs from the reference by {worst:.2g}"}
    return {"difference": worst, **time_graph(step, operands)}


def _links(size: int, settings: Settings) -> int:
    return links_for(size, settings.l2_bytes)


def _sizes(size: int, links: int, settings: Settings) -> dict[str, Any]:
    """Of operands that are not those of the case."""
    return {"bytes": size, "l2_ratio": l2_ratio(links * size, settings.l2_bytes)}


def _dtype(settings: Settings) -> Any:
    import torch

    return getattr(torch, settings.dtype)


def _normal(shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Any:
    import torch

    return torch.randn(shape, dtype=dtype, device="cuda") * scale


def _dense(fields: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Torch's cuBLAS, ``[M, K] @ [K, N]`` in 16 bits."""
    m, k, n = fields["m"], fields["k"], fields["n"]
    dtype = _dtype(settings)
    size = 2 * k * n
    x = _normal((m, k), dtype)
    w = [_normal((k, n), dtype, k**-0.5) for _ in range(_links(size, settings))]
    expected = x.float() @ w[0].float()
    return {**_checked(lambda w: x @ w, w, expected), **_sizes(size, len(w), settings)}


def _group_weights(k: int, n: int) -> tuple[Any, Any]:
    """Codes uint8 ``[N, K]`` of 0 .. 15 and scales ``[N, K / 128]``."""
    import torch

    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scale = torch.rand((n, k // _GROUP), device="cuda") * 0.2 + 0.9
    return codes, scale * k**-0.5 / 4.6


def _decoded(codes: Any, scale: Any) -> Any:
    n, k = codes.shape
    grouped = codes.float().reshape(n, k // _GROUP, _GROUP) - 8
    return (grouped * scale[..., None]).reshape(n, k)


def _int4pack(fields: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Torch's int4 kernel (tinygemm), groups of 128."""
    import torch

    m, k, n = fields["m"], fields["k"], fields["n"]
    aten: Any = torch.ops.aten
    x = _normal((m, k), torch.bfloat16)
    operands = []
    expected = None
    for _ in range(_links(k * n // 2, settings)):
        codes, scale = _group_weights(k, n)
        scale = scale.bfloat16()
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        packed = aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
        both = torch.stack([scale.t(), torch.zeros_like(scale.t())], dim=-1).contiguous()
        operands.append((packed, both))
        if expected is None:
            expected = x.float() @ _decoded(codes, scale.float()).t()

    def step(operand: Any) -> Any:
        return aten._weight_int4pack_mm(x, operand[0], _GROUP, operand[1])

    return _checked(step, operands, expected)


def _int8pack(fields: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Torch's weight-only int8 kernel, scales per channel; newer versions have it on CUDA."""
    import torch

    m, k, n = fields["m"], fields["k"], fields["n"]
    x = _normal((m, k), torch.bfloat16)
    scale = torch.full((n,), k**-0.5 / 73, dtype=torch.bfloat16, device="cuda")
    w = [_int8((n, k)) for _ in range(_links(k * n, settings))]
    expected = x.float() @ (w[0].float() * scale.float()[:, None]).t()
    aten: Any = torch.ops.aten
    return _checked(lambda w: aten._weight_int8pack_mm(x, w, scale), w, expected)


def _int8(shape: tuple[int, ...]) -> Any:
    import torch

    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def _int_mm(fields: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Torch's int8 x int8 -> int32; M is padded to 32, which it needs."""
    import torch

    m, k, n = fields["m"], fields["k"], fields["n"]
    x = _int8((max(m, 32), k))
    w = [_int8((n, k)).t() for _ in range(_links(k * n, settings))]
    expected = x.double() @ w[0].double()
    return _checked(lambda w: torch._int_mm(x, w), w, expected.float())


def _gemlite(fields: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The Triton kernels of gemlite, int4 in groups of 128, configured by itself."""
    from gemlite.core import TORCH_TO_DTYPE, GemLiteLinearTriton  # type: ignore

    if fields["scheme"] != "W4A16":
        raise NotImplementedError(f"only W4A16 is measured, not {fields['scheme']}")
    m, k, n = fields["m"], fields["k"], fields["n"]
    dtype = _dtype(settings)
    x = _normal((m, k), dtype)
    layers, expected = [], None
    for _ in range(_links(k * n // 2, settings)):
        codes, scale = _group_weights(k, n)
        layer = GemLiteLinearTriton(
            4,
            group_size=_GROUP,
            in_features=k,
            out_features=n,
            input_dtype=TORCH_TO_DTYPE[dtype],
            output_dtype=TORCH_TO_DTYPE[dtype],
        )
        flat = scale.reshape(-1, 1).to(dtype)
        layer.pack(codes, flat, flat * 0 + 8, None)
        layers.append(layer)
        if expected is None:
            rounded = scale.to(dtype).float()
            expected = x.float() @ _decoded(codes, rounded).t()
    return _checked(lambda layer: layer(x), layers, expected)


def _sdpa(fields: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Torch's scaled dot product attention over a 16-bit cache, whatever the case's format."""
    import torch

    b, slots = fields["m"], fields["slots"]
    heads, kv_heads, d = fields["heads"], fields["kv_heads"], fields["head_dim"]
    dtype = _dtype(settings)
    size = 2 * 2 * b * kv_heads * slots * d
    q = _normal((b, heads, 1, d), dtype)
    shape = (b, kv_heads, slots, d)
    caches = [(_normal(shape, dtype), _normal(shape, dtype)) for _ in range(_links(size, settings))]
    attend: Any = torch.nn.functional.scaled_dot_product_attention

    def step(cache: Any) -> Any:
        return attend(q, *cache, enable_gqa=True)

    k, v = (a.float().repeat_interleave(heads // kv_heads, dim=1) for a in caches[0])
    expected = torch.softmax(q.float() @ k.transpose(2, 3) * d**-0.5, dim=-1) @ v
    return {**_checked(step, caches, expected), **_sizes(size, len(caches), settings)}


if __name__ == "__main__":
    section_main(run)
