"""The support matrix in SUPPORT.md, made from what the tests ran.

    KERAS_BACKEND=jax python -m pytest --junitxml=jax.xml
    python -m tests.matrix tensorflow.xml jax.xml torch.xml            # prints it
    python -m tests.matrix --write tensorflow.xml jax.xml torch.xml    # into SUPPORT.md
    python -m tests.matrix --check tensorflow.xml jax.xml torch.xml    # fails if it differs

A row is what a test says it covers (`@pytest.mark.covers`), a column is a run. "yes": all tests
that cover it and ran passed; "no": one failed; "-": none ran, for the reason below the table.
"""

import argparse
import collections
import dataclasses
import sys
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parent / "SUPPORT.md"
BEGIN, END = "<!-- matrix: made by tests/matrix.py -->\n", "<!-- end of the matrix -->"


@dataclasses.dataclass
class Run:
    """What one run of the tests showed: its title, and for each thing covered, how it went."""

    title: str = ""
    outcomes: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    reasons: dict = dataclasses.field(default_factory=dict)

    def cell(self, row):
        outcomes = set(self.outcomes[row])
        if "failed" in outcomes:
            return "no"
        return "yes" if "passed" in outcomes else "-"


def read(path):
    """Reads the file that `pytest --junitxml` wrote."""
    run = Run()
    for case in ElementTree.parse(path).iter("testcase"):
        properties = [(one.get("name"), one.get("value")) for one in case.iter("property")]
        for name, value in properties:
            if name == "ran_on":
                run.title = value
            if name == "covers":
                run.outcomes[value].append(_outcome(case))
                skipped = case.find("skipped")
                if skipped is not None:
                    run.reasons[value] = skipped.get("message")
    if not run.title:
        raise SystemExit(f"{path} has no test that says what it covers.")
    return run


def joined(runs):
    """Makes one of the runs with one title, which ran other tests in the same versions."""
    by_title = {}
    for run in runs:
        one = by_title.setdefault(run.title, Run(run.title))
        for row, outcomes in run.outcomes.items():
            one.outcomes[row] += outcomes
        one.reasons.update(run.reasons)
    return list(by_title.values())


def _outcome(case):
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def table(runs):
    """Returns the matrix as Markdown."""
    rows = list(dict.fromkeys(row for run in runs for row in run.outcomes))
    lines = ["| | " + " | ".join(run.title for run in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    notes = {}
    for row in sorted(rows, key=str.lower):
        cells = []
        for run in runs:
            cell = run.cell(row)
            if cell == "-" and row in run.reasons:
                number = notes.setdefault(run.reasons[row], len(notes) + 1)
                cell = f"- ({number})"
            cells.append(cell)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    numbered = [f"({number}) {reason}" for reason, number in notes.items()]
    return "\n".join([*lines, "", "  \n".join(numbered), ""])


def without_versions(text):
    """The table but for its first line, in which versions change as they are published."""
    return text.strip().split("\n")[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    made = table(joined(read(path) for path in arguments.files))
    print(made)
    before, written = PAGE.read_text().split(BEGIN)
    written, after = written.split(END)
    if arguments.write:
        PAGE.write_text(before + BEGIN + "\n" + made + "\n" + END + after)
    if arguments.check and without_versions(written) != without_versions(made):
        sys.exit(
            "The matrix in tests/SUPPORT.md is another one: `python -m tests.matrix --write ...`."
        )


if __name__ == "__main__":
    main()
