"""The engine on the CPU: the captured step replayed as a plain call, and everything around it as on a GPU."""

import copy
import gc
import pickle
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import InputError, NonFiniteLogitsError, OutOfMemoryError
from gptneo_fast.generation import Generation, captured as captured_path, text
from gptneo_fast.generation.captured import capturing, memory, runner, strategy
from gptneo_fast.generation.generate import complete, request_of, settle
from gptneo_fast.generation.prompt import prompt_of
from gptneo_fast.ops import backends, ops
from gptneo_fast.ops.constants import FINISHED, STATUS
from tests.support.engines import CONFIG, both, captured, model, ragged, repeating  # noqa: F401 (fixtures)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("new", [1, 2, 15, 16, 17, 60])
def test_greedy_tokens_are_those_of_the_stepwise_path(model, monkeypatch, rows, new):
    assert torch.equal(*both(model, monkeypatch, **ragged(rows), max_new_tokens=new))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"suppress_tokens": [5, 9, 77], "begin_suppress_tokens": list(range(100))},
        {"eos_token_id": list(range(0, 211, 3)), "pad_token_id": 1},
        {"eos_token_id": list(range(0, 211, 2)), "pad_token_id": 1, "min_new_tokens": 9},
        {"eos_token_id": list(range(0, 211, 5)), "pad_token_id": 2, "min_length": 30, "repetition_penalty": 1.3},
    ],
    ids=lambda o: ", ".join(o),
)
def test_options_mean_the_same_on_the_device(model, monkeypatch, options):
    stepwise, fast = both(model, monkeypatch, **ragged(), max_new_tokens=40, **options)
    assert torch.equal(stepwise, fast)


def test_a_token_is_penalised_however_often_the_prompt_has_it(model, monkeypatch):
    ids = torch.full((1, 259), 5)
    ids[0, 256:] = torch.tensor([6, 7, 8])
    with torch.no_grad():
        model.transformer.wte.weight[5] *= 3  # likely, were it not for the penalty
    assert torch.equal(*both(model, monkeypatch, input_ids=ids, max_new_tokens=20, repetition_penalty=5.0))


def test_a_rows_text_depends_neither_on_its_mates_nor_on_how_often_the_host_looks(model, captured, monkeypatch):
    options = dict(do_sample=True, top_k=20, top_p=0.9, temperature=0.8, seed=4, max_new_tokens=50)
    batch = ragged()
    texts = model.generate(**batch, **options)
    first = model.generate(batch["input_ids"][:1], **options)
    assert torch.equal(texts[:1], first)
    for replays in (1, 3, 100):
        monkeypatch.setattr(strategy, "_REPLAYS", replays)
        assert torch.equal(model.generate(**batch, **options), texts)
    assert not torch.equal(model.generate(**batch, **options | {"seed": 5}), texts)
    same = model.generate(batch["input_ids"][:1].expand(4, -1), **options)
    assert len({tuple(row) for row in same.tolist()}) == 4  # equal prompts, a text of their own each


def test_a_text_depends_on_its_prompts_place_in_the_list_and_not_on_its_batch(captured, monkeypatch):
    model = gptneo_fast.load(FOLDER, device="cpu")
    prompts = ["Once upon a time", "One morning the little fox", "Long ago", "Once upon a time"]
    options = dict(do_sample=True, temperature=0.9, seed=11, max_new_tokens=12)
    together = model.generate_text(prompts, **options)
    monkeypatch.setattr(text, "_BATCH", 1)
    assert model.generate_text(prompts, **options) == together
    assert together[0] != together[3]


def test_the_global_seed_decides_where_none_is_given(model, captured):
    def text():
        torch.manual_seed(7)
        return model.generate(**ragged(), do_sample=True, max_new_tokens=20)

    assert torch.equal(text(), text())


def test_streams_give_every_token_and_leave_nothing_behind(model, captured):
    ids = ragged(1)["input_ids"]
    whole = model.generate(ids, max_new_tokens=30)
    seen = []

    class Streamer:
        def put(self, tokens):
            seen.extend(tokens.flatten().tolist())

        def end(self):
            seen.append("end")

    model.generate(ids, max_new_tokens=30, streamer=Streamer())
    assert seen == [*whole[0].tolist(), "end"]


def request(model, **options):
    settled = settle(model, None, options)
    return request_of(model, prompt_of(model, ragged(1)["input_ids"], None, None, settled), settled)


def test_interleaved_generations_use_memory_of_their_own_and_hand_it_back(model, captured):
    whole = model.generate(ragged(1)["input_ids"], max_new_tokens=30)[0, 11:].tolist()
    steps = [captured_path.captured(model, request(model, max_new_tokens=30)) for _ in range(2)]
    texts = [[], []]
    for _ in range(30):
        for found, step in zip(texts, steps, strict=True):
            found.append(next(step).item())
    assert texts == [whole, whole]
    assert len(model.idle_runners.runners) < 2
    for step in steps:
        step.close()  # as a `break` does
    assert len(model.idle_runners.runners) == 2
    kept = list(model.idle_runners.runners)
    model.generate(ragged(1)["input_ids"], max_new_tokens=30)
    assert {id(r) for r in model.idle_runners.runners} == {id(r) for r in kept}


def test_threads_do_not_disturb_each_other(model, captured):
    batches = [ragged(n) for n in (1, 2, 3, 1, 2, 3)]
    alone = [model.generate(**b, max_new_tokens=20) for b in batches]
    got = [None] * len(batches)

    def work(i):
        got[i] = model.generate(**batches[i], max_new_tokens=20)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, got, strict=True))


def test_other_weights_mean_other_steps(model, monkeypatch, captured):
    model.generate(**ragged(), max_new_tokens=3)
    old = model.idle_runners.runners[0]
    model.resize_token_embeddings(250)
    monkeypatch.undo()
    assert torch.equal(*both(model, monkeypatch, **ragged(), max_new_tokens=20))
    assert old not in model.idle_runners.runners
    model.double()
    assert torch.equal(*both(model, monkeypatch, **ragged(), max_new_tokens=20))


def test_weights_changed_in_place_are_seen(model, monkeypatch, captured):
    before = model.generate(**ragged(), max_new_tokens=20)
    with torch.no_grad():
        model.transformer.wte.weight.add_(torch.randn_like(model.transformer.wte.weight))
    monkeypatch.undo()
    stepwise, fast = both(model, monkeypatch, **ragged(), max_new_tokens=20)
    assert torch.equal(stepwise, fast) and not torch.equal(before, fast)


def test_a_copy_of_a_model_has_runners_of_its_own(model, monkeypatch, captured):
    model.generate(**ragged(), max_new_tokens=3)
    other = copy.deepcopy(model)
    assert model.idle_runners.runners and not other.idle_runners.runners
    assert pickle.loads(pickle.dumps(model)).idle_runners.runners == []


def test_memory_is_accounted_for_and_can_be_released(model, captured):
    model.generate(**ragged(), max_new_tokens=3)
    model.generate(**ragged(1), max_new_tokens=3, prompt_lookup_num_tokens=2)
    cache = sum(model.cache_bytes(rows, 256) for rows in (4, 1))
    assert cache < model.release_memory() < 1.2 * cache
    assert not model.idle_runners.runners and model.release_memory() == 0


def test_memory_goes_with_the_model(model, captured):
    other = gptneo_fast.GPTNeoForCausalLM(model.config).eval()
    other.generate(**ragged(), max_new_tokens=3)
    held = weakref.ref(other.idle_runners.runners[0])
    del other
    gc.collect()
    assert held() is None


def test_a_row_that_breaks_ends_with_an_error_and_the_others_go_on(model, captured):
    batch = ragged()
    whole = model.generate(**batch, max_new_tokens=12)
    model.idle_runners.drop(model.device)
    step, calls = type(model).step, 0

    def breaks(*args, **keywords):
        nonlocal calls
        calls += 1
        out = step(model, *args, **keywords).clone()
        if calls == 5:
            out[1] = float("nan")
        return out

    model.step = breaks
    with pytest.raises(NonFiniteLogitsError, match="row 1 were NaN or infinite after 15") as error:
        model.generate(**batch, max_new_tokens=12, pad_token_id=0)
    got = error.value.sequences
    assert error.value.rows == [1] and torch.equal(got[[0, 2]], whole[[0, 2]])
    assert torch.equal(got[1, :15], whole[1, :15]) and (got[1, 15:] == 0).all()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor runs on the host"),
        ({"logits_processor": [lambda ids, scores: scores]}, "function runs on the host"),
        ({"max_time": 100.0}, "MaxTimeCriteria runs on the host"),
        ({"typical_p": 0.5, "do_sample": True}, "TypicalLogitsWarper runs on the host"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate asks"),
        ({"use_cache": False}, "use_cache=False asks"),
        ({"remove_invalid_values": True}, "InfNanRemoveLogitsProcessor runs on the host"),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else "",
)
def test_what_the_host_must_do_takes_the_stepwise_path_and_says_so(model, captured, options, why):
    model.generate(**ragged(1), max_new_tokens=3, **options)
    assert model.last_generation.path == "stepwise" and why in model.last_generation.why


def test_a_touched_model_is_not_captured_and_a_touch_ends_what_was(model, captured):
    ids = torch.randint(1, 211, (1, 9), generator=torch.Generator().manual_seed(0))
    plain = model.generate(ids, max_new_tokens=20)
    assert model.last_generation.path == "captured"

    def halve(module, args, out):
        return out * -0.5

    handle = model.transformer.h[1].mlp.c_fc.register_forward_hook(halve)
    touched = model.generate(ids, max_new_tokens=20)
    assert model.last_generation.path == "stepwise" and "hooked" in model.last_generation.why
    assert not torch.equal(touched, plain)
    handle.remove()
    assert torch.equal(model.generate(ids, max_new_tokens=20), plain) and model.last_generation.path == "captured"
    model.prepare_inputs_for_generation = model.prepare_inputs_for_generation  # as peft does
    assert torch.equal(model.generate(ids, max_new_tokens=20), plain) and model.last_generation.path == "stepwise"
    del model.prepare_inputs_for_generation

    steps = captured_path.captured(model, request(model, max_new_tokens=60))
    next(steps)
    model.transformer.h[1].mlp.c_fc.register_forward_hook(halve)
    with pytest.raises(InputError, match="hooked, replaced or patched while captured steps"):
        list(steps)


def test_bad_requests_fail_before_anything_is_launched(model, captured):
    with pytest.raises(InputError):
        model.generate(**ragged(), max_new_tokens=5000)
    assert not model.idle_runners.runners


def test_a_step_that_could_not_be_captured_is_said_so(model, monkeypatch, captured):
    ids = repeating(model)
    whole = model.generate(ids, max_new_tokens=20)
    assert model.last_generation == Generation("captured", "every option runs on the device")
    model.idle_runners.drop(model.device)
    monkeypatch.setattr(capturing, "capture", lambda step, _: capturing.EagerStep(step, "RuntimeError: no"))
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        model.last_generation = None
        assert torch.equal(model.generate(ids, max_new_tokens=20, **options), whole)
        assert model.last_generation == Generation("launched", "the step could not be captured: RuntimeError: no")


def test_what_will_be_captured_is_not_said_before_it_was(captured):
    model = gptneo_fast.load(FOLDER, device="cpu")
    pieces = model.stream("Once upon", max_new_tokens=3)
    assert model.last_generation is None
    next(pieces)
    assert model.last_generation.path == "captured"


def in_turn(generate):
    """What `generate` gives under inference_mode, ordinarily, under no_grad, and under inference_mode again."""
    found = []
    for mode in (torch.inference_mode, nullcontext, torch.no_grad, torch.inference_mode):
        with mode():
            found.append(generate())
    return found


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3}, {"prompt_lookup_num_tokens": 3}, {"no_repeat_ngram_size": 9}]
)
def test_memory_made_in_one_mode_serves_in_all(model, captured, options):
    ids = repeating(model)
    first, *others = in_turn(lambda: model.generate(ids, max_new_tokens=20, **options))
    assert all(torch.equal(first, other) for other in others)
    assert len(model.idle_runners.runners) == ("no_repeat_ngram_size" not in options)  # the same memory each time


def test_a_text_begun_in_inference_mode_goes_on_outside_of_it(model, captured):
    whole = model.generate(**ragged(1), max_new_tokens=20)[0, 11:].tolist()
    with torch.inference_mode():
        steps = captured_path.captured(model, request(model, max_new_tokens=20))
        text = [next(steps).item()]
    assert text + [step.item() for step in steps] == whole


class Transfers(TorchDispatchMode):
    """Counts the tensors that go to another device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.sent = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            self.sent += args[0].device.type != self.device and out.device.type == self.device
        return out


def test_tokens_go_to_the_device_once_however_many_there_are(model, captured, monkeypatch):
    """A prompt on another device than the runner's copies on the host, as on a GPU."""
    asked = request(model, max_new_tokens=30)
    run, seen = runner.Runner.run, []
    monkeypatch.setattr(runner.Runner, "run", lambda self, _, *rest: run(self, ids, *rest))
    ids, asked.prompt.ids = asked.prompt.ids, asked.prompt.ids.to("meta")
    for token in captured_path.captured(model, asked):
        assert token.device.type == "cpu"
        seen.append(token.item())
    assert len(seen) == 30
    with Transfers("meta") as transfers:
        out = complete(model, asked)
    assert transfers.sent == 1 and out.device.type == "meta" and out.shape == (1, 30)


def test_a_request_that_cannot_fit_names_what_would(model):
    need = memory.needed(model.config, model.dtype, 4, 512)
    memory.check_memory(model, 4, 512, lambda: None, free=need)
    freed = []
    with pytest.raises(OutOfMemoryError, match="2 rows of 512 tokens or 4 rows of") as error:
        memory.check_memory(model, 4, 512, lambda: freed.append(1), free=memory.needed(model.config, model.dtype, 2, 512))
    assert isinstance(error.value, MemoryError) and freed
    shorter = int(str(error.value).split("4 rows of ")[2].split()[0])
    memory.check_memory(model, 4, shorter, lambda: None, free=memory.needed(model.config, model.dtype, 2, 512))
    with pytest.raises(OutOfMemoryError, match="not one row would fit"):
        memory.check_memory(model, 1, 512, lambda: None, free=0)


def test_a_step_never_waits_for_the_device(monkeypatch):
    """On fake CUDA tensors a look at a value raises; the whole step, drawing included, must pass."""
    monkeypatch.setattr(backends, "choose", lambda *_: backends.Choice("triton", "", ops))
    for name in ("cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a step asked for values on the host"))
    with torch.device("meta"):
        model = gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**CONFIG)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model.to_empty(device="cuda")
        state = torch.zeros(5, 2, dtype=torch.int64)
        lengths = torch.zeros(2, dtype=torch.int32)
        cache = gptneo_fast.KVCache(model.config, 2, dtype=torch.float32, device="cuda", max_length=256)
        view = runner.StepCache(cache, lengths)
        with torch.no_grad():
            logits = runner.step_logits(model, state, view)
            ops.sample(
                logits, torch.ones(4), torch.zeros(3, dtype=torch.int32), torch.zeros(211, dtype=torch.uint8),
                torch.zeros(2, dtype=torch.int64), None, state, torch.zeros(8, 2, dtype=torch.int32).t(), lengths, 0,
            )  # fmt: skip
        assert logits.device.type == "cuda" and logits.shape == (2, 211)
        with pytest.raises(Exception, match="local_scalar_dense"):
            bool(state.select(0, STATUS).select(0, 0) == FINISHED)


def test_the_public_names():
    assert Generation("captured", "x").path == "captured"


def test_interpreted_kernels_generate_what_the_reference_does(model, captured):
    kernels = pytest.importorskip("gptneo_fast.kernels")
    if not kernels.launch.INTERPRETED:
        pytest.skip("kernels are compiled here: benchmarks/gpu/run.py checks them")
    fast = gptneo_fast.GPTNeoForCausalLM(model.config, backend="triton").eval()
    fast.load_state_dict(model.state_dict())
    assert fast.backend.name == "triton"
    for options in ({}, dict(do_sample=True, top_k=9, top_p=0.9, seed=2, repetition_penalty=1.2)):
        expected = model.generate(**ragged(2), max_new_tokens=7, **options)
        assert torch.equal(fast.generate(**ragged(2), max_new_tokens=7, **options), expected)
    ids = repeating(model)
    expected = model.generate(ids, max_new_tokens=9)
    assert torch.equal(fast.generate(ids, max_new_tokens=9, prompt_lookup_num_tokens=3), expected)
    assert fast.last_generation.path == "captured"
