"""Prefill kernels at their edges: lengths around the window, every head dim, ragged rows, every tile; what attention loads."""

import importlib
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from gptneo_fast import kernels
from gptneo_fast.kernels import gemm, launch, linear, skinny
from gptneo_fast.ops import reference
from gptneo_fast.ops.testing import EPS, Sample, over_budget
from tests.support.interpreting import watched

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here: benchmarks/gpu/run.py checks them")
attention_module = importlib.import_module("gptneo_fast.kernels.attention")  # the package gives the function under that name
EDGES = (1, 2, 63, 255, 256, 257, 300, 513)
HEAD_DIMS = (4, 8, 16, 32, 48, 64, 128)


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64) * scale


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def check(name, args, dtype, monkeypatch, mutates=()):
    sample = Sample(name, args, mutates).to(dtype)
    assert over_budget(name, watched(getattr(kernels, name), monkeypatch, mutates), sample) is None


@pytest.mark.parametrize("window", [0, 256])
@pytest.mark.parametrize(("T", "D"), [*zip(EDGES, itertools.cycle(HEAD_DIMS)), *((257, D) for D in HEAD_DIMS)])
def test_attention_at_every_edge_and_head_dim(T, D, window, monkeypatch):
    qkv = (random(1, 1, T, D, seed=i, scale=2.0 if i < 2 else 1.0) for i in range(3))
    check("attention", (*qkv, window), torch.float32, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_chunk_attends_to_a_ring_that_has_wrapped_and_to_itself(dtype, monkeypatch):
    T, D, R, window = 150, 16, 384, 256
    qkv = (random(3, 1, T, D, seed=i) for i in range(3))
    cache = (random(3, 1, R, D, seed=i) for i in (5, 6))
    args = (*qkv, window, int32(0, 140, 149), None, *cache, int32(1000, 384, 20))
    check("attention", args, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_logits_of_scores_exist_in_chunks(dtype, monkeypatch):
    """Three chunks of rows, the last one shorter; a vocabulary of two blocks and a rest."""
    module = importlib.import_module("gptneo_fast.kernels.logprob")  # the package gives the function under that name
    N, C, V = 21, 16, 150
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "CHUNK", 8 * (V + -V % 8) * dtype.itemsize)
    launched, run = [], module.launch.run
    monkeypatch.setattr(module.launch, "run", lambda kernel, rows, *a, **k: launched.append(rows) or run(kernel, rows, *a, **k))
    check("logprob", (random(N, C), random(V, C, seed=1, scale=0.5), torch.arange(N) * 7), dtype, monkeypatch)
    assert launched == [8, 8, 5]


def test_scores_beyond_float16_stay_exact_and_a_score_of_one_key_wins(monkeypatch):
    q, k, v = (random(1, 2, 40, 64, seed=i, scale=scale) for i, scale in enumerate((80, 80, 1)))
    scores = q @ k.transpose(-1, -2)
    assert scores.abs().max() > 2 * torch.finfo(torch.float16).max
    check("attention", (q, k, v, 0), torch.float16, monkeypatch)
    check("attention", (q, k, v, 7), torch.float32, monkeypatch)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.data())
def test_attention_of_any_shape(monkeypatch, data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    B, T, D = draw(1, 3), draw(1, 70), data.draw(st.sampled_from(HEAD_DIMS))
    H = draw(1, 2) * -(-40 // (B * T))  # an error has a mean only over many rows
    window = data.draw(st.sampled_from((0, 1, 5, 16, 33)))
    starts = int32(*(draw(0, T) for _ in range(B))) if data.draw(st.booleans()) else None
    ends = int32(*(draw(0, T) for _ in range(B))) if data.draw(st.booleans()) else None
    qkv = (random(B, T, H * D, seed=i).unflatten(-1, (H, D)).transpose(1, 2) for i in range(3))
    past = ()
    if data.draw(st.booleans()):
        R = draw(max(1, window), 80)
        past = (*(random(B, H, R, D, seed=i) for i in (5, 6)), int32(*(draw(0, 200 if window else R) for _ in range(B))))
    check("attention", (*qkv, window, starts, ends, *past), torch.float32, monkeypatch)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(rows=st.integers(1, 150), C=st.integers(1, 90), F=st.integers(1, 90), gelu=st.booleans())
def test_linear_kernels_of_any_shape(monkeypatch, rows, C, F, gelu):
    x, norm = random(1, rows, C), (1 + random(C, scale=0.1), random(C, scale=0.1, seed=1))
    weight, bias = random(F, C, scale=C**-0.5), random(F, seed=3)
    check("norm_linear", (x, *norm, weight, bias, EPS, gelu), torch.float32, monkeypatch)
    check("linear_add", (x, weight, bias, random(1, rows, F, seed=4)), torch.float32, monkeypatch)
    check("layer_norm", (x, *norm, EPS), torch.float32, monkeypatch)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.data())
def test_kv_append_of_any_shape(monkeypatch, data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    B, H, T, D, R = draw(1, 3), draw(1, 2), draw(1, 70), data.draw(st.sampled_from(HEAD_DIMS)), draw(1, 80)
    starts = int32(*(draw(0, T) for _ in range(B))) if data.draw(st.booleans()) else None
    new = (random(B, T, H * D, seed=i).unflatten(-1, (H, D)).transpose(1, 2) for i in range(2))
    cache = [random(B, H, R, D, seed=i) for i in (5, 6)]
    check("kv_append", (*cache, *new, int32(*(draw(0, 200) for _ in range(B))), starts), torch.float32, monkeypatch, (0, 1))


TILES = [(size, tile) for size in (2, 4) for tile in gemm.TILES[size]]


@pytest.mark.parametrize(("size", "tile"), TILES, ids=str)
def test_every_tile_of_the_product_is_right(size, tile, monkeypatch):
    monkeypatch.setattr(gemm, "tile", lambda *_: tile)
    dtype = {2: torch.float16, 4: torch.float32}[size]
    rows, C, F = max(tile.M, skinny.MOST_ROWS) + 3, tile.K + 8, tile.N + 9
    x, gamma, beta = random(1, rows, C), 1 + random(C, scale=0.1), random(C, scale=0.1, seed=1)
    weights = [random(F, C, scale=C**-0.5, seed=i) for i in range(3)]
    check("norm_linear", (x, gamma, beta, weights[0], random(F), EPS, True), dtype, monkeypatch)
    check("norm_qkv", (x, gamma, beta, *weights, EPS), dtype, monkeypatch)
    check("linear_add", (x, weights[0], random(F), random(1, rows, F, seed=3)), dtype, monkeypatch)


@pytest.mark.parametrize("gelu", [False, True])
def test_float32_stays_with_the_kernel_where_the_library_could_take_it(gelu, monkeypatch):
    """cuBLASLt obeys the user's TF32 setting, and its gelu may be approximate."""
    asked = []
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "check", lambda *_, **__: None)  # it wants CUDA tensors now
    monkeypatch.setattr(linear, "by_library", lambda rows, *_: asked.append(rows.dtype))
    x, gamma, beta = random(skinny.MOST_ROWS + 1, 24), 1 + random(24, scale=0.1), random(24, scale=0.1)
    sample = Sample("many rows", (x, gamma, beta, random(40, 24, scale=24**-0.5), random(40), EPS, gelu))
    assert over_budget("norm_linear", kernels.norm_linear, sample.to(torch.float32)) is None
    assert asked == []
    sample.to(torch.float16).run(kernels.norm_linear)
    assert asked == [torch.float16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("C", [768, 2048, 2560])
@pytest.mark.parametrize("M", [65, 512, 2048, 16384])
def test_the_tile_of_a_product_leaves_no_sm_far_more_work_than_another_tile_would(M, C, dtype):
    for N in (C, 3 * C, 4 * C):
        chosen = gemm.tile(dtype, M, N, 132)
        work = {tile: -(-(-(-M // tile.M) * -(-N // tile.N)) // 132) * tile.M * tile.N for tile in gemm.TILES[dtype.itemsize]}
        assert work[chosen] * 0.8 <= min(work.values())
        larger = [t for t in work if t.M * t.N > chosen.M * chosen.N]
        assert all(work[chosen] < work[t] for t in larger), "a larger tile would do"


def visible(T, window, start, end, held, R, queries):
    """[queries, held + T] whether a query sees a key, old ones first: the definition, token by token."""
    query = torch.arange(queries)[:, None] - start + held
    old = torch.arange(held)
    new = torch.arange(T)
    key = torch.cat([old, new - start + held])
    exists = torch.cat([old >= held - R, (new >= start) & (new < end)])
    return (key <= query) & (key > query - (window or 10**9)) & exists


@pytest.mark.parametrize(
    ("T", "window", "start", "end", "held", "R"),
    [
        *((T, window, 0, T, 0, 0) for T in (1, 63, 256, 513) for window in (0, 256)),
        *((130, 40, start, end, 0, 0) for start, end in ((0, 100), (37, 130), (130, 130), (64, 65))),
        *(
            (150, window, start, 150, held, 384)
            for window, start, held in ((256, 0, 1000), (256, 20, 384), (0, 7, 300), (0, 0, 0))
        ),
    ],
)
def test_attention_visits_the_fewest_blocks_there_can_be_and_masks_only_those_that_are_cut(
    T, window, start, end, held, R, monkeypatch
):
    visited, over_block = [], attention_module.over_block

    def counted(*args):
        j, ring, masked, BLOCK_N = (int(args[i]) for i in (10, 15, 16, 17))
        visited.append((ring, j, masked))
        assert BLOCK_N == tile.N
        return over_block(*args)

    monkeypatch.setattr(attention_module, "over_block", counted)
    D, tile = 8, attention_module.TILES[4, 16]
    qkv = [random(1, 1, T, D, seed=i).float() for i in range(3)]
    past = (*(random(1, 1, R, D, seed=i).float() for i in (5, 6)), int32(held)) if R else ()
    got = kernels.attention(*qkv, window, int32(start), int32(end), *past)
    torch.testing.assert_close(got, reference.attention(*qkv, window, int32(start), int32(end), *past), rtol=1e-4, atol=1e-4)

    seen = visible(T, window, start, end, held, R or 1, queries=-(-T // tile.M) * tile.M)
    fewest = whole = 0
    for first in range(0, T, tile.M):
        for memory in (seen[first : first + tile.M, :held], seen[first : first + tile.M, held:]):
            keys = memory[: T - first].any(0).nonzero()
            if len(keys):
                low, high = int(keys[0]), int(keys[-1]) + 1
                blocks = [memory[:, j : j + tile.N] for j in range(low, high, tile.N)]
                fewest += len(blocks)
                whole += sum(bool(block.all()) and block.shape[1] == tile.N for block in blocks)
    assert len(visited) == fewest
    unmasked = sum(not masked for _, _, masked in visited)
    assert unmasked == whole
