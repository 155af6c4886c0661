"""Seconds to load many LoRA adapters over one base: our bank of stacked tensors against PEFT's load_adapter, from the same files.

    python -m benches.peers.adapters [--shape 17M] [--rank 8] [--count 100] [--peft 20] [--rounds 3]

PEFT's time grows with the square of the number of adapters, so it loads fewer, and the ratio is at that number. The last line is the
time to give a slot another adapter. The page cache is warm: the files have been read before.
"""

import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel

from benches import common
from benches.models import SHAPES, Spent, adapter_folders, model, rounds, say_rounds, spent
from elmwood.lm.adapters.lora import Adapter, Bank

warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT 0.21 with transformers 5.23


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", default="17M", choices=SHAPES)
    for name, value in (("rank", 8), ("count", 100), ("peft", 20), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        folders = adapter_folders(model(options.shape), options.count, options.rank, Path(folder))
        tasks = {"bank": lambda: bank(options.shape, folders), "bank, opened only": lambda: bank(options.shape, folders, read=False)}
        say_rounds("adapters", rounds(tasks, options.rounds), **vars(options))
        if few := folders[: options.peft]:
            found = rounds({"bank, few": lambda: bank(options.shape, few), "peft, few": lambda: peft(options.shape, few)}, 1)
            say_rounds("adapters", found, ("bank, few",), **vars(options))
        made = Bank(model(options.shape), [files(path) for path in folders])
        turns = [list(range(n, n + 4)) for n in range(0, options.count - 3, 4)]
        change = rounds({"four slots change": lambda: spent(lambda: [made.select(slots) for slots in turns], len(turns))}, 1)
        say_rounds("adapters", change, **vars(options))


def files(folder: Path) -> Adapter:
    return Adapter(folder / "adapter_config.json", folder / "adapter_model.safetensors")


def bank(shape: str, folders: list[Path], read: bool = True) -> Spent:
    """Open a bank and, as a bank reads weights when they are first used, use every adapter once."""
    base = model(shape)

    def load() -> None:
        made = Bank(base, [files(path) for path in folders])
        for number in range(len(folders) if read else 0):
            made.select([number])

    return spent(load)


def peft(shape: str, folders: list[Path]) -> Spent:
    base = model(shape)

    def load() -> None:
        wrapped = PeftModel.from_pretrained(base, folders[0], adapter_name="0", low_cpu_mem_usage=True)
        for number, path in enumerate(folders[1:], 1):
            wrapped.load_adapter(path, adapter_name=str(number), low_cpu_mem_usage=True)

    return spent(load)


if __name__ == "__main__":
    main()
