"""gptneo_fast as a runner of whole models: random weights, the kernels asked for by name, and proof of what was timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gptneo_fast
from benchmarks.models import randomise
from gptneo_fast import GPTNeoConfig, KVCache
from gptneo_fast.generation.captured.params import SamplingParams
from gptneo_fast.generation.captured.runner import BUCKETS, Runner
from gptneo_fast.ops.constants import BROKEN, GREEDY, PLACE, STATUS, TOKEN


class Ours:
    """Our causal model; `backend="triton"`: what cannot take the kernels fails instead of taking plain torch.

    Args:
        quantize: "int8" or "int4" for weights in few bits.
    """

    name = "gptneo_fast"

    def __init__(self, config: GPTNeoConfig, dtype: torch.dtype, device: torch.device, quantize: str | None = None) -> None:
        with torch.device("meta"):
            model = gptneo_fast.GPTNeoForCausalLM(config, backend="triton")
        self.model = model.to(dtype).to_empty(device=device).eval()
        self.model.tie_weights()
        randomise(self.model)
        if quantize is not None:
            self.model.quantize_(quantize)
        self.config, self.dtype, self.device = config, dtype, device

    def logits(self, ids: Tensor) -> Tensor:
        """[B, T, V]."""
        return self.model(ids, use_cache=False).logits

    def scores(self, ids: Tensor) -> Tensor:
        """Log-probabilities [B, T - 1], as `score` computes them."""
        wanted = torch.ones_like(ids, dtype=torch.bool)
        wanted[:, -1] = False
        own, *_ = self.model.logprobs(ids, torch.ones_like(ids), wanted, ids[:, 1:].flatten())
        return own.view(len(ids), -1)

    def prefill(self, ids: Tensor) -> Tensor:
        """[B, 1, V], with a cache."""
        return self.model(ids, use_cache=True, logits_to_keep=1).logits

    def prefill_on_device(self, ids: Tensor) -> Callable[[], Tensor]:
        """The same as `generate` begins with it, into one cache: nothing in it looks at the device, so it can be captured."""
        B, T = ids.shape
        cache = KVCache(self.config, B, dtype=self.dtype, device=self.device, max_length=T)
        positions = torch.arange(T, device=self.device)[None]

        def call() -> Tensor:
            cache.reset()
            return self.model.step(ids, positions, None, cache)

        return call

    def decoder(self, batch: int, context: int, steps: int, early_launch: bool = False) -> Decoding:
        """`steps` greedy steps, of which the last one sees `context` keys."""
        self.model.early_launch = early_launch
        return Decoding(self.model, batch, context, steps)

    def generate(self, ids: Tensor, **how: Any) -> Tensor:
        """The whole call, prompt included.

        Raises:
            AssertionError: it was not captured where that is possible.
        """
        tokens = self.model.generate(ids, pad_token_id=0, **how)
        check_captured(self.model, self.device)
        return tokens


def check_captured(model: Any, device: torch.device) -> str:
    """The path of the last generation.

    Raises:
        AssertionError: steps on a GPU were not captured.
    """
    last = model.last_generation
    if device.type == "cuda" and last.path != "captured":
        raise AssertionError(f"generation was {last.path} and not captured: {last.why}")
    return str(last.path)


class Decoding:
    """A captured greedy step over a random cache, as `generate` replays it.

    Args:
        batch: rows. context: keys that the last of `steps` steps sees.
    """

    @torch.no_grad()
    def __init__(self, model: Any, batch: int, context: int, steps: int) -> None:
        self.context, self.steps, self.device = context, steps, model.device
        self.backend = model.backend.name
        self.runner = runner = Runner(model, next(n for n in BUCKETS if n >= batch), context)
        for tensor in (*runner.cache.keys, *runner.cache.values):
            tensor.normal_()
        greedy = SamplingParams(GREEDY, [1.0, 1.0, 0.0, 1.0], [0, 0, context], runner.flags, runner.seeds, penalty=False)
        self.step = runner.step_for(greedy)
        runner.counts.copy_(torch.tensor(greedy.counts))
        runner.state.zero_()
        runner.state[PLACE] = context - steps
        runner.lengths.fill_(context - steps)
        self.before = self.newest()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """One token of each row, int64 [B]."""
        self.step.replay()
        return self.runner.state[TOKEN]

    def newest(self) -> Tensor:
        """Keys and values [2 L, B, H, D] where the last step writes."""
        tensors = (*self.runner.cache.keys, *self.runner.cache.values)
        return torch.stack([t[:, :, (self.context - 1) % t.shape[2]] for t in tensors])

    def check(self) -> dict[str, Any]:
        """The backend and the path, once all steps have run.

        Raises:
            AssertionError: the step was not captured on a GPU; the cache does not hold what it should; tokens are broken.
        """
        why = getattr(self.step, "why_launched", "there is no graph")  # None of a captured step
        if why is not None and self.device.type == "cuda":
            raise AssertionError(f"the step was launched and not captured: {why}")
        runner, newest = self.runner, self.newest()
        if runner.lengths.tolist() != [self.context] * runner.rows:
            raise AssertionError(f"the cache holds {runner.lengths.tolist()} tokens, expected {self.context} of each row")
        if not newest.isfinite().all():
            raise AssertionError("keys and values of the last step are not finite")
        if not (newest != self.before).flatten(2).any(-1).all():
            raise AssertionError("a layer has not written the keys and values of the last step")
        tokens = runner.out[: self.steps]
        if (runner.state[STATUS] & BROKEN).any() or not ((tokens >= 0) & (tokens < len(runner.flags))).all():
            raise AssertionError("rows are broken: their logits were not finite")
        return {"backend": self.backend, "path": "captured" if why is None else "launched"}
