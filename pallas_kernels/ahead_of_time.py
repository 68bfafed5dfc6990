"""Compiles kernels and whole programs for any GPU on a machine without one, and reports on them.

    reports = compile_cases(all_cases(), ["t4", "h200"])
    print(reports[0].registers, reports[0].problems())

XLA compiles for a GPU that is only described to it (`Gpu.target_config`), down to machine code. The
functions are traced with that GPU as the default device, so that what asks for the device's kind,
compute capability or number of multiprocessors gets those of the real card.

Each compile is a process of its own (`compile_worker`): an instruction that an architecture lacks
ends the process rather than raise an error, and a compiler that hangs is ended after `timeout`.

Needs the extra `fdq[aot]`: JAX's CUDA plugin, ptxas and cuobjdump; no driver and no CUDA libraries.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pallas_kernels import cuda_tools, gpu_targets, launches
from pallas_kernels.compile_report import HotLoop, KernelReport
from pallas_kernels.compile_report import Report as Report
from pallas_kernels.cuda_tools import Resources
from pallas_kernels.kernel_cases import KernelCase, Program
from pallas_kernels.sass import Loop, functions, hot_loop

TIMEOUT = 600.0
"""Seconds that one compile may take."""

_MOSAIC_SUFFIX = "_mosaic_gpu_kernel"


def unavailable() -> str | None:
    """Why nothing can be compiled ahead of time here; None if it can."""
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "JAX's CUDA plugin is not installed, which compiles for GPUs: " + cuda_tools.INSTALL
    for tool in ("ptxas", "cuobjdump"):
        try:
            cuda_tools.find(tool)
        except FileNotFoundError as error:
            return str(error)
    return None


def compile_cases(
    cases: Sequence[KernelCase],
    gpus: Iterable[str] | None = None,
    *,
    processes: int = 2,
    timeout: float = TIMEOUT,
    update: Callable[[Report], None] | None = None,
) -> list[Report]:
    """Compiles each case for each GPU, in child processes.

    Args:
      cases: `build` must be importable in another process: a function of a module, a
        ``functools.partial`` of one, or a case of `kernel_cases.all_cases` (those are looked up by
        name).
      gpus: names; None for those that each case claims. With names given, every case is compiled
        for all of them, claimed or not.
      processes: compiles at a time; each takes one core and about 1 GB.
      timeout: seconds that one compile may take.
      update: called with each report as it comes, from one thread at a time.

    Returns:
      One report for each case and GPU, in that order.

    Raises:
      ModuleNotFoundError: the extra `fdq[aot]` is not installed.
      ValueError: an unknown GPU.
    """
    named = None if gpus is None else [gpu_targets.find(name).name for name in gpus]
    jobs = [(case, gpu) for case in cases for gpu in (case.gpus if named is None else named)]
    return compile_jobs(jobs, processes=processes, timeout=timeout, update=update)


def compile_jobs(
    jobs: Sequence[tuple[KernelCase, str]],
    *,
    processes: int = 2,
    timeout: float = TIMEOUT,
    update: Callable[[Report], None] | None = None,
) -> list[Report]:
    """`compile_cases` for chosen pairs of a case and a GPU's name.

    Raises:
      ModuleNotFoundError: the extra `fdq[aot]` is not installed.
    """
    from pallas_kernels.compile_pool import run_jobs

    if reason := unavailable():
        raise ModuleNotFoundError(reason)
    return run_jobs(list(jobs), processes=processes, timeout=timeout, update=update)


def compile_for(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    gpu: str,
    *,
    donate: tuple[int, ...] = (),
    timeout: float = TIMEOUT,
) -> Report:
    """Compiles one function for one GPU in a child process.

    Args:
      function: of a module, or a ``functools.partial`` of one (no lambda: another process imports
        it).
      arguments: pytrees of ``jax.ShapeDtypeStruct``.
      gpu: a name in `gpu_targets.GPUS`.
      donate: positions of arguments whose buffers are given up.
      timeout: seconds.
    """
    import functools

    name = getattr(function, "__name__", type(function).__name__)
    build = functools.partial(
        Program, function=function, arguments=tuple(arguments), donate=tuple(donate)
    )
    case = KernelCase(name=name, kernel=name, build=build)
    return compile_cases([case], [gpu], processes=1, timeout=timeout)[0]


def compile_here(case: KernelCase, gpu: str) -> Report:
    """Compiles a case in this process, which may end it; see `compile_cases`.

    The environment must hold JAX_PLATFORMS=cpu and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 before jax is
    imported. Only one GPU should be compiled for in a process.
    """
    import jax

    target = gpu_targets.find(gpu)
    base = Report(
        case=case.name,
        kernel=case.kernel,
        gpu=target.name,
        arch=target.arch,
        jax=jax.__version__,
        ok=False,
    )
    with tempfile.TemporaryDirectory(prefix="fdq-aot-") as scratch:
        directory = pathlib.Path(scratch)
        try:
            return _compile(case, target, base, directory)
        except Exception as error:  # the reason is the result, whatever the compiler raises
            return dataclasses.replace(
                base, error=one_line(error), traceback=traceback.format_exc()
            )


def _compile(
    case: KernelCase, target: gpu_targets.Gpu, base: Report, directory: pathlib.Path
) -> Report:
    import jax
    from jax.experimental import topologies

    device = topologies.get_topology_desc(
        platform="cuda", target_config=target.target_config(), topology="1x1x1"
    ).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    start = time.perf_counter()
    with jax.default_device(device):
        program = case.build()
        arguments = jax.tree.map(abstract, program.arguments)
        lowered = jax.jit(program.function, donate_argnums=program.donate).lower(*arguments)
    lowered_at = time.perf_counter()
    mosaic, xla = directory / "mosaic", directory / "xla"
    mosaic.mkdir()
    # Mosaic's kernels never appear in XLA's dump. They are dumped during the compile only: during
    # lowering it would double the time, for texts that nobody reads.
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(mosaic)
    os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
    try:
        compiled = lowered.compile(
            compiler_options={
                "xla_dump_to": str(xla),
                "xla_dump_emitter_re": "ptx",
                "xla_gpu_dump_llvmir": True,
            }
        )
    finally:
        del os.environ["MOSAIC_GPU_DUMP_TO"], os.environ["MOSAIC_GPU_DUMP_PTX"]
    compiled_at = time.perf_counter()
    counted = launches.count(
        _text(xla, "*thunk_sequence.txt"),
        _text(xla, "*thunk_metadata.txt"),
        _text(xla, "*gpu_after_optimizations.txt"),
    )
    ours, loops = _mosaic_kernels(mosaic)
    memory: Any = compiled.memory_analysis()
    report = dataclasses.replace(
        base,
        ok=True,
        lower_seconds=round(lowered_at - start, 3),
        compile_seconds=round(compiled_at - lowered_at, 3),
        kernels=(*ours, *(_xla_kernels(xla) if case.xla_kernels else ())),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        launches=counted.total,
        launch_kinds=counted.kinds,
        unknown_loops=counted.unknown_loops,
        copies=counted.copies,
        sequence=counted.sequence,
        large_results=counted.large_results,
    )
    return _with_instructions(report, case, target, loops)


def _with_instructions(
    report: Report, case: KernelCase, target: gpu_targets.Gpu, loops: dict[str, Loop]
) -> Report:
    counted = next((loop for name, loop in loops.items() if case.report in name), None)
    if case.weights_per_iteration is None or counted is None:
        return report
    weights = case.weights_per_iteration
    if callable(weights):
        weights = weights(counted)
    return dataclasses.replace(
        report,
        instructions_per_weight=round(len(counted) / weights, 3) if weights else None,
        instruction_limit=case.instruction_limit,
        instruction_budget=(
            round(target.instruction_budget(case.bytes_per_weight), 2)
            if case.bytes_per_weight
            else None
        ),
    )


def _mosaic_kernels(directory: pathlib.Path) -> tuple[list[KernelReport], dict[str, Loop]]:
    """Mosaic's kernels without repetition, and the hot loop of each by name."""
    reports: list[KernelReport] = []
    loops: dict[str, Loop] = {}
    seen: set[str] = set()
    for ptx in sorted(directory.glob("*.ptx"), key=_number):
        text = ptx.read_text()
        if text in seen:  # jax 0.11.2 compiles a kernel once for each place that calls it
            continue
        seen.add(text)
        resources, cubin = cuda_tools.assemble(ptx)
        machine_code = functions(cuda_tools.disassemble(cubin))
        dynamic = _dynamic_shared_memory(ptx.with_suffix(".mlir-passes.log"))
        for one in resources:
            name = one.name.removesuffix(_MOSAIC_SUFFIX)
            loop = hot_loop(machine_code[one.name])
            loops.setdefault(name, loop)
            reports.append(_kernel_report(one, name, dynamic, mosaic=True, loop=loop))
    return reports, loops


def _xla_kernels(directory: pathlib.Path) -> list[KernelReport]:
    found: dict[str, KernelReport] = {}
    for ptx in sorted(directory.glob("*.ptx"), key=_number):
        if ".entry" not in ptx.read_text():
            continue
        for one in cuda_tools.assemble(ptx)[0]:
            found[one.name] = _kernel_report(one, one.name, 0, mosaic=False, loop=None)
    return list(found.values())


def _kernel_report(
    resources: Resources, name: str, dynamic: int, *, mosaic: bool, loop: Loop | None
) -> KernelReport:
    hot = None
    if loop is not None:
        hot = HotLoop(
            instructions=len(loop),
            opcodes=loop.opcodes,
            global_bytes=loop.global_bytes,
            whole_kernel=loop.whole_kernel,
        )
    return KernelReport(
        name=name,
        mosaic=mosaic,
        registers=resources.registers,
        stack_bytes=resources.stack_bytes,
        spill_store_bytes=resources.spill_store_bytes,
        spill_load_bytes=resources.spill_load_bytes,
        shared_memory_bytes=resources.shared_memory_bytes + dynamic,
        tensor_core=resources.tensor_core,
        loop=hot,
    )


def _dynamic_shared_memory(log: pathlib.Path) -> int:
    """Bytes of shared memory that a Mosaic kernel asks for at launch, which ptxas cannot know."""
    if not log.is_file():
        return 0
    constants: dict[str, int] = {}
    with log.open() as lines:
        for line in lines:
            if match := re.match(r"\s*(%\w+) = arith\.constant (\d+) : i32", line):
                constants[match.group(1)] = int(match.group(2))
            elif "gpu.launch " in line:
                match = re.search(r"dynamic_shared_memory_size (%\w+)", line)
                return constants.get(match.group(1), 0) if match else 0
    return 0


def one_line(error: BaseException | str) -> str:
    """An error's text in one line, without the parts that name no cause."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # JAX appends where the primitive was bound; MLIR appends the whole module.
    kept = []
    for line in lines:
        if line.startswith(("-----", "The above exception", "module @", "#loc", "For simplicity")):
            break
        kept.append(line)
    return " ".join(" ".join(kept).split())[:600]


def _number(path: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", path.stem))


def _text(directory: pathlib.Path, pattern: str) -> str:
    return "".join(path.read_text() for path in sorted(directory.glob(pattern)))
