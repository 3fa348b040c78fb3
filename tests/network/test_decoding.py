"""Few rows on the CPU in one call of the extension: the reference's results, whatever the shape; true to what was touched."""

# ruff: noqa: F811 (a fixture)

import os
import signal
import threading

import pytest
import torch

from gptneo_fast import GPTNeoConfig, GPTNeoForCausalLM
from gptneo_fast.network.masks import Rows
from gptneo_fast.ops import cpu, extension
from tests.ops.test_cpu import lanes  # noqa: F401 (a fixture)
from tests.support.peers import SMALL

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=f"no extension: {extension.why_not()}")
# head_dim, inner width: below the lanes, their multiples and beside them, four vectors at a time and more
SHAPES = [(8, None), (1, 5), (3, 77), (4, 64), (12, 40), (20, 33), (48, 96), (64, 129), (80, 320)]


@pytest.fixture
def calls(monkeypatch):
    """The blocks of each call of the extension, and whether it took them."""
    found, plain = [], cpu.Plan.__call__

    def called(self, *args):
        out = plain(self, *args)
        found.append((len(args[3]), out is not None))
        return out

    monkeypatch.setattr(cpu.Plan, "__call__", called)
    return found


def build(dtype=torch.float32, backend="auto", **changes):
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(GPTNeoConfig(**(SMALL | changes)), backend=backend)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.08 + (1 if p.dim() == 1 else 0))
    return model.to(dtype).eval().requires_grad_(False)


def twin(model, dtype, backend="reference"):
    """The same weights in plain torch."""
    other = GPTNeoForCausalLM(model.config, backend=backend)
    other.load_state_dict(model.state_dict())
    return other.to(dtype).eval().requires_grad_(False)


def steps(model, ids, sizes, starts=None, keep=None):
    """Logits of pieces of ids [B, T], each appended to the cache of those before it; and the cache."""
    cache, at, out = model.transformer.new_cache(len(ids)), 0, []
    for n, size in enumerate(sizes):
        places = torch.arange(at, at + size)[None]
        rows = Rows(starts=starts) if n == 0 and starts is not None else Rows()
        out.append(model.step(ids[:, at : at + size].contiguous(), places, None, cache, keep=keep or size, rows=rows))
        at += size
    return out, cache


def check(model, ids, sizes):
    """All logits, and what the cache holds, err from float64 by at most twice what plain torch errs in this dtype and one
    rounding, in the mean by 1.5 times and a quarter of one."""
    exact, plain, got = (steps(m, ids, sizes) for m in (twin(model, torch.float64), twin(model, model.dtype), model))
    compared = [[torch.cat(out, 1) for out, _ in (exact, plain, got)]]
    for name in ("keys", "values"):
        for tensors in zip(*(getattr(cache, name) for _, cache in (exact, plain, got)), strict=True):
            slots = min(sum(sizes), *(t.shape[2] for t in tensors))
            compared.append([t[:, :, :slots].double() for t in tensors])
    for e, p, g in compared:
        rounding = e.abs().max() * torch.finfo(model.dtype).eps
        may, error = (p - e).abs(), (g - e).abs()
        assert error.max() <= 2 * (may.max() + rounding)
        assert error.mean() <= 1.5 * may.mean() + rounding / 4


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize(("D", "F"), SHAPES)
def test_steps_of_every_shape_and_dtype_compute_what_the_reference_does(D, F, dtype, lanes, calls):
    model = build(dtype, hidden_size=4 * D, intermediate_size=F)
    ids = torch.randint(0, 97, (1, 22), generator=torch.Generator().manual_seed(D))
    check(model, ids, [9, 1, 1, 3, 8])  # the window of 7 is crossed in the first
    assert calls == [(3, True)] * 5


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 2, 3, 16])
def test_batches_and_rings_that_wrapped(B, dtype, lanes, calls):
    model = build(dtype)
    ids = torch.randint(0, 97, (B, 304), generator=torch.Generator().manual_seed(B))
    sizes = [280, 1, 1, *([16 // B] if B < 16 else []), 1]  # a ring has 135 slots
    check(model, ids, sizes)
    assert calls == [(3, True)] * (len(sizes) - 1)


def test_left_padding_is_never_stored_and_never_seen(calls):
    model = build()
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(5))
    starts = torch.tensor([0, 2, 4], dtype=torch.int32)
    places = (torch.arange(5)[None] - starts[:, None]).clamp(min=0)
    cache = model.transformer.new_cache(3)
    got = [model.step(ids[:, :5].contiguous(), places, None, cache, keep=5, rows=Rows(starts=starts))]
    got += [model.step(ids[:, i : i + 1].contiguous(), places[:, -1:] + i - 4, None, cache) for i in range(5, 9)]
    assert calls == [(3, True)] * 5 and cache.lengths.tolist() == [9, 7, 5]
    for row in range(3):
        start = int(starts[row])
        alone, _ = steps(model, ids[row : row + 1, start:], [5 - start, 1, 1, 1, 1])
        assert torch.equal(got[0][row, start:], alone[0][0])
        for together, single in zip(got[1:], alone[1:], strict=True):
            assert torch.equal(together[row], single[0])


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_a_rows_bits_know_nothing_of_its_company_of_threads_or_of_how_it_came(dtype, lanes):
    model = build(dtype, hidden_size=96, num_heads=4, intermediate_size=700, vocab_size=4099)
    ids = torch.randint(0, 4099, (5, 12), generator=torch.Generator().manual_seed(1))
    together, _ = steps(model, ids, [3, 3, 1, 3, 1, 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        alone = [steps(model, ids[row : row + 1], [3, 3, 1, 3, 1, 1])[0] for row in range(5)]
    finally:
        torch.set_num_threads(threads)
    for row in range(5):
        assert all(torch.equal(t[row], a[0]) for t, a in zip(together, alone[row], strict=True))
    one_by_one, _ = steps(model, ids, [1] * 12)
    assert torch.equal(torch.cat(one_by_one, 1), torch.cat(together, 1))


def test_token_types_embeddings_and_kept_columns(calls):
    model = build()
    plain = twin(model, torch.float32)
    ids, types = (torch.randint(0, 97, (2, 6), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    places = torch.tensor([[3, 4, 5, 9, 10, 11]])
    got, want = (
        m.step(ids, places, types, m.transformer.new_cache(2), keep=2)  # a row of positions for all
        for m in (model, plain)
    )
    assert got.shape == (2, 2, 97)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    embeds = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    got, want = (m(inputs_embeds=embeds, use_cache=True).logits for m in (model, plain))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert calls == [(3, True)] * 2


def test_only_what_is_in_sight_is_read_and_only_new_slots_are_written():
    model = build()
    ids = torch.randint(0, 97, (1, 200), generator=torch.Generator().manual_seed(3))
    _, cache = steps(model, ids[:, :199], [199])
    cache.reserve(1)
    for layer, window in enumerate(cache.windows):
        keys, values = cache.keys[layer], cache.values[layer]
        R = keys.shape[2]
        seen = {t % R for t in range(max(0, 199 - window + 1) if window else 0, 199)}
        for slot in set(range(R)) - seen:
            keys[:, :, slot] = values[:, :, slot] = float("nan")
    before = [t.clone() for t in (*cache.keys, *cache.values)]
    logits = model.step(ids[:, 199:], torch.tensor([[199]]), None, cache)
    whole = twin(model, torch.float64)(ids).logits[:, -1:]
    assert (logits - whole).abs().max() < 1e-5
    for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
        slot = 199 % old.shape[2]
        assert new[:, :, slot].isfinite().all()
        old[:, :, slot] = new[:, :, slot]
        assert torch.equal(old, new) or (
            torch.equal(old.isnan(), new.isnan()) and torch.equal(old.nan_to_num(), new.nan_to_num())
        )


@pytest.mark.parametrize("value", [1e20, 3e38, float("inf"), -1e20, -3e38, float("-inf"), float("nan")])
def test_gelu_of_what_is_far_from_zero_is_that_of_torch(value, lanes):
    from gptneo_fast.ops import reference
    from gptneo_fast.ops.testing import EPS

    x, w = torch.zeros(1, 1, 8), torch.zeros(40, 8)
    args = (x, torch.ones(8), torch.zeros(8), w, torch.full((40,), value), EPS, True)
    got, want = cpu.norm_linear(*args), reference.norm_linear(*args)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, 0x7F800001, 0x7FC00001, 0x7FFFFFFF])
def test_every_nan_of_a_key_reaches_the_result(bits, lanes):
    model = build()
    ids = torch.randint(0, 97, (1, 7), generator=torch.Generator().manual_seed(8))
    _, cache = steps(model, ids[:, :6], [6])
    cache.keys[2][0, 1, 3, 5] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
    assert model.step(ids[:, 6:], torch.tensor([[6]]), None, cache).isnan().all()


def test_several_threads_compute_the_same():
    model = build(vocab_size=20011)
    ids = torch.randint(0, 20011, (4, 6), generator=torch.Generator().manual_seed(7))
    want = [torch.cat(steps(model, row[None], [1] * 6)[0], 1) for row in ids]
    got = [None] * 4

    def run(i):
        with torch.no_grad():
            got[i] = torch.cat(steps(model, ids[i : i + 1], [1] * 6)[0], 1)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, got, want))


def test_forked_children_compute_the_same_while_a_thread_goes_on():
    model = build()
    ids = torch.randint(0, 97, (1, 6), generator=torch.Generator().manual_seed(7))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has none of its parent's
    want = torch.cat(steps(model, ids, [1] * 6)[0], 1)
    done = threading.Event()

    def go_on():
        with torch.no_grad():
            while not done.is_set():
                steps(model, ids, [1] * 6)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for _ in range(8):
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # ends one that waits for ever
                os._exit(0 if torch.equal(torch.cat(steps(model, ids, [1] * 6)[0], 1), want) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        done.set()
        thread.join()
        torch.set_num_threads(before)


def arguments(model, cache):
    """Of the op, for one token."""
    trunk = model.transformer
    blocks = []
    for b in trunk.h:
        a, m = b.attn.attention, b.mlp
        blocks += [b.ln_1.weight, b.ln_1.bias, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.out_proj.weight]
        blocks += [a.out_proj.bias, b.ln_2.weight, b.ln_2.bias, m.c_fc.weight, m.c_fc.bias, m.c_proj.weight, m.c_proj.bias]
    last = [trunk.ln_f.weight, trunk.ln_f.bias, model.lm_head.weight]
    plan = ([trunk.wte.weight, trunk.wpe.weight], blocks, last, [], list(cache.windows), [1e-5] * (2 * len(trunk.h) + 1))
    token = torch.tensor([[5]])
    return plan, [token, torch.tensor([[2]]), None, cache.keys, cache.values, cache.lengths, None, 1]


REFUSED = {
    "an id": (lambda p, a: a.__setitem__(0, torch.tensor([[97]])), "ids holds 97, but must be from 0 to 96"),
    "a negative id": (lambda p, a: a.__setitem__(0, torch.tensor([[-1]])), "ids holds -1"),
    "a position": (lambda p, a: a.__setitem__(1, torch.tensor([[640]])), "positions holds 640, but must be from 0 to 639"),
    "int32 ids": (lambda p, a: a.__setitem__(0, torch.tensor([[5]], dtype=torch.int32)), "ids is Int .1, 1."),
    "many rows": (lambda p, a: a.__setitem__(0, torch.zeros(1, 33, dtype=torch.long)), "33 rows, but must have from 1 to 32"),
    "no rows": (lambda p, a: a.__setitem__(0, torch.zeros(1, 0, dtype=torch.long)), "0 rows"),
    "no positions": (lambda p, a: a.__setitem__(1, None), "ids need positions"),
    "kept columns": (lambda p, a: a.__setitem__(7, 2), "keep is 2, but must be from 1 to 1"),
    "a length": (lambda p, a: a.__setitem__(5, torch.tensor([-1], dtype=torch.int32)), "row 0 holds -1 tokens"),
    "no room": (
        lambda p, a: a.__setitem__(5, torch.tensor([64], dtype=torch.int32)),
        "a layer has 64 slots, but row 0 needs 65",
    ),
    "a start": (lambda p, a: a.__setitem__(6, torch.tensor([2], dtype=torch.int32)), "begins at column 2"),
    "values of a shape": (lambda p, a: a.__setitem__(4, [t[:, :, :1] for t in a[4]]), "keys or values are Float"),
    "a cache's dtype": (lambda p, a: a.__setitem__(3, [t.double() for t in a[3]]), "keys or values are Double"),
    "a layer too many": (lambda p, a: a.__setitem__(3, [*a[3], a[3][0]]), "4 keys and 3 values, but 3 blocks"),
    "another width": (
        lambda p, a: p[1].__setitem__(0, torch.ones(31)),
        "block 0's ln_1.weight is Float .31., but must be contig",
    ),
    "another dtype": (lambda p, a: p[1].__setitem__(15, torch.ones(32, 32).half()), "block 1's q_proj.weight is Half .32, 32."),
    "strides": (
        lambda p, a: p[1].__setitem__(2, torch.ones(32, 32).t()[::1].t().t()),
        "q_proj.weight is Float .32, 32., but must be",
    ),
    "an inner width": (lambda p, a: p[1].__setitem__(11, torch.ones(32, 31)), "block 0's c_proj.weight is Float .32, 31."),
    "a head": (lambda p, a: p[2].__setitem__(2, torch.ones(97, 31)), "lm_head.weight is Float .97, 31."),
    "a window": (lambda p, a: p[4].__setitem__(1, -1), "a window is -1"),
    "epsilons": (lambda p, a: p[5].pop(), "6 epsilons are not those of a number of blocks"),
    "embeddings": (lambda p, a: p[0].pop(), "1 tensors before the blocks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(case):
    model = build()
    _, cache = steps(model, torch.ones(1, 2, dtype=torch.long), [2])
    before = [t.clone() for t in (*cache.keys, *cache.values)]
    plan, args = arguments(model, cache)
    spoil, message = REFUSED[case]
    spoil(plan, args)
    with pytest.raises(RuntimeError, match=f"gptneo_fast_csrc: .*{message}"):
        torch.ops.gptneo_fast_csrc.decode(torch.ops.gptneo_fast_csrc.plan(*plan), *args)
    assert all(map(torch.equal, before, (*cache.keys, *cache.values)))


def test_the_arguments_of_these_refusals_are_else_taken():
    model = build()
    _, cache = steps(model, torch.ones(1, 2, dtype=torch.long), [2])
    plan, args = arguments(model, cache)
    got = torch.ops.gptneo_fast_csrc.decode(torch.ops.gptneo_fast_csrc.plan(*plan), *args)
    _, other = steps(model, torch.ones(1, 2, dtype=torch.long), [2])
    assert torch.equal(got, model.step(args[0], args[1], None, other))
