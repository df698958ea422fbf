"""What the benchmarks print; what they measure is not tested."""

import pytest

from tests.benchmarks.__main__ import NAMES
from tests.benchmarks.timing import print_table, verdict


@pytest.mark.parametrize(
    ("target", "value", "said"),
    [("<= 1.1", 1.1, "yes"), ("<= 1.1", 1.2, "MISSED"), (">= 2", 1.9, "MISSED"), ("", 5.0, "")],
)
def test_a_missed_target_is_said(target, value, said):
    assert verdict(target, value) == said


def test_a_row_has_median_and_range(capsys):
    print_table([("this / that", "<= 2", [1.0, 4.0, 3.0])])
    assert "| this / that | 3 | 1 to 4 | <= 2 | MISSED |" in capsys.readouterr().out


def test_one_command_runs_all_that_there_are(request):
    folder = request.path.parent / "benchmarks"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__", "timing"}
    assert modules == set(NAMES)
