"""A live model of transformers over our blocks and cache gives what it gave, and obeys what is done to it."""

import copy

import pytest
import torch
from torch import nn

import gptneo_fast
from gptneo_fast.errors import CacheError, InputError
from tests.support.peers import peers

transformers = pytest.importorskip("transformers")
from gptneo_fast.integrations.transformers import BoundedCache, accelerate, undo  # noqa: E402

IDS = torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :6] = 0
MASK[2, :14] = 0
CLASSES = ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]


def model(cls="GPTNeoForCausalLM", **changes):
    return peers(cls, **({"window_size": 5, "pad_token_id": 0} | changes))[0]


def both(**changes):
    plain = model(**changes)
    return plain, accelerate(copy.deepcopy(plain))


@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_every_class_computes_what_it_did(cls, fused_calls):
    plain, fast = both(cls=f"GPTNeo{cls}")
    assert isinstance(fast, transformers.PreTrainedModel)
    for options in (
        {},
        {"attention_mask": MASK},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
    ):
        want, got = plain(IDS, **options), fast(IDS, **options)
        assert type(got) is type(want)
        held = MASK.bool() if "attention_mask" in options and cls in ("Model", "ForCausalLM", "ForTokenClassification") else ...
        for a, b in zip(
            want.to_tuple() if hasattr(want, "to_tuple") else want,
            got.to_tuple() if hasattr(got, "to_tuple") else got,
            strict=True,
        ):
            if isinstance(a, torch.Tensor) and cls != "ForQuestionAnswering":
                torch.testing.assert_close(b[held], a[held], atol=1e-4, rtol=1e-4)
    assert fused_calls


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(do_sample=True, top_k=9),
        dict(num_beams=3, num_return_sequences=2),
        dict(attention_mask=MASK),
        dict(attention_mask=MASK, num_beams=2),
        dict(repetition_penalty=1.4, no_repeat_ngram_size=2),
        dict(use_cache=False),
        dict(prompt_lookup_num_tokens=3),
        dict(output_attentions=True, return_dict_in_generate=True),
    ],
    ids=str,
)
@torch.no_grad()
def test_generate_gives_the_same_tokens_over_a_cache_bounded_at_the_window(options):
    tokens = []
    ids = IDS[:1] if "prompt_lookup_num_tokens" in options else IDS
    options = {"attention_mask": torch.ones_like(ids)} | options
    for each in both(max_position_embeddings=512):
        torch.manual_seed(4)
        out = each.generate(ids, max_new_tokens=30, eos_token_id=None, pad_token_id=0, **options)
        tokens.append(out if isinstance(out, torch.Tensor) else out.sequences)
    assert torch.equal(*tokens)


@torch.no_grad()
def test_the_cache_is_bounded_and_goes_on_past_its_slack():
    plain, fast = both(max_position_embeddings=512)
    ids = torch.randint(3, 97, (1, 300))
    past = want = None
    for begin in range(0, 300, 50):
        out, ref = (
            fast(ids[:, begin : begin + 50], past_key_values=past),
            plain(ids[:, begin : begin + 50], past_key_values=want),
        )
        past, want = out.past_key_values, ref.past_key_values
        torch.testing.assert_close(out.logits, ref.logits, atol=2e-4, rtol=1e-4)
    assert isinstance(past, BoundedCache) and past.get_seq_length() == want.get_seq_length() == 300
    assert [keys.shape[2] for keys in past.kv.keys] == [320, 133, 133] and len(past) == 3


@torch.no_grad()
def test_what_is_touched_is_obeyed_and_only_that_runs_unfused(fused_calls):
    def hook(each):
        each.transformer.h[1].mlp.c_fc.register_forward_hook(lambda module, args, out: out * 1.3)

    def replaced(each):
        each.transformer.h[0].attn.attention.q_proj = nn.Sequential(each.transformer.h[0].attn.attention.q_proj, nn.Tanh())

    def wider(each):
        each.transformer.h[1].attn.attention.bias[..., 8, 0] = True

    for touch in (hook, replaced, wider):
        found = []
        plain, fast = both()
        for each in (plain, fast):
            touch(each)
            fused_calls.clear()
            found.append(each.generate(IDS, attention_mask=MASK, max_new_tokens=9, eos_token_id=None, pad_token_id=0))
            found.append(each(IDS).logits)
        assert torch.equal(found[0], found[2]) and torch.allclose(found[1], found[3], atol=1e-4)
        assert set(fused_calls) == {0, 1, 2} - {{hook: 1, replaced: 0, wider: 1}[touch]}
    past = fast(IDS).past_key_values
    fast.transformer.h[2].attn.attention.forward = fast.transformer.h[2].attn.attention.forward
    with pytest.raises(CacheError, match="other attention"):
        fast(IDS[:, :1], past_key_values=past)


def test_training_is_that_of_transformers():
    found = []
    for each in both(attention_dropout=0.1):
        each.train()
        torch.manual_seed(0)
        each(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in each.parameters()]))
    assert torch.equal(*found)


@torch.no_grad()
def test_undo_and_copies(tmp_path, fused_calls):
    plain, fast = both()
    copied = copy.deepcopy(fast)
    copied.transformer.wte.weight.zero_()
    assert not torch.equal(copied(IDS).logits, fast(IDS).logits) and fused_calls
    past = fast(IDS[:, :9]).past_key_values
    undo(fast)
    fused_calls.clear()
    torch.testing.assert_close(fast(IDS[:, 9:], past_key_values=past).logits, plain(IDS).logits[:, 9:], atol=1e-4, rtol=1e-4)
    assert not fused_calls and "forward" not in vars(fast.transformer)
    accelerate(fast).save_pretrained(tmp_path)
    torch.testing.assert_close(
        gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path)(IDS).logits, plain(IDS).logits, atol=1e-4, rtol=1e-4
    )
    with pytest.raises(InputError, match="takes a GPT-Neo of transformers"):
        accelerate(nn.Linear(1, 1))


@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_our_models_become_theirs_with_the_same_weights(cls, tmp_path):
    theirs, ours = peers(f"GPTNeo{cls}", window_size=5, pad_token_id=0)
    made = ours.to_transformers()
    assert type(made) is type(theirs)
    first = lambda out: out[0]  # noqa: E731
    assert torch.equal(first(made(IDS)), first(theirs(IDS)))
    shared = dict(made.named_parameters())
    assert all(p.data_ptr() == shared[name].data_ptr() for name, p in ours.named_parameters())
    made.save_pretrained(tmp_path)
    assert torch.equal(first(type(theirs).from_pretrained(tmp_path)(IDS)), first(theirs(IDS)))
    fast = accelerate(made)
    torch.testing.assert_close(first(fast(IDS)), first(theirs(IDS)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_forward_of_somebody_elses_is_neither_replaced_nor_taken_away():
    plain, fast = both()
    patch = plain.transformer.forward = lambda *args, **kw: type(plain.transformer).forward(plain.transformer, *args, **kw)
    with pytest.raises(InputError, match="has a forward of its own"):
        accelerate(plain)
    fast.transformer.forward = patch
    assert undo(fast).transformer.forward is patch


@torch.no_grad()
def test_texts_packed_into_a_row_stay_apart(fused_calls):
    plain, fast = both()
    places = torch.cat([torch.arange(9), torch.arange(8)])[None].expand(3, -1)
    for use_cache in (True, False):
        options = {"position_ids": places, "use_cache": use_cache}
        torch.testing.assert_close(fast(IDS, **options).logits, plain(IDS, **options).logits, atol=1e-4, rtol=1e-4)


def test_what_cannot_go_over_to_transformers_is_said():
    from gptneo_fast.errors import GPTNeoFastWarning

    _, ours = peers()
    ours.transformer.h[0].mlp.register_forward_hook(lambda module, args, out: out)
    with pytest.warns(GPTNeoFastWarning, match="hooks and patched forwards stay"):
        ours.to_transformers()
    ours.transformer.h[0].mlp.c_fc = nn.Sequential(ours.transformer.h[0].mlp.c_fc)
    with pytest.raises(InputError, match="4 are of replaced layers"):
        ours.to_transformers()

    class Reward(gptneo_fast.GPTNeoModel):
        pass

    with pytest.raises(InputError, match="no Reward"):
        Reward(ours.config).to_transformers()


def test_our_tokenizer_becomes_theirs():
    from pathlib import Path

    demo = Path(gptneo_fast.__file__).parent / "demo" / "model"
    ours = gptneo_fast.AutoTokenizer.from_pretrained(demo)
    made = ours.to_transformers()
    text = "Once upon a time\n there was naïve 🦊"
    assert isinstance(made, transformers.PreTrainedTokenizerFast) and made(text).input_ids == ours(text).input_ids
    assert made.eos_token_id == ours.eos_token_id and made.model_max_length == ours.model_max_length


@torch.no_grad()
def test_a_pipeline_of_transformers_takes_an_accelerated_model(fused_calls):
    from pathlib import Path

    demo = Path(gptneo_fast.__file__).parent / "demo" / "model"
    tokenizer, texts = transformers.AutoTokenizer.from_pretrained(demo), []
    for change in (lambda each: each, accelerate):
        each = change(transformers.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32))
        run = transformers.pipeline("text-generation", model=each, tokenizer=tokenizer)
        texts.append(run("Once upon a time", max_new_tokens=20, do_sample=False))
    assert texts[0] == texts[1] and fused_calls
