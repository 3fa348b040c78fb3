"""The released checkpoints, downloaded: `pytest --hub -m hub`. The 1.3B model takes 5 GB of disk and of memory."""

import pytest
import torch

import gptneo_fast

pytestmark = pytest.mark.hub
NEEDS = "EleutherAI/gpt-neo-125m", "roneneldan/TinyStories-33M"  # safetensors with tokenizer.json; a pickle and nothing else


def test_the_1_3b_model_gives_the_known_greedy_text():
    # From transformers' own tests of the model (GPTNeoModelLanguageGenerationTest).
    expected = [464, 3290, 12, 3380, 4866, 286, 262, 1492, 11, 543, 318, 257, 4947, 286, 27126, 416, 262, 2739, 1772, 11]
    model = gptneo_fast.load("EleutherAI/gpt-neo-1.3B", device="cpu")  # vocab.json and merges.txt, no tokenizer.json
    ids = torch.tensor([[464, 3290]])
    assert model.tokenizer("The dog").input_ids == ids[0].tolist()
    assert model.generate(ids, do_sample=False, max_length=20)[0].tolist() == expected


@pytest.mark.parametrize(("size", "count"), [("125m", 125_198_592), ("1.3B", 1_315_575_808), ("2.7B", 2_651_307_520)])
def test_configurations_have_the_parameters_of_the_released_sizes(size, count):
    config = gptneo_fast.AutoConfig.from_pretrained(f"EleutherAI/gpt-neo-{size}")
    with torch.device("meta"):
        assert gptneo_fast.GPTNeoForCausalLM(config).num_parameters() == count


@pytest.mark.filterwarnings("ignore::gptneo_fast.errors.GPTNeoFastWarning")  # a pickle says how to convert it
@pytest.mark.parametrize("name", NEEDS)
def test_logits_and_texts_are_those_of_transformers_past_the_window(name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager", dtype=torch.float32)
    ours = gptneo_fast.load(name, device="cpu", dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    text = "Once upon a time there was a little fox who lived in a wood, and every day it went to the river. " * 20
    batch = tokenizer(text, return_tensors="pt")
    assert ours.tokenizer(text).input_ids == batch.input_ids[0].tolist() and batch.input_ids.shape[1] > 300
    with torch.inference_mode():
        exact = ours.double()(**batch).logits
        errors = [(m(**batch).logits - exact).abs().max() for m in (theirs, ours.float())]
    assert errors[1] <= 2 * errors[0]
    assert torch.equal(ours.generate(**batch, max_new_tokens=30), theirs.generate(**batch, max_new_tokens=30))


@pytest.mark.parametrize("name", ["EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-1.3B"])
def test_the_released_tokenizers_give_the_ids_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(name), gptneo_fast.AutoTokenizer.from_pretrained(name)
    for text in ("Hello world", " naïve 🦊\n\n  done<|endoftext|>", "x" * 50):
        assert dict(ours(text, return_offsets_mapping=True)) == dict(theirs(text, return_offsets_mapping=True))
    assert ours.get_vocab() == theirs.get_vocab() and ours.model_max_length == theirs.model_max_length
    assert ours.special_tokens_map == theirs.special_tokens_map
