"""Drafts on the device change no token, whoever guesses."""

import copy
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gptneo_fast
from gptneo_fast.generation import Generation
from gptneo_fast.generation.captured import runner, speculation
from gptneo_fast.generation.generate import request_of, settle
from gptneo_fast.generation.prompt import prompt_of
from gptneo_fast.ops import backends, ops
from tests.support.engines import CONFIG, both, capture, captured, model, ragged, repeating  # noqa: F401 (fixtures)


@pytest.mark.parametrize("new", [1, 5, 6, 40, 100])
@pytest.mark.parametrize("n", [1, 4, 10])
def test_a_looked_up_draft_changes_no_token(model, monkeypatch, n, new):
    ids = repeating(model)
    plain = model.generate(ids, max_new_tokens=new)
    assert torch.equal(*(both(model, monkeypatch, input_ids=ids, max_new_tokens=new, prompt_lookup_num_tokens=n)))
    capture(monkeypatch)
    assert torch.equal(model.generate(ids, max_new_tokens=new, prompt_lookup_num_tokens=n), plain)


@pytest.mark.parametrize("eos", [None, list(range(0, 211, 9))])
@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistants_draft_changes_no_token(model, captured, do_sample, eos):
    torch.manual_seed(1)
    other = gptneo_fast.GPTNeoForCausalLM(model.config).eval()
    batch = ragged(1, 30)
    options = dict(do_sample=do_sample, temperature=1.5, seed=3, max_new_tokens=50, eos_token_id=eos, pad_token_id=0)
    plain = model.generate(**batch, **options)
    for assistant in (other, copy.deepcopy(model)):
        assistant.generation_config.num_assistant_tokens = 6
        assert torch.equal(model.generate(**batch, **options, assistant_model=assistant), plain)
        assert model.last_generation.path == "captured"


def test_right_guesses_save_steps(model, captured, monkeypatch):
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 9
    rounds = []
    step = speculation.Speculation.step
    monkeypatch.setattr(speculation.Speculation, "step", lambda self, method: (rounds.append(1), step(self, method)))
    model.generate(**ragged(1), max_new_tokens=61, assistant_model=assistant)
    assert len(rounds) <= 7  # 60 tokens after the first, ten a round


def test_left_padding_and_used_memory_do_not_disturb_drafts(model, captured):
    ids = repeating(model)
    plain = model.generate(ids, max_new_tokens=30)[0, ids.shape[1] :]
    padded, mask = torch.nn.functional.pad(ids, (4, 0)), torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    for _ in range(2):
        got = model.generate(padded, attention_mask=mask, max_new_tokens=30, prompt_lookup_num_tokens=5)
        assert torch.equal(got[0, padded.shape[1] :], plain)
    assert len([r for r in model.idle_runners.runners if isinstance(r, speculation.Speculation)]) == 1


def test_drafts_that_the_host_must_check_say_so(model, captured):
    model.generate(repeating(model), max_new_tokens=3, prompt_lookup_num_tokens=3, repetition_penalty=1.2)
    assert model.last_generation == Generation("stepwise", "repetition_penalty with drafts runs on the host")


def test_an_assistant_on_another_device_is_no_part_of_a_captured_step(model):
    settled = settle(model, None, {"max_new_tokens": 3})
    prompt = prompt_of(model, repeating(model), None, None, settled)
    far = types.SimpleNamespace(device=torch.device("cuda", 1), config=model.config)
    request = request_of(model, prompt, settled, assistant=far)
    assert speculation.why_not_drafts(request) == "the assistant is on cuda:1 and the model on cpu"
    assert speculation.why_not_drafts(request_of(model, prompt, settled, assistant=model)) is None


def test_a_drafting_step_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_: backends.Choice("triton", "", ops))
    with torch.device("meta"):
        model = gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**CONFIG)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cpu")  # fake, and on the CPU: values are as far away as on a GPU
        drafts = speculation.Speculation(runner.Runner(model, 1, 256), 4, runner.Runner(model, 1, 256))
        drafts.step(0)
        drafts.assistant = None
        drafts.step(1)
