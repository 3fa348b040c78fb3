"""transformers.Trainer on our models and on transformers': the same losses from the same seed and data, and files that load."""

import copy

import numpy as np
import pytest
import torch

import gptneo_fast
from tests.support.peers import peers

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from gptneo_fast.integrations.transformers import accelerate  # noqa: E402

CLASSES = ["GPTNeoForCausalLM", "GPTNeoForSequenceClassification", "GPTNeoForTokenClassification", "GPTNeoForQuestionAnswering"]


def rows(cls, n, seed=0):
    """Texts of 6 to 12 tokens, padded to 12 on the right, with labels that can be learnt."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        T = int(torch.randint(6, 13, (), generator=draw))
        ids = torch.randint(3, 97, (12,), generator=draw)
        mask = (torch.arange(12) < T).long()
        ids = ids * mask
        row = {"input_ids": ids, "attention_mask": mask}
        if cls == "GPTNeoForCausalLM":
            row["labels"] = ids.masked_fill(mask == 0, -100)
        elif cls == "GPTNeoForSequenceClassification":
            row["labels"] = ids.sum() % 3
        elif cls == "GPTNeoForTokenClassification":
            row["labels"] = (ids % 3).masked_fill(mask == 0, -100)
        else:
            row |= {"start_positions": ids[0] % 6, "end_positions": ids[1] % 6}
        found.append(row)
    return found


def trainer_of(model, cls, folder, **options):
    how = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 5,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**how | options),
        train_dataset=rows(cls, 24),
        eval_dataset=rows(cls, 6, seed=1),
    )


def curve(trainer, **options):
    trainer.train(**options)
    logged = trainer.state.log_history
    return [(h["loss"], h["grad_norm"]) for h in logged if "loss" in h] + [
        (h["eval_loss"], 0.0) for h in logged if "eval_loss" in h
    ]


OPTIONS = {
    "plain": {},
    "bf16": {"bf16": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "accumulation": {"gradient_accumulation_steps": 3},
    "neftune": {"neftune_noise_alpha": 5.0},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "every second block checkpointed": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"every_n_layers": 2},
    },
    "evaluation on the way": {"eval_strategy": "steps", "eval_steps": 2},
    "groups by length": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cls", CLASSES)
def test_the_losses_of_training_are_those_of_transformers(cls, name, tmp_path):
    if name == "label smoothing" and cls == "GPTNeoForQuestionAnswering":
        pytest.skip("it has no labels to smooth")
    theirs, ours = peers(cls, num_labels=3, pad_token_id=0, embed_dropout=0.1, resid_dropout=0.1)
    if cls != "GPTNeoForCausalLM":
        theirs.accepts_loss_kwargs = False  # else Trainer hands a divisor to classes that do not divide by it
    loss, evaluated, predicted = [], [], []
    for model in (theirs, ours):
        trainer = trainer_of(model, cls, tmp_path, **OPTIONS[name])
        loss.append(curve(trainer))
        evaluated.append(trainer.evaluate()["eval_loss"])
        predicted.append(trainer.predict(rows(cls, 5, seed=2)))
    near = {"rtol": 0.03, "atol": 0.03} if name == "bf16" else {"rtol": 2e-4, "atol": 2e-4}
    np.testing.assert_allclose(loss[1], loss[0], **near)
    np.testing.assert_allclose(evaluated[1], evaluated[0], **near)
    for ours, theirs in zip(
        *[p.predictions if isinstance(p.predictions, tuple) else (p.predictions,) for p in predicted], strict=True
    ):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(
            ours, theirs, **({"rtol": 0.1, "atol": 0.1} if name == "bf16" else {"rtol": 1e-2, "atol": 1e-2})
        )


def test_a_block_may_keep_its_input_in_host_memory_and_every_second_block_all_that_it_computes():
    cls = "GPTNeoForCausalLM"
    _, ours = peers(cls, resid_dropout=0.1)
    batch = {k: torch.stack([row[k] for row in rows(cls, 3)]) for k in ("input_ids", "attention_mask", "labels")}
    calls = []
    hooks = [block.register_forward_hook(lambda block, args, out: calls.append(block)) for block in ours.transformer.h]
    inner = [block.ln_1.register_forward_hook(lambda norm, args, out: calls.append(norm)) for block in ours.transformer.h]
    ours.train()
    found = []
    for how in ({}, {"offload": True}, {"every_n_layers": 2}):
        if how:
            ours.activation_checkpointing_enable(**how)
            assert ours.is_activation_checkpointing and ours.is_gradient_checkpointing
        ours.zero_grad(), calls.clear()
        torch.manual_seed(3)
        ours(**batch, use_cache=False).loss.backward()
        found.append({n: p.grad.clone() for n, p in ours.named_parameters()})
        assert sum(module in list(ours.transformer.h) for module in calls) == 3  # the block's own hook runs once
        assert len(calls) - 3 == {"": 3, "offload": 6, "every_n_layers": 5}["".join(how)]
    for grads in found[1:]:
        for name, grad in grads.items():
            assert torch.equal(grad, found[0][name])
    ours.activation_checkpointing_disable()
    assert not ours.is_activation_checkpointing
    ours.transformer.gradient_checkpointing = True  # as scripts of old set it
    assert all(block.recompute is not None for block in ours.transformer.h)
    with pytest.raises(gptneo_fast.errors.InputError, match="every_n_layers"):
        ours.gradient_checkpointing_enable(every_n_layers=0)
    for hook in hooks + inner:
        hook.remove()


@pytest.mark.parametrize("cls", CLASSES)
def test_what_trainer_saves_of_a_real_pretrained_model_resumes_and_loads_in_both_libraries(cls, tmp_path):
    theirs, ours = peers(cls, num_labels=3, pad_token_id=0, resid_dropout=0.1)
    live = accelerate(ours.to_transformers())
    how = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    losses = []
    for name, model in (("theirs", theirs), ("live", live)):
        trainer = trainer_of(model, cls, tmp_path / name, **how)
        losses.append(curve(trainer))
        trainer.save_model(tmp_path / name / "last")
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4, atol=2e-4)
    batch = {k: torch.stack([row[k] for row in rows(cls, 3)]) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = theirs.eval()(**batch)[0]
        for loaded in (
            live.eval(),
            getattr(gptneo_fast, cls).from_pretrained(tmp_path / "live" / "last"),
            getattr(gptneo_fast, cls).from_pretrained(tmp_path / "theirs" / "last"),
            getattr(transformers, cls).from_pretrained(tmp_path / "live" / "last"),
        ):
            torch.testing.assert_close(loaded(**batch)[0], expected, rtol=1e-3, atol=1e-3)
    again = getattr(gptneo_fast, cls).from_pretrained(tmp_path / "live" / "checkpoint-2")
    resumed = curve(
        trainer_of(accelerate(again.to_transformers()), cls, tmp_path / "live", **how),
        resume_from_checkpoint=str(tmp_path / "live" / "checkpoint-2"),
    )
    np.testing.assert_allclose(resumed, losses[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("cls", CLASSES)
def test_trainer_writes_whole_checkpoints_of_our_models_and_goes_on_with_them(cls, tmp_path):
    _, ours = peers(cls, num_labels=3, pad_token_id=0, resid_dropout=0.1)
    fresh = copy.deepcopy(ours)
    how = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trainer_of(ours, cls, tmp_path, **how)
    whole, best = curve(trainer), trainer.state.best_model_checkpoint
    resumed = curve(trainer_of(fresh, cls, tmp_path, **how), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    np.testing.assert_allclose(resumed, whole, rtol=2e-4, atol=2e-4)
    for name, p in fresh.state_dict().items():
        torch.testing.assert_close(p, ours.state_dict()[name], rtol=1e-4, atol=1e-4)
    trainer.save_model(tmp_path / "last")
    batch = {k: torch.stack([row[k] for row in rows(cls, 3)]) for k in ("input_ids", "attention_mask")}
    for library in (gptneo_fast, transformers):
        for folder in (best, tmp_path / "last"):
            loaded = getattr(library, cls).from_pretrained(folder).eval()
            with torch.no_grad():
                torch.testing.assert_close(loaded(**batch)[0], ours.eval()(**batch)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", ["GPTNeoModel", "GPTNeoForCausalLM", "GPTNeoForTokenClassification"])
def test_texts_packed_into_a_row_are_kept_apart_by_their_positions(cls):
    theirs, ours = peers(cls)
    texts = [torch.randint(3, 97, (T,)) for T in (5, 11, 1, 9)]
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": t.tolist(), "labels": t.tolist()} for t in texts]
    )
    batch.pop("labels")
    batch = {k: torch.as_tensor(v) if k != "max_length_q" and k != "max_length_k" else v for k, v in batch.items()}
    apart = torch.cat([ours(t[None])[0] for t in texts], 1)
    for model in (theirs, ours):
        torch.testing.assert_close(model(**batch, use_cache=False)[0], apart, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(**batch)[0], theirs(**batch)[0], rtol=1e-4, atol=1e-4)  # with a cache, neither does
    batch.pop("position_ids")
    with pytest.raises(gptneo_fast.errors.InputError, match="position_ids"):
        ours(**batch, use_cache=False)


def test_an_adapter_is_trained_saved_and_resumed(tmp_path):
    peft = pytest.importorskip("peft")
    cls, losses = "GPTNeoForCausalLM", []
    how = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}

    def adapted(model):
        torch.manual_seed(4)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "c_fc"], r=4, lora_dropout=0.1)
        return peft.get_peft_model(model, lora)

    for name, model in zip(("theirs", "ours"), peers(cls, pad_token_id=0), strict=True):
        fresh = copy.deepcopy(model)
        losses.append(curve(trainer_of(adapted(model), cls, tmp_path / name, **how)))
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4, atol=2e-4)
    again = trainer_of(adapted(fresh), cls, tmp_path / "ours", **how)
    np.testing.assert_allclose(
        curve(again, resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2")), losses[0], rtol=2e-4, atol=2e-4
    )
    with pytest.raises(gptneo_fast.errors.ConfigError, match=r"adapter of peft: .*PeftModel.from_pretrained"):
        gptneo_fast.load(tmp_path / "ours" / "checkpoint-4")
    theirs, ours = peers(cls, pad_token_id=0)
    ids = rows(cls, 1)[0]["input_ids"][None]
    found = [peft.PeftModel.from_pretrained(m, tmp_path / "ours" / "checkpoint-4").eval()(ids).logits for m in (theirs, ours)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
