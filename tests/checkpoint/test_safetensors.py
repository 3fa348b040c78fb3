"""Safetensors: every way in which a file can be wrong is refused with the reason, and what is right arrives bit for bit."""

import json
import os
import struct
import threading

import pytest
import torch

import gptneo_fast
from gptneo_fast.checkpoint import fill as copying, safetensors
from gptneo_fast.checkpoint.weight_file import WeightFile
from gptneo_fast.errors import CheckpointError
from tests.support.peers import SMALL


@pytest.fixture
def folder(tmp_path):
    """A small causal model saved by us."""
    gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**SMALL)).save_pretrained(tmp_path)
    return tmp_path


def load(folder, **options):
    return gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder, **options)


def refused(folder, *words, **options):
    """Loading fails, and the message holds each of these words."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    for word in words:
        assert str(word) in str(caught.value), (word, str(caught.value))
    return caught.value


def weights(folder):
    return folder / "model.safetensors"


def parts(folder):
    """(header as a dict, bytes after it)."""
    data = weights(folder).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(folder, header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    weights(folder).write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("data", [b"", b"1234567"], ids=["empty", "7 bytes"])
def test_7_a_file_without_room_for_a_header_is_an_interrupted_download(folder, data):
    weights(folder).write_bytes(data)
    refused(folder, weights(folder), f"{len(data)} bytes", "interrupted download?")


def test_8_a_cut_header_is_told_with_both_lengths(folder):
    data = weights(folder).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    weights(folder).write_bytes(data[: 8 + length - 1])
    refused(folder, f"its header has {length} bytes", f"the file {8 + length - 1}", "fetch it again")


def test_9_a_cut_body_is_told_with_expected_and_real_bytes(folder):
    data = weights(folder).read_bytes()
    weights(folder).write_bytes(data[:-4])
    refused(folder, f"need {len(data)} bytes", f"has {len(data) - 4} (4 fewer)", "delete it and fetch it again")


def test_10_a_tail_is_told_with_its_bytes(folder):
    with weights(folder).open("ab") as file:
        file.write(b"12345")
    refused(folder, "5 bytes stand after tensor", "the last")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "this is an HTML page"),
        (b"\n <html lang=en>" + b"x" * 600, "this is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(100), "this is a zip archive"),
        (b"\x1f\x8b\x08" + bytes(100), "this is a gzip archive"),
        (b"\x80\x02}q\x00." + bytes(100), "this is a pickle"),
        (b'{"error": "Repository not found"}', "this is JSON text"),
        (bytes(4096), "it begins with zeros"),
    ],
)
def test_11_to_13_other_files_are_called_by_their_name(folder, data, words):
    weights(folder).write_bytes(data)
    refused(folder, words, weights(folder))


def test_12_the_way_out_of_an_lfs_pointer(folder):
    weights(folder).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    refused(folder, "run git lfs pull")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100 * 2**20 + 1, (16 << 20) + 1])
def test_14_an_absurd_header_length_allocates_nothing(folder, length, monkeypatch):
    weights(folder).write_bytes(struct.pack("<Q", length) + b'{"a":1}' * 10)
    read, seen = WeightFile.read, []
    monkeypatch.setattr(WeightFile, "read", lambda self, start, count: seen.append(count) or read(self, start, count))
    refused(folder, f"{length} bytes, of at most {16 << 20}")
    assert max(seen) <= 512


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"not json", "is not JSON"),
        (b'{"a": "\xff\xfe"}', "is not UTF-8"),
        (b"[1, 2]", "holds a list, not an object"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a": ' * 200_000, "nested too deep"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"", "is not JSON"),
    ],
    ids=range(7),
)
def test_15_a_header_that_is_no_json_object(folder, header, words):
    _, body = parts(folder)
    write(folder, header, body)
    refused(folder, "the header of", words)


@pytest.mark.parametrize("kind", ["F7", "", None, 3, ["F32"]])
def test_16_an_unknown_dtype_names_the_tensor(folder, kind):
    header, body = parts(folder)
    header["transformer.wpe.weight"]["dtype"] = kind
    write(folder, header, body)
    refused(folder, "'transformer.wpe.weight' has dtype", str(kind), "F32")


WPE = "transformer.wpe.weight"


def described(header, **changes):
    header[WPE] |= changes


def shifted(header, first, last):
    begin, end = header[WPE]["data_offsets"]
    header[WPE]["data_offsets"] = [begin + first, end + last]


FAULTS = {
    "shape unlike bytes": (lambda h: described(h, shape=[1, 1]), "needs 4 bytes"),
    "negative size": (lambda h: described(h, shape=[-640, -32]), "a shape is a list of at most 8 sizes"),
    "size of 2^63": (lambda h: described(h, shape=[2**63]), "a shape is a list of at most 8 sizes"),
    "product of 2^124": (lambda h: described(h, shape=[2**62, 2**62]), "needs"),
    "size that is a bool": (lambda h: described(h, shape=[True, 640 * 32]), "a shape is a list of at most 8 sizes"),
    "size that is a float": (lambda h: described(h, shape=[640.0, 32]), "a shape is a list of at most 8 sizes"),
    "nine sizes": (lambda h: described(h, shape=[1] * 7 + [640, 32]), "a shape is a list of at most 8 sizes"),
    "no shape": (lambda h: h[WPE].pop("shape"), "has shape None"),
    "reversed": (lambda h: h[WPE]["data_offsets"].reverse(), "its data_offsets"),
    "negative place": (lambda h: described(h, data_offsets=[-4, 640 * 32 * 4 - 4]), "they are two positions"),
    "one place": (lambda h: described(h, data_offsets=[4]), "they are two positions"),
    "overlap": (lambda h: shifted(h, -4, -4), "without overlap or hole"),
    "hole": (lambda h: shifted(h, 4, 4), "without overlap or hole"),
    "no object": (lambda h: h.update({WPE: 7}), "is described by a int"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_17_a_tensor_that_contradicts_itself_or_another_is_named(folder, fault):
    header, body = parts(folder)
    change, words = FAULTS[fault]
    change(header)
    write(folder, header, body)
    refused(folder, words)
    assert WPE in str(refused(folder))


def test_metadata_that_the_library_would_refuse_is_refused(folder):
    header, body = parts(folder)
    write(folder, header | {"__metadata__": {"format": 1}}, body)
    refused(folder, weights(folder), "safetensors refuses its header", "expected a string")


@pytest.mark.parametrize("name", ["a\0b\n", "x" * 5000])
def test_a_name_out_of_a_damaged_header_is_printed_in_part(folder, name):
    header, body = parts(folder)
    shifted(header, 4, 4)
    header[name] = header.pop(WPE)
    write(folder, header, body)
    error = str(refused(folder, "without overlap or hole"))
    assert error.isprintable() and len(error) < 1000


def test_17_a_name_given_twice_is_refused(folder):
    header, body = parts(folder)
    text = json.dumps(header)
    again = json.dumps({WPE: header[WPE]})[1:-1]
    write(folder, f"{text[:-1]}, {again}}}".encode(), body)
    refused(folder, "is given twice", WPE)


@pytest.mark.parametrize(("kind", "dtype"), [("I32", "int32"), ("F8_E4M3", "float8_e4m3fn"), ("BOOL", "bool")])
def test_18_weights_that_are_no_floats_are_refused_with_their_dtype(folder, kind, dtype):
    header, body = parts(folder)
    size = {"I32": 4}.get(kind, 1)
    cut = 640 * 32 * (4 - size)
    begin, end = header[WPE]["data_offsets"]
    for about in header.values():
        if "data_offsets" in about and about["data_offsets"][0] >= end:
            about["data_offsets"] = [x - cut for x in about["data_offsets"]]
    header[WPE] |= {"dtype": kind, "data_offsets": [begin, end - cut]}
    write(folder, header, body[: end - cut] + body[end:])
    refused(folder, f"'{WPE}' is {dtype}", "float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_19_a_value_that_is_not_finite_is_named_and_can_be_let_in(folder, value, dtype):
    model = load(folder)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = value
    model.save_pretrained(folder)
    refused(
        folder, "'transformer.h.1.mlp.c_fc.weight' holds", value, f"element {3 * 32 + 5} of", "check_finite=False", dtype=dtype
    )
    again = load(folder, check_finite=False, dtype=dtype)
    loaded = again.transformer.h[1].mlp.c_fc.weight[3, 5].item()
    assert loaded == value or (value != value and loaded != loaded)


def test_19_a_value_beyond_float16_is_told_as_such_and_not_as_damage(folder):
    model = load(folder)
    with torch.no_grad():
        model.transformer.wte.weight[2, 1] = 70000.0
    model.save_pretrained(folder)
    refused(folder, "holds 70000.0", "beyond float16's 65504.0", "bfloat16", dtype="float16")
    assert load(folder, dtype="bfloat16").transformer.wte.weight[2, 1] == 70144


def test_the_largest_finite_values_are_let_in(folder):
    model = load(folder)
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = torch.finfo(torch.float32).max
        model.transformer.wte.weight[0, 1] = torch.finfo(torch.float32).min
    model.save_pretrained(folder)
    assert load(folder).transformer.wte.weight[0, 0] == torch.finfo(torch.float32).max


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_arrives_as_torch_converts_it(tmp_path, stored, wanted):
    model = gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**SMALL)).to(stored)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=wanted)
    for name, p in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p.to(wanted)), name


@pytest.mark.parametrize("block", [1, 24, 1000])
def test_blocks_of_any_size_give_the_same_tensor(tmp_path, block, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setattr(copying, "BLOCK", block)
    tensors = {"a": torch.randn(37, 11), "b": torch.randn(5).half(), "c": torch.empty(0, 3), "d": torch.randn(1)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = WeightFile(tmp_path / "x.safetensors")
    copier = copying.Copier()
    for stored in safetensors.stored_in(file):
        for dtype in (torch.float32, torch.bfloat16):
            target = torch.full(stored.shape, 7.0, dtype=dtype)
            copier.fill(stored, target)
            assert torch.equal(target, tensors[stored.name].to(dtype)), stored.name
            assert copier.equal(stored, target)
            if target.numel():
                target.view(-1)[-1] += 1
                assert not copier.equal(stored, target)
    file.close()


def test_the_header_of_every_file_that_safetensors_writes_is_read_as_it_reads_it(checkpoint):
    from safetensors import safe_open

    file = WeightFile(checkpoint / "model.safetensors")
    ours = {t.name: t for t in safetensors.stored_in(file)}
    with safe_open(checkpoint / "model.safetensors", framework="pt") as theirs:
        assert ours.keys() == set(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118
            value = theirs.get_tensor(name)
            assert (ours[name].dtype, ours[name].shape) == (value.dtype, tuple(value.shape))
            target = torch.empty_like(value)
            copying.Copier().fill(ours[name], target)
            assert torch.equal(target, value)
    file.close()


def test_32_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_crash(folder, monkeypatch):
    size = weights(folder).stat().st_size
    fill = copying.Copier.fill

    def cut_first(self, stored, target):
        os.truncate(weights(folder), size // 2)
        fill(self, stored, target)

    monkeypatch.setattr(copying.Copier, "fill", cut_first)
    refused(folder, f"had {size} bytes when loading began", "cut while it was read")


def test_32_a_file_that_is_written_to_while_it_is_read_is_refused(folder, monkeypatch):
    fill_all = copying.Copier.fill_all

    def touch(self, pairs):
        fill_all(self, pairs)
        with weights(folder).open("r+b") as file:
            file.write(b"x")

    monkeypatch.setattr(copying.Copier, "fill_all", touch)
    refused(folder, "changed while it was read")


def test_32_a_file_that_is_replaced_while_it_is_read_is_loaded_as_it_was(folder, tmp_path_factory, monkeypatch):
    before = load(folder).state_dict()
    other = tmp_path_factory.mktemp("other")
    torch.manual_seed(5)
    gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**SMALL)).save_pretrained(other)
    fill, replaced = copying.Copier.fill, []

    def replace_first(self, stored, target):
        if not replaced:
            replaced.append(os.replace(weights(other), weights(folder)))
        fill(self, stored, target)

    monkeypatch.setattr(copying.Copier, "fill", replace_first)
    after = load(folder).state_dict()
    assert replaced and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "character device", "loop", "nowhere"])
def test_31_special_files_are_refused_by_their_kind_and_never_waited_for(folder, name, kind):
    weights(folder).unlink()
    path = folder / name
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "character device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.symlink_to("gone")
    caught = []

    def attempt():
        try:
            load(folder, use_safetensors=name == "model.safetensors")
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptneo_fast.checkpoint.files.warn_once", lambda message: None)
        thread.start()
        thread.join(10)
    assert not thread.is_alive(), "it waits"
    (error,) = caught
    assert isinstance(error, CheckpointError)
    said = {"loop": "a symbolic link that leads nowhere", "nowhere": "a symbolic link that leads nowhere"}.get(
        kind, f"is a {kind}"
    )
    assert said in str(error) and str(path) in str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_33_a_file_that_may_not_be_read_is_named(folder):
    weights(folder).chmod(0)
    refused(folder, weights(folder), "Permission denied")


def test_33_an_unreadable_file_is_named(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    refused(folder, weights(folder), "cannot be read: Permission denied")


def test_a_failed_load_leaves_no_file_open_and_nothing_in_the_folder(folder):
    header, body = parts(folder)
    shifted(header, 4, 4)
    write(folder, header, body)
    before, listing = len(os.listdir("/proc/self/fd")), sorted(os.listdir(folder))
    for _ in range(3):
        refused(folder)
    assert len(os.listdir("/proc/self/fd")) == before
    assert sorted(os.listdir(folder)) == listing
