"""Loading a checkpoint of the 1.3B shape, float32 on disk and bfloat16 in memory, beside transformers: seconds and peak memory.

python benchmarks/cpu/load_checkpoint.py                       # writes benchmarks/results/load_checkpoint.json
python benchmarks/cpu/load_checkpoint.py --layers 2 --out -    # a smaller shape, on standard output

The checkpoint (5.3 GB of random weights) is written to a temporary folder and read once, so that every run finds it in the
page cache. Each run is a process of its own; the two loaders take turns. Peak memory is VmHWM, the kernel's own high-water
mark of resident pages, less what the process held after its imports. Both must load the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = """
import json, sys, time
import torch
import {library} as library
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
Model = library.GPTNeoForCausalLM
torch.set_num_threads({threads})
torch.ones(64, 64) @ torch.ones(64, 64)
before, began = peak(), time.perf_counter()
model = Model.from_pretrained({folder!r}, dtype=torch.bfloat16)
seconds = time.perf_counter() - began
rise = peak() - before
bits = {{n: int(p.detach().view(torch.int16).sum(dtype=torch.int64)) for n, p in model.named_parameters()}}
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps(dict(seconds=seconds, peak_rise=rise, size=size, bits=bits)))
"""


def write(folder: Path, layers: int, hidden: int = 2048) -> int:
    """A checkpoint with random float32 weights, written tensor by tensor; returns the bytes of its weights."""
    import torch

    import gptneo_fast

    config = gptneo_fast.GPTNeoConfig(num_layers=layers, hidden_size=hidden, architectures=["GPTNeoForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in gptneo_fast.GPTNeoForCausalLM(config).named_parameters()}
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + 4 * shape.numel()]}
        at += 4 * shape.numel()
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            (torch.randn(shape) * 0.02).numpy().tofile(file)
    return at


def load(library: str, folder: Path, threads: int) -> dict:
    """One load in a process of its own."""
    code = RUN.format(library=library, folder=str(folder), threads=threads)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is written for the while; default: a temporary folder"
    )
    parser.add_argument(
        "--out", default=str(Path(__file__).parents[1] / "results" / "load_checkpoint.json"), help="'-' prints only"
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="load-checkpoint-", dir=args.folder))
    runs: dict[str, list[dict]] = {"gptneo_fast": [], "transformers": []}
    try:
        on_disk = write(folder, args.layers)
        for library in runs:
            load(library, folder, args.threads)  # warms the page cache and the imports
        for _ in range(args.rounds):
            for library, done in runs.items():
                done.append(load(library, folder, args.threads))
    finally:
        shutil.rmtree(folder)
    bits = [run.pop("bits") for done in runs.values() for run in done]
    assert all(b == bits[0] for b in bits), "the loaders disagree"
    size = runs["gptneo_fast"][0]["size"]
    from importlib.metadata import version

    report = {
        "what": f"GPT-Neo 1.3B shape with {args.layers} layers: float32 safetensors to bfloat16 on the CPU",
        "bytes_on_disk": on_disk,
        "bytes_loaded": size,
        "threads": args.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": version("torch"), "transformers": version("transformers")},
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
        "equal_bits": True,
    }
    for library, done in runs.items():
        rises = [run["peak_rise"] for run in done]
        report[library] = {
            "seconds_median": round(statistics.median(run["seconds"] for run in done), 3),
            "seconds_best": round(min(run["seconds"] for run in done), 3),
            "seconds": [round(run["seconds"], 3) for run in done],
            "peak_rise_max": max(rises),
            "peak_rise_beyond_the_weights_mb": round((max(rises) - size) / 2**20, 1),
        }
    text = json.dumps(report, indent=1) + "\n"
    print(text, end="")
    if args.out != "-":
        Path(args.out).parent.mkdir(exist_ok=True)
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
