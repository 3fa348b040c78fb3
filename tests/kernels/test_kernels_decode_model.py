"""A whole model decoding on the kernels, past its window: equal to the reference, five launches a layer, no byte too many."""

from __future__ import annotations

import copy

import pytest
import torch

import gptneo_fast
from benchmarks.static import costs
from benchmarks.static.counting import Traffic
from gptneo_fast.kernels import launch
from gptneo_fast.network.cache import KVCache

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here: benchmarks/gpu/run.py checks them")


def trio(dtype=torch.float32, **changes):
    """A causal model on the kernels, on plain torch, and on plain torch in float64; weights wide, so that attention peaks."""
    values = dict(
        vocab_size=97, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=7,
        max_position_embeddings=1024,
    )  # fmt: skip
    plain = gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**values | changes), backend="reference").eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (1 if p.dim() == 1 else 0))
    plain = plain.to(dtype)
    exact, ours = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    ours.transformer.requested_backend = "triton"
    return ours, plain, exact


def decode(model, ids, pieces, padding=None):
    """Logits [B, N, V] of ids [B, N] given piece by piece; padding: columns of each row that are none of its tokens."""
    columns = torch.arange(ids.shape[1])[None]
    mask = None if padding is None else (columns >= padding[:, None]).long()
    positions = columns if padding is None else (columns - padding[:, None]).clamp(min=0)
    cache, out, at = None, [], 0
    with torch.no_grad():
        for n in pieces:
            seen = None if mask is None else mask[:, : at + n]
            where = positions[:, at : at + n]
            got = model(ids[:, at : at + n], past_key_values=cache, attention_mask=seen, position_ids=where, use_cache=True)
            cache, at = got.past_key_values, at + n
            out.append(got.logits)
    assert at == ids.shape[1]
    return torch.cat(out, 1)


def assert_equal_within_budget(models, ids, pieces, padding=None):
    """Kernels err at most twice as much as plain torch against float64, and choose its tokens where errors cannot."""
    got, plain, exact = (decode(model, ids, pieces, padding) for model in models)
    if padding is not None:
        real = torch.arange(ids.shape[1]) >= padding[:, None]
        got, plain, exact = got[real], plain[real], exact[real]
    error, usual = (got.double() - exact).abs(), (plain.double() - exact).abs()
    rounding = (exact.to(got.dtype).double() - exact).abs()
    assert error.max() <= 2 * (usual + rounding).max()
    assert error.mean() <= 1.5 * (usual + rounding).mean()
    best = exact.topk(2, -1).values
    clear = best[..., 0] - best[..., 1] > 2 * torch.maximum(error, usual).max()
    assert clear.float().mean() > 0.5  # else nothing is compared
    assert torch.equal(got.argmax(-1)[clear], plain.argmax(-1)[clear])


SCHEDULES = {
    "one by one": [130, *[1] * 8],  # the ring of 7 + 128 slots wraps on the way
    "in chunks": [30, 2, 16, 17, 1, 64, 8],
    "the longest step": [3, 129, 1, 5],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decoding_past_the_window_is_the_reference_s(schedule):
    dtype = torch.float16 if schedule == "in chunks" else torch.float32
    assert_equal_within_budget(trio(dtype), torch.randint(97, (1, 138)), SCHEDULES[schedule])


def test_ragged_batches_decode_as_their_rows_would():
    models, pieces = trio(), [128, 1, 1, 6]
    ids, padding = torch.randint(97, (3, 136)), torch.tensor([0, 19, 4])
    assert_equal_within_budget(models, ids, pieces, padding)
    together = decode(models[0], ids, pieces, padding)
    alone = decode(models[1], ids[1:2, 19:], [136 - 19])
    torch.testing.assert_close(together[1:2, 19:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [[250, *[1] * 306], [250, *[31, 1, 129] * 2, 30], [10, 129, 129, 129, 129, 34]], ids=len)
def test_300_tokens_past_a_window_of_256(pieces):
    models, N = trio(window_size=256), sum(pieces)
    assert N >= 256 + 300
    assert_equal_within_budget(models, torch.randint(97, (1, N)), pieces)
    if len(pieces) < 100:  # one by one, ragged rows take many minutes more
        assert_equal_within_budget(models, torch.randint(97, (3, N)), pieces, torch.tensor([0, 200, 7]))


def filled(config, batch, past, dtype=torch.float32):
    """A cache of `past` random tokens a row."""
    cache = KVCache(config, batch, dtype=dtype, device="cpu", max_length=past + 8)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    cache._seen = cache._written = past
    cache.lengths.fill_(past)
    return cache


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 5), (16, 1)])
def test_five_launches_a_layer_and_two_around_them(batch, tokens):
    """The third, `sample`, also moves the lengths on; here the cache does that itself, with a torch function."""
    ours, *_ = trio()
    cache, positions = filled(ours.config, batch, 300), torch.arange(300, 300 + tokens)[None]
    ids = torch.randint(97, (batch, tokens))
    with torch.no_grad():
        ours.step(ids, positions, None, filled(ours.config, batch, 300))  # makes the counters of tickets, once a process
    with torch.no_grad(), Traffic() as traffic:
        ours.step(ids, positions, None, cache)
    product = "gemv" if batch * tokens == 1 else "skinny"
    layer, head = [product, "attend", product, product, product], "gemv" if batch == 1 else "skinny"
    assert [name for name in traffic.launches if not name.startswith("aten.")] == ["_embed_kernel", *layer * 2, head]
    assert [name for name in traffic.launches if name.startswith("aten.")] == ["aten.add"]
    wanted = costs.decode_step(ours.config, batch, 300 + tokens, torch.float32, tokens)
    assert sum(cost.launches for cost in wanted) == 5 * 2 + 3 == len(traffic.launches)


@pytest.mark.parametrize(("batch", "tokens", "context"), [(1, 1, 300), (1, 4, 400), (3, 1, 100)])
def test_a_step_moves_the_bytes_of_the_floor_and_hardly_more(batch, tokens, context):
    ours, *_ = trio(window_size=256, hidden_size=64, vocab_size=256, num_heads=4)
    cache = filled(ours.config, batch, context - tokens)
    matrices = [p for p in ours.parameters() if p.dim() == 2]
    vectors = [p for p in ours.parameters() if p.dim() == 1]
    ids, positions = torch.randint(97, (batch, tokens)), torch.arange(context - tokens, context)[None]
    with torch.no_grad(), Traffic(matrices=matrices, vectors=vectors, cache=[*cache.keys, *cache.values]) as traffic:
        ours.step(ids, positions, None, cache)
    floor = costs.total(costs.decode_step(ours.config, batch, context, torch.float32, tokens))
    read, written = traffic.read, traffic.written
    moved = read["matrices"].total + read["vectors"].distinct + read["cache"].total + written["cache"].total
    assert floor.bytes * 0.98 <= moved <= floor.bytes * 1.02
    assert written["matrices"].total == written["vectors"].total == 0
    # Re-reads, apart: each program reads the norms' weights again, which L2 serves.
    print(f"vectors read {read['vectors'].total} bytes, {read['vectors'].repeated} of them again; others {read['other'].total}")
