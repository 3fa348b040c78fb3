"""Our classes are PreTrainedModels where transformers is imported, and keep every name that is theirs."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten

import gptneo_fast
from gptneo_fast.demo import FOLDER
from tests.support.peers import peers

transformers = pytest.importorskip("transformers")

CLASSES = [
    "GPTNeoModel",
    "GPTNeoForCausalLM",
    "GPTNeoForSequenceClassification",
    "GPTNeoForTokenClassification",
    "GPTNeoForQuestionAnswering",
]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_model_is_a_pretrained_model_whose_methods_are_ours(cls):
    _, ours = peers(cls)
    assert isinstance(ours, transformers.PreTrainedModel) and issubclass(type(ours), transformers.PreTrainedModel)
    assert not isinstance(ours, getattr(transformers, cls)) and type(type(ours)) is type
    last = type(ours).__mro__.index(object)
    assert type(ours).__mro__[last + 1 :] == (transformers.PreTrainedModel,)  # behind all that is ours or torch's
    for found in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(found) is type(ours)
        torch.testing.assert_close(found(torch.tensor([[1, 2]]))[0], ours(torch.tensor([[1, 2]]))[0])


def test_a_class_of_the_users_own_keeps_its_bases():
    from abc import ABC

    class Mixed(gptneo_fast.GPTNeoForCausalLM, transformers.GenerationMixin, ABC):
        pass

    assert Mixed.generate is gptneo_fast.GPTNeoForCausalLM.generate
    assert isinstance(Mixed(peers()[1].config), transformers.PreTrainedModel)


@pytest.mark.parametrize("first", ["gptneo_fast", "transformers"])
def test_the_order_of_imports_has_no_say_and_nothing_stays_behind(first):
    script = f"""
import sys
before = list(sys.meta_path)
import {first}
import gptneo_fast
from gptneo_fast.demo import FOLDER
from tests.support.peers import peers
gptneo_fast.GPTNeoForCausalLM
if {first!r} == "gptneo_fast":
    assert "transformers" not in sys.modules, "importing gptneo_fast imports transformers"
import transformers
assert issubclass(gptneo_fast.GPTNeoForCausalLM, transformers.PreTrainedModel)
from gptneo_fast.network import outputs
import transformers.modeling_utils
assert issubclass(outputs.CausalLMOutputWithPast, transformers.utils.ModelOutput)
assert not any("kinship" in type(finder).__module__ for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("cls", "task"), [("GPTNeoForCausalLM", "CAUSAL_LM"), ("GPTNeoForSequenceClassification", "SEQ_CLS"), ("GPTNeoModel", None)]
)
def test_pefts_all_linear_spares_the_head_as_for_transformers(cls, task):
    peft = pytest.importorskip("peft")
    found = [
        [n for n, m in peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules="all-linear")).named_modules()]
        for model in peers(cls)
    ]
    assert found[0] and not [n for n in found[1] if ("lora" in n and "score" in n) or ("lora" in n and "lm_head" in n)]
    assert [n for n in found[1] if n.endswith("lora_A.default")] == [n for n in found[0] if n.endswith("lora_A.default")]


@pytest.mark.parametrize("cls", CLASSES)
def test_an_output_is_one_of_transformers_and_goes_through_its_hands(cls):
    theirs, ours = peers(cls)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        out, expected = ours(ids), theirs(ids)
    assert isinstance(out, transformers.utils.ModelOutput) and type(out).__mro__[-1] is transformers.utils.ModelOutput
    for found in (out, copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
        assert list(found) == [{"cache": "past_key_values"}.get(name, name) for name in expected]


@pytest.mark.parametrize(
    ("task", "cls"),
    [
        ("text-generation", "GPTNeoForCausalLM"),
        ("feature-extraction", "GPTNeoModel"),
        ("text-classification", "GPTNeoForSequenceClassification"),
        ("token-classification", "GPTNeoForTokenClassification"),
    ],
)
def test_pipelines_of_transformers_take_our_models(task, cls):
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    how = {"max_new_tokens": 5, "do_sample": False} if task == "text-generation" else {}
    found = []
    for model in peers(cls, vocab_size=len(tokenizer), pad_token_id=0, max_position_embeddings=64):
        found.append(transformers.pipeline(task, model=model, tokenizer=tokenizer)("The fox lived", **how))
    leaves, shapes = zip(*map(tree_flatten, found), strict=True)
    assert shapes[0] == shapes[1] and len(leaves[0]) > 0
    assert leaves[1] == [pytest.approx(x, rel=1e-3, abs=1e-4) if isinstance(x, float | np.floating) else x for x in leaves[0]]
