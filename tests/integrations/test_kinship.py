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
from gptneo_fast.kinship import make_kin
from tests.support.peers import CLASSES, peers

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_model_is_a_pretrained_model_whose_methods_are_ours(cls):
    _, ours = peers(cls)
    assert isinstance(ours, transformers.PreTrainedModel) and issubclass(type(ours), transformers.PreTrainedModel)
    assert not isinstance(ours, getattr(transformers, cls)) and type(type(ours)) is type
    last = type(ours).__mro__.index(object)
    behind = type(ours).__mro__[last + 1 :]  # all that is ours or torch's
    assert behind[0] is transformers.PreTrainedModel and [kind.__name__ for kind in behind[1:]] == ["PeftAdapterMixin"]
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


def test_a_tokenizer_is_one_of_transformers_and_keeps_its_names():
    ours = gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER)
    for kind in (transformers.PreTrainedTokenizerFast, transformers.PreTrainedTokenizerBase):
        assert isinstance(ours, kind) and isinstance(pickle.loads(pickle.dumps(ours)), kind)
    assert ours.encode("a fox") == transformers.AutoTokenizer.from_pretrained(FOLDER).encode("a fox")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ours.nonsense  # noqa: B018


@pytest.mark.parametrize("make", [lambda: peers()[1], lambda: gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER)])
def test_no_property_of_theirs_hides_what_an_object_of_ours_holds(make):
    ours = make()
    for name, value in vars(ours).items():
        assert getattr(ours, name) is value, name


def test_asking_where_the_module_is_does_not_end_the_watch():
    script = """
import importlib.util
import gptneo_fast
gptneo_fast.GPTNeoForCausalLM
assert importlib.util.find_spec("transformers.modeling_utils")
import transformers
assert issubclass(gptneo_fast.GPTNeoForCausalLM, transformers.PreTrainedModel)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_threads_that_import_at_once_end_with_kin():
    script = """
import sys, threading
import gptneo_fast
asked = lambda: __import__("transformers").PreTrainedModel, lambda: gptneo_fast.GPTNeoForCausalLM
threads = [threading.Thread(target=ask) for ask in asked]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
import transformers
assert issubclass(gptneo_fast.GPTNeoForCausalLM, transformers.PreTrainedModel)
watching = [finder.module for finder in sys.meta_path if "kinship" in type(finder).__module__]
assert "transformers.modeling_utils" not in watching
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_version_without_the_type_is_left_alone(monkeypatch):
    class Ours:
        pass

    monkeypatch.setitem(sys.modules, "module_without_it", sys)
    make_kin(Ours, "module_without_it", "NoSuchType")
    assert Ours.__mro__ == (Ours, object)


def test_adapters_of_peft_go_on_by_the_methods_of_transformers(monkeypatch, tmp_path):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # of a newest one
    ids, found = torch.tensor([[5, 6, 7, 8]]), []
    for model in peers():
        torch.manual_seed(2)
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "c_fc"], r=4, init_lora_weights=False))
        with torch.no_grad():
            on = model(ids).logits
            model.disable_adapters()
            off = model(ids).logits
        model.enable_adapters()
        found.append((on, off, model.generate(ids, max_new_tokens=5, do_sample=False), model.active_adapters()))
        assert (on - off).abs().max() > 0.1
        model.save_pretrained(tmp_path / type(model).__module__)
    torch.testing.assert_close(found[1][:3], found[0][:3], rtol=1e-3, atol=1e-4)
    assert found[1][3] == found[0][3]
    files = [sorted(path.name for path in (tmp_path / type(model).__module__).iterdir()) for model in peers()]
    assert set(files[1]) <= set(files[0]) and "adapter_model.safetensors" in files[1]
    for model in peers():  # the adapter, over other weights
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "gptneo_fast.models.causal")
        assert "base_model.model.transformer.h.0.attn.attention.q_proj.lora_A.default.weight" in adapted.state_dict()


def test_names_that_scripts_import_beside_ours_are_those_of_transformers():
    from gptneo_fast import (
        DataCollatorForLanguageModeling,
        GPTNeoBlock,
        StaticCache,
        TrainingArguments,
        get_linear_schedule_with_warmup,
        logging,
    )
    from gptneo_fast.models.gpt_neo import configuration_gpt_neo, modeling_gpt_neo

    assert TrainingArguments is transformers.TrainingArguments and StaticCache is transformers.StaticCache
    assert get_linear_schedule_with_warmup is transformers.get_linear_schedule_with_warmup and logging is transformers.logging
    assert DataCollatorForLanguageModeling is transformers.DataCollatorForLanguageModeling
    assert modeling_gpt_neo.GPTNeoBlock is GPTNeoBlock and configuration_gpt_neo.GPTNeoConfig is gptneo_fast.GPTNeoConfig
    from gptneo_fast import generation, models

    assert models.__name__ == "gptneo_fast.models" and generation.__name__ == "gptneo_fast.generation"
    for name in ("LlamaForCausalLM", "AutoModelForSeq2SeqLM", "Nonsense", "_LazyModule"):
        with pytest.raises(AttributeError, match=f"module 'gptneo_fast' has no attribute '{name}'"):
            getattr(gptneo_fast, name)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_output_is_one_of_transformers_and_goes_through_its_hands(cls):
    theirs, ours = peers(cls)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        out, expected = ours(ids), theirs(ids)
    assert isinstance(out, transformers.utils.ModelOutput) and type(out).__mro__[-1] is transformers.utils.ModelOutput
    for found in (out, copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
        assert getattr(found, "past_key_values", None) is getattr(found, "cache", None)
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
