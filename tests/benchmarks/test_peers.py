"""Other runtimes compute what transformers does: what we hand them, and why one that is not there is left out."""

import statistics
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cpu import bench_peers, floor, turns
from benchmarks.cpu.peers import Peer, likeliest, missing, peers as all_peers
from benchmarks.cpu.peers.as_gpt2 import as_gpt2
from benchmarks.cpu.peers.compiled import Compiled
from benchmarks.cpu.peers.exported import OnnxRuntime, Step
from benchmarks.tables import OURS, PEER
from gptneo_fast.tools.bench import step_bytes
from tests.support.peers import peers

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 97, (1, 23), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    """transformers' model whose window holds 40 tokens, and no gradients."""
    theirs, _ = peers(window_size=40)
    return theirs.requires_grad_(False)


@torch.no_grad()
def test_the_step_for_exporters_is_transformers_past_the_window_whole_and_token_by_token():
    theirs, _ = peers(window_size=7)
    step = Step(theirs)
    expected = theirs(IDS).logits[0]
    logits, *kept = step(IDS, *step.past())
    torch.testing.assert_close(logits[0], expected[-1])
    _, *grown = step(IDS[:, :5], *step.past())
    for t in range(5, IDS.shape[1]):
        logits, *grown = step(IDS[:, t : t + 1], *grown)
        torch.testing.assert_close(logits[0], expected[t])
    torch.testing.assert_close(grown, kept)
    assert len(step.names("new")) == len(kept)


@torch.no_grad()
def test_the_weights_as_gpt2_give_transformers_gpt2_the_logits_of_gpt_neo_within_the_window(model):
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.max_position_embeddings,
        n_embd=c.hidden_size,
        n_layer=c.num_layers,
        n_head=c.num_heads,
    )
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    turned = {n: w.T if w.dim() == 2 and not n.startswith(("wte", "wpe")) else w for n, w in as_gpt2(model).items()}
    lacks = gpt2.load_state_dict({f"transformer.{n}": w for n, w in turned.items()}, strict=False)
    assert lacks.missing_keys == ["lm_head.weight"] and not lacks.unexpected_keys
    gpt2.tie_weights()
    torch.testing.assert_close(gpt2(IDS).logits, model(IDS).logits)
    far = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(gpt2(far).logits, model(far).logits, atol=1e-2)  # which is why a runner's name says so


def test_the_static_cache_gives_transformers_tokens_within_the_window_and_refuses_past_it(model):
    peer = Compiled(model, torch.get_num_threads(), backend="eager")
    with torch.no_grad():
        expected = turns.continuation(model, IDS, 10)
        for _ in range(2):  # the cache is emptied
            assert torch.equal(peer.decode(IDS, 10), expected)
    torch.compiler.reset()
    with pytest.raises(ValueError, match=r"23 \+ 18 tokens are past the window of 40"):
        peer.decode(IDS, 18)


@pytest.mark.parametrize("peer", all_peers(), ids=lambda peer: peer.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peer_that_is_there_gives_transformers_tokens(peer, dtype):
    if reason := peer.why_not(dtype):
        pytest.skip(reason)
    theirs, ours = peers(window_size=64, dtype=dtype)
    theirs.requires_grad_(False)
    how = {"backend": "eager"} if peer is Compiled else {}
    found = peer(theirs, 1, **how).decode(IDS, 12)
    assert found.shape == (1, 35)
    turns.leaves(ours, found, turns.continuation(theirs, IDS, 12), 12, peer.coarse)


def test_a_runtime_that_cannot_be_imported_is_named_with_the_way_to_it(monkeypatch):
    for name in ("onnxruntime", "openvino", "ctranslate2", "llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)
    those, why = bench_peers.runnable(torch.float32)
    assert those == [Compiled] and len(why) == len(all_peers()) - 1
    assert all("cannot be imported" in reason and "`make peers`" in reason for reason in why.values())
    assert "float32 only" in OnnxRuntime.why_not(torch.bfloat16)
    assert missing("json") == ""


def test_the_likeliest_token_is_not_the_end():
    assert likeliest(torch.tensor([1.0, 3.0, 2.0]), None) == 1
    assert likeliest(torch.tensor([1.0, 3.0, 2.0]), 1) == 2


class Watch:
    """What pytest-benchmark does with `pedantic`: calls in order, and `stats`."""

    def __init__(self) -> None:
        self.extra_info = {}

    def pedantic(self, call, setup, rounds):
        data = []
        for _ in range(rounds):
            setup()
            data.append(turns.seconds_of(call))
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data, median=statistics.median(data)))


def test_runners_take_turns_and_a_step_is_what_further_tokens_take(monkeypatch):
    called, clock = [], {"now": 0.0}

    def run(name, first, further, ids, new):
        called.append((name, new))
        clock["now"] += first + further * (new - 1)

    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(turns, "read_rate", lambda threads: 1e9)
    watch = Watch()
    runners = {
        PEER: partial(run, PEER, 0.25, 0.125),
        OURS: partial(run, OURS, 0.125, 0.125),
        "x": partial(run, "x", 0.5, 0.0625),
    }
    config = peers()[1].config
    turns.decode(watch, ("w", "bf16", 1), runners, (IDS, 4, config), warm=True)
    a_round = [(name, 1) for name in runners] + [(PEER, 4), ("x", 4), (OURS, 4)]
    assert called == a_round * turns.ROUNDS
    rows = {row["runner"]: row for row in watch.extra_info["rows"]}
    assert rows[PEER]["ms"] == 625 and rows["x"]["tokens_per_second"] == 4 / 0.6875 and rows[OURS]["ms"] == 500
    assert {name: row["step_ms"] for name, row in rows.items()} == {PEER: 125, "x": 62.5, OURS: 125}
    least = step_bytes(config, torch.bfloat16, 1, 23 + 2) / 1e9
    assert rows["x"]["floor_ms"] == least * 1e3 and rows["x"]["share_of_floor"] == least / 0.0625


@torch.no_grad()
def test_tokens_that_the_dtype_does_not_explain_fail_wherever_they_stand(monkeypatch):
    theirs, ours = peers()
    expected = turns.continuation(theirs, IDS, 5)
    assert turns.leaves(ours, expected, expected, 5) is None
    for place in range(-5, 0):
        wrong = expected.clone()
        wrong[0, place] = (wrong[0, place] + 1) % 97
        with pytest.raises(AssertionError, match=rf"tokens \[{5 + place}"):
            turns.leaves(ours, wrong, expected, 5)
        with pytest.raises(AssertionError, match=rf"tokens \[{5 + place}"):
            turns.leaves(ours, wrong, expected, 5, torch.float16)
    with pytest.raises(AssertionError, match="the prompt was changed"):
        turns.leaves(ours, expected.roll(1), expected, 5)


@torch.no_grad()
def test_a_token_within_the_error_passes_and_is_named():
    theirs, ours = peers()
    for model in (theirs, ours):  # every token is as likely as any
        model.transformer.wte.weight.copy_(model.transformer.wte.weight[:1].expand(97, -1))
    expected = turns.continuation(theirs, IDS, 5)
    other = expected.clone()
    other[0, -2] = (other[0, -2] + 5) % 97
    assert turns.leaves(ours, other, expected, 5) == 3


def test_the_read_rate_is_that_of_the_bytes_and_the_time(monkeypatch):
    monkeypatch.setattr(floor, "_data", lambda: torch.ones(8, 4096))
    times = iter([0.0, 2.0, *(float(10 * i) for i in range(2, 16))])
    monkeypatch.setattr(floor.time, "perf_counter", lambda: next(times))
    before = torch.get_num_threads()
    assert floor.read_rate(1) == floor.BYTES / 2.0  # the best of all passes
    assert torch.get_num_threads() == before


def test_every_peer_says_its_name_once():
    names = [peer.name for peer in all_peers()]
    assert len(set(names)) == len(names) and {OURS, PEER}.isdisjoint(names)
    assert all(hasattr(peer, name) for peer in all_peers() for name in ("decode", "why_not"))
    assert Peer not in all_peers()
