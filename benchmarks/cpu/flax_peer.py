"""The Flax classes beside transformers 4.57's: tokens and logits compared, then decoding on the CPU timed in turns.

    python -m venv peer && peer/bin/pip install transformers==4.57.6 jax==0.4.38 jaxlib==0.4.38 flax==0.10.2 torch -e .
    peer/bin/python -m benchmarks.cpu.flax_peer OUT.json

Both run in one process, on one jax, with the same weights; each `generate` is compiled by jax.jit and warmed before it is
timed. Rounds alternate; a figure is the median of the rounds. A step is read off two runs:
(time of N new tokens - time of 1 new token) / (N - 1).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import gptneo_fast
from gptneo_fast.flax import FlaxGPTNeoForCausalLM

SIZES: dict[str, dict[str, Any]] = {
    "small": dict(vocab_size=4096, hidden_size=256, num_layers=4, num_heads=4, max_position_embeddings=1024),
    "125m": dict(vocab_size=50257, hidden_size=768, num_layers=12, num_heads=12, max_position_embeddings=2048),
}


def peers(size: str) -> tuple[Any, Any]:
    """(transformers' model, ours) with the same weights, which go by way of flax_model.msgpack that theirs wrote."""
    import transformers

    values = SIZES[size]
    layers = [("global", "local")[i % 2] for i in range(values["num_layers"])]
    config = transformers.GPTNeoConfig(**values, attention_types=[[layers, 1]], window_size=256)
    theirs = transformers.FlaxGPTNeoForCausalLM(config, seed=0)
    theirs.params = jax.tree_util.tree_map(lambda x: x * 4 if x.ndim > 1 else x, theirs.params)  # peaked, as once trained
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = FlaxGPTNeoForCausalLM.from_pretrained(folder)
        back = Path(folder) / "ours"
        ours.save_pretrained(back)
        again = transformers.FlaxGPTNeoForCausalLM.from_pretrained(back)
    same = jax.tree_util.tree_map(
        lambda a, b, c: bool((a == b).all() and (a == c).all()), theirs.params, ours.params, again.params
    )
    assert all(jax.tree_util.tree_leaves(same)), "a weight changed on the way through the files"
    return theirs, ours


def parity(theirs: Any, ours: Any) -> dict[str, Any]:
    """Errors of logits past the window, plain and cached, a row padded on the left; whether generated tokens agree."""
    config = ours.config
    T, ids = 400, np.random.default_rng(0).integers(0, config.vocab_size, (2, 400))
    mask = np.ones((2, T), np.int32)
    mask[1, :37] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)

    def error(a: Any, b: Any) -> float:
        a, b = np.asarray(a)[mask > 0], np.asarray(b)[mask > 0]
        return float(np.abs(a - b).max() / np.abs(b).max())

    whole = _oracle(ours, ids, mask, positions)
    found = {f"plain, {name}": error(m(ids, mask, positions).logits, whole) for name, m in (("theirs", theirs), ("ours", ours))}
    for name, model in (("cached, theirs", theirs), ("cached, ours", ours)):
        cache, parts = model.init_cache(2, T), []
        for begin, end in ((0, 390), *((i, i + 1) for i in range(390, T))):
            step = slice(begin, end)
            out = model(ids[:, step], mask, positions[:, step], past_key_values=cache)
            cache = out.past_key_values
            parts.append(np.asarray(out.logits))
        found[name] = error(np.concatenate(parts, 1), whole)
    options = dict(attention_mask=mask[:, :250], eos_token_id=None, pad_token_id=0)
    agree = {}
    for name, more in (
        ("greedy", dict(max_length=290)),
        ("sampled", dict(max_length=290, do_sample=True, top_k=20, top_p=0.9, temperature=0.8, prng_key=jax.random.PRNGKey(5))),
        ("beams", dict(max_length=270, num_beams=3)),
    ):
        # theirs must have an end token: one beyond the vocabulary never comes
        a = theirs.generate(jnp.asarray(ids[:, :250]), **(options | {"eos_token_id": config.vocab_size} | more)).sequences
        b = ours.generate(ids[:, :250], **options, **more).sequences
        agree[name] = bool(np.array_equal(a, b))
    return {"largest error of logits beside float64 / largest logit": found, "tokens equal": agree}


def _oracle(ours: Any, ids: Any, mask: Any, positions: Any) -> Any:
    """Logits of the torch reference in float64."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        model = gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder, dtype=torch.float64, backend="reference")
    with torch.no_grad():
        return model(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(positions)
        ).logits.numpy()


def timed(call: Any) -> float:
    """Seconds of one call, to the last byte."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def speed(theirs: Any, ours: Any, batch: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a decode step of each, compiled, in turns."""
    ids = jnp.asarray(np.random.default_rng(1).integers(0, ours.config.vocab_size, (batch, prompt)), jnp.int32)

    def compiled(model: Any, tokens: int, **options: Any) -> Any:
        length = dict(max_length=prompt + tokens, pad_token_id=0) | options
        run = jax.jit(lambda ids, params: model.generate(ids, params=params, **length).sequences)
        return lambda: run(ids, model.params)

    calls = {
        (name, tokens): compiled(model, tokens, eos_token_id=eos)
        for name, model, eos in (("transformers", theirs, ours.config.vocab_size), ("gptneo_fast", ours, None))
        for tokens in (1, new)
    }
    for call in calls.values():
        call()
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            seconds[key].append(timed(call))
    step = {
        name: [1e3 * (many - one) / (new - 1) for many, one in zip(seconds[name, new], seconds[name, 1], strict=True)]
        for name in ("transformers", "gptneo_fast")
    }
    middle = {name: statistics.median(times) for name, times in step.items()}
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "ms a step, median": {k: round(v, 3) for k, v in middle.items()},
        "ms a step, of each round": {k: [round(t, 3) for t in v] for k, v in step.items()},
        "ms of prompt and first token, median": {k: round(1e3 * statistics.median(seconds[k, 1]), 1) for k in step},
        "times as fast": round(middle["transformers"] / middle["gptneo_fast"], 2),
    }


def main() -> None:
    """Parity on the small size, then speed, into one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["small", "125m"], choices=SIZES)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("BATCH", "PROMPT", "NEW"), help="instead of the usual two")
    args = parser.parse_args()
    result: dict[str, Any] = {
        "what": "Flax classes beside transformers', float32, CPU, one process, rounds in turns",
        "versions": {name: version(name) for name in ("transformers", "jax", "jaxlib", "flax", "numpy")}
        | {"python": platform.python_version(), "gptneo_fast": gptneo_fast.__version__},
        "cores": os.cpu_count(),
        "load at begin": os.getloadavg()[0],
    }
    for size in args.sizes:
        theirs, ours = peers(size)
        shapes = [(1, 32, 64), (4, 32, 64)] if size != "small" else [(1, 32, 128), (4, 300, 128)]
        shapes = [tuple(args.shape)] if args.shape else shapes
        result[size] = {
            "parity": parity(theirs, ours) if size == "small" else "see small",
            "speed": [speed(theirs, ours, *shape, args.rounds) for shape in shapes],
        }
        result["load at end"] = os.getloadavg()[0]
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result[size], indent=1))


if __name__ == "__main__":
    main()
