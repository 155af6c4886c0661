"""How long `elmwood --help` takes, beside an empty Python and a bare `import torch`, interleaved: one JSON line.

python -m benches.speed.start [--rounds 9]
"""

import statistics
import subprocess
import sys
import time

from benches.common import parser, say

COMMANDS = {
    "help": [sys.executable, "-m", "elmwood", "--help"],
    "python": [sys.executable, "-c", "pass"],
    "torch": [sys.executable, "-c", "import torch"],
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    rounds = options.parse_args().rounds
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, command in COMMANDS.items():
            took = seconds(command)
            if turn:  # the first round fills the disk cache
                found[name].append(took)
    median = {name: statistics.median(took) for name, took in found.items()}
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, elmwood.cli; print('torch' in sys.modules)"], check=True, capture_output=True, text=True
    )
    seconds_of = {f"{name}_seconds": value for name, value in median.items()}
    ratio, torch = median["help"] / median["python"], loaded.stdout.strip() == "True"
    say("start", rounds=rounds, **seconds_of, help_over_python=ratio, imports_torch=torch)


if __name__ == "__main__":
    main()
