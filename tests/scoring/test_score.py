"""Scores of texts are those of a plain forward pass, whatever runs beside them, and whatever a user did to the model."""

import copy
import math

import pytest
import torch
from torch import nn

import gptneo_fast
from gptneo_fast.errors import InputError, NonFiniteLogitsError, SetupError
from gptneo_fast.ops import reference
from gptneo_fast.scoring.batches import batches
from tests.support.peers import SMALL, peers

V = SMALL["vocab_size"]


@pytest.fixture(scope="module")
def models():
    return peers()


def ids_of(n, seed=0):
    return torch.randint(0, V, (n,), generator=torch.Generator().manual_seed(seed + n)).tolist()


def expected(model, ids, before):
    """Statistics [n] of ids after the first `before` of them, from logits in float64."""
    logits = model(torch.tensor([ids])).logits[0, before - 1 : -1].double()
    return reference.statistics(logits, torch.tensor(ids[before:]))


@torch.no_grad()
def test_every_statistic_of_ragged_texts_is_that_of_one_alone(models):
    theirs, ours = models
    texts = [ids_of(n) for n in (30, 2, 1, 0, 300, 17)]
    names = ("logprob", "rank", "greedy", "entropy", "mean", "variance")
    scores = ours.score(texts, want=names)
    assert [len(s.tokens) for s in scores] == [29, 1, 0, 0, 299, 16]
    for text, score in zip(texts, scores, strict=True):
        if len(text) < 2:
            assert score.total == 0 and score.logprob.shape == (0,)
            continue
        own, rank, entropy, variance = expected(theirs, text, 1)
        for got, want in ((score.logprob, own), (score.entropy, entropy), (score.mean, -entropy), (score.variance, variance)):
            assert (got - want).abs().max() < 2e-4
        assert torch.equal(score.rank, rank) and torch.equal(score.greedy, rank == 0)
        assert abs(score.total - own.sum()) < 1e-3 and score.tokens == text[1:]


@torch.no_grad()
def test_a_context_is_computed_once_and_changes_nothing_else(models):
    theirs, ours = models
    context, texts = ids_of(290, 7), [ids_of(n, 9) for n in (5, 1, 0, 40)]
    for score, text in zip(ours.score(texts, context), texts, strict=True):
        assert score.tokens == text
        if text:
            assert (score.logprob - expected(theirs, context + text, len(context))[0]).abs().max() < 2e-4


def test_one_text_gives_one_score_and_strings_need_a_tokenizer(models):
    ours = models[1]
    assert ours.score([5, 6, 7]).tokens == [6, 7]
    assert ours.score(torch.tensor([5, 6, 7])).tokens == [6, 7]
    assert [s.tokens for s in ours.score(torch.tensor([[5, 6, 7], [1, 2, 3]]))] == [[6, 7], [2, 3]]
    with pytest.raises(SetupError, match="text 0 is text and the model has no tokenizer"):
        ours.score("abc")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.score([[1, V]]), f"text 0 holds token {V}, which is not in the vocabulary"),
        (lambda m: m.score([[1], 3.5]), "text 1 is 3.5; give a string, or token ids"),
        (lambda m: m.score(7), "texts is a int"),
        (lambda m: m.score([[1]], want="rank"), "want='rank'; give a list of logprob"),
        (lambda m: m.score([[1]], want=["ranks"]), r"want=\['ranks'\]"),
        (lambda m: m.score([[1], [2] * 700]), "text 1 has 700 tokens, and the model scores up to 641"),
        (lambda m: m.score([[2] * 400], [1] * 300), "text 0 has 400 tokens after 300 of context"),
        (lambda m: m.perplexity([1]), "the text has 1 tokens"),
        (lambda m: m.perplexity([1, 2], stride=0), "stride=0 is not an integer from 1 to 639"),
    ],
)
def test_what_cannot_be_scored_is_named(models, call, message):
    with pytest.raises(InputError, match=message):
        call(models[1])


def replaced_head(model):
    model.lm_head = nn.Sequential(nn.Linear(model.config.hidden_size, V))


def hooked_head(model):
    model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)


def hooked_block(model):
    model.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: out * 0.5)


def own_forward(model):
    plain = model.forward

    def forward(*args, **keywords):
        out = plain(*args, **keywords)
        out.logits = out.logits * 2
        return out

    model.forward = forward


@pytest.mark.parametrize("touch", [replaced_head, hooked_head, hooked_block, own_forward])
@torch.no_grad()
def test_what_a_user_did_to_the_model_counts(touch):
    model = gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**SMALL)).eval()
    text = ids_of(20)
    before = model.score(text).logprob
    touch(model)
    after = model.score(text).logprob
    assert (after - expected(model, text, 1)[0]).abs().max() < 2e-4
    assert (after - before).abs().max() > 1e-3


def test_texts_that_are_not_finite_are_named_and_the_others_kept():
    model = gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**SMALL, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        model.transformer.wte.weight[50] = float("nan")
    with pytest.raises(NonFiniteLogitsError, match="logits of text 1 were NaN or infinite after") as caught:
        model.score([[5, 6, 7], [5, 6, 7, 50, 8]])
    good = model.score([5, 6, 7])
    assert caught.value.rows == [1] and torch.allclose(caught.value.scores[0].logprob, good.logprob, atol=1e-5)


def test_a_context_without_cache_is_an_error_and_not_lost():
    model = gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**SMALL)).eval()
    plain = model.forward
    model.forward = lambda input_ids=None, **_: plain(input_ids, return_dict=True, use_cache=False)
    with pytest.raises(InputError, match="gave no cache of the context"):
        model.score([[5]], [6, 7, 8])


def test_batches_hold_neighbours_of_length_and_every_text_once():
    lengths = [(i * 37) % 100 for i in range(200)]
    found = batches(lengths, 300)
    assert sorted(i for batch in found for i in batch) == [i for i, n in enumerate(lengths) if n]
    in_order = [lengths[i] for batch in found for i in batch]
    assert in_order == sorted(in_order, reverse=True)
    for batch, after in zip(found, [*found[1:], [0]], strict=True):
        assert len(batch) * lengths[batch[0]] <= 300 < (len(batch) + 1) * lengths[batch[0]] or after == [0]
    assert batches([5, 900, 0], 300) == [[1], [0]]


def test_a_context_counts_for_every_text_of_a_batch():
    assert [len(batch) for batch in batches([1] * 500, 2048, held=1000)] == [2] * 250
    assert [len(batch) for batch in batches([1] * 500, 2048)] == [500]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_text_alone_scores_as_in_a_batch(models, dtype):
    model = copy.deepcopy(models[1]).to(dtype)
    texts = [ids_of(n) for n in (5, 40, 300, 12)]
    for text, score in zip(texts, model.score(texts), strict=True):
        assert (model.score(text).logprob - score.logprob).abs().max() < 0.08


@torch.no_grad()
def test_perplexity_counts_every_token_once(models):
    theirs, ours = models
    limit = SMALL["max_position_embeddings"]
    for n, stride in ((2, None), (100, 30), (limit, 100), (limit + 1, 100), (1500, 200), (1500, limit - 1)):
        ids = ids_of(n)
        total, end = 0.0, 1
        for begin in range(0, n, stride or limit // 2):
            last = min(begin + limit, n)
            new = last - end
            if new:
                total -= expected(theirs, ids[begin:last], last - begin - new)[0].sum().item()
            end = last
            if last == n:
                break
        assert math.isclose(ours.perplexity(ids, stride), math.exp(total / (n - 1)), rel_tol=1e-4), (n, stride)


def test_what_looks_at_masks_behind_a_context_is_shown_the_padding():
    _, model = peers(window_size=7)
    texts, context = [[5, 6, 7, 8], [9, 10]], [3, 4, 5]
    want = model.score(texts, context=context)
    seen = []
    handle = model.transformer.h[1].register_forward_pre_hook(
        lambda module, args, given: seen.append(given.get("attention_mask")), with_kwargs=True
    )
    got = model.score(texts, context=context)
    handle.remove()
    assert seen[-1] is not None  # of the two texts together; the shorter is padded
    hidden = (seen[-1][1] if seen[-1].dtype == torch.bool else seen[-1][1] > -1).logical_not()
    assert hidden[..., -1].any() and torch.allclose(got[0].logprob, want[0].logprob, atol=1e-5)
    assert torch.allclose(got[1].logprob, want[1].logprob, atol=1e-5)
