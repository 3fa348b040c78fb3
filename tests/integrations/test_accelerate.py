"""accelerate, DDP and FSDP2 with our models: the losses and gradients of transformers' models, or of one process."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import gptneo_fast
from tests.support.peers import peers

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

IDS = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(0))
LABELS = {
    "GPTNeoForCausalLM": {"labels": IDS},
    "GPTNeoForSequenceClassification": {"labels": torch.tensor([0, 2, 1, 1])},
    "GPTNeoForTokenClassification": {"labels": IDS % 3},
    "GPTNeoForQuestionAnswering": {"start_positions": torch.tensor([1, 2, 0, 3]), "end_positions": torch.tensor([3, 9, 4, 3])},
}


@pytest.fixture
def fresh_state():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("cls", LABELS)
def test_a_prepared_model_trains_as_transformers_does(cls, precision, fresh_state):
    models = peers(cls, num_labels=3, pad_token_id=0)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    losses = []
    for model in models:
        torch.manual_seed(5)  # of dropout
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model, optimizer = accelerator.prepare(model.train(), optimizer)
        losses.append([])
        for _ in range(6):
            with accelerator.accumulate(model):
                out = model(IDS, **LABELS[cls])
                assert all(v.dtype is torch.float32 for k, v in out.items() if "logits" in k)  # accelerate turns them back
                accelerator.backward(out.loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step(), optimizer.zero_grad()
            losses[-1].append(out.loss.item())
        assert type(accelerator.unwrap_model(model)).__name__ == cls
    near = 0.03 if precision == "bf16" else 1e-4
    assert abs(losses[0][-1] - losses[0][0]) > 1e-3
    torch.testing.assert_close(losses[1], losses[0], rtol=near, atol=near)


def test_state_is_saved_and_loaded(tmp_path, fresh_state):
    _, ours = peers()
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(ours)
    before = ours(IDS).logits
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(model, tmp_path / "model")
    with torch.no_grad():
        ours.transformer.wte.weight.mul_(2)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(ours(IDS).logits, before)
    again = gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path / "model", config=ours.config)
    assert torch.equal(again(IDS).logits, before)


@torch.no_grad()
def test_a_dispatched_model_computes_and_generates_the_same(tmp_path):
    theirs, ours = peers()
    expected, tokens = theirs(IDS).logits, theirs.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=None)
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu", "transformer.ln_f": "cpu"}
    places |= {"lm_head": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.h.2": "disk"}
    for place in (places, {"": "cpu"}):
        model = copy.deepcopy(ours)
        model = accelerate.dispatch_model(model, place, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=None), tokens)
    model = accelerate.cpu_offload(copy.deepcopy(ours), execution_device="cpu")
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=None), tokens)
    assert accelerate.infer_auto_device_map(ours, {"cpu": "1GB"}, no_split_module_classes=ours._no_split_modules)


def _ddp(model, static, checkpointing):
    wrapped = torch.nn.parallel.DistributedDataParallel(model.train(), static_graph=static)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return wrapped, lambda p: p.grad


def _fsdp(model, static, checkpointing):
    from torch.distributed.fsdp import fully_shard

    if checkpointing:
        model.gradient_checkpointing_enable()
    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model.train()), lambda p: p.grad.full_tensor()


WAYS = {
    "ddp": (_ddp, False, False),
    "ddp of a static graph": (_ddp, True, False),
    "ddp of a static graph with checkpoints": (_ddp, True, True),
    "fsdp2": (_fsdp, False, False),
    "fsdp2 with checkpoints": (_fsdp, False, True),
}


def _process(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    ids = IDS[2 * rank : 2 * rank + 2]
    for name, (wrap, static, checkpointing) in WAYS.items():
        model = gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder)
        wrapped, whole = wrap(model, static, checkpointing)
        for _ in range(2):
            model.zero_grad()
            wrapped(ids, labels=ids, use_cache=not checkpointing).loss.backward()
        found[name] = {n: whole(p) for n, p in model.named_parameters()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Of the model by itself, and in each of two processes by the way in which they share the work."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("processes")
    _, ours = peers()
    ours.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (port, folder), nprocs=2)
    ours(IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in ours.named_parameters()}, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_find_the_gradients_of_one(way, gradients):
    alone, processes = gradients
    for found in processes:
        for name, grad in alone.items():
            torch.testing.assert_close(found[way][name], grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
