"""The evaluation harness on the embedded model: our LM beside its own `hf` model over transformers, the same requests in turn.

    python -m benchmarks.cpu.harness    # needs the extra [eval]; writes benchmarks/results/harness.json

Answers are compared before anything is kept: greedy choices and texts are equal, log-probabilities but for the order of sums.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import gptneo_fast
from benchmarks.models import EMBEDDED
from benchmarks.tables import RESULTS, ROOT, instructions
from gptneo_fast.demo import FOLDER
from gptneo_fast.integrations.lm_eval import LM

STORY = "Once upon a time there was a little fox who lived in a wood and sang. "
ANIMALS = ("fox", "dog", "bird", "king", "girl", "boy", "cat", "bear", "mouse", "wolf")
ENDS = (" red", " happy and went home", " sad", " in a wood by the lake")
TURNS, ROWS, THREADS, FAR = 5, 8, 2, 1e-2  # FAR: log-probabilities of some thirty tokens, added in another order


def requests() -> dict[str, tuple[str, list[tuple[Any, ...]]]]:
    """What is asked, by name: the method, and its arguments."""
    until = {"until": ["\n\n"], "max_gen_toks": 48, "do_sample": False}
    short = [(STORY * 3 + f"The {a} number {i} was", end) for i in range(6) for a in ANIMALS for end in ENDS]
    return {
        "240 choices, four to a context": ("loglikelihood", short),
        "40 choices, long contexts": ("loglikelihood", [(STORY * 18 + f"The {a} was", end) for a in ANIMALS for end in ENDS]),
        "16 texts, perplexity": ("loglikelihood_rolling", [(STORY * (10 + i % 7) + f"{i} The end",) for i in range(16)]),
        "10 continuations": ("generate_until", [(STORY + f"The {a}", until) for a in ANIMALS]),
    }


def answers(lm: Any, method: str, arguments: list[tuple[Any, ...]]) -> tuple[float, list[Any]]:
    """(seconds, what it says)."""
    asked = [Instance(request_type=method, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]
    began = time.perf_counter()
    found = getattr(lm, method)(asked, disable_tqdm=True)
    return time.perf_counter() - began, found


def check(method: str, ours: list[Any], theirs: list[Any]) -> None:
    """Raises AssertionError where the answers differ."""
    if method == "generate_until":
        assert ours == theirs, "texts differ"
        return
    pairs = [(a, b) if method == "loglikelihood" else ((a, True), (b, True)) for a, b in zip(ours, theirs, strict=True)]
    assert all(a[1] == b[1] for a, b in pairs), "greedy choices differ"
    assert max(abs(a[0] - b[0]) for a, b in pairs) < FAR, "log-probabilities differ"


def main() -> None:
    """Measure, and write the result."""
    torch.set_num_threads(THREADS)
    tokenizer = gptneo_fast.AutoTokenizer.from_pretrained(FOLDER).to_transformers()
    tokenizer.pad_token = tokenizer.eos_token
    theirs = transformers.GPTNeoForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    runners = {
        "gptneo_fast": LM(gptneo_fast.load(FOLDER, dtype="float32")),
        "hf": HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=ROWS, device="cpu"),
    }
    rows = []
    for name, (method, arguments) in requests().items():
        seconds: dict[str, list[float]] = {runner: [] for runner in runners}
        for _ in range(TURNS + 1):
            said = {}
            for runner, lm in runners.items():
                took, said[runner] = answers(lm, method, arguments)
                seconds[runner].append(took)
            check(method, said["gptneo_fast"], said["hf"])
        median = {runner: statistics.median(took[1:]) for runner, took in seconds.items()}  # the first one warms up
        rows.append({"work": name, "seconds": median, "ratio": median["hf"] / median["gptneo_fast"]})
        print(json.dumps(rows[-1]), flush=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    report = {
        "model": EMBEDDED,
        "dtype": "float32",
        "threads": THREADS,
        "batch size of hf": ROWS,
        "cpu": f"{os.cpu_count()} cores, {instructions()}",
        "when": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("torch", "transformers", "lm_eval")},
        "rows": rows,
    }
    (RESULTS / "harness.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
