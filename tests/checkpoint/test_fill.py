"""Memory while loading, the order of things in the CUDA copier, and what a load in threads must keep."""

import contextlib
import copy
import gc
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import gptneo_fast
from gptneo_fast.checkpoint import fill as copying, safetensors
from gptneo_fast.checkpoint.weight_file import WeightFile
from gptneo_fast.errors import CheckpointError
from gptneo_fast.ops import extension
from tests.support.peers import SMALL

Causal = gptneo_fast.GPTNeoForCausalLM

PEAK = """
import json, sys, torch, gptneo_fast
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
Model = gptneo_fast.GPTNeoForCausalLM
first, second = sys.argv[1:]
Model.from_pretrained(first, dtype=torch.bfloat16)
before = peak()
model = Model.from_pretrained(second, dtype=torch.bfloat16)
print(json.dumps([peak() - before, sum(p.numel() * 2 for p in model.parameters())]))
"""


@pytest.mark.parametrize("kind", ["safetensors", "shards", "pickle"])
def test_loading_takes_the_memory_of_the_target_and_a_few_blocks(tmp_path, kind):
    small, large = tmp_path / "small", tmp_path / "large"
    Causal(gptneo_fast.GPTNeoConfig(**SMALL)).save_pretrained(small)
    model = Causal(gptneo_fast.GPTNeoConfig(**SMALL).replace(hidden_size=512, vocab_size=20000, num_layers=4))
    model.save_pretrained(large, max_shard_size="20MB" if kind == "shards" else "50GB")
    if kind == "pickle":
        (large / "model.safetensors").unlink()
        torch.save(model.state_dict(), large / "pytorch_model.bin")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, small, large], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rise, size = json.loads(done.stdout)
    assert size > 45e6  # float32 on disk has twice that; the largest tensor has 41 MB of it
    assert size * 0.9 < rise < size + 16e6, (rise, size)


def flags_of_memory(address):
    """What the kernel was told of the memory at an address (VmFlags)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition("-")
        if rest and all(c in "0123456789abcdef" for c in first):
            inside = int(first, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such memory")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages")
@pytest.mark.skipif(extension.why_not() is not None, reason=f"no extension: {extension.why_not()}")
@pytest.mark.parametrize("how", [{}, {"quantize": "int8"}, {"quantize": "int4"}], ids=str)
def test_weights_lie_together_in_huge_pages(tmp_path, how):
    """Also those that are smaller than one."""
    shape = {"hidden_size": 256, "num_layers": 4, "attention_types": [[["global", "local"], 2]], "vocab_size": 9000}
    model = Causal(gptneo_fast.GPTNeoConfig(**SMALL | shape))
    model.save_pretrained(tmp_path)
    loaded = Causal.from_pretrained(tmp_path, **how)
    for found in (loaded, model.quantize_(how["quantize"]) if how else loaded):
        named = [*found.named_parameters(), *found.named_buffers()]
        held = [t for name, t in named if t.dim() == 2 and not name.endswith(("wpe.weight", "scales"))]
        assert len(held) == 1 + 4 * 6
        asked = [t for t in held if "hg" in flags_of_memory(t.data_ptr())]
        assert len(asked) == len(held)
        pages = {t.data_ptr() >> 21 for t in held}
        assert len(pages) <= 1.2 * sum(t.nbytes for t in held) / (1 << 21) + 2
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        assert len(storages) == len(held) and sum(storages.values()) == sum(t.nbytes for t in held)


@pytest.mark.skipif(extension.why_not() is not None, reason=f"no extension: {extension.why_not()}")
def test_weights_outlive_their_neighbours_and_can_be_sent_to_other_processes(tmp_path):
    want = Causal(gptneo_fast.GPTNeoConfig(**SMALL))
    want.save_pretrained(tmp_path)
    one = Causal.from_pretrained(tmp_path).transformer.wpe.weight  # the model is gone
    gc.collect()
    assert torch.equal(one, want.transformer.wpe.weight) and one.data_ptr() % 64 == 0
    shared = Causal.from_pretrained(tmp_path).share_memory()
    assert shared.transformer.wte.weight.is_shared()
    copies = copy.deepcopy(shared), pickle.loads(pickle.dumps(shared)), shared.to(torch.float64)
    for other in copies:
        assert all(torch.equal(other.get_parameter(n).float(), p) for n, p in want.named_parameters())


def test_memory_is_asked_for_like_tensors_of_any_shape():
    like = [
        torch.empty(s, dtype=d, device="meta") for s, d in (((), torch.int8), ((0, 3), torch.float32), ((2, 0), torch.float32))
    ]
    like += [torch.empty(40 << 18, 4, device="meta"), torch.empty(3, 5, 7, dtype=torch.bfloat16, device="meta")]
    for made, wanted in zip(extension.memory(like, "cpu"), like, strict=True):
        assert made.shape == wanted.shape and made.dtype is wanted.dtype and made.is_contiguous() and made.device.type == "cpu"
        made.fill_(1)


def test_a_load_under_inference_mode_or_another_default_device(tmp_path):
    want = Causal(gptneo_fast.GPTNeoConfig(**SMALL))
    want.save_pretrained(tmp_path)
    with torch.inference_mode():
        under_mode = Causal.from_pretrained(tmp_path, dtype="bfloat16")
    with torch.device("meta"):
        under_device = Causal.from_pretrained(tmp_path, dtype="bfloat16")
    for loaded in (under_mode, under_device):
        assert all(torch.equal(loaded.get_parameter(n), p.bfloat16()) for n, p in want.named_parameters())


def test_one_thread_or_many_give_the_same_and_leave_the_number_of_threads(tmp_path):
    want = Causal(gptneo_fast.GPTNeoConfig(**SMALL))
    want.save_pretrained(tmp_path)
    before = torch.get_num_threads()
    try:
        for threads in (1, 7):
            torch.set_num_threads(threads)
            loaded = Causal.from_pretrained(tmp_path)
            assert torch.get_num_threads() == threads
            assert all(torch.equal(loaded.get_parameter(n), p) for n, p in want.named_parameters())
    finally:
        torch.set_num_threads(before)


def test_loads_in_many_threads_leave_the_number_of_threads(tmp_path):
    Causal(gptneo_fast.GPTNeoConfig(**SMALL)).save_pretrained(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(6) as pool:
            for _ in range(5):
                list(pool.map(Causal.from_pretrained, [tmp_path] * 6))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


class FakeCuda:
    """Streams and events that write down what happens; a copy to the device happens when its event is waited for."""

    def __init__(self):
        self.log, self.current = [], None

    def stream_class(self):
        log = self.log

        class Stream:
            def __init__(self, device=None):
                self.name = f"stream {len(log)}"

            def synchronize(self):
                log.append(("finish", self))

            def wait_stream(self, other):
                log.append(("wait", self, other))

        return Stream

    def event_class(self):
        log = self.log

        class Event:
            def record(self, stream):
                log.append(("record", self, stream))

            def synchronize(self):
                log.append(("synchronize", self))

        return Event


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as far as the copier needs it, on the CPU."""
    fake = FakeCuda()
    Stream = fake.stream_class()
    compute = Stream()

    @contextlib.contextmanager
    def stream(of):
        fake.log.append(("enter", of))
        yield
        fake.log.append(("leave", of))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", fake.event_class())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: compute)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    read = WeightFile.read_into
    monkeypatch.setattr(
        WeightFile, "read_into", lambda self, view, at: (fake.log.append(("read", len(view))), read(self, view, at))[1]
    )
    monkeypatch.setattr(copying, "STAGE", 4096)
    return fake


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cuda_copier_reads_into_a_buffer_only_after_its_last_copy_has_left_it(tmp_path, cuda, dtype):
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(77, 50), "b": torch.randn(3), "c": torch.randn(2048)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = WeightFile(tmp_path / "x.safetensors")
    copier = copying.CudaCopier(torch.device("cpu"))
    stored = safetensors.stored_in(file)
    targets = [torch.empty(s.shape, dtype=dtype) for s in stored]
    copier.fill_all(zip(stored, targets, strict=True))
    file.close()
    for s, t in zip(stored, targets, strict=True):
        assert torch.equal(t, tensors[s.name].to(dtype)), s.name
    steps = [step for step in cuda.log if step[0] in ("synchronize", "read", "record")]
    turns = [steps[i : i + 3] for i in range(0, len(steps), 3)]
    assert len(turns) == 4 + 1 + 2  # blocks of 4096 bytes
    events = []
    for wait, read, record in turns:
        assert (wait[0], read[0], record[0]) == ("synchronize", "read", "record")
        assert wait[1] is record[1], "a buffer is waited for by its own event"
        events.append(wait[1])
    assert all(a is not b for a, b in itertools.pairwise(events)), "the buffers take turns"
    assert all(a is b for a, b in zip(events, events[2:], strict=False))
    side = next(step[2] for step in cuda.log if step[0] == "record")
    compute = torch.cuda.current_stream()
    waits = [(a.name, b.name) for kind, a, b in (s for s in cuda.log if s[0] == "wait")]
    assert waits == [(side.name, compute.name), (compute.name, side.name)]
    assert cuda.log[0] == ("wait", side, compute) and cuda.log[-2:] == [("finish", side), ("wait", compute, side)]
    assert {step[1] for step in cuda.log if step[0] == "enter"} == {side}


def test_the_cuda_copier_waits_for_what_is_under_way_before_it_gives_up(tmp_path, cuda):
    from safetensors.torch import save_file

    save_file({"a": torch.randn(4096)}, tmp_path / "x.safetensors")
    file = WeightFile(tmp_path / "x.safetensors")
    (stored,) = safetensors.stored_in(file)
    os.truncate(tmp_path / "x.safetensors", file.size - 5000)
    copier = copying.CudaCopier(torch.device("cpu"))
    with pytest.raises(CheckpointError, match="cut while it was read"):
        copier.fill_all([(stored, torch.empty(4096))])
    file.close()
    assert [step[0] for step in cuda.log].count("record") == 2 and cuda.log[-1][0] == "finish"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70000.0])
def test_the_cuda_copier_names_the_tensor_whose_value_does_not_fit(tmp_path, cuda, value):
    from safetensors.torch import save_file

    tensors = {"fine": torch.randn(2048), "odd": torch.randn(2048)}
    tensors["odd"][2000] = value
    save_file(tensors, tmp_path / "x.safetensors")
    file = WeightFile(tmp_path / "x.safetensors")
    stored = safetensors.stored_in(file)

    def fill(check):
        copier = copying.CudaCopier(torch.device("cpu"), check)
        targets = [torch.empty(s.shape, dtype=torch.float16) for s in stored]
        copier.fill_all(zip(stored, targets, strict=True))

    with pytest.raises(CheckpointError, match=f"tensor 'odd' holds {value}"):
        fill(True)
    fill(False)
    file.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_load_gives_the_bits_of_a_cpu_load(tmp_path):
    Causal(gptneo_fast.GPTNeoConfig(**SMALL).replace(vocab_size=50257)).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        here, there = (Causal.from_pretrained(tmp_path, dtype=dtype, device_map=d) for d in ("cpu", "cuda"))
        assert all(torch.equal(there.get_parameter(n).cpu(), p) for n, p in here.named_parameters())


def test_interrupting_a_load_ends_its_threads(tmp_path, monkeypatch):
    import threading

    Causal(gptneo_fast.GPTNeoConfig(**SMALL)).save_pretrained(tmp_path)
    before, filled = threading.active_count(), []
    fill = copying.Copier.fill

    def interrupted(self, stored, target):
        filled.append(stored)
        if len(filled) == 3:
            raise KeyboardInterrupt
        if len(filled) > 3:
            time.sleep(0.2)  # as a large tensor takes
        fill(self, stored, target)

    monkeypatch.setattr(copying.Copier, "fill", interrupted)
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        Causal.from_pretrained(tmp_path)
    assert threading.active_count() == before and len(os.listdir("/proc/self/fd")) == fds
    assert len(filled) < 10, "what was not begun is not begun any more"
