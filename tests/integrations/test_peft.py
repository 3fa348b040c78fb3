"""peft's adapters on our models and on transformers': the same logits, losses, gradients, tokens and files."""

import copy
import inspect

import pytest
import torch

import gptneo_fast
from tests.support.peers import peers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 30, 4, 96, 17, 8, 11, 22, 3, 90, 41], [3, 3, 8, 44, 60, 12, 7, 7, 65, 20, 31, 2]])
TASKS = {
    "GPTNeoModel": "FEATURE_EXTRACTION",
    "GPTNeoForCausalLM": "CAUSAL_LM",
    "GPTNeoForSequenceClassification": "SEQ_CLS",
    "GPTNeoForTokenClassification": "TOKEN_CLS",
    "GPTNeoForQuestionAnswering": "QUESTION_ANS",
}
LABELS = {
    "GPTNeoModel": {},
    "GPTNeoForCausalLM": {"labels": IDS},
    "GPTNeoForSequenceClassification": {"labels": torch.tensor([0, 2])},
    "GPTNeoForTokenClassification": {"labels": IDS % 3},
    "GPTNeoForQuestionAnswering": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 9])},
}
FFN = ["c_fc", "c_proj"]


def lora(**more):
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "c_fc"]} | more))


ADAPTERS = {
    "lora": lambda **o: lora(**o),
    "lora by default": lambda **o: peft.LoraConfig(r=4, **o),
    # without being told, peft leaves the head out for a PreTrainedModel only
    "lora on everything": lambda **o: lora(target_modules="all-linear", exclude_modules=["lm_head", "score"], **o),
    "lora on embeddings": lambda **o: lora(target_modules=["wte", "wpe", "k_proj"], **o),
    "lora with bias": lambda **o: lora(bias="all", **o),
    "rslora": lambda **o: lora(use_rslora=True, **o),
    "dora": lambda **o: lora(use_dora=True, **o),
    "trainable tokens in lora": lambda **o: lora(trainable_token_indices=[3, 5, 96], **o),
    "layers of lora": lambda **o: lora(layers_to_transform=[1], layers_pattern="h", **o),
    "modules_to_save": lambda **o: lora(modules_to_save=["ln_f", "wpe"], **o),
    "ia3": lambda **o: peft.IA3Config(target_modules=["k_proj", "v_proj", "c_proj"], feedforward_modules=["c_proj"], **o),
    "adalora": lambda **o: peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=0, tfinal=0, total_step=10, target_modules=["q_proj", "c_fc"], **o
    ),
    "loha": lambda **o: peft.LoHaConfig(r=4, target_modules=["q_proj", "c_proj"], **o),
    "lokr": lambda **o: peft.LoKrConfig(r=4, target_modules=["q_proj", "c_proj"], **o),
    "vera": lambda **o: peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"], **o),
    "oft": lambda **o: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "out_proj"], **o),
    "boft": lambda **o: peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj"], **o),
    "hra": lambda **o: peft.HRAConfig(r=4, target_modules=["q_proj", "c_fc"], **o),
    "fourierft": lambda **o: peft.FourierFTConfig(n_frequency=20, target_modules=["q_proj"], **o),
    "vblora": lambda **o: peft.VBLoRAConfig(num_vectors=8, vector_length=8, r=2, topk=2, target_modules=["q_proj"], **o),
    "ln tuning": lambda **o: peft.LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"], **o),
    "trainable tokens": lambda **o: peft.TrainableTokensConfig(token_indices=[3, 5, 96], **o),
}
PROMPTS = {
    "prompt tuning": lambda **o: peft.PromptTuningConfig(num_virtual_tokens=5, **o),
    "p-tuning": lambda **o: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, **o),
    "prefix tuning": lambda **o: peft.PrefixTuningConfig(num_virtual_tokens=5, **o),
    "prefix tuning through a projection": lambda **o: peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16, **o
    ),
}


def adapted(config, cls="GPTNeoForCausalLM", moved=0.3, **changes):
    """(transformers' model, ours), each under peft with the same adapter, which changes the result."""
    theirs, ours = peers(cls, num_labels=3, pad_token_id=0, scale=8.0, **changes)
    plain = theirs(IDS)[0]
    if config.is_prompt_learning:
        name_the_cache_as_peft_does(theirs)
    theirs = peft.get_peft_model(theirs, copy.deepcopy(config))
    ours = peft.get_peft_model(ours, copy.deepcopy(config))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * moved)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    theirs.eval(), ours.eval()
    changed = theirs(IDS)[0]
    assert changed.shape != plain.shape or not torch.allclose(changed, plain, atol=1e-2)
    return theirs, ours


def name_the_cache_as_peft_does(theirs):
    """Give a model of transformers 5.24, which calls it `cache`, the argument `past_key_values` that peft 0.21 looks for.

    Without it peft refuses prefixes there, and gives a prompt again at every token. Ours has kept the name.
    """
    if "past_key_values" in inspect.signature(transformers.GPTNeoModel.forward).parameters:
        return
    holder = theirs if "cache" in inspect.signature(theirs.forward).parameters else theirs.transformer  # of QuestionAnswering
    forward, prepare = holder.forward, getattr(theirs, "prepare_inputs_for_generation", None)

    def renamed(*args, past_key_values=None, **kwargs):
        return forward(*args, cache=past_key_values, **kwargs)

    def prepared(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        return inputs | {"past_key_values": inputs.pop("cache", None)}

    known = inspect.signature(forward)
    parameters = [p.replace(name="past_key_values") if p.name == "cache" else p for p in known.parameters.values()]
    renamed.__signature__, holder.forward = known.replace(parameters=parameters), renamed
    if prepare is not None:
        theirs.prepare_inputs_for_generation = prepared


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def same_training(theirs, ours, **inputs):
    """The same loss, or where there is none sum of outputs, and the same gradients, which are not zero."""
    found = []
    for model in (theirs, ours):
        model.zero_grad()
        out = model(**inputs)
        loss = out.loss if "loss" in out else out[0].tanh().sum()
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (their_loss, their_grads), (our_loss, our_grads) = found
    same(our_loss, their_loss)
    assert our_grads.keys() == their_grads.keys()
    assert any(g.abs().max() > 1e-6 for g in their_grads.values())
    least = 1e-3 * max(g.abs().max() for g in their_grads.values())  # less is rounding: a softmax has no use for a bias
    for name, grad in their_grads.items():
        scale = grad.abs().max().clamp(min=least)
        torch.testing.assert_close(
            our_grads[name] / scale, grad / scale, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def same_tokens(theirs, ours, **options):
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    how = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "attention_mask": mask} | options
    expected = theirs.generate(input_ids=IDS, eos_token_id=None, **how)
    assert torch.equal(ours.generate(input_ids=IDS, **how, eos_token_id=None), expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_trains_and_generates_as_on_transformers(name):
    theirs, ours = adapted(ADAPTERS[name](task_type="CAUSAL_LM"))
    same(ours(IDS).logits, theirs(IDS).logits)
    same_training(theirs, ours, input_ids=IDS, labels=IDS)
    theirs.train(), ours.train()
    same_training(theirs, ours, input_ids=IDS, labels=IDS)
    theirs.eval(), ours.eval()
    same_tokens(theirs, ours)


@pytest.mark.parametrize("cls", TASKS)
@pytest.mark.parametrize("typed", [True, False], ids=["with task_type", "without"])
@pytest.mark.parametrize("name", ["lora", "lora on everything"])
def test_every_class_takes_lora(cls, typed, name):
    if typed and name == "lora on everything" and cls in ("GPTNeoForTokenClassification", "GPTNeoForQuestionAnswering"):
        pytest.skip("peft adapts the head and then wants to train it, too, on transformers' model")
    theirs, ours = adapted(ADAPTERS[name](task_type=TASKS[cls] if typed else None), cls)
    same(ours(IDS)[0], theirs(IDS)[0])
    same_training(theirs, ours, input_ids=IDS, **LABELS[cls])


@pytest.mark.parametrize(
    "name", ["lora", "lora on embeddings", "dora", "ia3", "oft", "modules_to_save", "trainable tokens in lora"]
)
def test_merging_unloading_disabling_and_files_are_as_on_transformers(name, tmp_path):
    theirs, ours = adapted(ADAPTERS[name](task_type="CAUSAL_LM"))
    expected = theirs(IDS).logits
    with theirs.disable_adapter(), ours.disable_adapter():
        same(ours(IDS).logits, theirs(IDS).logits)
        same_tokens(theirs, ours)
    same(ours(IDS).logits, expected)
    for folder, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / folder)
        _, fresh = peers(num_labels=3, pad_token_id=0)
        fresh.load_state_dict(peers_state(theirs, name))
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / folder).eval()
        same(again(IDS).logits, expected)
    merged = ours.merge_and_unload()
    their_merged = theirs.merge_and_unload()
    same(merged(IDS).logits, their_merged(IDS).logits)
    assert type(merged) is gptneo_fast.GPTNeoForCausalLM
    same_tokens(their_merged, merged)
    if name not in ("trainable tokens in lora", "lora on embeddings"):  # merging there unties what the configuration ties
        merged.save_pretrained(tmp_path / "merged")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
        same(loaded(IDS).logits, expected)


def peers_state(adapted_model, name):
    """The weights that `peers` made, read back from under the adapter."""
    plain = copy.deepcopy(adapted_model).unload()
    return plain.state_dict()


def test_two_adapters_take_turns_add_up_and_go():
    theirs, ours = adapted(lora(task_type="CAUSAL_LM"))
    for model in (theirs, ours):
        torch.manual_seed(7)
        model.add_adapter(
            "second", lora(r=2, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["k_proj", "c_proj"])
        )
    for turn in ("second", "default"):
        for model in (theirs, ours):
            model.set_adapter(turn)
        same(ours(IDS).logits, theirs(IDS).logits)
        same_tokens(theirs, ours)
    for model in (theirs, ours):
        model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "both", combination_type="cat")
        model.set_adapter("both")
    same(ours(IDS).logits, theirs(IDS).logits)
    for model in (theirs, ours):
        model.delete_adapter("both")
        model.set_adapter("default")
    same(ours(IDS).logits, theirs(IDS).logits)
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "second"])
    same(ours(IDS).logits, theirs(IDS).logits)


def test_rows_of_a_batch_take_different_adapters():
    theirs, ours = adapted(lora(task_type="CAUSAL_LM"))
    for model in (theirs, ours):
        torch.manual_seed(7)
        model.add_adapter("second", lora(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    for names in (["default", "second"], ["second", "__base__"]):
        same(ours(IDS, adapter_names=names).logits, theirs(IDS, adapter_names=names).logits)
        same_tokens(theirs, ours, adapter_names=names)


def test_an_adapter_that_was_fused_for_a_while_is_merged_and_taken_out_again():
    theirs, ours = adapted(lora(task_type="CAUSAL_LM"))
    with torch.no_grad():
        before = ours(IDS).logits
        ours.merge_adapter()
        same(ours(IDS).logits, before)
        same_tokens(theirs, ours)
        ours.unmerge_adapter()
        same(ours(IDS).logits, before)
        plain = ours.unload()
        assert plain.looked(anew=True)  # every block untouched again
        same(plain(IDS).logits, theirs.unload()(IDS).logits)
        same_tokens(theirs.unload(), plain)


def test_a_float32_adapter_over_half_weights_goes_with_and_without_autocast():
    theirs, ours = adapted(lora(task_type="CAUSAL_LM"), dtype=torch.bfloat16)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.no_grad()):
        with context:
            torch.testing.assert_close(ours(IDS).logits.float(), theirs(IDS).logits.float(), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_learnt_prompt_computes_trains_and_generates_as_on_transformers(name):
    theirs, ours = adapted(PROMPTS[name](task_type="CAUSAL_LM"), moved=0.6)
    mask = torch.ones_like(IDS)
    same(ours(IDS).logits, theirs(IDS).logits)
    same(ours(IDS, attention_mask=mask).logits, theirs(IDS, attention_mask=mask).logits)
    mask[1, :3] = 0
    found, expected = ours(IDS, attention_mask=mask).logits, theirs(IDS, attention_mask=mask).logits
    tokens = torch.cat([torch.ones(2, found.shape[1] - 12), mask], 1).bool()  # the prompt's own, where it is embeddings
    same(found[tokens], expected[tokens])
    same_training(theirs, ours, input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100))
    same_tokens(theirs, ours, attention_mask=torch.ones_like(IDS))
    same_tokens(theirs, ours)
    same_tokens(theirs, ours, num_beams=3)


@pytest.mark.filterwarnings("ignore:padding cannot be told")
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("cls", [c for c in TASKS if c != "GPTNeoForCausalLM"])
def test_classifiers_take_a_learnt_prompt(name, cls):
    theirs, ours = adapted(PROMPTS[name](task_type=TASKS[cls]), cls, moved=0.6)
    mask = torch.ones_like(IDS)
    same(ours(IDS, attention_mask=mask)[0], theirs(IDS, attention_mask=mask)[0])
    if cls != "GPTNeoForTokenClassification" or "prefix" in name:  # peft gives the prompt's columns no labels
        same_training(theirs, ours, input_ids=IDS, attention_mask=mask, **LABELS[cls])


@pytest.mark.parametrize("name", PROMPTS)
def test_learnt_prompts_are_saved_and_loaded(name, tmp_path):
    theirs, ours = adapted(PROMPTS[name](task_type="CAUSAL_LM"), moved=0.6)
    expected = theirs(IDS).logits
    ours.save_pretrained(tmp_path)
    base = ours.get_base_model()
    same(peft.PeftModel.from_pretrained(base, tmp_path).eval()(IDS).logits, expected)


def test_gradients_reach_an_adapter_through_checkpointed_frozen_blocks():
    for reentrant in (True, False):
        theirs, ours = adapted(lora(task_type="CAUSAL_LM"))
        for model in (theirs, ours):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.train()
        same_training(theirs, ours, input_ids=IDS, labels=IDS, use_cache=False)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_lora_trains_on_top_of_weights_in_few_bits(name, tmp_path):
    """As on top of what they stand for; a merge, which they could not hold, is refused and changes nothing."""
    from tests.support.serial import lively, serial

    quantized = lively().quantize_(name)
    plain = copy.deepcopy(quantized).dequantize_()
    models, losses = [], []
    for base in (quantized, plain):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, lora(task_type="CAUSAL_LM"))
        transformers.trainer_utils.validate_quantization_for_training(model)  # which refuses them without adapters
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses.append([])
        for _ in range(5):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        models.append(model.eval())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]
    other = dict(models[1].named_parameters())
    for key, got in models[0].named_parameters():
        if "lora_" in key:
            torch.testing.assert_close(got, other[key], rtol=1e-2, atol=1e-4)
    before = models[0](input_ids=IDS).logits
    with pytest.raises(AttributeError, match=r"has no 'data', since nothing can change it; .*dequantize_"):
        models[0].merge_and_unload()
    assert torch.equal(models[0](input_ids=IDS).logits, before)
    prompt = IDS[0].tolist()
    adapted = serial(models[0], prompt, max_new_tokens=6)
    with models[0].disable_adapter():
        assert serial(models[0], prompt, max_new_tokens=6) != adapted
    models[0].save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(lively().quantize_(name), tmp_path).eval()
    assert serial(again, prompt, max_new_tokens=6) == adapted
