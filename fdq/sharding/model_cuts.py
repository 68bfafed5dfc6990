"""How the tensors of a model are cut: by the module that each is in, and the rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from fdq import nn
from fdq.formats import FORMATS
from fdq.formats.qtensor import QTensor, QuantizedWeight
from fdq.models.decoder import Decoder
from fdq.nn.parameters import value
from fdq.schemes.mesh_rules import Rules, repeats, shards
from fdq.sharding.cut import Axes, Cut, Dealt, smaller_blocks


@dataclasses.dataclass
class Cuts:
    """What was decided of the tensors of a model so far, by dotted path, and why not more."""

    mesh: Mesh
    rules: Rules
    found: dict[str, Cut] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def count(self, axes: Axes) -> int:
        """Devices along axes."""
        return shards(self.mesh, axes)

    def over(self, axes: Axes) -> str:
        """The axes with their sizes, for people."""
        return " x ".join(f"{name}={self.mesh.shape[name]}" for name in axes)

    def columns(
        self, path: str, layer: Any, kind: str, axes: Axes, dealt: Dealt, lead: Axes | None = None
    ) -> None:
        """Columns of a layer's kernel and its bias; `lead` are the axes of experts."""
        kernel = value(layer.kernel)
        front = () if lead is None else (lead,)
        spec = None
        if isinstance(kernel, QTensor) and axes:
            self._column_problem(f"{path}.kernel", kernel)
            new = smaller_blocks(kernel.spec, dealt.widths)
            spec = None if new == kernel.spec else kernel.spec
        # One part that is cut as it lies needs no order.
        order = None if len(dealt.parts) == 1 or not axes else dealt
        widths = tuple(dealt.widths) if spec is not None else ()
        axes_of = (*front, (), axes)
        self.found[f"{path}.kernel"] = Cut(kind, axes_of, order, spec=spec, widths=widths)
        if layer.bias is not None:
            self.found[f"{path}.bias"] = Cut(kind, (*front, axes), order)

    def rows(self, path: str, layer: Any, kind: str, axes: Axes, lead: Axes | None = None) -> None:
        """Rows of a layer's kernel; a bias is whole."""
        front = () if lead is None else (lead,)
        self.found[f"{path}.kernel"] = Cut(kind, (*front, axes, ()))
        if layer.bias is not None and lead:
            self.found[f"{path}.bias"] = Cut(kind, (lead, ()))

    def row_problem(self, kernel: Any, axes: Axes) -> str | None:
        """Why the rows of a kernel `[..., K, N]` cannot be cut over axes; None if they can."""
        k, n = kernel.shape[-2], self.count(axes)
        where = f"K={k} over {self.over(axes)}"
        if k % n:
            return f"{where} does not divide"
        if not isinstance(kernel, QTensor) or n == 1:
            return None
        spec, unit = kernel.spec, FORMATS[kernel.spec.format].unit
        if spec.row_order:
            return "its rows are in another order (desc_act), which shards cannot follow"
        if spec.double_quantization:
            return "its scales share scales across shards (-dq)"
        block = spec.block_size[0] if spec.block_size else 1
        together = math.lcm(unit[1] if unit else 1, spec.group_size or 1, block, self.rules.align)
        if k // n % together:
            return f"{where} gives shards of {k // n} rows, not multiples of {together} ({spec})"
        return None

    @staticmethod
    def _column_problem(path: str, kernel: QTensor) -> None:
        if kernel.spec.double_quantization:
            raise ValueError(
                f"{path}: {kernel.spec} shares scales of scales between columns of several "
                "devices. Quantize without -dq."
            )


def cuts_of(model: Decoder, mesh: Mesh, rules: Rules) -> Cuts:
    """The cuts of a model's tensors; those that are not named are whole on every device.

    Raises:
      ValueError: a tensor that the mesh does not divide, or weights in another layout than that of
        checkpoints.
    """
    cuts = Cuts(mesh, rules)
    for keys, module in nnx.iter_modules(model):
        path = ".".join(map(str, keys))
        for kind, cut in _OF_KIND.items():
            if type(module) is kind:
                _check_layout(path, module)
                cut(cuts, path, module)
    _vocabulary(cuts, model)
    used = {name for cut in cuts.found.values() for axes in cut.axes for name in axes}
    used |= set(rules.axes("batch", mesh))
    for name, size in mesh.shape.items():
        if size > 1 and name not in used:
            cuts.notes.append(
                f"axis {name}: nothing in this model is cut over it, its {size} devices do the same"
            )
    return cuts


def _check_layout(path: str, module: Any) -> None:
    for name, layer in vars(module).items():
        kernel = getattr(layer, "kernel", None)
        if isinstance(kernel, QuantizedWeight) and not isinstance(value(kernel), QTensor):
            raise ValueError(
                f"{path}.{name}.kernel: laid out for one device ({kernel.layout!r}). Load it with "
                "mesh=, or call fdq.unprepare first."
            )


def _plain(cuts: Cuts, path: str, module: Any, *names: str) -> bool:
    """Whether these layers are fdq's own: where one has another in its place all stay whole."""
    for name in names:
        kind = type(getattr(module, name))
        if kind not in (nn.Linear, nn.ExpertLinear):
            cuts.notes.append(f"{path}: whole on every device, {name} is a {kind.__name__}")
            return False
    return True


def _attention(cuts: Cuts, path: str, module: nn.Attention) -> None:
    axes = cuts.rules.axes("heads", cuts.mesh)
    if not axes or not _plain(cuts, path, module, "qkv_proj", "o_proj"):
        return
    heads, kv_heads, d, n = module.num_heads, module.num_kv_heads, module.head_dim, cuts.count(axes)
    _divides(cuts, path, "query heads", heads, axes, "heads")
    try:
        often = repeats(kv_heads, n)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if problem := cuts.row_problem(value(module.o_proj.kernel), axes):
        raise ValueError(_advice(f"{path}.o_proj.kernel", problem, "heads"))
    parts = (heads * d, kv_heads * d, kv_heads * d)
    dealt = Dealt(n, parts, d, (1, often, often))
    cuts.columns(f"{path}.qkv_proj", module.qkv_proj, "heads", axes, dealt)
    cuts.rows(f"{path}.o_proj", module.o_proj, "heads", axes)
    if module.sinks is not None:
        cuts.found[f"{path}.sinks"] = Cut("heads", (axes,))
    for name in ("k_cache_scale", "v_cache_scale", "k_cache_zero", "v_cache_zero", "k_cache_mean"):
        if getattr(module, name) is not None:
            order = Dealt(n, (kv_heads,), 1, (often,))
            cuts.found[f"{path}.{name}"] = Cut("heads", (axes, ()), order, along=0)


def _latent_attention(cuts: Cuts, path: str, module: nn.LatentAttention) -> None:
    axes = cuts.rules.axes("heads", cuts.mesh)
    query = "q_proj" if module.q_proj is not None else "q_b_proj"
    if not axes or not _plain(cuts, path, module, query, "kv_b_proj", "o_proj"):
        return
    heads, n = module.num_heads, cuts.count(axes)
    _divides(cuts, path, "query heads", heads, axes, "heads")
    if problem := cuts.row_problem(value(module.o_proj.kernel), axes):
        raise ValueError(_advice(f"{path}.o_proj.kernel", problem, "heads"))
    for name in (query, "kv_b_proj"):
        layer = getattr(module, name)
        dealt = Dealt(n, (value(layer.kernel).shape[-1],))
        cuts.columns(f"{path}.{name}", layer, "heads", axes, dealt)
    cuts.rows(f"{path}.o_proj", module.o_proj, "heads", axes)


def _mlp(cuts: Cuts, path: str, module: nn.MLP) -> None:
    axes = cuts.rules.axes("channels", cuts.mesh)
    if not axes or not _plain(cuts, path, module, "gate_up_proj", "down_proj"):
        return
    width, n = module.intermediate_size, cuts.count(axes)
    if problem := cuts.row_problem(value(module.down_proj.kernel), axes):
        if path.endswith("shared_experts"):
            cuts.notes.append(f"{path}: whole on every device, {problem}")
            return
        raise ValueError(_advice(f"{path}.down_proj.kernel", problem, "channels"))
    dealt = Dealt(n, (width, width))
    cuts.columns(f"{path}.gate_up_proj", module.gate_up_proj, "channels", axes, dealt)
    cuts.rows(f"{path}.down_proj", module.down_proj, "channels", axes)


def _experts(cuts: Cuts, path: str, module: nn.Experts) -> None:
    lead, inner = (cuts.rules.axes(kind, cuts.mesh) for kind in ("experts", "channels"))
    inner = tuple(name for name in inner if name not in lead)
    if not (lead or inner) or not _plain(cuts, path, module, "gate_up_proj", "down_proj"):
        return
    down = value(module.down_proj.kernel)
    count, width = down.shape[0], down.shape[-2]
    if lead and count % cuts.count(lead):
        raise ValueError(
            f"{path}: {count} experts over {cuts.over(lead)} does not divide. Use an axis of "
            f"{math.gcd(count, cuts.count(lead))}, or fdq.sharding.Rules(experts=None)."
        )
    if inner and (problem := _inner_problem(cuts, module, down, inner)):
        # Whole experts over both axes instead.
        both = (*lead, *inner)
        if count % cuts.count(both):
            advice = f"{count} experts do not divide over {cuts.over(both)} either"
            raise ValueError(
                _advice(f"{path}.down_proj.kernel", f"{problem}; {advice}", "channels")
            )
        cuts.notes.append(f"{path}: whole experts over {cuts.over(both)}, {problem}")
        lead, inner = both, ()
    dealt = Dealt(cuts.count(inner), (width, width))
    cuts.columns(f"{path}.gate_up_proj", module.gate_up_proj, "experts", inner, dealt, lead)
    cuts.rows(f"{path}.down_proj", module.down_proj, "experts", inner, lead)
    for name in ("gate_up_proj", "down_proj"):
        scale = getattr(module, name).activation_scale
        if scale is not None and lead and value(scale).shape[:1] == (count,):
            axes = (lead, *[()] * (len(value(scale).shape) - 1))
            cuts.found[f"{path}.{name}.activation_scale"] = Cut("experts", axes)


def _inner_problem(cuts: Cuts, module: nn.Experts, down: Any, inner: Axes) -> str | None:
    """Why the channels of each expert stay together."""
    activation = module.down_proj.activation
    if activation is not None and activation.granularity == "token":
        return "a row of its channels is quantized with one scale"
    return cuts.row_problem(down, inner)


def _vocabulary(cuts: Cuts, model: Decoder) -> None:
    axes, size = cuts.rules.axes("vocabulary", cuts.mesh), model.config.vocab_size
    if not axes:
        return
    if size % cuts.count(axes):
        cuts.notes.append(
            f"vocabulary: whole on every device, {size} tokens over {cuts.over(axes)} does not "
            "divide"
        )
        return
    table, head = value(model.embed_tokens.embedding), model.lm_head
    if type(model.embed_tokens) is nn.Embedding:
        if problem := cuts.row_problem(table, axes):
            cuts.notes.append(f"embed_tokens: whole on every device, {problem}")
        else:
            cuts.found["embed_tokens.embedding"] = Cut("vocabulary", (axes, ()))
    if head is not None and type(head) is nn.Linear:
        cuts.columns("lm_head", head, "vocabulary", axes, Dealt(cuts.count(axes), (size,)))


def _divides(cuts: Cuts, path: str, what: str, size: int, axes: Axes, kind: str) -> None:
    n = cuts.count(axes)
    if size % n:
        raise ValueError(
            f"{path}: {size} {what} over {cuts.over(axes)} does not divide. Use an axis of "
            f"{math.gcd(size, n)}, or fdq.sharding.Rules({kind}=None), which leaves them whole."
        )


def _advice(path: str, problem: str, kind: str) -> str:
    whole = f"fdq.sharding.Rules({kind}=None), which leaves it whole"
    if "multiples of" not in problem:
        return f"{path}: {problem}. Use another number of devices on this axis, or {whole}."
    return (
        f"{path}: {problem}. Use fewer devices on this axis, smaller groups, "
        f"fdq.sharding.Rules(align=...) below 128, or {kind}=None, which leaves it whole."
    )


_OF_KIND: dict[type, Callable[[Cuts, str, Any], None]] = {
    nn.Attention: _attention,
    nn.LatentAttention: _latent_attention,
    nn.MLP: _mlp,
    nn.Experts: _experts,
}
"""What cuts the tensors of a module; modules of other kinds are whole on every device."""
