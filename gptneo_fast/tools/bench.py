"""`gptneo-fast bench`: tokens per second of a user's own model, beside transformers and the floor that memory sets."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, SetupError
from .verify import first_divergence, twin

ROUNDS = 3
_PROBE = 2**28  # bytes read to find the bandwidth
_PEER = "transformers eager"


@dataclass(frozen=True)
class Speed:
    """Greedy decoding of `batch` rows after prompts of `context` tokens.

    runner: "gptneo_fast" or a peer. batch, context, new_tokens: the shape of the work.
    prefill_ms: one forward pass over the prompts and the first token. step_ms: one further token of each row.
    tokens_per_second: batch / step. floor_ms: the bytes that a step must read over the measured bandwidth.
    check: "equal", or what is wrong; then there are no times.
    """

    runner: str
    batch: int
    context: int
    new_tokens: int
    prefill_ms: float | None
    step_ms: float | None
    tokens_per_second: float | None
    floor_ms: float
    check: str


def step_bytes(config: Any, dtype: torch.dtype, batch: int, context: int) -> int:
    """Bytes that one step must read: every weight but the embeddings of other tokens and positions, and the keys and values
    that are in sight."""
    C, F, V = config.hidden_size, config.ffn_size, config.vocab_size
    layer = 4 * C * C + 2 * C * F + F + 6 * C  # q, k, v, out_proj, c_fc, c_proj; their biases, two norms
    windows = (config.window(i) or context for i in range(config.num_layers))
    keys = sum(min(window, context) for window in windows)
    return dtype.itemsize * (config.num_layers * layer + V * C + 2 * C + 2 * batch * keys * C)


@torch.no_grad()
def measure(
    model: Any,
    *,
    batches: Sequence[int] = (1, 8),
    contexts: Sequence[int] = (128, 1024),
    new_tokens: int = 64,
    peer: bool | None = None,
    report: Callable[[Speed], None] = lambda _: None,
) -> list[Speed]:
    """Time greedy generation; medians of three rounds after one to warm up.

    Beside every time stands an equality check: the tokens are those of the reference path, or differ first where the
    reference's choice was within the error of the dtype.

    Args:
        model: a GPTNeoForCausalLM.
        batches, contexts: every pair is measured that the model's positions have room for.
        new_tokens: generated after each prompt.
        peer: whether transformers runs the same weights beside it; None for where it is installed.
        report: called with each result as it is found.

    Raises:
        InputError: nothing of what was asked for fits. SetupError: `peer=True` and transformers is not installed.
    """
    limit = model.config.max_position_embeddings
    pairs = [(b, c) for b in batches for c in contexts if c + new_tokens <= limit and c > 0 and b > 0]
    if not pairs or new_tokens < 2:
        raise InputError(
            f"contexts {list(contexts)} + {new_tokens} new tokens leave nothing to measure: the model has {limit} positions, "
            "and at least 2 new tokens are needed"
        )
    rate = bandwidth(model.device)
    runners: dict[str, Any] = {"gptneo_fast": model}
    if peer is not False and (other := _transformers(model, required=peer is True)) is not None:
        runners[_PEER] = other
    plain = twin(model, model.dtype)
    out = []
    for batch, context in pairs:
        ids = torch.randint(model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(context))
        ids = ids.to(model.device)
        expected = _tokens(plain, ids, new_tokens)
        for name, runner in runners.items():
            floor = step_bytes(model.config, model.dtype, batch, context) / rate * 1e3
            check = _check(plain, _tokens(runner, ids, new_tokens), expected, ids)
            first = step = None
            if check == "equal":
                first = _seconds(partial(_tokens, runner, ids, 1), model.device)
                whole = _seconds(partial(_tokens, runner, ids, new_tokens), model.device)
                step = (whole - first) / (new_tokens - 1)
            out.append(
                Speed(
                    name,
                    batch,
                    context,
                    new_tokens,
                    first and first * 1e3,
                    step and step * 1e3,
                    step and batch / step,
                    floor,
                    check,
                )
            )
            report(out[-1])
    return out


def bandwidth(device: torch.device) -> float:
    """Bytes per second at which the device reads memory, measured with the threads that are set."""
    data = torch.ones(_PROBE // 4, device=device)
    return _PROBE / min(_seconds(data.sum, device) for _ in range(3))


def table(results: Sequence[Speed]) -> str:
    """The results as text, one line each."""
    lines = [
        f"{'runner':<20} {'batch':>5} {'context':>7} {'prefill ms':>11} {'step ms':>9} {'tokens/s':>10} {'of floor':>8}  check"
    ]
    for r in results:
        lines.append(f"{r.runner:<20} {r.batch:>5} {r.context:>7} {_times(r)}  {r.check}")
    return "\n".join(lines)


def _times(r: Speed) -> str:
    if r.prefill_ms is None or r.step_ms is None or r.tokens_per_second is None:
        return f"{'-':>11} {'-':>9} {'-':>10} {'-':>8}"
    return f"{r.prefill_ms:>11.2f} {r.step_ms:>9.3f} {r.tokens_per_second:>10,.1f} {r.floor_ms / r.step_ms:>8.0%}"


def plot(results: Sequence[Speed], path: str | os.PathLike[str]) -> None:
    """Bars of tokens per second beside the floor; errors are those of `bars`."""
    work = list(dict.fromkeys((r.batch, r.context) for r in results))
    series = {
        "floor of memory": [next(1e3 * r.batch / r.floor_ms for r in results if (r.batch, r.context) == at) for at in work]
    }
    for runner in dict.fromkeys(r.runner for r in results):
        found = {(r.batch, r.context): r.tokens_per_second or 0.0 for r in results if r.runner == runner}
        series[runner] = [found.get(at, 0.0) for at in work]
    bars(path, [f"batch {b}\ncontext {c}" for b, c in work], series, ylabel="tokens/s")


def bars(
    path: str | os.PathLike[str],
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    ylabel: str,
    labels: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Groups of bars, one bar of each series in each, as SVG or PNG by the file's ending; equal figures give equal files.

    Args:
        groups: what stands below each group. series: a value for each group; the first is drawn in grey.
        labels: what stands above the bars of a series.

    Raises:
        SetupError: matplotlib is not installed. InputError: another ending.
    """
    if not str(path).endswith((".svg", ".png")):
        raise InputError(f"plot {str(path)!r}: give a file that ends in .svg or .png")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SetupError("plots need matplotlib: pip install 'gptneo-fast[bench]'") from error
    figure = Figure(figsize=(1.5 + 1.6 * len(groups), 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for j, (name, values) in enumerate(series.items()):
        at = [i - 0.4 + width * (j + 0.5) for i in range(len(groups))]
        drawn = axes.bar(at, values, width, label=name, color="lightgrey" if j == 0 else None)
        axes.bar_label(drawn, labels.get(name, [""] * len(groups)), fontsize=8)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "gptneo_fast"}):
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def as_dicts(results: Sequence[Speed]) -> list[dict[str, Any]]:
    """The results for JSON."""
    return [asdict(r) for r in results]


def _tokens(model: Any, ids: Tensor, new: int) -> Tensor:
    """Exactly `new` greedy tokens after each row: int64 [B, context + new]."""
    mask = torch.ones_like(ids)
    out: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, do_sample=False
    )
    return out


def _check(plain: Any, tokens: Tensor, expected: Tensor, ids: Tensor) -> str:
    found = first_divergence(plain, tokens, expected, torch.ones_like(ids))
    if found is None or found.margin <= found.error:
        return "equal"
    return f"row {found.row} differs at token {found.token}, {found.margin:.3g} from the reference's choice"


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median of the rounds, the device waited for."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _transformers(model: Any, required: bool) -> Any:
    """transformers' eager model with the same weights, or None where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        if required:
            raise SetupError("the peer needs transformers: pip install transformers") from error
        return None
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "dtype", "id2label", "label2id")}
    with torch.device(model.device):  # its mask buffers are in no state_dict
        peer = transformers.GPTNeoForCausalLM._from_config(transformers.GPTNeoConfig(**values), attn_implementation="eager")
    peer.load_state_dict(model.state_dict(), assign=True)
    peer.tie_weights()
    return peer.eval()
