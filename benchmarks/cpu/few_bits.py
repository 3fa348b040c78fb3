"""Weights in 8 and 4 bits: what they cost in quality, and what they bring in speed beside bfloat16.

    python -m benchmarks.cpu.few_bits    # writes benchmarks/results/few_bits_<kind>.json; then `make tables`

Quality is the perplexity of the embedded model on the stories that its recipe held out (examples/demo_model), and the error of
logits of random weights of a released shape. Speed is that of greedy steps after a prompt of 128 tokens, and of the prompt, on
one thread, in medians of rounds in turn; the logits of each are first held to those of what its weights stand for.
"""

from __future__ import annotations

import copy
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import gptneo_fast
from benchmarks.models import config_of, loaded, randomise
from benchmarks.tables import RESULTS, ROOT, instructions
from gptneo_fast.demo import FOLDER

WAYS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "int8": {"quantize": "int8"},
    "int4, groups of 128": {"quantize": "int4", "group": 128},
    "int4": {"quantize": "int4"},
    "int4, groups of 32": {"quantize": "int4", "group": 32},
}
SHAPES, PROMPT, STEPS, ROUNDS = ("125m", "TinyStories-33M", "TinyStories-1M"), 128, 32, 9


def stories() -> tuple[list[str], list[str]]:
    """(some that the embedded model was trained on, those that its recipe held out)."""
    sys.path.insert(0, str(ROOT / "examples" / "demo_model"))
    from stories import story

    r = random.Random(0)
    seen = [story(r) for _ in range(60_000)]
    known = set(seen)
    return seen[:48], [s for s in (story(r) for _ in range(600)) if s not in known][:400]


@torch.no_grad()
def perplexity(model: Any, texts: list[str], T: int = 512) -> float:
    """Of rows of T tokens, as the recipe has it."""
    end = model.config.eos_token_id
    ids = torch.tensor([token for text in texts for token in [end, *model.tokenizer.encode(text)]])
    rows = ids[: len(ids) // (T + 1) * (T + 1)].view(-1, T + 1)
    losses = [F.cross_entropy(model(row[None, :-1]).logits[0], row[1:]).item() for row in rows]
    return math.exp(sum(losses) / len(losses))


def quality() -> list[dict[str, Any]]:
    """The embedded model in every way, and calibrated on stories that it has seen."""
    seen, held_out = stories()
    found: list[dict[str, Any]] = []
    for name, how in {**WAYS, "int4, calibrated": {"quantize": "int4", "calibrate": seen}}.items():
        model = gptneo_fast.load(FOLDER, dtype="float32")
        if how is not None:
            model.quantize_(**how)
        value = perplexity(model, held_out)
        found.append({"way": name, "perplexity": value, "share": value / (found[0]["perplexity"] if found else value) - 1})
    return found


@torch.no_grad()
def errors(shape: str = "125m") -> list[dict[str, Any]]:
    """Of logits, their root mean square beside that of the logits about their mean."""
    torch.manual_seed(0)
    model = gptneo_fast.GPTNeoForCausalLM(config_of(shape)).eval()
    randomise(model)
    ids = torch.randint(0, model.config.vocab_size, (1, 256))
    exact = model(ids).logits[0]
    found = []
    for name, how in WAYS.items():
        if how is not None:
            error = copy.deepcopy(model).quantize_(**how)(ids).logits[0] - exact
            found.append({"way": name, "error": (error.norm() / (exact - exact.mean(-1, keepdim=True)).norm()).item()})
    return found


@torch.no_grad()
def check(model: Any, ids: torch.Tensor) -> float:
    """The error of logits beside those of what the weights stand for, as a share of their spread."""
    plain = copy.deepcopy(model).dequantize_()
    usual = plain(ids).logits[0].float()
    exact = plain.float()(ids).logits[0]
    error, may = ((logits - exact).norm() for logits in (model(ids).logits[0].float(), usual))
    assert error <= 1.5 * may, (error, may)  # as much as floats in the model's dtype err
    return (error / (exact - exact.mean(-1, keepdim=True)).norm()).item()


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def speed(shape: str) -> list[dict[str, Any]]:
    """Tokens a second of steps and of the prompt, of a shape with random weights in bfloat16 and in few bits."""
    torch.manual_seed(0)
    plain = gptneo_fast.GPTNeoForCausalLM(config_of(shape)).eval()
    randomise(plain)
    ids = torch.randint(0, plain.config.vocab_size, (1, PROMPT))
    models = {"bfloat16": loaded(plain, dtype=torch.bfloat16)}
    models |= {name: loaded(plain, quantize=name, dtype=torch.bfloat16) for name in ("int8", "int4")}
    del plain
    checked = {name: check(model, ids[:, :64]) for name, model in models.items() if name != "bfloat16"}

    def run(model: Any, n: int) -> None:
        model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

    prompts: dict[str, list[float]] = {name: [] for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            prompt = seconds(partial(run, model, 1))
            whole = seconds(partial(run, model, STEPS + 1))
            if turn:  # the first is not counted
                prompts[name].append(prompt)
                steps[name].append((whole - prompt) / STEPS)
    base = statistics.median(steps["bfloat16"]), statistics.median(prompts["bfloat16"])
    rows = []
    for name, model in models.items():
        step, prompt = statistics.median(steps[name]), statistics.median(prompts[name])
        row = {"shape": shape, "way": name, "steps_per_second": 1 / step, "ratio": base[0] / step, "mb": size_of(model)}
        rows.append(row | {"prompt_ms": prompt * 1e3, "prompt_ratio": base[1] / prompt, "error": checked.get(name)})
    return rows


def size_of(model: Any) -> float:
    """Megabytes of what a model holds."""
    return float(model.get_memory_footprint() / 1e6)


def main() -> None:
    """Measure everything, and keep it."""
    torch.set_num_threads(2)
    found = {"quality": quality(), "errors": errors()}
    torch.set_num_threads(1)
    found["speed"] = [row for shape in SHAPES for row in speed(shape)]
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    facts = {"when": date.today().isoformat(), "commit": commit, "cpu": instructions(), "torch": torch.__version__}
    kind = instructions().lower().replace(" with ", "_")
    path = RESULTS / f"few_bits_{kind}.json"
    path.write_text(json.dumps(facts | {"rounds": ROUNDS} | found, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
