"""What `make gpu` measures is what it says: memory of the arguments, the step that ran, tiles that stood; peers are right."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import kernel_times, paths, predictions, run as gpu, sweeps, timing, whole
from benchmarks.gpu.kernel_times import Shapes
from benchmarks.gpu.ours import Ours, check_captured
from benchmarks.gpu.peers import Compiled, Transformers
from benchmarks.gpu.stage import LeftOut, Setting
from gptneo_fast import kernels
from gptneo_fast.kernels import gemm, gemv, launch, skinny
from gptneo_fast.ops.constants import BROKEN, STATUS
from tests.support.peers import peers

CARD = Setting(device=torch.device("meta"))  # true shapes that take no memory
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins for a GPU where there is none")


@pytest.fixture(scope="module")
def dry():
    return Setting(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def ours(dry):
    return Ours(dry.config("tiny"), torch.float32, dry.device)


@pytest.mark.parametrize("shape", ["1.3B", "2.7B"])  # 125m needs more sets, and less memory
def test_rotating_sets_exceed_the_caches_and_fit_into_memory(shape):
    for work in Shapes(CARD, shape).all():
        sets = timing.rotating(work.make, work.moved)
        storages = {t.untyped_storage()._cdata: t for args in sets for t in args if isinstance(t, torch.Tensor)}
        assert sum(t.untyped_storage().nbytes() for t in storages.values()) <= timing.MOST_BYTES, work.name
        assert len(sets) * work.moved >= timing.ROTATING or len(sets) == timing.MOST_SETS, work.name


def test_rotating_sets_stop_at_the_memory_and_count_what_they_share_once():
    half = int(timing.MOST_BYTES / 2)
    shared = torch.empty(half, dtype=torch.uint8, device="meta")
    assert len(timing.rotating(lambda i: [torch.empty(half, dtype=torch.uint8, device="meta")], 1.0)) == 2
    assert len(timing.rotating(lambda i: [shared, i], 1.0)) == timing.MOST_SETS
    assert len(timing.rotating(lambda i: [i], 1e6)) == 200


def test_sets_of_an_append_go_to_different_slots():
    work = Shapes(Setting(device=torch.device("cpu")), "tiny").kv_append(1, 1, called=False)
    first, second = work.make(0), work.make(1)
    assert first[0] is second[0] and first[2] is not second[2] and int(first[4]) != int(second[4])


def test_every_prediction_is_of_something_that_is_timed():
    timed = {work.name for work in Shapes(CARD, "1.3B").all()}
    assert set(predictions.KERNEL_US) <= timed
    from benchmarks.static.costs import WORK

    assert {name.removesuffix(", early launch") for name in predictions.WHOLE_MS} == set(WORK)
    assert predictions.kernel_us("1.3B", "lm_head, 1 rows") == 75 and predictions.kernel_us("125m", "lm_head, 1 rows") is None


def test_a_kernel_that_errs_at_the_timed_shape_is_not_timed(dry, monkeypatch):
    work = Shapes(dry, "tiny").layer_norm(5)
    right = kernels.layer_norm
    assert 0 < kernel_times.measure(dry, "tiny", work)["error over budget"] <= 1
    monkeypatch.setattr(kernels, "layer_norm", lambda *args: right(*args) * 1.01)
    with pytest.raises(AssertionError, match=r"layer_norm, 5 rows: m.* error .* of result 0 exceeds"):
        kernel_times.measure(dry, "tiny", work)


def test_the_compiled_peer_computes_what_transformers_computes_past_the_window():
    theirs, ours = peers(num_layers=3)
    ids = torch.randint(0, 97, (2, 25))
    peer = Compiled(theirs, ours.config, compile_layers=False)
    peer.allocate(2, 25)
    with torch.no_grad():
        expected = theirs(ids).logits
        got = [peer.forward(ids[:, :10], torch.arange(10))]
        got += [peer.forward(ids[:, i : i + 1], torch.tensor([i])) for i in range(10, 25)]
    torch.testing.assert_close(torch.cat(got, 1), expected[:, 9:], rtol=1e-4, atol=1e-4)


def test_decoders_step_on_to_the_context_that_was_asked_for():
    setting = Setting(device=torch.device("cpu"))
    theirs = Transformers(setting.config("tiny"), torch.float32, setting.device)
    lengths = []
    theirs.model.transformer.h[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["layer_past"].get_seq_length()), with_kwargs=True
    )
    with torch.no_grad():
        step = theirs.decoder(3, context=20, steps=4)
        for _ in range(4):
            assert step().shape == (3, 1)
    assert lengths == [16, 17, 18, 19]


def test_our_decoder_is_the_engines_step_and_ends_at_the_context(ours):
    step = ours.decoder(2, context=20, steps=2)
    tokens = torch.stack([step().clone() for _ in range(2)])
    assert step.runner.lengths.tolist() == [20, 20]
    assert torch.equal(step.runner.out[:2], tokens)
    assert step.check() == {"backend": "triton", "path": "launched"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda step: step.runner.lengths.sub_(1), "holds .19. tokens, expected 20"),
        (lambda step: setattr(step, "before", step.newest()), "has not written"),
        (lambda step: step.runner.cache.values[1].fill_(torch.nan), "not finite"),
        (lambda step: step.runner.state[STATUS].fill_(BROKEN), "logits were not finite"),
        (lambda step: step.runner.out.fill_(-1), "logits were not finite"),
        (lambda step: setattr(step, "device", torch.device("cuda")), "launched and not captured"),
    ],
)
def test_a_step_that_did_not_do_what_it_should_is_found(ours, spoil, words):
    step = ours.decoder(1, context=20, steps=1)
    step()
    step.check()
    spoil(step)
    with pytest.raises(AssertionError, match=words):
        step.check()


def test_generation_that_was_not_captured_fails_on_a_gpu():
    model = SimpleNamespace(last_generation=SimpleNamespace(path="stepwise", why="no reason"))
    assert check_captured(model, torch.device("cpu")) == "stepwise"
    with pytest.raises(AssertionError, match="stepwise and not captured: no reason"):
        check_captured(model, torch.device("cuda"))


@torch.no_grad()
def test_the_prompt_on_the_device_alone_computes_the_prompt(ours):
    ids = torch.arange(12)[None] % 19
    call = ours.prefill_on_device(ids)
    first, again = call().clone(), call()
    torch.testing.assert_close(first, ours.prefill(ids).float())
    assert torch.equal(first, again)


def test_early_launches_reach_the_kernels_and_their_tokens_are_compared(dry, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "chained", lambda op, like: seen.append(launch.early.get()) or {"PDL": False})
    case = paths.Paths(dry, "tiny")
    with pytest.raises(LeftOut, match="needs a GPU of capability"):
        case.early(1)
    monkeypatch.setattr(Setting, "need_early_launch", lambda self: None)
    assert case.early(1) == {"tokens": case.new, "path": "stepwise"}
    assert True in seen and False in seen and case.model.early_launch is False
    row = whole.Bench(dry, "tiny").decode(Ours.name, 1, 128, early_launch=True)
    assert row["early_launch"] and row["path"] == "launched"
    monkeypatch.setattr(case, "tokens", lambda rows, **how: torch.arange(4)[None] * len(how))
    with pytest.raises(AssertionError, match="column 1 of row 0 differs: 1 and 0"):
        case.early(1)


def test_calls_are_replayed_from_a_graph_or_launched_where_they_cannot_be_captured(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 6.0

    class Graph:
        def replay(self):
            log.append("replay")

    class Capture:
        def __init__(self, graph):
            pass

        def __enter__(self):
            if refuses:
                raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *reason):
            pass

    log, refuses, cuda = [], False, torch.device("cuda")
    for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": Capture, "synchronize": lambda *_: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    calls = [lambda: log.append("call")] * 3
    assert timing.per_call(calls, cuda, rounds=1) == timing.Timing(pytest.approx(2e-3), "graph")
    assert log == ["call"] * 6 + ["event", "replay", "event"] * 3
    refuses = True
    assert timing.per_call(calls, cuda, rounds=1).how == "events"
    log.clear()
    assert timing.wall(calls[0], cuda, rounds=2) >= 0 and log == ["call"] * 3


def test_every_winner_is_a_row_that_can_be_pasted():
    full = Setting("full", CARD.device)
    found = list(sweeps.sweeps(full))
    assert {s.owner.__name__.rpartition(".")[2] for s in found} == {"gemv", "decode_attention", "skinny", "gemm", "attention"}
    for sweep in found:
        names = {"Tile": gemm.Tile if sweep.owner is gemm else type(sweep.present)}
        assert sweep.others and sweep.present not in sweep.others, sweep.name
        for tile in (sweep.present, *sweep.others):
            assert eval(f"{{{sweep.row(tile)}}}", names) == {sweep.key: tile}
        table = getattr(sweep.owner, sweep.table)
        assert callable(table) or sweep.key in table, sweep.name
    assert {s.key for s in found if s.owner is gemv} == set(gemv.TILES)
    assert {s.key for s in found if s.owner is skinny} <= set(skinny.TILES)


def test_a_candidate_that_no_kernel_looks_up_is_a_fault(dry):
    sweep, before = next(sweeps.sweeps(dry)), gemv.TILES
    assert sweeps._held(sweep, sweep.others[0])["error over budget"] <= 1
    with pytest.raises(sweeps.NotAskedError, match="no kernel has looked up row"), sweep.standing(sweep.others[0]):
        pass
    assert gemv.TILES is before


def test_the_fastest_tile_that_is_right_and_worth_it_wins(dry, monkeypatch):
    sweep = next(sweeps.sweeps(dry))
    present, wrong, right = sweep.present, "wrong", "right"

    def held(_, tile):
        if tile == wrong:
            raise AssertionError("max error 3 exceeds")

    monkeypatch.setattr(sweeps, "_held", held)
    failed = {}
    assert sweeps._best(sweep, {present: 10.0, wrong: 5.0, right: 8.0}, failed) == right
    assert failed == {"'wrong'": "max error 3 exceeds"}
    assert sweeps._best(sweep, {present: 10.0, wrong: 5.0, right: 9.9}, failed) == present


def test_a_tile_that_the_card_has_no_room_for_is_left_out_and_a_wrong_one_is_not(dry, monkeypatch):
    sweep = next(sweeps.sweeps(dry))
    for error, expected in (
        (RuntimeError("out of resource: shared memory"), LeftOut),
        (AssertionError("over"), AssertionError),
    ):

        def held(*_, error=error):
            raise error

        monkeypatch.setattr(sweeps, "_held", held)
        with pytest.raises(expected):
            sweeps._fits(sweep, sweep.present)


def test_each_candidate_is_compiled_by_one_of_the_stages_side_by_side(dry):
    parts = [[case.name for case in sweeps.compile_cases(dry, part, 3)] for part in range(3)]
    everything = [f"{s.name}, {tile}" for s in sweeps.sweeps(dry) for tile in (s.present, *s.others)]
    assert sorted(itertools.chain(*parts)) == sorted(everything) and len(set(everything)) == len(everything)


def test_a_dry_run_is_as_small_as_it_may_be():
    dry = Setting(device=torch.device("cpu"))
    assert dry.tiny and not CARD.tiny and dry.shapes == ["tiny"] and CARD.shapes[0] == "1.3B"
    assert [dry.batch(n) for n in (1, 8, 64)] == [1, 2, 3] and CARD.batch(64) == 64


@pytest.mark.parametrize("mode", gpu.MINUTES)
def test_the_stages_of_a_card_have_cases_of_every_model_the_middle_one_first(mode):
    setting = Setting(mode, CARD.device)
    for part in gpu.PLAN:
        for stage in part.stages:
            cases = [case.name for case in gpu.cases_of(stage, setting)]
            assert cases and len(set(cases)) == len(cases), stage
            if stage in ("exact", "paths", "models", "decode", "peers", "kernels", "ours", "profile"):
                assert cases[0].startswith("1.3B"), stage
            if stage.startswith("other"):
                assert not any(name.startswith("1.3B") for name in cases) and any(name.startswith("2.7B") for name in cases)
