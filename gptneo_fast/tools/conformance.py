"""Hold an engine against what GPT-Neo is: `python -m gptneo_fast.tools.conformance ENGINE [ENGINE ...] [--json FILE]`.

Local layers see `window_size` tokens, 256 in every released model, and that is where engines go wrong. Three models are
tried: a small random one with a window of 16, one with a window of 256, and the embedded one, which is trained; or those that
`--model` names. For each there are three texts: one pass over a text longer than the window; a prompt shorter than it
and then token by token, with a cache, across it; and the same for two rows of which one is padded on the left.

The truth is our reference in float64 on the same checkpoint. What an engine may err is measured: twice what plain torch errs
in the engine's dtype, in several orders of its sums (as in `verify`). Positions count from 0; one below the window sees all
that is before it, and the first that does not see position 0 has the window's number.

Engines: "gptneo_fast"; "transformers" (eager), "transformers-static-cache" (eager, with a StaticCache of all the model's
positions), "transformers-sdpa" and "transformers-flash_attention_2", where transformers offers them; and "module:function", a
function of yours that is called as

    function(folder: str, ids: list[int])

with the folder of a checkpoint in the format of the hub (config.json, model.safetensors). It returns either

- logits [T, V], of floats: row t is what follows ids[:t + 1]. It is called once, with a text longer than the window; or
- tokens [N], of integers, N at least 16, and more tell more: what it generates greedily after `ids`, end tokens ignored, `ids`
  left out. It is called twice, with a text longer than the window and with one shorter. The error of a token is half of what
  the truth prefers its own best by: one of the two logits must be wrong by at least as much.

They may be anything that torch.as_tensor takes. Say with `--dtype` in what it computes.

Exit codes: 0 nothing is wrong, 1 something is, 2 an engine is unknown or does not run here, or the command line is wrong.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.config import GPTNeoConfig
from ..demo import FOLDER
from ..errors import GPTNeoFastError, InputError, SetupError, nearest, short
from ..models.causal import GPTNeoForCausalLM
from ..models.load import load
from .verify import reordered, twin

ORDERS = 16  # in which plain torch computes; over 60 short texts right paths came to 0.81 of what is allowed, with 4 to 0.93
NEW = 16  # tokens that there is room for after the longest text
BEFORE = 8  # tokens by which a short prompt falls short of the window
PADS = 5  # columns of padding

Measured = tuple[str, int, Tensor, float]  # case, position of the first error, errors float64 [N], what is allowed
Engine = Callable[[Path, Sequence[Any], Tensor], Iterator[Measured]]  # of a folder, its plain models and a text [T]


@dataclass(frozen=True)
class Finding:
    """What one case showed.

    engine, model, case: what was held against what. window: tokens that a local layer sees.
    first_wrong: the first position with an error beyond `allowed` (or one that is no number), or None.
    before, past: largest error at positions below the window and at the others, None where none was looked at.
    allowed: twice the largest error of plain torch in `ORDERS` orders of its sums, its logits rounded once more.
    """

    engine: str
    model: str
    case: str
    window: int
    first_wrong: int | None
    before: float | None
    past: float | None
    allowed: float


@torch.no_grad()
def check(name: str, folder: Path, *, model: str = "", dtype: str = "float32", device: str = "cpu") -> list[Finding]:
    """Hold the engine `name` against the truth on the checkpoint in `folder`, one finding for each case.

    Args:
        model: what to call the checkpoint; default: its folder.
        dtype: that the engine computes in. device: for the truth, and for engines that are not yours.

    Raises:
        InputError: an engine that is unknown or returns something else than is asked of it; a model without positions past
            its window. SetupError: an engine that does not run here.
    """
    engine = _engine(name)
    ours = load(folder, dtype=dtype, device=device)
    window, room = ours.config.window_size, ours.config.max_position_embeddings - NEW
    if room <= window:
        raise InputError(f"{folder} has {room + NEW} positions; a window of {window} takes more than {window + NEW} to check")
    plain = twin(ours, ours.dtype)
    models = (twin(ours, torch.float64), plain, *(reordered(plain, order) for order in range(1, ORDERS)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ours.config.vocab_size, (min(2 * window + 24, room),), generator=generator).to(ours.device)
    return [_finding(name, model or str(folder), window, *measured) for measured in engine(folder, models, ids)]


def _finding(engine: str, model: str, window: int, case: str, first: int, errors: Tensor, allowed: float) -> Finding:
    wrong = (~(errors <= allowed)).nonzero()  # so that NaN is wrong
    parts = errors[: max(window - first, 0)], errors[max(window - first, 0) :]
    before, past = (part.max().item() if len(part) else None for part in parts)
    return Finding(engine, model, case, window, first + int(wrong[0]) if len(wrong) else None, before, past, allowed)


def _truth(models: Sequence[Any], ids: Tensor) -> tuple[Tensor, float]:
    """Logits float64 [T, V] of a text, and what an engine may err there: `models` is the exact one and the plain ones."""
    exact, *usual = (model(ids[None], use_cache=False).logits[0].double() for model in models)
    rounding = (exact.to(models[1].dtype).double() - exact).abs()
    return exact, 2 * max(((logits - exact).abs() + rounding).max().item() for logits in usual)


def _engine(name: str) -> Engine:
    """The engine of a name.

    Raises:
        InputError: there is none.
    """
    if name in ENGINES:
        return partial(_modules, ENGINES[name])
    room, colon, attribute = name.partition(":")
    if not (room and colon and attribute):
        names = f"{', '.join(ENGINES)}, or module:function"
        raise InputError(f"engine {short(name)} is unknown; choose from {names}{nearest(name, ENGINES)}")
    try:
        function = getattr(import_module(room), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"engine {name}: {error}; a module is found as `python -c 'import {room}'` finds it") from error
    if not callable(function):
        raise InputError(f"engine {name} is {short(function)}; give a function of a folder and ids")
    return partial(_function, name, function)


def _modules(loader: Callable[..., tuple[Any, Any]], folder: Path, models: Sequence[Any], ids: Tensor) -> Iterator[Measured]:
    """The cases of an engine that is a module with the arguments of transformers' GPTNeoForCausalLM."""
    model, new_cache = loader(folder, models[1].dtype, models[1].device)
    exact, allowed = _truth(models, ids)
    short_prompt = max(models[0].config.window_size - BEFORE, 1)
    read = partial(_read, model, new_cache, ids)
    for case, pads, prompt in (("one pass", 0, len(ids)), ("steps", 0, short_prompt), ("padded steps", PADS, short_prompt)):
        errors = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        for logits in read(pads, prompt):  # [T or T - pads, V]
            error = (logits.double() - exact[: len(logits)]).abs().amax(-1)
            errors[: len(error)] = torch.maximum(errors[: len(error)], error)
        yield case, 0, errors, allowed


def _read(model: Any, new_cache: Callable[[], Any], ids: Tensor, pads: int, prompt: int) -> list[Tensor]:
    """Logits [T, V] of ids [T], `prompt` of them at once and then one by one; with `pads`, also [T - pads, V] of the row below
    it that starts so much later."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # until transformers 5.23
    rows = torch.stack([ids, ids.roll(pads)])[: 2 if pads else 1]  # [B, T]
    starts = torch.tensor([[0], [pads]], device=ids.device)[: len(rows)]
    mask = (torch.arange(len(ids), device=ids.device) >= starts).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    parts, cache = [], new_cache()
    for start, end in ((0, prompt), *((t, t + 1) for t in range(prompt, len(ids)))):
        padded = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]} if pads else {}
        use_cache = cache is not None or prompt < len(ids)
        out = model(rows[:, start:end], use_cache=use_cache, **{name: cache}, **padded)
        cache = getattr(out, name)
        parts.append(out.logits)
    logits = torch.cat(parts, 1)
    return [row[row_mask != 0] for row, row_mask in zip(logits, mask, strict=True)]


def _function(name: str, function: Callable[..., Any], folder: Path, models: Sequence[Any], ids: Tensor) -> Iterator[Measured]:
    """The cases of a user's function."""
    result = _result(name, function, folder, ids)
    if result.is_floating_point():
        exact, allowed = _truth(models, ids)
        if result.shape != exact.shape:
            raise InputError(f"engine {name} returned {list(result.shape)} for {len(ids)} ids; logits are {list(exact.shape)}")
        yield "one pass", 0, (result.double() - exact).abs().amax(-1), allowed
        return
    yield "tokens after it", *_regret(name, models, ids, result)
    prompt = ids[: max(models[0].config.window_size - BEFORE, 1)]
    yield "tokens across it", *_regret(name, models, prompt, _result(name, function, folder, prompt))


def _result(name: str, function: Callable[..., Any], folder: Path, ids: Tensor) -> Tensor:
    result = function(str(folder), ids.tolist())
    try:
        return torch.as_tensor(result).detach().to(ids.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"engine {name} returned {short(result)}; give logits [T, V] or tokens [N]") from error


def _regret(name: str, models: Sequence[Any], prompt: Tensor, tokens: Tensor) -> tuple[int, Tensor, float]:
    """The first position, the errors [N] and what is allowed of tokens [N] that are said to be the likeliest after a prompt."""
    config = models[0].config
    integers = not tokens.is_floating_point() and tokens.dtype != torch.bool and tokens.dim() == 1
    if not integers or len(tokens) < NEW or not bool(((tokens >= 0) & (tokens < config.vocab_size)).all()):
        what = f"{tokens.dtype} {list(tokens.shape)}"
        raise InputError(f"engine {name} returned {what}; tokens are at least {NEW} integers below {config.vocab_size}")
    tokens = tokens[: config.max_position_embeddings - len(prompt)].long()
    exact, allowed = _truth(models, torch.cat([prompt, tokens])[:-1])
    exact = exact[len(prompt) - 1 :]
    regret = exact.amax(-1) - exact.gather(1, tokens[:, None])[:, 0]
    return len(prompt) - 1, regret / 2, allowed


def _ours(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Callable[[], Any]]:
    return load(folder, dtype=dtype, device=device), lambda: None


def _theirs(attention: str, static: bool, folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError as error:
        raise SetupError("this engine needs transformers: pip install transformers") from error
    try:
        model = transformers.GPTNeoForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    except (ImportError, ValueError) as error:
        raise SetupError(
            f"transformers {transformers.__version__} does not run GPT-Neo by {attention} here: {error}"
        ) from error
    model = model.to(device).eval()
    capacity = model.config.max_position_embeddings  # `generate` gives it prompt and new tokens; longer than a window, too
    return model, lambda: transformers.StaticCache(config=model.config, max_cache_len=capacity) if static else None


ENGINES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "gptneo_fast": _ours,
    "transformers": partial(_theirs, "eager", False),
    "transformers-static-cache": partial(_theirs, "eager", True),
    "transformers-sdpa": partial(_theirs, "sdpa", False),
    "transformers-flash_attention_2": partial(_theirs, "flash_attention_2", False),
}


def random_model(folder: Path, window: int, positions: int) -> Path:
    """Write a small random model with this window to a folder, the same at every call; returns the folder.

    Its weights are wide enough for every layer to matter, and its scores even enough for every key in sight to count.
    """
    config = GPTNeoConfig(
        vocab_size=97, hidden_size=32, num_heads=2, num_layers=3, attention_layers=["global", "local", "local"],
        window_size=window, max_position_embeddings=positions, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model, generator = GPTNeoForCausalLM(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.1 if "q_proj" in name or "k_proj" in name else 0.2
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (name.endswith("weight") and p.dim() == 1))
    model.save_pretrained(folder)
    return folder


def table(findings: Sequence[Finding]) -> str:
    """The findings as a table in Markdown."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2g}"

    head = ["engine", "model", "case", "first wrong position", "error before the window", "past it", "allowed"]
    rows = [
        [f.engine, f.model, f.case, "none" if f.first_wrong is None else str(f.first_wrong)]
        + [number(value) for value in (f.before, f.past, f.allowed)]
        for f in findings
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    findings = []
    try:
        for name in args.engines:
            _engine(name)  # before anything is computed
        with tempfile.TemporaryDirectory() as made:
            models = [(folder, Path(folder)) for folder in args.model or ()] or [
                ("random, window 16", random_model(Path(made, "16"), 16, 96)),
                ("random, window 256", random_model(Path(made, "256"), 256, 336)),
                ("embedded, window 256", FOLDER),
            ]
            for name in args.engines:
                for called, folder in models:
                    findings += check(name, folder, model=called, dtype=args.dtype, device=args.device)
        print(table(findings))
        if args.json:
            _write(args.json, args.dtype, args.device, findings)
    except GPTNeoFastError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    return 0 if all(f.first_wrong is None for f in findings) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gptneo_fast.tools.conformance",
        description="Hold an engine against what GPT-Neo is, before its window and past it.",
        epilog="exit codes: 0 nothing is wrong, 1 something is, 2 an engine is unknown or does not run here",
    )
    parser.add_argument("engines", nargs="+", metavar="ENGINE", help=f"{', '.join(ENGINES)}, or module:function")
    parser.add_argument("-m", "--model", action="append", metavar="FOLDER", help="a checkpoint, in place of the small models")
    parser.add_argument("--dtype", default="float32", help="that the engine computes in; default float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...; default cpu")
    parser.add_argument("--json", metavar="FILE", help="write the findings there, too")
    return parser


def _write(file: str, dtype: str, device: str, findings: Sequence[Finding]) -> None:
    """Findings and versions as one JSON object; null for an error that is no finite number."""
    errors = ("before", "past", "allowed")
    rows = [{k: None if k in errors and not isfinite(v or 0) else v for k, v in asdict(f).items()} for f in findings]
    versions: dict[str, str] = {name: version(name) for name in ("torch", "transformers") if name in sys.modules}
    found = {"dtype": dtype, "device": device, **versions, "findings": rows}
    try:
        Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
