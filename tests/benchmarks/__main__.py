"""Runs all benchmarks, each in a process of its own, and writes their tables as Markdown.

    python -m tests.benchmarks                        # all, into benchmarks.md
    python -m tests.benchmarks switch guard           # some
    python -m tests.benchmarks --output other.md

Each table is of ratios: two things timed in turn in one process, with the median and the range over
repeats, and whether the median meets its target. Let nothing else run beside it.
"""

import argparse
import datetime
import os
import pathlib
import platform
import subprocess
import sys
from importlib import import_module, metadata

NAMES = (
    "drift",
    "switch",
    "guard",
    "backup",
    "groups",
    "features",
    "feature_dtypes",
    "stage_records",
)
PACKAGES = ("tensorflow", "keras", "numpy")


def machine():
    """Returns what the figures were measured on, in a sentence."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return (
        f"{cores} cores of {_processor()}, {platform.system()}, no GPU, Python "
        f"{platform.python_version()}, {versions}; {datetime.date.today():%B %Y}."
    )


def _processor():
    info = pathlib.Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def run(name):
    """Runs a benchmark. Returns its section of the Markdown."""
    command = [sys.executable, "-m", f"tests.benchmarks.{name}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    title = import_module(f"tests.benchmarks.{name}").__doc__.split("\n")[0].rstrip(".")
    return f"## {title}\n\n`python -m tests.benchmarks.{name}`\n\n{done.stdout.strip()}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(NAMES))
    parser.add_argument("--output", type=pathlib.Path, default="benchmarks.md")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}. There are {', '.join(NAMES)}.")
    parts = [f"# Benchmarks\n\nMeasured on {machine()}\n"]
    for name in arguments.names or NAMES:
        parts.append(run(name))
        print(parts[-1], flush=True)
        arguments.output.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
