"""Weights in 8 and 4 bits: their layout is the documented one, rounding is the best there is of it, products are exact."""

import pytest
import torch

from gptneo_fast.errors import InputError
from gptneo_fast.ops import cpu, extension, quantized, reference, widened
from gptneo_fast.ops.quantized import GROUPS, Format, QuantizedWeight
from gptneo_fast.ops.testing import EPS
from tests.ops.test_cpu import LANES, lanes, random  # noqa: F401 (a fixture)

FORMATS = [Format(8), *(Format(4, group) for group in GROUPS)]
compiled = pytest.mark.skipif(extension.why_not() is not None, reason=f"no extension: {extension.why_not()}")


def number(values, scales, n, k, how):
    """One number of a weight, by the words of the module's first lines."""
    if values.dtype is torch.int32:  # words of 16 rows side by side, of the last rows if there are fewer
        first, width = n // 16 * 16, min(16, len(values) - n // 16 * 16)

        def at(t, w):
            return t.flatten()[first * (t.numel() // len(values)) + w * width + n - first]

        word = int(at(values, k // 4 if how.bits == 8 else k // 64 * 8 + k % 16 // 2)) & 0xFFFFFFFF
        scale = float(at(scales, 0 if how.bits == 8 else k // how.group))
        if how.bits == 8:
            return (((word >> 8 * (k % 4) & 255) ^ 128) - 128) * scale
        return ((word >> 16 * (k % 2) + 4 * (k % 64 // 16) & 15) - 8) * scale
    if how.bits == 8:
        return int(values[n, k]) * float(scales[n, 0])
    block, place = divmod(k, 64)
    nibble, word = divmod(place, 16)
    low, high = (int(values[n, 32 * block + 2 * word + i]) for i in (0, 1))
    bits = (low + 256 * high) >> (4 * nibble) & 15
    return (bits - 8) * float(scales[n, k // how.group])


@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(3, 64), (2, 200), (5, 33), (1, 1), (16, 70), (37, 130)])
def test_numbers_lie_where_the_words_say(how, N, K):
    """On a CPU words of 16 rows side by side, elsewhere row by row."""
    weight = QuantizedWeight.of(random(N, K), how)
    values, scales = weight.row_by_row()
    assert (tuple(values.shape), tuple(scales.shape)) == how.shapes(N, K) and (values.dtype, scales.dtype) == how.dtypes
    assert weight.is_side_by_side and weight.values.dtype is torch.int32
    ids = torch.tensor([[0, N - 1], [N // 2, 0]])
    for one in (weight, QuantizedWeight(values, scales, K, how)):
        wanted = torch.tensor([[number(one.values, one.scales, n, k, how) for k in range(K)] for n in range(N)])
        assert torch.equal(one.dequantize(torch.float32), wanted)
        assert torch.equal(one.rows(ids, torch.float32), one.dequantize(torch.float32)[ids])
        assert one.rows(ids[:0], torch.float32).shape == (0, 2, K)
        for wrong in (-1, N):
            with pytest.raises((IndexError, RuntimeError)):
                one.rows(torch.tensor([wrong]), torch.float32)
    assert torch.equal(weight.dequantize(), one.dequantize())
    back = QuantizedWeight(values.clone(), scales.clone(), K, how).arrange_()
    assert torch.equal(back.values, weight.values) and torch.equal(back.scales, weight.scales)
    with pytest.raises(InputError, match=r"side by side, but scales .* row by row; set both"):
        QuantizedWeight(weight.values, scales, K, how).dequantize()
    with pytest.raises(InputError, match=r"row by row, but scales .* side by side; set both"):
        QuantizedWeight(values, weight.scales, K, how).side_by_side()


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_either_order_is_loaded_into_either(how):
    """As a state dict of a model on another device has it."""
    weight, other = (QuantizedWeight.of(random(21, 70, seed=i), how) for i in range(2))
    rows = QuantizedWeight(*weight.row_by_row(), 70, how)
    for own in (other, QuantizedWeight(*other.row_by_row(), 70, how)):
        for given in (weight, rows):
            own.load_state_dict(given.state_dict())
            assert torch.equal(own.dequantize(), weight.dequantize())
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(QuantizedWeight.of(random(22, 70), how).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"scales": rows.scales}, strict=False)
    odd = torch.zeros(rows.values.numel() + 1, dtype=rows.values.dtype)[1:].view_as(rows.values)
    other.load_state_dict({"values": odd.copy_(rows.values), "scales": rows.scales})
    assert torch.equal(other.dequantize(), weight.dequantize())


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_a_device_gets_the_order_that_it_multiplies_in(how, monkeypatch):
    """Whatever moves it there."""
    weight = QuantizedWeight.of(random(21, 70), how)
    before, (values, scales) = [t.clone() for t in weight.buffers()], weight.row_by_row()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(QuantizedWeight, "device", torch.device("cuda"))
        assert weight.half() is weight and not weight.is_side_by_side
        assert torch.equal(weight.values, values) and torch.equal(weight.scales, scales)
    assert all(map(torch.equal, before, weight.to("cpu").side_by_side()))
    empty = weight.to("meta")
    assert (tuple(empty.values.shape), tuple(empty.scales.shape)) == how.shapes(21, 70)  # as files have it


@compiled
@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_what_came_row_by_row_is_brought_into_order_in_memory_of_its_own(how):
    """As pickles of a GPU's models come: others may hold the same memory."""
    weight = QuantizedWeight.of(random(21, 70), how)
    values, scales = weight.row_by_row()
    kept = values.clone(), scales.clone()
    others = [QuantizedWeight(values, scales, 70, how) for _ in range(2)]
    with torch.inference_mode():
        assert torch.equal(others[0].dequantize(), weight.dequantize()) and not others[0].is_side_by_side
    for other in others:
        x = random(3, 70).float()
        assert torch.equal(cpu.linear(x, other.float()), cpu.linear(x, weight))
        assert other.is_side_by_side and not other.values.is_inference()
        assert torch.equal(values, kept[0]) and torch.equal(scales, kept[1])


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_rounding_in_four_bits_errs_less_than_by_the_largest_number_alone(how):
    x = random(40, 256).float()
    error = (QuantizedWeight.of(x, how).dequantize() - x).square().mean()
    parts = quantized.grouped(x, how)
    scale = (parts.abs().amax(-1, keepdim=True) / how.range[1]).to(how.dtypes[1]).float()
    plain = ((parts / scale).round().clamp(*how.range) * scale - parts).square().mean()
    assert error <= (1 if how.bits == 8 else 0.9) * plain
    levels = QuantizedWeight.of(x, how).dequantize().div(x.abs().amax()).unique()
    assert len(levels) > 2**how.bits  # every group has its own


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_what_needs_no_rounding_is_kept(how):
    low, high = how.range
    x = torch.arange(low, high + 1).repeat(64).view(64, -1).float()
    x = torch.cat([x / 4, torch.zeros(1, x.shape[1])])
    x[:, 0] = low / 4
    assert torch.equal(QuantizedWeight.of(x, how).dequantize(), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    x = torch.ones(3, 70)
    x[1, 69] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        QuantizedWeight.of(x, Format(4, 64))


def test_formats_are_asked_for_by_name():
    assert Format.of("int8", 12) == Format(8) and Format.of("int4") == Format(4, 64)
    assert Format.of("int4", 32) == Format(4, 32)
    for name, group, message in (
        ("int3", 64, "'int8' or 'int4'"),
        (8, 64, "quantize=8"),
        ("int4", 48, "group=48.*32, 64, 128"),
    ):
        with pytest.raises(InputError, match=message):
            Format.of(name, group)


def allowed(x, weight, exact):
    """Of a product: rows of x rounded to 16 bits, block by block, then float32."""
    largest = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 64)).amax(-1)
    steps = (largest / 32767).repeat_interleave(64, -1)[..., : x.shape[-1]]
    size = (steps * 0.501 + x.double().abs() * 2e-7) @ weight.abs().T
    return size + torch.finfo(x.dtype).eps * exact.abs()


@compiled
@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("K", "N", "dtype"),
    [
        *((K, N, torch.float32) for K, N in ((1, 7), (48, 65), (64, 33), (200, 18), (768, 40), (1100, 21), (2560, 9))),
        *((200, 18, dtype) for dtype in cpu.DTYPES if dtype is not torch.float32),
    ],
)
def test_products_are_those_of_what_the_weight_stands_for(K, N, how, dtype, lanes, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cpu, "_PACKED_ROWS", 100)
    weight = QuantizedWeight.of(random(N, K, seed=1) * K**-0.5, how)
    exact_weight = weight.dequantize(torch.float64)
    x = random(67, K, seed=2).to(dtype)
    x[1] *= 100
    x[2, K // 2] = 60  # beside which the others of its block are small
    x[4, ::50] *= 30  # several such blocks
    x[3] = 0
    exact = x.double() @ exact_weight.T
    got = cpu.linear(x, weight)
    assert got.dtype is dtype and ((got.double() - exact).abs() <= allowed(x, exact_weight, exact)).all()
    for rows in (1, 2, 3, 64):  # a row's bits do not depend on its company
        assert torch.equal(cpu.linear(x[3 : 3 + rows].contiguous(), weight), got[3 : 3 + rows])
        assert torch.equal(cpu.linear(x[:rows].contiguous(), weight), got[:rows])


@compiled
@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("K", [64, 33, 200, 768])
def test_the_extension_gives_the_numbers_that_the_words_say(K, dtype, how, lanes):  # noqa: F811
    weight = QuantizedWeight.of(random(11, K), how)
    out = torch.empty(5, K, dtype=dtype)
    torch.ops.gptneo_fast_csrc.dequantize.default(weight.values, weight.scales, 4, out, cpu.Plan.max_lanes)
    assert torch.equal(out, weight.dequantize(dtype)[4:9])


@compiled
@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_rows_are_multiplied_in_halves_where_a_cpu_does_so(dtype, how, monkeypatch):
    """Over copies of a few rows of the weight; fewer rows of x stay with the integers."""
    rows, K, N = 80, 200, 97
    monkeypatch.setattr(widened, "DTYPES", frozenset())
    monkeypatch.setattr(widened, "MATRICES", True)
    monkeypatch.setattr(widened, "_PIECE", 10 * K)
    weight, bias = QuantizedWeight.of(random(N, K, seed=1) * K**-0.5, how), random(N, seed=3).to(dtype)
    x, other = random(rows, K, seed=2).to(dtype), random(rows, N, seed=4).to(dtype)
    asked, dequantize = [], torch.ops.gptneo_fast_csrc.dequantize.default
    spy = type("Spy", (), {"default": staticmethod(lambda *args: asked.append(args[2]) or dequantize(*args))})
    monkeypatch.setattr(torch.ops.gptneo_fast_csrc, "dequantize", spy)
    norm = (torch.ones(K, dtype=dtype), torch.zeros(K, dtype=dtype))
    for name, args in (
        ("norm_linear", (x, *norm, weight, bias, EPS, True)),
        ("linear_add", (x, weight, bias, other)),
        ("lm_head", (x, *norm, weight, EPS)),
    ):
        asked.clear()
        got, want = getattr(cpu, name)(*args), getattr(reference, name)(*args)
        assert asked == list(range(0, N, 10)) and got.dtype is want.dtype
        assert (got - want[..., :N]).double().norm() <= torch.finfo(dtype).eps * want.double().norm(), name
    asked.clear()
    cpu.linear(x[:64].contiguous(), weight)
    cpu.linear(x.float(), weight)
    monkeypatch.setattr(widened, "MATRICES", False)
    cpu.linear(x, weight)
    assert asked == []


@compiled
@pytest.mark.parametrize("how", [Format(8), Format(4, 32)], ids=str)
def test_threads_change_no_bit(how):
    weight = QuantizedWeight.of(random(3001, 320), how)
    x, before = random(5, 320, seed=1).float(), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(cpu.linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@compiled
@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 6, 70])
def test_layers_around_a_product_are_those_of_the_reference(rows, how, lanes):  # noqa: F811
    C, F = 96, 200
    weight, square = QuantizedWeight.of(random(F, C) * C**-0.5, how), QuantizedWeight.of(random(C, C, seed=1) * C**-0.5, how)
    x, bias, other = random(1, rows, C, seed=2).float(), random(F, seed=3).float(), random(C, seed=4).float()
    norm = (1 + 0.1 * random(C, seed=5).float(), 0.1 * random(C, seed=6).float())
    for name, args in (
        ("norm_linear", (x, *norm, weight, bias, EPS, True)),
        ("norm_linear", (x, *norm, weight, bias, EPS, False)),
        ("norm_qkv", (x, *norm, square, square, square, EPS)),
        ("linear_add", (x, square, other, x.flip(-1).contiguous())),
        ("lm_head", (x, *norm, weight, EPS)),
        ("logprob", (x[0], weight, torch.arange(rows) % F)),
    ):
        got, want = getattr(cpu, name)(*args), getattr(reference, name)(*args)
        for g, w in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, want)), strict=True):
            if g.dtype == torch.int64:  # a rank: neighbours may change places
                assert ((g - w).abs() <= 1).all()
                continue
            assert (g - w).double().norm() <= 1e-4 * w.double().norm(), name


@compiled
@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_in_x_is_seen_and_stays_in_its_row(value, how, lanes):  # noqa: F811
    weight, x = QuantizedWeight.of(random(9, 130), how), random(3, 130, seed=1).float()
    x[1, 129] = value
    got = cpu.linear(x, weight)
    assert got.isfinite()[[0, 2]].all() and not got.isfinite()[1].any()


@compiled
@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("N", [2, 16, 33])
def test_nothing_is_read_behind_the_end_of_memory(how, N, lanes):  # noqa: F811
    """The last row's words and scales stand at the end of a page, behind which nothing may be read."""
    import ctypes
    import mmap

    K, page = 96, mmap.PAGESIZE
    weight = QuantizedWeight.of(random(N, K), how)

    def at_the_end(t):
        room = mmap.mmap(-1, 3 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(room))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + 2 * page), page, 0) == 0
        there = torch.frombuffer(room, dtype=t.dtype, offset=2 * page - t.nbytes, count=t.numel())
        return there.copy_(t.flatten()).view_as(t)

    moved = QuantizedWeight(at_the_end(weight.values), at_the_end(weight.scales), K, how)
    x = random(3, K).float()
    assert torch.equal(cpu.linear(x, moved), cpu.linear(x, weight))
    assert torch.equal(cpu.linear(x[:1], moved), cpu.linear(x[:1], weight))
    out = torch.empty(N, K)
    torch.ops.gptneo_fast_csrc.dequantize.default(moved.values, moved.scales, 0, out, cpu.Plan.max_lanes)
    assert torch.equal(out, weight.dequantize())


@compiled
def test_tensors_that_do_not_fit_are_refused():
    linear, x = torch.ops.gptneo_fast_csrc.linear.default, torch.ones(1, 70)
    weight = QuantizedWeight.of(torch.ones(4, 70), Format(4, 64))
    for values, scales, message in (
        (weight.values, None, "must be contiguous"),
        (weight.values[:, :8].contiguous(), weight.scales, "4 rows of 70 numbers in blocks of 64"),
        (weight.values, weight.scales.float(), "with a scale a row or a group"),
        (weight.values, weight.scales.half(), "with a scale a row or a group"),
        (weight.values, weight.scales[:3].contiguous(), "with a scale a row or a group"),
        (weight.values, torch.ones(20).bfloat16(), "with a scale a row or a group"),
        (weight.values, weight.row_by_row()[1], "with a scale a row or a group"),
        (weight.values.view(torch.int8), weight.scales, "Char"),
        (weight.row_by_row()[0], weight.scales, "Byte"),
        (weight.values[:, ::2], weight.scales, "must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=f"gptneo_fast_csrc: .*{message}"):
            linear(x, values, None, None, None, None, EPS, False, scales)
    dequantize = torch.ops.gptneo_fast_csrc.dequantize.default
    for values, first, out, message in (
        (torch.ones(4, 70), 0, torch.empty(4, 70), "not in few bits"),
        (weight.values, 1, torch.empty(4, 70), "rows 1 to 5 are not among 4"),
        (weight.values, -1, torch.empty(4, 70), "rows -1 to 3"),
        (weight.values, 0, torch.empty(4, 129), "4 rows of 129 numbers"),
        (weight.values, 0, torch.empty(4, 140)[:, ::2], "must be contiguous"),
        (weight.values, 0, torch.empty(4, 70, dtype=torch.float64), "Double"),
    ):
        with pytest.raises(RuntimeError, match=f"gptneo_fast_csrc: .*{message}"):
            dequantize(values, weight.scales, first, out)


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_a_graph_of_it_has_nothing_that_exporters_do_not_know(how):
    """ONNX has no memory that is looked at as another dtype."""
    weight = QuantizedWeight.of(random(21, 70), how)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x, ids):
            return quantized.linear(x, self.weight), self.weight.rows(ids, x.dtype)

    args = random(3, 70).float(), torch.tensor([0, 20, 16])
    graph = torch.export.export(Both(), args)
    assert not [node for node in graph.graph.nodes if "view.dtype" in str(node.target)]
    assert all(map(torch.equal, graph.module()(*args), Both()(*args)))


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_gradients_are_those_of_what_the_weight_stands_for(how):
    weight, bias = QuantizedWeight.of(random(5, 70), how), random(5, seed=1).requires_grad_()
    x = random(3, 70, seed=2).requires_grad_()
    got = torch.autograd.grad(quantized.linear(x, weight, bias).square().sum(), (x, bias))
    plain = torch.nn.functional.linear(x, weight.dequantize(torch.float64), bias)
    assert all(map(torch.equal, got, torch.autograd.grad(plain.square().sum(), (x, bias))))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        quantized.linear(x.float(), weight)
    assert set(kept) <= {torch.int32, torch.bfloat16, torch.float32} and len(kept) == 2
