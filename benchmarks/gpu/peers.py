"""What ours is compared with: transformers, and a compiled peer written as gpt-fast writes its models.

Every peer offers `decoder(batch, context, steps)` and `logits(ids)`; random keys and values fill its cache, so that a long
context costs no prefill of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import peer_of
from gptneo_fast import GPTNeoConfig

Step = Callable[[], Tensor]  # one decoded token for each row, int64 [B, 1], on the device


class Transformers:
    """transformers on its eager path, or with another `attn_implementation`, with random weights."""

    def __init__(self, config: GPTNeoConfig, dtype: torch.dtype, device: torch.device, attention: str = "eager") -> None:
        self.name = f"transformers {attention}"
        self.config, self.dtype, self.device = config, dtype, device
        self.model = peer_of(config, dtype, device)
        if attention != "eager":
            self.model.set_attn_implementation(attention)

    def logits(self, ids: Tensor) -> Tensor:
        """[B, T, V]."""
        return self.model(ids, use_cache=False).logits

    def prefill(self, ids: Tensor) -> Tensor:
        """[B, 1, V], with a cache."""
        return self.model(ids, use_cache=True, logits_to_keep=1).logits

    def decoder(self, batch: int, context: int, steps: int) -> Step:
        """Greedy steps whose last one sees `context` keys."""
        from transformers import DynamicCache

        c, cache = self.config, DynamicCache()
        for layer in range(c.num_layers):
            shape = (batch, c.num_heads, context - steps, c.head_dim)
            cache.update(*(torch.randn(shape, dtype=self.dtype, device=self.device) for _ in range(2)), layer)
        state = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)

        def step() -> Tensor:
            out = self.model(state, past_key_values=cache, use_cache=True)
            state.copy_(out.logits[:, -1:].argmax(-1))
            return state

        return step

    def generate(self, ids: Tensor, **how: Any) -> Tensor:
        """transformers' own loop."""
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)


class _Block(nn.Module):
    """One layer over a static cache; the mask has the window."""

    def __init__(self, config: GPTNeoConfig, layer: int, weights: dict[str, Tensor]) -> None:
        super().__init__()
        p = f"transformer.h.{layer}."
        self.H, self.D, self.eps = config.num_heads, config.head_dim, config.layer_norm_epsilon
        self.qkv = torch.cat([weights[f"{p}attn.attention.{n}_proj.weight"] for n in "qkv"])
        names = dict(out="attn.attention.out_proj", fc="mlp.c_fc", proj="mlp.c_proj", ln_1="ln_1", ln_2="ln_2")
        for name, module in names.items():
            setattr(self, name, (weights[f"{p}{module}.weight"], weights[f"{p}{module}.bias"]))

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]. mask: bool [T, S]; k_cache, v_cache: [B, H, S, D], written at `positions`."""
        B, T, C = x.shape
        q, k, v = F.linear(F.layer_norm(x, (C,), *self.ln_1, self.eps), self.qkv).chunk(3, -1)
        q, k, v = (t.view(B, T, self.H, self.D).transpose(1, 2) for t in (q, k, v))
        k_cache[:, :, positions] = k
        v_cache[:, :, positions] = v
        y = F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask, scale=1.0)
        x = x + F.linear(y.transpose(1, 2).reshape(B, T, C), *self.out)
        hidden = F.gelu(F.linear(F.layer_norm(x, (C,), *self.ln_2, self.eps), *self.fc), approximate="tanh")
        return x + F.linear(hidden, *self.proj)


class Compiled:
    """Plain torch, q, k and v fused, a static cache, the right window; each layer compiled by inductor, one CUDA graph a step.

    The layers are compiled one by one (two variants: they differ in their mask only) and the whole step is captured, which
    is what torch.compile(mode="reduce-overhead") does, at a fraction of its compile time.
    """

    name = "compiled torch"

    def __init__(self, model: nn.Module, config: GPTNeoConfig, compile_layers: bool = True) -> None:
        weights = {k: v.detach() for k, v in model.state_dict().items()}
        self.config, self.wte, self.wpe = config, weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
        self.ln_f = (weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"])
        self.blocks = [_Block(config, layer, weights) for layer in range(config.num_layers)]
        self.caches: list[tuple[Tensor, Tensor]] = []
        if compile_layers:
            for block in self.blocks:
                block.compile(fullgraph=True, dynamic=False)

    def allocate(self, batch: int, slots: int, random: bool = False) -> None:
        """A cache of `slots` tokens a row."""
        shape = (batch, self.config.num_heads, slots, self.config.head_dim)
        make = torch.randn if random else torch.zeros
        like = dict(dtype=self.wte.dtype, device=self.wte.device)
        self.caches = [(make(shape, **like), make(shape, **like)) for _ in self.blocks]

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, 1, V] of the last of ids [B, T] at positions [T], all on the device."""
        x = self.wte[ids] + self.wpe[positions]
        keys = torch.arange(self.caches[0][0].shape[2], device=ids.device)
        causal = keys <= positions[:, None]  # [T, S]
        local = causal & (keys > positions[:, None] - self.config.window_size)
        for block, kind, (k, v) in zip(self.blocks, self.config.attention_layers, self.caches, strict=True):
            x = block(x, positions, local if kind == "local" else causal, k, v)
        return F.linear(F.layer_norm(x[:, -1:], x.shape[-1:], *self.ln_f, self.config.layer_norm_epsilon), self.wte)

    def decoder(self, batch: int, context: int, steps: int) -> Step:
        """Greedy steps whose last one sees `context` keys, captured on CUDA."""
        self.allocate(batch, context, random=True)
        device = self.wte.device
        state = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        position = torch.full((1,), context - steps, dtype=torch.int64, device=device)

        def step() -> Tensor:
            state.copy_(self.forward(state, position).argmax(-1))
            position.add_(1)
            return state

        if device.type != "cuda":
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        position.fill_(context - steps)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def replay() -> Tensor:
            graph.replay()
            return state

        return replay
