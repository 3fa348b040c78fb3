"""The counters: right on kernels that were written to be counted by hand."""

import pytest
import torch

from benchmarks.static.counting import Bytes, Launches, Traffic

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")


@triton.jit
def _copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _scale(x_ptr, w_ptr, y_ptr, count_ptr, BLOCK: tl.constexpr):
    """Every program reads the same BLOCK weights and one scalar, and counts itself."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0))
    tl.store(y_ptr + tl.program_id(0) * BLOCK + offs, _product(x, tl.load(w_ptr + offs)))
    tl.atomic_add(count_ptr, 1)


@triton.jit
def _product(a, b):
    return a * b


@needs_interpreter
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2), (torch.int64, 8), (torch.bool, 1)])
def test_only_active_lanes_count_and_each_by_its_size(dtype, size):
    x, y = torch.ones(100).to(dtype), torch.zeros(100).to(dtype)
    with Traffic(x=x, y=y) as traffic:
        _copy[(4,)](x, y, 70, BLOCK=32)
    assert y.sum() == 70
    assert traffic.read["x"] == Bytes(70 * size, 70 * size) and traffic.read["y"] == Bytes()
    assert traffic.written["y"] == Bytes(70 * size, 70 * size) and traffic.written["x"] == Bytes()
    assert traffic.read["other"].total == traffic.written["other"].total == 0
    assert traffic.launches == ["_copy"]


@needs_interpreter
def test_repeats_are_told_from_first_reads_and_memory_without_a_name_is_counted():
    x, w, y, count = torch.randn(5), torch.randn(16), torch.zeros(5, 16), torch.zeros(1, dtype=torch.int32)
    with Traffic(weights=[w], counters=[count]) as traffic:
        _scale[(5,)](x, w, y, count, BLOCK=16)
    torch.testing.assert_close(y, x[:, None] * w)
    assert count == 5
    assert traffic.read["weights"] == Bytes(total=5 * 64, distinct=64)
    assert traffic.read["weights"].repeated == 4 * 64
    assert traffic.read["counters"] == traffic.written["counters"] == Bytes(total=5 * 4, distinct=4)
    assert traffic.read["other"].total == 5 * 4  # x
    assert traffic.written["other"].total == 5 * 64  # y


@needs_interpreter
def test_views_of_a_storage_are_one_memory_and_a_second_call_adds_up():
    whole = torch.randn(64)
    y = torch.zeros(32)
    with Traffic(weights=[whole[:32], whole[32:]]) as traffic:
        for half in (whole[:32], whole[32:], whole[32:]):
            _copy[(1,)](half, y, 32, BLOCK=32)
    assert traffic.read["weights"] == Bytes(total=3 * 128, distinct=2 * 128)
    assert traffic.launches == ["_copy"] * 3


def test_one_storage_under_two_names_is_refused():
    x = torch.randn(8)
    with pytest.raises(ValueError, match="'b' and 'a' share a storage"):
        Traffic(a=x, b=x[2:])


def test_what_torch_launches_counts_and_what_only_names_memory_does_not():
    x, w, b = torch.randn(4, 8), torch.randn(8, 8), torch.randn(8)
    with Launches() as counter:
        y = torch.empty_like(x)
        y.copy_(x.t().t())
        torch.nn.functional.linear(x, w, b).view(2, 16).transpose(0, 1).detach()
    assert counter.launches == ["aten.copy_", "aten.addmm"]


@needs_interpreter
def test_nothing_is_counted_or_left_patched_outside_the_context():
    x, y = torch.randn(32), torch.zeros(32)
    traffic = Traffic(x=x)
    with traffic:
        pass
    _copy[(1,)](x, y, 32, BLOCK=32)
    with pytest.raises(Exception, match="division"), traffic:
        _copy[(1 // 0,)](x, y, 32, BLOCK=32)
    _copy[(1,)](x, y, 32, BLOCK=32)
    assert traffic.launches == [] and traffic.read["x"] == Bytes()
