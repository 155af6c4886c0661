"""How long `elmwood --help` takes, beside an empty Python and a bare `import torch`, in turn: one JSON line.

python -m benches.speed.start [ROUNDS]
"""

import json
import statistics
import subprocess
import sys
import time

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
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
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
    line = {"bench": "start", "rounds": rounds, **{f"{name}_seconds": round(value, 3) for name, value in median.items()}}
    line |= {"help_over_python": round(median["help"] / median["python"], 1), "imports_torch": loaded.stdout.strip() == "True"}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
