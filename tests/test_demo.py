"""The embedded model is what its recipe says: the recipe runs, and the figures beside the weights are those of the weights."""

import json
import math
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gptneo_fast
from gptneo_fast.demo import FOLDER

RECIPE = Path(__file__).parents[1] / "examples" / "demo_model" / "recipe.py"


def test_the_recipe_makes_a_model_that_loads_and_writes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")

    def run(*argv):  # python examples/demo_model/recipe.py
        monkeypatch.setattr(sys, "argv", ["recipe", *map(str, argv)])
        monkeypatch.syspath_prepend(RECIPE.parent)
        runpy.run_path(str(RECIPE), run_name="__main__")

    with pytest.raises(SystemExit, match="0"):
        run("--help")
    assert "--minutes" in capsys.readouterr().out
    threads = torch.get_num_threads()
    run(tmp_path / "made", "--minutes", 0.02, "--threads", 1, "--stories", 200, "--judge", 40)
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "made" / "results.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result and result["steps"] >= 1
    model = gptneo_fast.load(tmp_path / "made", device="cpu")
    shipped = gptneo_fast.load(FOLDER, device="cpu")
    assert model.dtype == shipped.dtype == torch.float16
    same = "hidden_size num_layers num_heads window_size max_position_embeddings attention_layers".split()
    assert all(getattr(model.config, name) == getattr(shipped.config, name) for name in same)
    assert model.num_parameters() == result["parameters"]
    text = "Once upon a time there was a little fox."
    assert model.tokenizer.decode(model.tokenizer(text).input_ids) == text
    assert model.generate(**model.tokenizer(text, return_tensors="pt"), max_new_tokens=3).shape[0] == 1


story = runpy.run_path(str(RECIPE.with_name("stories.py")))["story"]


def held_out():
    """The stories that the recipe judges by."""
    r = random.Random(0)
    seen = {story(r) for _ in range(60_000)}
    return [s for s in (story(r) for _ in range(600)) if s not in seen][:400]


def loss(model, texts, rows=None):
    """Mean loss per token, float64, of rows of 512 positions, the stories parted by the end token."""
    tokenizer, T = model.tokenizer, model.config.max_position_embeddings
    tokens = torch.tensor([t for ids in tokenizer(texts).input_ids for t in (tokenizer.eos_token_id, *ids)])
    cut = tokens[: len(tokens) // (T + 1) * (T + 1)].view(-1, T + 1)[:rows]
    with torch.inference_mode():
        return sum(F.cross_entropy(model(x[None, :-1]).logits[0].double(), x[1:]).item() for x in cut) / len(cut)


def test_the_shipped_model_has_learnt_its_stories_past_the_window():
    model = gptneo_fast.load(FOLDER, dtype="float32", device="cpu")
    told = json.loads((FOLDER / "results.json").read_text())
    assert model.num_parameters() == told["parameters"]
    r = random.Random(10**6)
    assert (
        loss(model, [story(r) for _ in range(40)], rows=4)
        < 2 * told["held_out_loss_per_token"]
        < math.log(model.config.vocab_size)
    )


@pytest.mark.slow
def test_the_perplexity_beside_the_weights_is_that_of_the_weights():
    model = gptneo_fast.load(FOLDER, dtype="float32", device="cpu")
    told = json.loads((FOLDER / "results.json").read_text())
    found = loss(model, held_out())
    assert round(found, 4) == told["held_out_loss_per_token"] and round(math.exp(found), 3) == told["held_out_perplexity"]
