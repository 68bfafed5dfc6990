"""`fdq kernels`: which GPU kernels run on which card, without one."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fdq import text_table
from fdq.cli import console

if TYPE_CHECKING:
    from pallas_kernels.aot.ahead_of_time import Report
    from pallas_kernels.aot.report_files import Row

NAME = "kernels"
EXAMPLE = (
    "Example:  fdq kernels --gpu l4     |     "
    "fdq kernels --decode-step ernie-4.5-21b-a3b --scheme W4A16C8 --gpu h200     |     "
    "fdq kernels --check"
)
_LONGEST_REASON = 160
_FEW_LAUNCHES = 40  # of a layer: more are not listed


@console.command
def run(
    ctx: typer.Context,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            help="t4, a100, l4, h100, h200, b200 or rtx_pro_6000; may be repeated. Default: this "
            "machine's; without one, the table that came with fdq.",
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="Every shape of every kernel; without --gpu for every GPU. Minutes."
        ),
    ] = False,
    kernel: Annotated[
        str | None, typer.Option(help="Only kernels whose name contains this.")
    ] = None,
    decode_step: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compile a whole decode step of this model (a known name, or a directory with a "
            "config.json), with abstract weights.",
        ),
    ] = None,
    scheme: console.Scheme = "W4A16C8",
    layers: Annotated[
        int | None, typer.Option(help="With --decode-step: the first so many layers only.")
    ] = None,
    context: Annotated[int, typer.Option(help="With --decode-step: slots of the cache.")] = 4096,
    batch: Annotated[int, typer.Option(help="With --decode-step: sequences.")] = 1,
    mesh: Annotated[
        str | None,
        typer.Option(help="With --decode-step: so many GPUs of one machine, as in tensor=4."),
    ] = None,
    prefill: Annotated[
        int,
        typer.Option(help="With --decode-step: a chunk of so many tokens of a prompt instead."),
    ] = 0,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Run every kernel on this machine's GPU against its reference, in processes of "
            "their own, and remember what came out, so that models start without doing it.",
        ),
    ] = False,
    interpret: Annotated[
        bool,
        typer.Option("--interpret", help="With --check: in an interpreter, which needs no GPU."),
    ] = False,
    limit: Annotated[
        float, typer.Option(min=1.0, help="With --check: seconds that one kernel may take.")
    ] = 300.0,
    output: Annotated[
        pathlib.Path | None, typer.Option(help="Also write the report to this file, as JSON.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table kernel by GPU as Markdown.")
    ] = False,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """What runs on a GPU and why something will not: compiled for it, on a machine without one.

    Registers, spills, shared memory, and machine instructions that the inner loop spends on a
    weight, "of" the number from which instructions and not memory limit the card.

    Needs the extra `aot` of fdq, but for --check. Exit code 1 if a kernel fails where it should
    run.
    """
    if check:
        from fdq.cli import kernel_checks

        _refuse_beside_check(ctx)
        kernel_checks.run(kernel, interpret=interpret, timeout=limit, as_json=json)
        return
    from fdq.schemes.mesh_rules import parse_sizes
    from pallas_kernels.aot import gpu_targets, report_files

    _refuse_what_goes_unread(ctx, decode_step is not None)
    names = [gpu_targets.find(name).name for name in gpu or []]
    if decode_step is not None:
        sizes = {"layers": layers, "context": context, "batch": batch, "prefill": prefill}
        sizes["mesh"] = None if mesh is None else parse_sizes(mesh)
        _decode_steps(decode_step, scheme, names, output, json, debug, **sizes)
        return
    names = names or ([] if everything else _this_machine())
    compiles = everything or names
    reports, broken = _compile(names, everything, kernel) if compiles else (_committed(kernel), [])
    if output is not None:
        report_files.save(reports, output)
    if json or markdown or everything or not names:
        _summary(reports, markdown=markdown, json=json)
    else:
        for name in names:
            _show(name, [report for report in reports if report.gpu == name])
    for report in reports if debug else ():
        console.err.print(report.traceback, markup=False, soft_wrap=True, end="")
    for problem in broken:
        console.err.print(problem, style="red", markup=False, soft_wrap=True)
    if broken:
        raise typer.Exit(console.FAILED_CHECK)


_OF_DECODE_STEPS = ("scheme", "layers", "context", "batch", "mesh", "prefill")
_OF_KERNELS = {"everything": "--all", "kernel": "--kernel", "markdown": "--markdown"}


def _given(ctx: typer.Context, names: dict[str, str]) -> list[str]:
    """Options of those named that are on the command line."""
    return [
        option
        for name, option in names.items()
        if getattr(ctx.get_parameter_source(name), "name", "DEFAULT") == "COMMANDLINE"
    ]


def _refuse_beside_check(ctx: typer.Context) -> None:
    names = (*_OF_DECODE_STEPS, "gpu", "output", "markdown")
    options = {name: f"--{name}" for name in names}
    given = _given(ctx, options | {"everything": "--all", "decode_step": "--decode-step"})
    if given:
        raise ValueError(f"{', '.join(given)}: not with --check. See fdq kernels --help.")


def _refuse_what_goes_unread(ctx: typer.Context, of_decode_step: bool) -> None:
    """An option that has no meaning beside the others is an error."""
    if given := _given(ctx, {name: f"--{name}" for name in ("interpret", "limit")}):
        raise ValueError(f"{', '.join(given)}: only with --check. See fdq kernels --help.")
    names = _OF_KERNELS if of_decode_step else {name: f"--{name}" for name in _OF_DECODE_STEPS}
    if given := _given(ctx, names):
        without = "not with" if of_decode_step else "only with"
        raise ValueError(f"{', '.join(given)}: {without} --decode-step. See fdq kernels --help.")


def _this_machine() -> list[str]:
    """The GPU of this machine, or the known one that is closest to it."""
    import jax

    from pallas_kernels.aot import gpu_targets

    device = jax.devices()[0]
    if device.platform != "gpu":
        return []
    found = gpu_targets.of_device(device.device_kind)
    if found is None:
        capability = getattr(device, "compute_capability", "")
        known = gpu_targets.GPUS.values()
        alike = [g for g in known if ".".join(map(str, g.compute_capability)) == capability]
        if not alike:
            raise ValueError(
                f"{device.device_kind} (compute capability {capability}) is none of the GPUs that "
                f"kernels are compiled for: {', '.join(gpu_targets.GPUS)}. Choose one with --gpu."
            )
        found = alike[0]
        console.err.print(f"{device.device_kind} is like {found.device_kind}: compiling for that.")
    return [found.name]


def _named(items: Sequence[Any], names: Sequence[str], kernel: str | None) -> list[Any]:
    """The items (cases or reports, with the kernel's name) whose name contains `kernel`."""
    part = (kernel or "").lower()
    chosen = [item for item, name in zip(items, names, strict=True) if part in name.lower()]
    if not chosen:
        known = "; ".join(dict.fromkeys(item.kernel for item in items))
        raise ValueError(f"--kernel {kernel!r} matches no kernel. There are: {known}.")
    return chosen


def _compile(
    names: Sequence[str], everything: bool, kernel: str | None
) -> tuple[list[Report], list[str]]:
    """Reports, and what failed where it was promised to run.

    Representative cases are compiled for every GPU asked for, promised or not, so that the report
    says why a kernel does not run; the other shapes only where the kernel claims to run.
    """
    from pallas_kernels.aot.ahead_of_time import compile_jobs
    from pallas_kernels.aot.gpu_targets import GPUS
    from pallas_kernels.aot.kernel_cases import all_cases

    cases = all_cases()
    cases = _named(cases, [case.name for case in cases], kernel)
    jobs = [
        (case, gpu)
        for gpu in names or GPUS
        for case in cases
        if case.representative or (everything and gpu in case.gpus)
    ]
    with console.progress("Compiling") as progress:
        update = _counter(progress, len(jobs))
        progress(0, len(jobs))
        reports = compile_jobs(jobs, update=update)
    broken = [
        problem
        for (case, gpu), report in zip(jobs, reports, strict=True)
        if gpu in case.gpus
        for problem in report.problems()
    ]
    return reports, broken


def _counter(progress: Callable[..., None], total: int) -> Callable[[Report], None]:
    """Tells a progress bar of one report after the other."""
    done = itertools.count(1)
    return lambda report: progress(next(done), total, f"{report.gpu}: {report.case}")


def _committed(kernel: str | None) -> list[Report]:
    import jax

    from pallas_kernels.aot.report_files import load

    reports = load(jax.__version__)
    return _named(reports, [report.case for report in reports], kernel)


def _show(gpu: str, reports: Sequence[Report]) -> None:
    """The table of one GPU."""
    from pallas_kernels.aot.gpu_targets import GPUS
    from pallas_kernels.aot.report_files import rows

    target = GPUS[gpu]
    title = f"{target.device_kind} ({target.arch}), jax {reports[0].jax}"
    columns = ["kernel", "runs", "registers", "spills", "shared", "instr./weight"]
    table = rows(reports)
    cells = [
        (
            row.kernel + (" (tensor cores)" if row.tensor_core else ""),
            "yes" if row.runs else "no",
            str(row.registers or ""),
            console.size(row.spill_bytes) if row.spill_bytes else "",
            console.size(row.shared_memory_bytes) if row.shared_memory_bytes else "",
            _instructions(row),
        )
        for row in table
    ]
    console.out.print(console.table(title, columns, cells))
    for row in table:
        _reason(row, row.kernel)


def _instructions(row: Row) -> str:
    if row.instructions_per_weight is None:
        return ""
    budget = f" of {row.instruction_budget:.1f}" if row.instruction_budget else ""
    return f"{row.instructions_per_weight:.1f}{budget}"


def _reason(row: Row, name: str) -> None:
    """Prints why a kernel does not run, where it does not."""
    if not row.runs:
        short = row.reason[:_LONGEST_REASON]
        more = " ..." if short != row.reason else ""
        console.out.print(f"{name}: {short}{more}", markup=False, soft_wrap=True)


def _summary(reports: Sequence[Report], *, markdown: bool, json: bool) -> None:
    """The table kernel by GPU."""
    from pallas_kernels.aot import report_files as files
    from pallas_kernels.aot.gpu_targets import SHORT_NAMES

    if json:
        console.print_json({"reports": [report.to_dict() for report in reports]})
        return
    known = tuple(dict.fromkeys(report.gpu for report in reports))
    gpus = tuple(SHORT_NAMES) if markdown else known
    by_kernel = files.by_kernel(reports)
    body = [(name, *(cells.get(gpu, "–") for gpu in gpus)) for name, cells in by_kernel.items()]
    if markdown:
        typer.echo(text_table.markdown(["kernel", *SHORT_NAMES.values()], body))
        return
    title = f"Kernels by GPU: instructions per weight, or yes (jax {reports[0].jax})"
    console.out.print(console.table(title, ["kernel", *gpus], body))
    for row in files.rows(reports):
        _reason(row, f"{row.kernel} on {row.gpu}")


def _decode_steps(
    model: str,
    scheme: str,
    names: Sequence[str],
    output: pathlib.Path | None,
    json: bool,
    debug: bool,
    **sizes: Any,
) -> None:
    import json as text

    from fdq.analysis.decode_step import report

    names = names or _this_machine()
    if not names:
        raise ValueError("--decode-step: name the GPU with --gpu, for this machine has none.")
    results = []
    for name in names:
        with console.progress(f"Compiling for {name}") as progress:
            update = _counter(progress, 3)
            recipe = console.read_scheme(scheme)
            results.append(report(model, recipe, name, **sizes, update=update))
    value = {"decode_steps": [result.to_dict() for result in results]}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text.dumps(value, indent=1) + "\n")
    if json:
        console.print_json(value)
    else:
        _show_decode_steps(results)
    for result in results if debug else ():
        console.err.print(result.traceback, markup=False, soft_wrap=True, end="")
    if not all(result.ok for result in results):
        raise typer.Exit(console.FAILED_CHECK)


def _show_decode_steps(results: Sequence[Any]) -> None:
    first = results[0]
    whole = first.layers == first.of_layers
    layers = f"{first.layers} layers" if whole else f"{first.layers} of {first.of_layers} layers"
    what = f"{first.prefill:,} tokens of a prompt" if first.prefill else "Decode step"
    title = (
        f"{what} of {first.model} in {first.scheme}: {layers}, {first.batch} x "
        f"{first.context:,} tokens, {f'mesh {first.mesh}, ' * bool(first.mesh)}jax {first.jax}"
    )
    columns = ["gpu", "launches", "a layer", "weights", "temporaries", "of weights", "copies"]
    rows = [
        (
            r.gpu,
            f"{r.launches:,}",
            "" if r.launches_per_layer is None else str(r.launches_per_layer),
            console.size(r.weight_bytes),
            console.size(r.temp_bytes),
            f"{100 * r.temp_fraction:.2f} %",
            str(r.weight_copies),
        )
        for r in results
        if r.ok
    ]
    console.out.print(console.table(title, columns, rows))
    for r in results:
        if not r.ok:
            console.out.print(f"{r.gpu}: {r.error}", markup=False, soft_wrap=True)
            continue
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in r.launch_kinds.items())
        console.out.print(f"{r.gpu} launches: {kinds}", markup=False, soft_wrap=True)
        few = r.launches_per_layer is not None and r.launches_per_layer <= _FEW_LAUNCHES
        for line in r.layer_sequence if few else ():
            console.out.print(f"  {line}", markup=False, soft_wrap=True)
        for kernel in r.kernels:
            if kernel.spill_bytes:
                spilled = console.size(kernel.spill_bytes)
                console.out.print(f"{r.gpu}: {kernel.name} spills {spilled}")
        for large in r.large_results[:10]:
            what = f"{large.operation} writes {large.shape} ({console.size(large.bytes)})"
            line = f"{r.gpu}: {large.count} x {what}: {large.source}"
            console.out.print(line, markup=False, soft_wrap=True)
    console.out.print(
        "Copies are results of the size of a weight or of the cache that XLA writes each step."
    )
