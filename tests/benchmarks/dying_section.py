"""A section with cases that die, raise or hang, by the letter."""

import dataclasses
import os
import time

from benchmarks.gpu_child import run_cases, section_main


@dataclasses.dataclass
class Case:
    key: str


def run(settings, emit):
    def measure(case, settings):
        if case.key == "b":
            os._exit(7)
        if case.key == "h":
            time.sleep(60)
        if case.key == "c":
            raise ValueError("not this one")
        print("libraries print what they like")
        return {"section": "test"}

    run_cases([Case(key) for key in settings.more["cases"]], settings, emit, measure)


if __name__ == "__main__":
    section_main(run)
