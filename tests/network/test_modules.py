"""What a user does to a module counts, in forward, cached steps, generation and backward: the same as in transformers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from gptneo_fast.errors import InputError
from gptneo_fast.network import fused, touch
from gptneo_fast.network.modules import GPTNeoBlock
from tests.support.peers import peers

pytest.importorskip("transformers")
IDS = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0))
LAYERS = dict(num_layers=2, window_size=5, max_position_embeddings=64)


def forward(model):
    return model(IDS).logits


def without_cache(model):
    return model(IDS, use_cache=False, output_hidden_states=True).logits


def cached(model):
    """A prefill, a chunk and single steps past the window."""
    out, past = [], None
    for begin, end in ((0, 9), (9, 13), *((i, i + 1) for i in range(13, 19))):
        got = model(IDS[:, begin:end], past_key_values=past, use_cache=True)
        out, past = [*out, got.logits], got.past_key_values
    return torch.cat(out, 1)


def generate(model):
    mask = torch.ones_like(IDS)
    return model.generate(IDS, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)


def backward(model):
    """Every gradient, in one vector."""
    with torch.enable_grad():
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])


RUNS = [forward, without_cache, cached, generate, backward]


def tensors(value):
    """The tensors in what a hook got, in order; caches are not looked into."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def close(ours, theirs, what=""):
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    scale = theirs.double().abs().max().clamp(min=1)
    assert (ours.double() - theirs.double()).abs().max() <= 1e-4 * scale, what


@torch.no_grad()
def agree(touch, **changes):
    """A touch has the same effect on our model as on transformers', in each way to run it, and some effect."""
    theirs, ours = peers(**(LAYERS | changes))
    plain = copy.deepcopy(ours)
    for model in (theirs, ours):
        torch.manual_seed(1)
        touch(model)
    assert not ours.looked(anew=True)
    for run in RUNS:
        close(run(ours), run(theirs), run.__name__)
    return ours, plain


# Hooks


@pytest.mark.parametrize("run", RUNS)
@torch.no_grad()
def test_hooks_on_every_module_get_the_tensors_of_transformers(run):
    seen = []
    for model in peers(**LAYERS):
        got = {}
        for name, module in model.named_modules():
            calls = got.setdefault(name, [])
            module.register_forward_pre_hook(
                lambda module, args, kw, calls=calls: calls.append(tensors(args) + tensors([kw.get("attention_mask")])),
                with_kwargs=True,
            )
            module.register_forward_hook(
                lambda module, args, kw, out, calls=calls: calls.append(tensors(out)), with_kwargs=True
            )
            if run is backward:
                module.register_full_backward_hook(
                    lambda module, grads, out, calls=calls: calls.append(tensors(grads) + tensors(out))
                )
        run(model)
        seen.append(got)
    theirs, ours = seen
    assert list(ours) == list(theirs)
    for name, calls in theirs.items():
        if name in ("", "transformer"):  # their keywords differ by what is worked out before the call
            continue
        assert len(ours[name]) == len(calls) > 0 or name.endswith(".h"), name
        for a, b in zip(ours[name], calls, strict=True):
            assert len(a) == len(b), name
            for x, y in zip(a, b, strict=True):
                close(x, y, name)


@pytest.mark.parametrize("kind", ["forward", "pre", "patched", "backward"])
@torch.no_grad()
def test_what_one_module_is_made_to_return_changes_the_result(kind):
    """One module at a time, the blocks beside it fused."""
    theirs, ours = peers(**LAYERS)
    names = [
        name for name, _ in theirs.named_modules() if name.count(".") > 1 or name.endswith(("ln_f", "drop", "lm_head", "wte"))
    ]

    def change(out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else out * 1.5 + 0.1 if out.is_floating_point() else out

    for name in names:
        found = []
        for model in (theirs, ours):
            module = model.get_submodule(name)
            if kind == "forward":
                handle = module.register_forward_hook(lambda module, args, out: change(out))
            elif kind == "pre":
                handle = module.register_forward_pre_hook(
                    lambda module, args, kw: (tuple(map(change, args)), kw), with_kwargs=True
                )
            elif kind == "backward":
                handle = module.register_full_backward_hook(
                    lambda module, grads, out: tuple(g * 2 for g in grads if g is not None)
                )
            else:
                plain = module.forward
                module.forward = lambda *args, plain=plain, **kw: change(plain(*args, **kw))
            runs = (backward,) if kind == "backward" else (forward, generate) if kind == "patched" else (cached, generate)
            found.append([run(model) for run in runs])
            if kind == "patched":
                del module.forward
            else:
                handle.remove()
        for a, b in zip(*found, strict=True):
            close(b, a, name)
    assert ours.looked(anew=True)


@torch.no_grad()
def test_a_hook_set_and_removed_while_a_model_generates_is_obeyed_from_that_token_on():
    found = []
    for model in peers(**LAYERS):
        handles = []

        def touching(ids, scores, model=model, handles=handles):
            if ids.shape[1] == IDS.shape[1] + 2:
                handles.append(model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda module, args, out: out * -2))
            if ids.shape[1] == IDS.shape[1] + 5:
                handles[0].remove()
                model.transformer.h[0].mlp = nn.Identity()
            return scores

        found.append(
            model.generate(
                IDS,
                attention_mask=torch.ones_like(IDS),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=[touching],
            )
        )
    assert torch.equal(*found)


@torch.no_grad()
def test_hooks_on_all_modules_and_patched_classes_count(monkeypatch):
    theirs, ours = peers(**LAYERS)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    counts = []
    for model in (theirs, ours):
        calls.clear()
        cached(model)
        counts.append({name: calls.count(name) for name in ("Linear", "LayerNorm", "Dropout", "Embedding", "GPTNeoBlock")})
    handle.remove()
    assert counts[0] == counts[1]
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: plain(self, x) * 1.01)
    close(cached(ours), cached(theirs))
    assert torch.equal(generate(ours), generate(theirs))


@pytest.mark.parametrize("cls", ["GPTNeoForCausalLM", "GPTNeoModel", "GPTNeoSelfAttention"])
@torch.no_grad()
def test_a_forward_patched_for_a_whole_class_is_obeyed_at_every_token(cls, monkeypatch):
    """Attention that looks past its window among them: the cache then keeps every key."""
    import transformers
    from transformers.models.gpt_neo import modeling_gpt_neo

    import gptneo_fast
    from gptneo_fast.network import modules

    theirs, ours = peers(**LAYERS | {"max_position_embeddings": 400})
    ids = torch.randint(3, 97, (1, 300), generator=torch.Generator().manual_seed(1))
    homes = [(modules, modeling_gpt_neo)] if cls == "GPTNeoSelfAttention" else [(gptneo_fast, transformers)]
    for kind in (getattr(home, cls) for pair in homes for home in pair):
        plain = kind.forward
        if cls == "GPTNeoForCausalLM":

            def changed(self, *args, plain=plain, **kw):
                out = plain(self, *args, **kw)
                out.logits = out.logits.roll(3, -1)
                return out

        elif cls == "GPTNeoModel":

            def changed(self, *args, plain=plain, **kw):
                out = plain(self, *args, **kw | {"return_dict": True})
                out.last_hidden_state = out.last_hidden_state.flip(-1)
                return out

        else:

            def changed(self, hidden_states, attention_mask=None, layer_past=None, **kw):
                q, k, v = (
                    p(hidden_states).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
                )
                k, v = (k, v) if layer_past is None else layer_past.update(k, v, self.layer_id)
                weights = (q @ k.transpose(-1, -2) * 0 + attention_mask).softmax(-1)  # the mean of all before
                return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights

        monkeypatch.setattr(kind, "forward", changed)
    tokens = [
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        for model in (theirs, ours)
    ]
    assert torch.equal(*tokens)


def test_inputs_prepared_in_another_way_are_no_matter_for_a_captured_step():
    _, ours = peers(**LAYERS)
    ours.prepare_inputs_for_generation = ours.prepare_inputs_for_generation
    look = ours.looked()
    assert not look and not look.prepare and look.forward


# Surgery


class Lora(nn.Module):
    def __init__(self, base, weight=False):
        super().__init__()
        self.base, self.a, self.b = (
            base,
            nn.Linear(base.in_features, 2, bias=False),
            nn.Linear(2, base.out_features, bias=False),
        )
        if weight:
            self.weight = base.weight

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * 3


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.1


class RMSNorm(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


class AnyArguments(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return (out[0] * 1.05, *out[1:])


class BlockArguments(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, layer_past=None, attention_mask=None, use_cache=False, output_attentions=False, **kwargs):
        return self.inner(
            hidden_states + 0.1,
            layer_past=layer_past,
            attention_mask=attention_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )


def as_type(kind, old):
    new = kind(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    return new


def put(model, name, new):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def in_block(name, make):
    """Another module in the place of one of block 1."""

    def touch(model):
        path = f"transformer.h.1.{name}"
        put(model, path, make(model.get_submodule(path)))

    return touch


def pruned(model):
    for linear in (model.transformer.h[0].mlp.c_proj, model.transformer.h[1].attn.attention.q_proj):
        prune.l1_unstructured(linear, "weight", 0.4)


def parametrized(model):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    torch.nn.utils.parametrize.register_parametrization(model.transformer.h[1].attn.attention.v_proj, "weight", Halved())


def blocks(change):
    """Another list of blocks."""

    def touch(model):
        model.transformer.h = nn.ModuleList(change(model.transformer.h))
        model.config.num_layers = len(model.transformer.h)
        kinds = [block.attn.attention.attention_type for block in model.transformer.h]
        model.config.attention_layers, model.config.attention_types = kinds, [[kinds, 1]]

    return touch


def renumbered(*order):
    def change(h):
        picked = [copy.deepcopy(h[i]) for i in order]
        for i, block in enumerate(picked):
            block.attn.layer_id = block.attn.attention.layer_id = i
        return picked

    return change


def with_bias(linear):
    new = nn.Linear(linear.in_features, linear.out_features)
    new.weight = linear.weight
    return new


def without_bias(linear):
    new = nn.Linear(linear.in_features, linear.out_features, bias=False)
    new.weight = linear.weight
    return new


def other_embedding(**options):
    def touch(model):
        new = nn.Embedding(97, 32, **options)
        with torch.no_grad():
            new.weight.copy_(model.transformer.wte.weight)
        model.set_input_embeddings(new)

    return touch


def untied(model):
    model.lm_head = nn.Linear(32, 97, bias=True)


def a_head_that_is_no_linear(model):
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())


def an_embedding_that_is_none(model):
    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            return self.inner(ids) * 2

    model.set_input_embeddings(Scaled(model.transformer.wte))


def mixed_dtypes(model):
    model.transformer.h[1].ln_2.double()
    model.transformer.h[1].ln_2.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    model.transformer.h[1].ln_2.register_forward_hook(lambda module, args, out: out.float())


def a_wider_mask(model):
    model.transformer.h[1].attn.attention.bias[..., 12:, :3] = True  # in place


def another_mask(model):
    attention = model.transformer.h[1].attn.attention
    attention.bias = torch.ones_like(attention.bias).tril().triu(-2)


SURGERY = {
    "a wider mask": a_wider_mask,
    "another mask": another_mask,
    "LoRA on q_proj": in_block("attn.attention.q_proj", Lora),
    "LoRA with a weight on c_fc": in_block("mlp.c_fc", lambda old: Lora(old, weight=True)),
    "LoRA on out_proj": in_block("attn.attention.out_proj", Lora),
    "a subclass of Linear": in_block("mlp.c_proj", lambda old: as_type(Doubled, old)),
    "RMSNorm": in_block("ln_2", lambda old: RMSNorm(old.weight)),
    "no norm": in_block("ln_1", lambda old: nn.Identity()),
    "another activation": in_block("mlp.act", lambda old: nn.ReLU()),
    "another mlp": in_block("mlp", lambda old: nn.Sequential(nn.Linear(32, 8), nn.SiLU(), nn.Linear(8, 32))),
    "q with bias": in_block("attn.attention.q_proj", with_bias),
    "c_fc without bias": in_block("mlp.c_fc", without_bias),
    "weight_norm of old": in_block("mlp.c_fc", torch.nn.utils.weight_norm),
    "weight_norm": in_block("mlp.c_fc", parametrizations.weight_norm),
    "spectral_norm": in_block("mlp.c_proj", lambda old: parametrizations.spectral_norm(old.eval())),
    "parametrized": parametrized,
    "pruned": pruned,
    "wrapped with any arguments": in_block("", AnyArguments),
    "wrapped with a block's arguments": in_block("", BlockArguments),
    "attention wrapped": in_block("attn", AnyArguments),
    "inner attention wrapped": in_block("attn.attention", AnyArguments),
    "moved": blocks(renumbered(1, 0)),
    "removed": blocks(renumbered(0)),
    "copied": blocks(renumbered(0, 1, 1, 0)),
    "embedding with max_norm": other_embedding(max_norm=0.3),
    "an embedding that is none": an_embedding_that_is_none,
    "untied head": untied,
    "a head that is no linear": a_head_that_is_no_linear,
    "mixed dtypes": mixed_dtypes,
}
STILL_UNTOUCHED = ("moved", "removed", "copied")


@pytest.mark.parametrize("surgery", SURGERY)
@torch.no_grad()
def test_surgery_has_the_effect_that_it_has_on_transformers(surgery):
    def touch(model):
        path = SURGERY[surgery]
        if surgery.startswith("wrapped"):
            model.transformer.h[1] = path.__closure__[0].cell_contents(model.transformer.h[1])
        else:
            path(model)

    theirs, ours = peers(**LAYERS)
    for model in (theirs, ours):
        torch.manual_seed(1)
        touch(model)
        model.eval()
    assert bool(ours.looked(anew=True)) is (surgery in STILL_UNTOUCHED)
    for run in RUNS:
        if run is backward and surgery == "embedding with max_norm":  # torch refuses it: the weight is changed in place
            continue
        torch.manual_seed(2)
        want = run(theirs)
        torch.manual_seed(2)
        close(run(ours), want, run.__name__)


@torch.no_grad()
def test_modules_called_alone_are_those_of_transformers():
    theirs, ours = peers(**LAYERS)
    x = torch.randn(2, 11, 32)
    mask = torch.zeros(2, 1, 11, 11).masked_fill(torch.rand(2, 1, 11, 11) < 0.3, torch.finfo(torch.float32).min)
    mask[..., range(11), range(11)] = 0
    for a, b in zip(ours.transformer.h, theirs.transformer.h, strict=True):
        close(a.mlp(x), b.mlp(x))
        for options in ({}, {"attention_mask": mask}):
            for one, other in ((a, b), (a.attn, b.attn), (a.attn.attention, b.attn.attention)):
                for got, want in zip(one(x, **options), other(x, **options), strict=True):
                    close(got, want)


@torch.no_grad()
def test_blocks_called_by_hand_fill_a_cache_as_the_model_does():
    theirs, ours = peers(**LAYERS)
    x = torch.randn(2, 23, 32)

    def run(model, past):
        out = []
        for begin, end in ((0, 9), (9, 10), (10, 17), *((i, i + 1) for i in range(17, 23))):
            hidden = x[:, begin:end]
            for block in model.transformer.h:
                hidden = block(hidden, layer_past=past, use_cache=True)[0]
            out.append(hidden)
        return torch.cat(out, 1), past.get_seq_length()

    import transformers

    got, seen = run(ours, ours.transformer.new_cache(2))
    want, length = run(theirs, transformers.DynamicCache())
    assert seen == length == 23
    close(got, want)


@torch.no_grad()
def test_a_cache_knows_what_attention_it_was_made_for():
    _, ours = peers(**LAYERS)
    past = ours(IDS).past_key_values
    ours.transformer.h[1].attn.attention.forward = ours.transformer.h[1].attn.attention.forward
    from gptneo_fast.errors import CacheError

    with pytest.raises(CacheError, match="windows"):
        ours(IDS[:, :1], past_key_values=past)


@torch.no_grad()
def test_an_embedding_with_other_rows_than_the_configuration_says():
    """More rows are used; ids beyond fewer are refused, and no kernel reads past them."""
    for rows, ids in ((120, torch.tensor([[5, 110]])), (40, torch.tensor([[5, 39]]))):
        theirs, ours = peers(**LAYERS)
        for model in (theirs, ours):
            torch.manual_seed(0)
            model.set_input_embeddings(nn.Embedding(rows, 32))
        assert not ours.looked(anew=True).embeddings
        close(ours(ids).logits, theirs(ids).logits)
        with pytest.raises(InputError, match=f"it must be from 0 to {rows - 1}"):
            ours(ids + rows)


# Training


def test_whether_gradients_are_wanted_is_decided_by_what_flows():
    """A frozen model with a hook that adds a vector which is to be learnt."""
    found = []
    for model in peers(**LAYERS):
        model.requires_grad_(False)
        vector = torch.zeros(32, requires_grad=True)
        model.transformer.h[0].register_forward_hook(lambda module, args, out, v=vector: (out[0] + v, *out[1:]))
        model(IDS, labels=IDS).loss.backward()
        found.append(vector.grad)
    assert found[0].abs().max() > 0
    close(found[1], found[0])


@pytest.mark.parametrize("use_cache", [True, False])
def test_gradients_reach_the_attention_weights_that_were_returned(use_cache):
    found = []
    for model in peers(**LAYERS):
        out = model(IDS, output_attentions=True, use_cache=use_cache)
        for weights in out.attentions:
            weights.retain_grad()
        out.logits[:, -1, 5].sum().backward()
        found.append([weights.grad for weights in out.attentions])
    for theirs, ours in zip(*found, strict=True):
        close(ours, theirs)


def test_gradients_flow_through_a_cache_over_several_calls():
    found = []
    for model in peers(**LAYERS):
        past, total = None, 0.0
        for begin, end in ((0, 6), (6, 7), (7, 8), (8, 19)):
            out = model(IDS[:, begin:end], past_key_values=past, use_cache=True)
            past, total = out.past_key_values, total + out.logits.square().mean()
        total.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(found[1], found[0])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_with_the_cache_on_computes_what_transformers_does(kind):
    found = []
    for model in peers(**LAYERS):
        with torch.autocast("cpu", kind):
            loss = model(IDS, labels=IDS, use_cache=True).loss
            loss.backward()
            with torch.no_grad():
                logits = cached(model)
        found.append((loss.detach(), logits.float()))
    for theirs, ours in zip(*found, strict=True):
        assert (theirs - ours).abs().max() <= 0.05 * theirs.abs().max()


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_checkpointing_gives_the_gradients_of_plain_training(reentrant):
    _, model = peers(**LAYERS)
    want = backward(model)
    model.train().config.use_cache = False
    model.gradient_checkpointing_enable(*([] if reentrant is None else [{"use_reentrant": reentrant}]))
    model.transformer.h[0].mlp.register_forward_hook(lambda module, args, out: out + 0)
    close(backward(model), want)


@pytest.mark.parametrize("where", ["resid_dropout", "attention_dropout", "embed_dropout"])
def test_dropout_of_a_module_counts_when_it_is_set_afterwards(where):
    found = []
    for model in peers(**LAYERS):
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and name.endswith(
                {"resid_dropout": "mlp.dropout", "attention_dropout": "attn_dropout", "embed_dropout": "drop"}[where]
            ):
                module.p = 0.5
        model.train()
        torch.manual_seed(3)
        found.append(model(IDS).logits.detach())
    close(found[1], found[0])


def test_forward_mode_goes_through_the_modules():
    theirs, ours = peers(**LAYERS)
    embeds, tangent = torch.randn(1, 7, 32), torch.randn(1, 7, 32)
    found = []
    for model in (theirs, ours):
        model.requires_grad_(False)
        run = lambda e, model=model: model(inputs_embeds=e, use_cache=False).logits  # noqa: E731
        found.append(torch.func.jvp(run, (embeds,), (tangent,))[1])
    assert found[0].abs().max() > 0
    close(found[1], found[0])


def test_vmap_over_texts_and_gradients_of_each():
    found = []
    for model in peers(**LAYERS):
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights, ids, mask, model=model):
            labels = torch.where(mask > 0, ids, -100)[None]
            options = {"attention_mask": mask[None], "labels": labels, "use_cache": False}
            return torch.func.functional_call(model, weights, (ids[None],), options).loss

        mask = torch.ones_like(IDS)
        mask[0, 11:] = 0
        grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, IDS, mask)
        found.append(torch.cat([g.flatten() for g in grads.values()]))
    assert found[0].abs().max() > 0
    close(found[1], found[0])


def test_flops_are_counted_as_for_transformers():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in peers(**LAYERS):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            cached(model)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# The check


def test_each_kind_of_touch_is_seen_and_none_where_there_is_none():
    _, ours = peers(**LAYERS)
    block = ours.transformer.h[0]
    assert fused.is_untouched(block) and ours.looked(anew=True)
    for name, module in block.named_modules():
        module.forward = module.forward
        assert not fused.is_untouched(block), name
        del module.forward
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
            handle = getattr(module, register)(lambda *args: None)
            assert not fused.is_untouched(block), (name, register)
            handle.remove()
        assert fused.is_untouched(block), name
    for name, parameter in block.named_parameters():
        parent, _, last = name.rpartition(".")
        owner = block.get_submodule(parent)

        class Weight(nn.Parameter):
            pass

        setattr(owner, last, Weight(parameter.detach()))
        assert not fused.is_untouched(block), name
        setattr(owner, last, nn.Parameter(parameter.detach().double()))
        assert not fused.is_untouched(block), name
        setattr(owner, last, parameter)
    assert fused.is_untouched(block)
    block.attn.attention._attn = block.attn.attention._attn
    assert not fused.is_untouched(block)


def test_what_is_set_between_two_looks_changes_the_stamp():
    _, ours = peers(**LAYERS)
    block = ours.transformer.h[0]
    for change in (
        lambda: block.mlp.c_fc.register_forward_hook(print),
        lambda: setattr(block.mlp, "c_fc", nn.Identity()),
        lambda: setattr(block, "forward", print),
        lambda: ours.train(),
        lambda: setattr(ours, "lm_head", nn.Identity()),
        lambda: delattr(block, "forward"),
    ):
        before = touch.stamp()
        change()
        assert touch.stamp() != before


def test_a_deep_copy_and_a_pickle_are_untouched_and_their_own():
    import pickle

    _, ours = peers(**LAYERS)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.looked(anew=True)
        other.transformer.h[0].register_forward_hook(lambda module, args, out: None)
        assert not other.looked() and ours.looked()
    assert type(ours.transformer.h[0]) is GPTNeoBlock
