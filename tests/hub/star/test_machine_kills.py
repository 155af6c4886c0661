"""A star's machines are killed in every phase: a few of the kills of benches/star/machine_kills.py, in processes of their own."""

from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from benches.star.machine_kills import alone, several

found = alone(Path("alone"), 5, 3, "top", 0)
assert found["lost"] == 0 and found["kills"] > 2, found
found = several(Path("several"), 2, 2, 2, "int8", 1)
assert found["kills"] > 0, found
"""


def test_killed_machines_lose_no_more_than_a_grant_and_nothing_is_applied_twice(forked, tmp_path):
    done = forked(SCRIPT, str(Path(__file__).parents[3]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
