"""Saves are whole or leave no trace: whatever fails, at whichever call or byte, what was there is there byte for byte."""

import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import CheckpointError, ConfigError, InputError, TokenizerError
from gptneo_fast.files import atomic
from tests.support.peers import SMALL

Causal = gptneo_fast.GPTNeoForCausalLM


def config(**changes):
    return gptneo_fast.GPTNeoConfig(**(SMALL | {"vocab_size": 50, "max_position_embeddings": 64} | changes))


def tokenizer(*tokens):
    made = gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER)
    made.add_tokens(list(tokens))
    return made


def flax_model():
    pytest.importorskip("jax")
    pytest.importorskip("flax")
    from gptneo_fast.flax import FlaxGPTNeoForCausalLM

    return FlaxGPTNeoForCausalLM(config())


def generation(**options):
    return gptneo_fast.GenerationConfig(**options)


SHARDS = {"max_shard_size": "20KB"}
SAVES = {  # kind -> (what saves first, what saves over it), and the error of a failure
    "one file over one": (lambda f: Causal(config()).save_pretrained(f), lambda f: Causal(config()).save_pretrained(f)),
    "one file over shards": (
        lambda f: Causal(config()).save_pretrained(f, **SHARDS),
        lambda f: Causal(config()).save_pretrained(f),
    ),
    "shards over one file": (
        lambda f: Causal(config()).save_pretrained(f),
        lambda f: Causal(config()).save_pretrained(f, **SHARDS),
    ),
    "config": (lambda f: config().save_pretrained(f), lambda f: config(window_size=8).save_pretrained(f)),
    "generation config": (
        lambda f: generation(do_sample=True, top_k=3).save_pretrained(f),
        lambda f: generation(do_sample=True, top_k=4).save_pretrained(f),
    ),
    "tokenizer": (
        lambda f: tokenizer().save_pretrained(f, legacy_format=True),
        lambda f: tokenizer("<a>").save_pretrained(f, legacy_format=True),
    ),
    "vocabulary": (lambda f: (f / "vocab.json").write_text("{}"), lambda f: tokenizer().save_vocabulary(f)),
    "flax": (lambda f: flax_model().save_pretrained(f, **SHARDS), lambda f: flax_model().save_pretrained(f)),
    "flax shards": (lambda f: config().save_pretrained(f), lambda f: flax_model().save_pretrained(f, **SHARDS)),
    "flax as safetensors": (
        lambda f: config().save_pretrained(f),
        lambda f: flax_model().save_pretrained(f, safe_serialization=True),
    ),
}
ERRORS = {"config": ConfigError, "generation config": ConfigError, "tokenizer": TokenizerError, "vocabulary": TokenizerError}


def contents(folder):
    """Every file below a folder, hidden ones too, and every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@contextmanager
def failing(target, name, at, error=None, times=1):
    """The calls of a function numbered `at` to `at + times - 1` fail; yields the list of the calls made."""
    real, calls = getattr(target, name), []

    def stand_in(*args, **options):
        calls.append(args)
        if at <= len(calls) < at + times:
            raise error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, stand_in)
        yield calls


@contextmanager
def room(size):
    """No file may grow beyond `size` bytes: writes fail inside the system, also those of libraries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=SAVES)
def saved(request, tmp_path):
    """(kind, folder as the first save left it, what saves over it)."""
    torch.manual_seed(1)
    first, second = SAVES[request.param]
    folder = tmp_path / "saved"
    folder.mkdir()
    first(folder)
    (folder / "notes.txt").write_text("of the user")
    torch.manual_seed(2)
    return request.param, folder, second


def refuse(kind, save, folder, *words):
    with pytest.raises(ERRORS.get(kind, CheckpointError)) as caught:
        save(folder)
    for word in (folder, *words):
        assert str(word) in str(caught.value), (word, str(caught.value))
    assert atomic._PREFIX not in str(caught.value)


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    """Whether the file system has hard links."""
    if request.param == "no links":
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "no hard links")))
    return request.param == "links"


def fails_at_each_call(target, name, kind, folder, save):
    """A save whose every call of a function fails in turn, until there is none of that number and it succeeds."""
    before = contents(folder)
    for at in range(1, 99):
        with failing(target, name, at) as calls:
            try:
                save(folder)
                break
            except ERRORS.get(kind, CheckpointError) as error:
                told = str(error)
        assert "No space left on device" in told and "free some space" in told
        assert len(calls) >= at and contents(folder) == before, at
    assert at > 1 and len(calls) == at - 1 and contents(folder) != before


@pytest.mark.parametrize(("target", "name"), [(os, "fsync"), (atomic.tempfile, "mkdtemp")])
def test_a_disk_that_is_full_before_the_files_move_changes_nothing(saved, target, name):
    fails_at_each_call(target, name, *saved)


def test_a_disk_that_is_full_while_the_files_move_changes_nothing(saved, links):
    fails_at_each_call(os, "replace", *saved)


def test_a_shard_of_before_that_cannot_be_removed_brings_them_all_back(tmp_path, links):
    save = Causal(config()).save_pretrained
    save(tmp_path, **SHARDS)
    before = contents(tmp_path)
    stale = sum(name.startswith("model") for name in before)
    assert stale > 3
    for at in (1, 2, stale):
        with failing(os, "unlink", at), pytest.raises(CheckpointError, match="No space left on device"):
            save(tmp_path)
        assert contents(tmp_path) == before, at


def test_a_file_that_cannot_grow_at_any_byte_changes_nothing(saved, tmp_path):
    kind, folder, save = saved
    before = contents(folder)
    (tmp_path / "whole").mkdir()
    save(tmp_path / "whole")
    sizes = {len(data) for data in contents(tmp_path / "whole").values()}
    for size in sorted({0, 1, 50, *(n // 2 for n in sizes), max(sizes) - 1}):
        if size < max(sizes):
            with room(size):
                refuse(kind, save, folder, "File too large")
            assert contents(folder) == before, size
    save(folder)
    assert contents(folder) != before and "notes.txt" in contents(folder)


def test_what_is_saved_over_something_is_what_is_saved_alone(saved, tmp_path):
    _, folder, save = saved
    torch.manual_seed(3)
    save(folder)
    (tmp_path / "alone").mkdir()
    torch.manual_seed(3)
    save(tmp_path / "alone")
    alone = contents(tmp_path / "alone")
    assert alone.items() <= contents(folder).items()
    assert not any("-of-" in name or "index" in name for name in contents(folder).keys() - alone.keys())


def test_an_interrupt_between_two_names_brings_the_old_files_back(tmp_path, links):
    atomic.write(tmp_path, {"a": "1", "b": "1"}, ConfigError)
    for at in (1, 2, 3) if links else (1, 2, 3, 4, 5):
        with failing(os, "replace", at, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            atomic.write(tmp_path, {"a": "2", "b": "2", "c": "2"}, ConfigError)
        assert contents(tmp_path) == {"a": b"1", "b": b"1"}, at


def test_no_name_stands_empty_while_files_change(tmp_path, monkeypatch):
    atomic.write(tmp_path, {"a": "1", "b": "1"}, ConfigError)
    replace, seen = os.replace, []

    def look(source, target):
        seen.append(sorted(p.name for p in tmp_path.glob("[ab]")))
        replace(source, target)
        seen.append(sorted(p.name for p in tmp_path.glob("[ab]")))

    monkeypatch.setattr(os, "replace", look)
    atomic.write(tmp_path, {"a": "2", "b": "2"}, ConfigError)
    assert seen == [["a", "b"]] * 4 and contents(tmp_path) == {"a": b"2", "b": b"2"}


def test_what_cannot_be_put_back_is_kept_and_the_error_says_where(tmp_path):
    atomic.write(tmp_path, {"a": "1", "b": "1"}, ConfigError)
    with (
        failing(os, "replace", 2, times=99),
        pytest.raises(ConfigError, match="what was there and is no more stands in") as caught,
    ):
        atomic.write(tmp_path, {"a": "2", "b": "2"}, ConfigError)
    (kept,) = tmp_path.glob(f"{atomic._PREFIX}*/old")
    assert str(kept) in str(caught.value) and (kept / "a").read_text() == "1"
    assert (tmp_path / "b").read_text() == "1"


def test_a_folder_that_the_save_made_goes_with_it(saved, tmp_path):
    kind, _, save = saved
    with room(10):
        refuse(kind, save, tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()


def test_a_folder_in_the_way_is_named_and_left(saved):
    kind, folder, save = saved
    save(folder)
    name = next(n for n in sorted(contents(folder)) if n != "notes.txt")
    (folder / name).unlink()
    (folder / name / "inside").mkdir(parents=True)
    before = contents(folder)
    refuse(kind, save, folder, f"a folder has the name of a file ({name})", "remove that folder")
    assert contents(folder) == before


def test_a_file_in_the_place_of_the_folder_is_named_and_left(saved, tmp_path):
    kind, _, save = saved
    (tmp_path / "file").write_text("x")
    refuse(kind, save, tmp_path / "file", "is a file; give a folder")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(("code", "way_out"), [(errno.EROFS, "you may write to"), (errno.EACCES, "you may write to")])
def test_a_folder_that_may_not_be_written_to_is_named_with_the_way_out(tmp_path, code, way_out):
    error = OSError(code, os.strerror(code), str(tmp_path / ".saving-x"))
    with failing(atomic.tempfile, "mkdtemp", 1, error), pytest.raises(ConfigError) as caught:
        config().save_pretrained(tmp_path)
    assert str(caught.value) == (
        f"the files cannot be written to {tmp_path}: {os.strerror(code)}; give a folder that {way_out}"
    )


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    """The files of a snapshot in the hub's cache are links into it."""
    blob = tmp_path / "blob"
    blob.write_text("shared")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").symlink_to(blob)
    (folder / "a").symlink_to("nowhere")
    with failing(os, "replace", 2), pytest.raises(ConfigError):
        atomic.write(folder, {"config.json": "{}", "a": "x"}, ConfigError)
    assert all(p.is_symlink() for p in folder.iterdir()) and len(os.listdir(folder)) == 2
    atomic.write(folder, {"config.json": "{}", "a": "x"}, ConfigError)
    assert blob.read_text() == "shared" and contents(folder) == {"config.json": b"{}", "a": b"x"}
    assert not any(p.is_symlink() for p in folder.iterdir())


def test_a_folder_with_the_name_of_a_stale_shard_is_left(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").mkdir()
    Causal(config()).save_pretrained(tmp_path)
    assert (tmp_path / "model-00001-of-00002.safetensors").is_dir() and (tmp_path / "model.safetensors").is_file()


def test_the_files_have_the_mode_that_others_would_have(tmp_path):
    config().save_pretrained(tmp_path)
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "config.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_vocabulary_is_written_as_the_library_writes_it(tmp_path):
    made = tokenizer("<a>")
    theirs = made.backend_tokenizer.model.save(str(tmp_path), "theirs")
    ours = made.save_vocabulary(tmp_path, "ours")
    assert [Path(p).name for p in ours] == ["ours-vocab.json", "ours-merges.txt"]
    assert [Path(p).read_bytes() for p in ours] == [Path(p).read_bytes() for p in theirs]
    with pytest.raises(InputError, match=r"filename_prefix '\.\./x' names a folder"):
        made.save_vocabulary(tmp_path, "../x")
