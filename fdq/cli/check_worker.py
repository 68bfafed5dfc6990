"""A process that runs self-checks of kernels, for `fdq kernels --check`.

    python -m fdq.cli.check_worker

says in a line of JSON what there is, then reads names of checks, one a line, and answers each with
a line. What ends it or hangs is one check's, and its parent's to tell.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Serves until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    import jax

    from fdq.analysis.standard_checks import standard_checks
    from fdq.ops import verdicts

    device = jax.local_devices()[0]
    checks = {check.name: check for check in standard_checks()}
    answer(
        {
            "platform": device.platform,
            "environment": verdicts.environment_of(device),
            "checks": {name: check.kernel for name, check in checks.items()},
        }
    )
    for line in sys.stdin:
        start = time.perf_counter()
        reason = checks[json.loads(line)].run(device)
        answer({"reason": reason, "seconds": round(time.perf_counter() - start, 2)})


if __name__ == "__main__":
    main()
