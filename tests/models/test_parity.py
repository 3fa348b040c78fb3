"""The five classes against transformers' eager path: outputs, tuples, losses, masks, caches, gradients, dtypes."""

import itertools

import pytest
import torch

import gptneo_fast
from tests.support.peers import CLASSES, SMALL, field_names, peers

CLOSE = dict(rtol=2e-5, atol=2e-5)


def ids(B, T, V=97):
    return torch.randint(3, V, (B, T))


def same(theirs, ours, rows=None):
    """Every field that transformers gives, ours gives equal; rows [B, T] True: positions that are defined."""
    for name in theirs:
        if name in ("past_key_values", "cache"):
            continue
        a, b = theirs[name], ours[name]
        for x, y in zip(a if isinstance(a, tuple) else [a], b if isinstance(b, tuple) else [b], strict=True):
            if rows is not None and x.dim() >= 2 and x.shape[:2] == rows.shape:
                x, y = x[rows], y[rows]
            elif rows is not None and x.dim() == 4:
                x, y = (t.transpose(1, 2)[rows] for t in (x, y))
            torch.testing.assert_close(y, x, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("window", [1, 5, 64, 256])
def test_every_class_and_output_equals_transformers(cls, window):
    theirs, ours = peers(cls, window_size=window, pad_token_id=0)
    x = ids(2, min(300, 2 * window + 9))
    for options in ({}, {"output_hidden_states": True, "output_attentions": True}):
        with torch.no_grad():
            a, b = theirs(x, **options), ours(x, **options)
            assert field_names(a) == list(b)
            same(a, b)
            assert len(theirs(x, return_dict=False, **options)) == len(ours(x, return_dict=False, **options))


@pytest.mark.parametrize("head_dim", [4, 8, 16, 32, 48, 64, 128])
def test_every_head_dim(head_dim):
    theirs, ours = peers(hidden_size=2 * head_dim, num_heads=2, window_size=6, scale=2)
    x = ids(2, 21)
    same(theirs(x), ours(x))


@pytest.mark.parametrize("kinds", [["global"], ["local"], ["local", "global"]])
def test_all_global_all_local_and_local_first(kinds):
    theirs, ours = peers(num_layers=2, attention_types=[[kinds, 2 // len(kinds)]])
    x = ids(2, 30)
    same(theirs(x), ours(x))


def test_random_configurations():
    rng = torch.Generator().manual_seed(7)

    def pick(*values):
        return values[torch.randint(len(values), (1,), generator=rng)]

    for _ in range(24):
        head_dim, heads, layers = pick(4, 8, 16, 48), pick(1, 2, 3), pick(1, 2, 4)
        theirs, ours = peers(
            hidden_size=head_dim * heads,
            num_heads=heads,
            num_layers=layers,
            window_size=pick(1, 2, 3, 17, 100),
            intermediate_size=pick(None, 24, 100),
            layer_norm_epsilon=pick(1e-5, 1e-3),
            vocab_size=pick(50, 131),
            tie_word_embeddings=pick(True, False),
            scale=pick(1, 4),
        )
        x = ids(pick(1, 3), pick(1, 2, 40, 130), 50)
        mask = torch.ones_like(x)
        if pick(True, False):
            mask[0, : x.shape[1] // 2] = 0
        same(theirs(x, attention_mask=mask), ours(x, attention_mask=mask), mask.bool())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", ["left", "right", "both", "holes", "all rows full", "one row empty"])
def test_masks(cls, kind):
    theirs, ours = peers(cls, pad_token_id=0)
    x, mask = ids(3, 24), torch.ones(3, 24, dtype=torch.long)
    if kind in ("left", "both"):
        mask[0, :11], mask[1, :1] = 0, 0
    if kind in ("right", "both"):
        mask[0, 20:], mask[2, 9:] = 0, 0
    if kind == "holes":
        mask[torch.rand(3, 24) < 0.4] = 0
        mask[:, 0] = 1
    if kind == "one row empty":
        mask[1] = 0
    x = x.masked_fill(mask == 0, 0)
    with torch.no_grad():
        a, b = theirs(x, attention_mask=mask), ours(x, attention_mask=mask)
    # A query whose window holds no token has no defined value in transformers. Windows of three layers reach 18 back.
    defined = torch.stack([mask[:, max(0, i - 6) : i + 1].any(1) for i in range(24)], 1)
    for _ in range(2):
        defined = torch.stack([(defined | (mask == 0))[:, max(0, i - 6) : i + 1].all(1) for i in range(24)], 1) & defined
    if kind == "holes":
        defined &= mask.bool()
    same(a, b, defined if cls != "GPTNeoForSequenceClassification" else None) if kind != "one row empty" else None
    if kind == "one row empty":
        keep = torch.tensor([0, 2])
        for name in a:
            if isinstance(a[name], torch.Tensor):
                torch.testing.assert_close(b[name][keep], a[name][keep], **CLOSE)
                assert b[name].isfinite().all()


def test_a_row_that_sees_nothing_gets_zeros_from_attention():
    from gptneo_fast.ops import reference

    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind(0)
    out = reference.attention(q, k, v, 3, starts=torch.tensor([0, 9], dtype=torch.int32))
    assert (out[1] == 0).all()
    assert (out[0] != 0).any()


@pytest.mark.parametrize("kind", ["bool", "additive", "heads"])
def test_4d_masks(kind):
    theirs, ours = peers()
    x = ids(2, 12)
    keep = (torch.rand(2, 4 if kind == "heads" else 1, 12, 12) < 0.7) | torch.eye(12, dtype=torch.bool)
    additive = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    same(theirs(x, attention_mask=additive), ours(x, attention_mask=keep if kind == "bool" else additive))


def test_additive_bias_is_added():
    theirs, ours = peers()
    x, bias = ids(2, 12), torch.randn(2, 1, 12, 12)
    same(theirs(x, attention_mask=bias), ours(x, attention_mask=bias))


def test_embeddings_token_types_and_positions():
    theirs, ours = peers()
    x = ids(2, 20)
    positions, types = torch.randint(0, 640, (2, 20)), torch.randint(0, 97, (2, 20))
    embeds = theirs.get_input_embeddings()(x).detach() + 0.1
    for options in (
        {"input_ids": x, "position_ids": positions, "token_type_ids": types},
        {"inputs_embeds": embeds},
        {"inputs_embeds": embeds, "token_type_ids": types, "position_ids": positions[:1]},
    ):
        same(theirs(**options), ours(**options))


@pytest.mark.parametrize("keep", [0, 1, 5, torch.tensor([2, 0]), torch.tensor([[3, 1], [7, 7]]), "bool"])
def test_logits_to_keep(keep):
    theirs, ours = peers()
    x = ids(2, 9)
    keep = torch.rand(2, 9) < 0.5 if keep == "bool" else keep
    torch.testing.assert_close(ours(x, logits_to_keep=keep).logits, theirs(x, logits_to_keep=keep).logits, **CLOSE)


CUTS = [[30], [1] * 30, [10, 20], [29, 1], [3, 9, 1, 17]]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_in_uneven_pieces_gives_the_logits_of_one_pass(cut, padded):
    theirs, ours = peers()
    x, mask = ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    if padded:
        mask[0, :13] = 0
    whole = theirs(x, attention_mask=mask).logits
    past, at, pieces = None, 0, []
    for n in cut:
        out = ours(x[:, at : at + n], attention_mask=mask[:, : at + n], past_key_values=past)
        past, at = out.past_key_values, at + n
        pieces.append(out.logits)
        assert past.get_seq_length() == at
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], **CLOSE)


def test_a_cached_step_in_transformers_equals_ours_whatever_the_mask():
    theirs, ours = peers()
    x = ids(3, 26)
    for kind in ("left", "right", "holes"):
        mask = torch.ones(3, 26, dtype=torch.long)
        if kind == "left":
            mask[1, :9] = 0
        elif kind == "right":
            mask[1, 12:20] = 0  # right padding of the first call, a hole for the second
        else:
            mask[0, 4], mask[2, 17], mask[1, 23] = 0, 0, 0
        a = theirs(x[:, :20], attention_mask=mask[:, :20])
        b = ours(x[:, :20], attention_mask=mask[:, :20])
        a = theirs(x[:, 20:], attention_mask=mask, past_key_values=a.past_key_values, output_attentions=True)
        b = ours(x[:, 20:], attention_mask=mask, past_key_values=b.past_key_values, output_attentions=True)
        same(a, b, mask[:, 20:].bool())


@pytest.mark.parametrize("cls", CLASSES[1:])
def test_losses_and_gradients(cls):
    theirs, ours = peers(cls, pad_token_id=0, num_labels=3)
    x = ids(4, 15)
    labels = {
        "GPTNeoForCausalLM": [{"labels": x.masked_fill(torch.rand(4, 15) < 0.2, -100)}],
        "GPTNeoForSequenceClassification": [{"labels": torch.randint(0, 3, (4,))}, {"labels": torch.rand(4, 3)}],
        "GPTNeoForTokenClassification": [{"labels": torch.randint(0, 3, (4, 15))}],
        "GPTNeoForQuestionAnswering": [
            {"start_positions": torch.tensor([0, 3, 99, -4]), "end_positions": torch.tensor([[5], [15], [14], [2]])}
        ],
    }[cls]
    for kinds in labels:
        theirs.config.problem_type = ours.config.problem_type = None
        a, b = theirs(x, **kinds), ours(x, **kinds)
        same(a, b)
        assert theirs.config.problem_type == ours.config.problem_type
        theirs.zero_grad(), ours.zero_grad()
        a.loss.backward(), b.loss.backward()
        for (name, p), (_, q) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("num_labels", [1, 3])
def test_regression(num_labels):
    theirs, ours = peers("GPTNeoForSequenceClassification", pad_token_id=0, num_labels=num_labels)
    theirs.config.problem_type = ours.config.problem_type = None if num_labels == 1 else "regression"
    x, labels = ids(4, 8), torch.randn(4, num_labels).squeeze(-1)
    same(theirs(x, labels=labels), ours(x, labels=labels))
    assert ours.config.problem_type == "regression"


def test_num_items_in_batch():
    theirs, ours = peers()
    x = ids(2, 8)
    same(theirs(x, labels=x, num_items_in_batch=5), ours(x, labels=x, num_items_in_batch=5))


def test_classification_pools_the_rightmost_token_on_either_side_of_padding():
    theirs, ours = peers("GPTNeoForSequenceClassification", pad_token_id=0)
    x = ids(4, 12)
    x[0, 8:], x[1, :5], x[2, 3] = 0, 0, 0
    same(theirs(x), ours(x))


def test_half_precision_stays_within_the_error_of_plain_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        theirs, ours = peers(dtype=dtype, scale=2)
        exact, _ = peers(dtype=torch.float64, scale=2)
        exact.load_state_dict(theirs.double().state_dict())
        theirs.to(dtype)
        x = ids(2, 40)
        with torch.no_grad():
            truth = exact(x).logits
            error = [(m(x).logits.double() - truth).abs().max() for m in (theirs, ours)]
            rounding = (truth.to(dtype).double() - truth).abs().max()
        assert error[1] <= 2 * (error[0] + rounding)


def test_a_tiny_model_learns():
    torch.manual_seed(3)
    model = gptneo_fast.GPTNeoForCausalLM(
        gptneo_fast.GPTNeoConfig(**SMALL | {"resid_dropout": 0.05, "attention_dropout": 0.05})
    )
    model.train()
    x = ids(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("where", ["resid_dropout", "embed_dropout", "attention_dropout"])
def test_dropout_acts_in_training_mode_only(where):
    model = gptneo_fast.GPTNeoModel(gptneo_fast.GPTNeoConfig(**SMALL | {where: 0.5}))
    x = ids(1, 10)
    assert torch.equal(*(model.eval()(x).last_hidden_state for _ in range(2)))
    assert not torch.equal(*(model.train()(x).last_hidden_state for _ in range(2)))


def test_gradient_checkpointing_changes_no_gradient():
    _, model = peers()
    x, grads = ids(2, 12), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.train().zero_grad()
        out = model(x, labels=x, use_cache=False)
        out.loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in itertools.zip_longest(*grads):
        torch.testing.assert_close(a, b)
    with pytest.warns(gptneo_fast.GPTNeoFastWarning, match="use_cache"):
        assert model(x).past_key_values is None


def test_outputs_read_by_attribute_key_index_and_slice():
    _, model = peers()
    out = model(ids(1, 5))
    assert out.logits is out["logits"] is out[0] is out[:1][0]
    assert list(out) == ["logits", "past_key_values"] and len(out) == 2 and "loss" not in out
    assert out.cache is out["cache"] is out.past_key_values
    assert out.get("loss") is None and out.to_tuple()[1] is out.past_key_values
    with pytest.raises(KeyError):
        out["loss"]
