"""pytorch_model.bin: read without unpickling, so that nothing in it runs and nothing is allocated on its word."""

import collections
import io
import json
import os
import pickle
import pickletools
import struct
import warnings
import zipfile

import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import CheckpointError, GPTNeoFastWarning, UnsafeCheckpointError
from tests.support.peers import SMALL

PATH = "pytorch_model.bin"


@pytest.fixture
def folder(tmp_path):
    """A folder with config.json and the pytorch_model.bin that torch.save writes of the same model."""
    model = gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**SMALL))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / PATH)
    return tmp_path


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GPTNeoFastWarning)
        return gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder, **options)


def refused(folder, *words, kind=CheckpointError, **options):
    with pytest.raises(kind) as caught:
        load(folder, **options)
    for word in words:
        assert str(word) in str(caught.value), (word, str(caught.value))


def state(folder):
    return torch.load(folder / PATH, weights_only=True)


def rewrite(folder, change=None, compression=zipfile.ZIP_STORED, skip=()):
    """The same archive with its members changed: change(name without the root, bytes) -> bytes."""
    with zipfile.ZipFile(folder / PATH) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(folder / PATH, "w", compression) as new:
        for name, data in members:
            short = name.split("/", 1)[1]
            if short not in skip:
                new.writestr(name, change(short, data) if change else data)


def put_pickle(folder, data):
    rewrite(folder, lambda name, old: data if name == "data.pkl" else old)


def test_28_its_tensors_are_those_of_torch_load_and_one_note_says_how_to_convert(folder):
    with pytest.warns(GPTNeoFastWarning, match=r"no code in it is run; model\.save_pretrained\(folder\) writes") as notes:
        loaded = [gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder) for _ in range(2)][1]
    assert len(notes) == 1
    want = state(folder)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, want[name]), name


def test_28_nothing_is_unpickled(folder, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a pickle was loaded")

    for target in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler"):
        monkeypatch.setattr(target, fail)
    load(folder)


def test_28_allow_pickle_false_refuses_it(folder):
    with pytest.raises(UnsafeCheckpointError, match=r"allow_pickle=False refuses it; model\.save_pretrained"):
        gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder, allow_pickle=False)


def test_safetensors_win_over_a_pickle_without_a_word(folder):
    load(folder).save_pretrained(folder)
    gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder)  # a warning is an error in these tests


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_that_torch_save_offers(folder, protocol):
    want = state(folder)
    torch.save(want, folder / PATH, pickle_protocol=protocol)
    loaded = load(folder)
    assert all(torch.equal(p, want[name]) for name, p in loaded.named_parameters())


def test_views_parameters_shared_storages_and_transposed_tensors(folder):
    want = state(folder)
    both = torch.randn(2, 32)
    want["transformer.ln_f.weight"], want["transformer.ln_f.bias"] = both[0], both[1]
    square = want["transformer.h.0.attn.attention.q_proj.weight"]
    want["transformer.h.0.attn.attention.q_proj.weight"] = square.t().contiguous().t()
    want["transformer.h.0.attn.attention.k_proj.weight"] = torch.nn.Parameter(torch.randn(32, 64)[:, ::2])
    want["transformer.h.1.attn.attention.bias"] = torch.ones(1, 1, 640, 640, dtype=torch.bool).tril()
    want["transformer.h.1.attn.attention.masked_bias"] = torch.tensor(-1e9)
    torch.save(want, folder / PATH)
    loaded = load(folder)
    assert all(torch.equal(p, want[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(folder, dtype):
    want = {k: v.to(dtype) for k, v in state(folder).items()}
    torch.save(want, folder / PATH)
    loaded = load(folder, dtype="float32")
    assert all(torch.equal(p, want[name].float()) for name, p in loaded.named_parameters())


def test_what_transformers_wrote_and_a_sharded_pickle(tmp_path, checkpoint):
    from safetensors.torch import load_file

    want = load_file(checkpoint / "model.safetensors")
    names = sorted(want)
    for i, part in enumerate((names[::2], names[1::2])):
        torch.save({n: want[n] for n in part}, tmp_path / f"pytorch_model-{i}.bin")
    index = {n: f"pytorch_model-{i}.bin" for i, part in enumerate((names[::2], names[1::2])) for n in part}
    (tmp_path / f"{PATH}.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    loaded = load(tmp_path)
    assert all(torch.equal(p, want[n]) for n, p in loaded.named_parameters())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["value", "key", "alone"])
def test_29_a_pickle_that_would_run_code_is_refused_and_runs_nothing(folder, protocol, place):
    ran = folder / "ran"
    evil = {"value": {"x": Evil(ran)}, "key": {Evil(ran): 1}, "alone": Evil(ran)}[place]
    put_pickle(folder, pickle.dumps(evil, protocol))
    refused(folder, "system", "was not loaded", kind=UnsafeCheckpointError)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["builtins eval", "builtins getattr", "torch load", "torch._utils _rebuild_sparse_tensor"])
def test_29_no_name_beyond_those_of_a_state_dict_is_known(folder, name):
    put_pickle(folder, b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")
    refused(folder, name.replace(" ", "."), kind=UnsafeCheckpointError)


class Claim:
    """Pickled as a tensor of any shape over a storage '0' of any size."""

    def __init__(self, shape, strides, numel):
        self.shape, self.strides, self.numel = shape, strides, numel


class ClaimPickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", value[1]) if type(value) is tuple and value[:1] == ("!",) else None

    def reducer_override(self, value):
        if not isinstance(value, Claim):
            return NotImplemented
        arguments = (("!", value.numel), 0, value.shape, value.strides, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def claim(folder, shape, strides, numel):
    """An archive with one float, and a tensor that claims this shape over a storage of `numel` floats."""
    torch.save({"transformer.wte.weight": torch.zeros(1)}, folder / PATH)
    out = io.BytesIO()
    ClaimPickler(out, 2).dump({"transformer.wte.weight": Claim(shape, strides, numel)})
    assert any(opcode.name == "BINPERSID" for opcode, _, _ in pickletools.genops(out.getvalue()))
    put_pickle(folder, out.getvalue())


@pytest.mark.parametrize(
    ("shape", "strides", "numel", "words"),
    [
        ((2**34,), (0,), 1, "reaches beyond the 1 elements of its storage, or repeats them"),
        ((2**20, 2**20), (2**20, 1), 1, "reaches beyond"),
        ((2,), (1,), 1, "reaches beyond"),
        ((4,), (1,), 4, "its storage '0' of 4 x 4 bytes has 4 bytes"),
        ((1,), (1,), 2**40, f"its storage '0' of {2**40} x 4 bytes has 4 bytes"),
        ((-1,), (1,), 1, "in a way that torch.save does not"),
        ((1,), (-1,), 1, "in a way that torch.save does not"),
        ((1, 1), (1,), 1, "in a way that torch.save does not"),
        ((2**64,), (0,), 1, "in a way that torch.save does not"),
    ],
)
def test_30_a_tensor_of_more_than_its_bytes_is_refused_before_it_is_made(folder, shape, strides, numel, words):
    claim(folder, shape, strides, numel)
    refused(folder, words, "transformer.wte.weight" if "way" not in words else "", kind=UnsafeCheckpointError)


def test_30_a_storage_that_is_missing_from_the_archive(folder):
    rewrite(folder, skip=("data/0",))
    refused(folder, "its storage '0'", "is missing", kind=UnsafeCheckpointError)


def test_30_a_deflated_archive_is_refused(folder):
    rewrite(folder, compression=zipfile.ZIP_DEFLATED)
    refused(folder, "is compressed", "may unpack to any size", kind=UnsafeCheckpointError)


def test_30_torchscript_is_refused(folder):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / PATH)
    refused(folder, "TorchScript program", "model.state_dict()", kind=UnsafeCheckpointError)


def test_30_a_file_of_torch_before_1_6_is_refused_with_the_way_out(folder):
    torch.save(state(folder), folder / PATH, _use_new_zipfile_serialization=False)
    refused(folder, "this is a pickle", "torch before 1.6", "torch.save(torch.load(path, weights_only=True), path)")


def test_30_an_empty_file_is_refused(folder):
    (folder / PATH).write_bytes(b"")
    refused(folder, "has 0 bytes", "interrupted download?")


def test_30_a_sparse_file_of_4_tib_is_refused_at_once(folder):
    with (folder / PATH).open("r+b") as file:
        file.truncate(2**42)
    refused(folder, "without its end")
    with (folder / PATH).open("wb") as file:
        file.truncate(2**42)
    refused(folder, "it begins with zeros")


def test_30_a_directory_that_claims_a_terabyte_is_not_read(folder):
    with (folder / PATH).open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**41)
        file.seek(2**41)
        file.write(b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, 2**40, 4))
        file.write(b"PK\x06\x07" + struct.pack("<IQI", 0, 2**41, 1))
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    refused(folder, f"would have {2**40} bytes", kind=UnsafeCheckpointError)


def test_members_with_sizes_of_64_bits_are_read_as_others(folder):
    want = state(folder)
    with zipfile.ZipFile(folder / PATH) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(folder / PATH, "w") as new:
        for name, data in members:
            with new.open(name, "w", force_zip64=True) as file:
                file.write(data)
    loaded = load(folder)
    assert all(torch.equal(p, want[name]) for name, p in loaded.named_parameters())


def directory(data):
    """(byte of the first entry, byte of the end record) of an archive without zip64 records."""
    end = data.rindex(b"PK\x05\x06")
    return struct.unpack_from("<I", data, end + 16)[0], end


@pytest.mark.parametrize("place", [5, 2**31, 2**32 - 2, "size"])
def test_30_a_member_outside_the_file_or_where_no_member_begins_is_refused(folder, place):
    rewrite(folder)
    data = bytearray((folder / PATH).read_bytes())
    first, _ = directory(data)
    struct.pack_into("<I", data, first + 42, len(data) if place == "size" else place)
    (folder / PATH).write_bytes(data)
    refused(folder, "does not lie within", kind=UnsafeCheckpointError)


def test_30_a_member_longer_than_the_file_is_refused(folder):
    rewrite(folder)
    data = bytearray((folder / PATH).read_bytes())
    struct.pack_into("<II", data, directory(data)[0] + 20, len(data), len(data))
    (folder / PATH).write_bytes(data)
    refused(folder, f"of {len(data)} bytes does not lie within", kind=UnsafeCheckpointError)


def test_30_a_directory_of_half_a_million_members_is_not_read(folder):
    rewrite(folder)
    data = (folder / PATH).read_bytes()
    first, end = directory(data)
    entries = data[first:end]
    again = entries * (500_000 // entries.count(b"PK\x01\x02"))
    record = bytearray(data[end:])
    struct.pack_into("<HHI", record, 8, 65535, 65535, len(again))
    (folder / PATH).write_bytes(data[:first] + again + record)
    refused(folder, f"would have {len(again)} bytes, of at most {8 << 20}", kind=UnsafeCheckpointError)


@pytest.mark.parametrize("change", [b"\xff\xfe", "version"], ids=["name", "version"])
def test_30_a_directory_that_zipfile_cannot_read_is_told_as_damage(folder, change):
    rewrite(folder)
    data = bytearray((folder / PATH).read_bytes())
    first, _ = directory(data)
    if change == "version":
        data[first + 6] = 99  # version needed to extract
    else:
        struct.pack_into("<H", data, first + 8, 0x800)  # its name is UTF-8, and then is not
        data[first + 46 : first + 48] = change
    (folder / PATH).write_bytes(data)
    refused(folder, "damaged", "fetch it again")


@pytest.mark.parametrize("cut", [1, 22, 100, 3000])
def test_30_a_cut_archive_is_refused(folder, cut):
    data = (folder / PATH).read_bytes()
    (folder / PATH).write_bytes(data[:-cut])
    refused(folder, "without its end" if cut >= 22 else "zip archive", folder)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"\x80\x02}q\x00", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02e.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02]q\x00.", "holds a list, not a dict"),
        (b"\x80\x02}K\x01K\x02s.", "has a int as a name"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x02s.", "entry 'a' is a int, not a tensor"),
        (b"\x80\x02}X\x01\x00\x00\x00a}s.", "entry 'a' is a dict, not a tensor"),
        (b"\x80\x02\x8a\xff" + bytes(255) + b".", "holds a int"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x80\x022.", "opcode DUP"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "is too"),
    ],
    ids=range(15),
)
def test_30_pickles_that_are_damaged_or_hold_something_else(folder, data, words):
    put_pickle(folder, data)
    if words == "is too":  # a memo at index 2^32 - 1 costs nothing here; the dict is empty
        refused(folder, "no tensor for")
    else:
        refused(folder, words)


def test_30_tuples_that_hold_each_other_two_to_the_sixty_times_are_no_bomb(folder):
    tuples = b")" + b"q\x00h\x00\x86" * 60
    put_pickle(folder, b"\x80\x02}" + tuples + b"K\x01s.")
    refused(folder, "has a tuple as a name")
    put_pickle(folder, b"\x80\x04" + tuples + b"h\x00\x93.")
    refused(folder, "damaged")
    put_pickle(folder, b"\x80\x02" + tuples + b"Q.")
    refused(folder, "names a storage", kind=UnsafeCheckpointError)


def test_a_member_that_stands_twice_is_refused(folder):
    with zipfile.ZipFile(folder / PATH, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr(file.namelist()[0], b"x")
    refused(folder, "stands twice", kind=UnsafeCheckpointError)


def test_a_checkpoint_of_a_training_says_what_to_save(folder):
    torch.save({"model": state(folder), "epoch": 3}, folder / PATH)
    refused(folder, "entry 'model' is a dict", "save model.state_dict() alone")


def test_19_a_pickle_is_checked_for_values_that_are_not_finite(folder):
    want = state(folder)
    want["transformer.wpe.weight"][3, 3] = float("nan")
    want["transformer.wte.weight"] = want["transformer.wte.weight"].t().contiguous().t()
    torch.save(want, folder / PATH)
    refused(folder, "'transformer.wpe.weight' holds nan")
    want["transformer.wpe.weight"][3, 3] = 0
    want["transformer.wte.weight"][3, 3] = float("inf")
    torch.save(want, folder / PATH)
    refused(folder, "'transformer.wte.weight' holds inf", f"at element {3 * 32 + 3}")
