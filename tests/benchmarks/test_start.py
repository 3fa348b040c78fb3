"""A process that is timed from nothing to its first token does that work, with the package of this folder."""

import pytest
import torch

import gptneo_fast
from benchmarks.cpu.bench_start import Starts
from benchmarks.tables import ROOT
from gptneo_fast.demo import FOLDER


def test_a_start_says_its_first_token_and_its_memory():
    start = Starts("gptneo_fast", FOLDER, [str(ROOT)])
    start()
    model = gptneo_fast.GPTNeoForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    token = model.generate(torch.arange(100, 110)[None], max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1].item()
    assert [said["token"] for said in start.said] == [token]
    assert start.said[0]["peak"] > model.get_memory_footprint()


def test_a_start_that_fails_is_no_measurement(tmp_path):
    with pytest.raises(AssertionError, match=r"config\.json"):
        Starts("gptneo_fast", tmp_path, [str(ROOT)])()
