"""The table of kernels and GPUs in docs/gpu.md, from the committed ahead-of-time report.

``python -m benchmarks.gpu_table`` prints it, ``--page docs/gpu.md`` puts it between its marks.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from benchmarks import page
from fdq.text_table import markdown
from pallas_kernels.aot import report_files as files
from pallas_kernels.aot.ahead_of_time import Report
from pallas_kernels.aot.gpu_targets import SHORT_NAMES

PART = "kernels"


def table(reports: Sequence[Report]) -> str:
    """Markdown: one line a kernel, one column a GPU.

    A number is the machine instructions that the inner loop spends on a weight (of attention: on an
    element of the cache), ``yes`` where there is nothing to count, a dash where it does not run.
    """
    known = {report.gpu for report in reports}
    gpus = [gpu for gpu in SHORT_NAMES if gpu in known]
    rows = [
        (kernel, *(cells.get(gpu, "–") for gpu in gpus))
        for kernel, cells in files.by_kernel(reports).items()
    ]
    return markdown(["kernel", *(SHORT_NAMES[gpu] for gpu in gpus)], rows)


def main(argv: list[str] | None = None) -> int:
    """Prints the table, or writes it to a file with marks."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--page", type=pathlib.Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    made = table(files.load())
    if arguments.page is None:
        print(made)
        return 0
    try:
        page.fill(arguments.page, PART, made)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
