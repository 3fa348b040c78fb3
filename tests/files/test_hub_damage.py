"""Downloads and caches that are damaged, broken off or written by two at once: nothing false is kept, and each is healed."""

import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest

import gptneo_fast
from gptneo_fast.errors import CheckpointError, GPTNeoFastError, SetupError
from gptneo_fast.files import repository
from gptneo_fast.files.hub import Source
from tests.support.hub_cache import NAME, Causal, blobs, left, load, refused, same, snapshot
from tests.support.hub_server import etag_of


def flipped(data):
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def page(data):
    return b"<html>Please log in</html>".ljust(len(data))


def shorter(data):
    return data[:-4]


def longer(data):
    return data + b"more"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", [flipped, page, shorter, longer])
def test_a_file_that_arrives_damaged_is_not_kept_and_the_next_one_is(hub, published, checkpoint, tmp_path, name, damage):
    published.sent[name] = damage(published.files[name])
    refused(GPTNeoFastError, repr(name), NAME, hub.address)
    assert not left(tmp_path) and not (snapshot(tmp_path) / name).exists()
    published.sent.clear()
    assert same(load(), checkpoint) and load().tokenizer is not None


def test_a_large_file_that_lies_elsewhere_is_held_to_what_the_hub_says_and_its_host_gets_no_token(hub, large, tmp_path):
    large.elsewhere = True
    large.sent["model.safetensors"] = flipped(large.files["model.safetensors"])
    refused(CheckpointError, "'model.safetensors'", "arrived damaged", token="hf_SECRET")
    large.sent.clear()
    assert same(Causal.from_pretrained(NAME, token="hf_SECRET"), tmp_path / "made")
    tokens = {path.split("/")[1] == "elsewhere": token for _, path, token in hub.log}
    assert tokens == {True: None, False: "Bearer hf_SECRET"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damage_that_leaves_the_size_is_told_as_such(hub, large, tmp_path, name):
    large.sent[name] = flipped(large.files[name])
    size, etag = len(large.files[name]), etag_of(large.files[name])
    refused(
        CheckpointError, f"'{name}' of '{NAME}' arrived damaged: its {size} bytes", f"the hash {etag}", "nothing of it is kept"
    )


def test_a_hub_that_does_not_tell_the_size_changes_nothing(hub, published, checkpoint, monkeypatch, tmp_path):
    send = BaseHTTPRequestHandler.send_header
    monkeypatch.setattr(
        BaseHTTPRequestHandler,
        "send_header",
        lambda s, k, v: None if k == "Content-Length" and s.command == "HEAD" else send(s, k, v),
    )
    published.sent["model.safetensors"] = published.files["model.safetensors"][:-4]
    refused(CheckpointError, "arrived damaged")
    published.sent.clear()
    assert same(load(), checkpoint)


def test_a_download_that_breaks_off_leaves_nothing(hub, large, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))  # between attempts
    large.cut = {"model.safetensors": 50_000}
    refused(SetupError, "model.safetensors", hub.address)
    assert not left(tmp_path)
    large.cut.clear()
    assert same(Causal.from_pretrained(NAME), tmp_path / "made")


@pytest.mark.parametrize("dripping", ["HEAD", "GET", "body"])
def test_a_hub_that_drips_is_given_up(hub, published, checkpoint, monkeypatch, tmp_path, dripping):
    monkeypatch.setattr(repository, "ANSWER", 0.5)
    monkeypatch.setattr(repository, "SILENCE", 0.5)
    published.dripping = dripping
    began = time.perf_counter()
    refused(GPTNeoFastError, f"the hub {hub.address} fell silent for 0 seconds")
    assert time.perf_counter() - began < 20 and not left(tmp_path)
    published.dripping = ""
    assert same(load(), checkpoint)
    published.dripping = dripping
    assert same(load(), checkpoint)


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "page"])
def test_34_what_was_left_over_is_neither_followed_nor_opened_nor_believed(hub, published, checkpoint, tmp_path, kind):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    blobs(tmp_path).mkdir(parents=True)
    snapshot(tmp_path).mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        etag = etag_of(published.files[name])
        for place in (blobs(tmp_path) / etag, blobs(tmp_path) / f"{etag}.incomplete", snapshot(tmp_path) / name):
            if kind == "fifo" and place.parent != snapshot(tmp_path):
                os.mkfifo(place)
            elif kind == "page" and place.parent != snapshot(tmp_path):
                place.write_bytes(b"<html>")
            elif kind == "dangling" or (kind == "link" and place.parent != snapshot(tmp_path)):
                place.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    assert same(load(), checkpoint)
    assert outside.read_bytes() == b"mine" and not (tmp_path / "nowhere").exists()


LOADER = """
import sys, hashlib
from gptneo_fast.files.hub import Source
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 100_000
path = Source.of(sys.argv[1]).file("model.safetensors")
print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def start(hub, tmp_path, *command):
    env = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache")}
    env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "300", "HF_HUB_ETAG_TIMEOUT": "300"}  # on a machine as busy as it likes
    command = command or (sys.executable, "-c", LOADER, NAME)
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_34_two_processes_at_once_fetch_once_and_one_killed_does_not_hold_up_the_other(hub, large, tmp_path):
    data = large.files["model.safetensors"]
    large.held_at = 4 << 20
    first = start(hub, tmp_path)
    deadline = time.time() + 240
    while not any(p.stat().st_size >= 2 << 20 for p in blobs(tmp_path).rglob("*.incomplete")):
        assert time.time() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = start(hub, tmp_path)
    while len(hub.requests("HEAD", "model.safetensors")) < 3:  # it stands before the lock, which the first has passed
        assert time.time() < deadline and second.poll() is None, second.communicate()
        time.sleep(0.05)
    time.sleep(0.5)
    assert len(hub.requests("GET", "model.safetensors")) == 1
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    large.gate.set()
    out, err = second.communicate(timeout=240)
    assert out.strip() == etag_of(data), err
    assert len(hub.requests("GET", "model.safetensors")) == 2


def test_34_what_a_killed_process_left_is_cleared_away_once_it_is_old(hub, large, tmp_path):
    for name, age in (("old", 2 * repository.STALE), ("new", 0)):
        folder = blobs(tmp_path) / f".gptneo_fast-{name}"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "part.incomplete").write_bytes(b"x")
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (time.time() - age,) * 2)
    Causal.from_pretrained(NAME)
    assert [p.name for p in blobs(tmp_path).glob(".*")] == [".gptneo_fast-new"]


def test_34_two_writers_where_locks_do_nothing_do_not_meet(hub, large, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.WeakFileLock", lambda *_, **__: nullcontext())
    large.held_at = 4 << 20
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(Source.of(NAME).file, "model.safetensors") for _ in range(2)]
        deadline = time.time() + 60
        while len(hub.requests("GET", "model.safetensors")) < 2:
            assert time.time() < deadline
            time.sleep(0.02)
        large.gate.set()
        assert all(f.result().read_bytes() == large.files["model.safetensors"] for f in found)
    assert not left(tmp_path)


def test_where_links_are_not_supported_the_file_itself_stands_in_the_snapshot(
    hub, published, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda folder: False)
    assert same(load(), checkpoint) and same(load(force_download=True), checkpoint)
    assert not (snapshot(tmp_path) / "model.safetensors").is_symlink() and not list(blobs(tmp_path).iterdir())


DAMAGES = {  # to a file of the cache, each seen when it is read
    "model.safetensors": shorter,
    "tokenizer.json": shorter,
    "config.json": lambda data: data.replace(b"gpt_neo", b"gpt_nep"),
    "generation_config.json": shorter,
}


@pytest.fixture(params=DAMAGES)
def spoiled(request, hub, published, tmp_path):
    """A cache with one damaged file; its name, and the message."""
    load()
    path = snapshot(tmp_path) / request.param
    path.resolve().write_bytes(DAMAGES[request.param](path.read_bytes()))
    words = f"The cache's {request.param} is not what the hub sent: pass force_download=True, or run: hf download {NAME}"
    return request.param, str(refused(GPTNeoFastError, path, words, cache_dir=str(tmp_path / "cache")))


def test_a_damaged_cache_is_healed_by_force_download(spoiled, checkpoint):
    assert same(load(force_download=True), checkpoint) and same(load(), checkpoint)


@pytest.mark.parametrize("spoiled", ["model.safetensors"], indirect=True)
def test_a_damaged_cache_is_healed_by_the_command_that_the_error_names(hub, spoiled, checkpoint, tmp_path):
    program, *arguments = shlex.split(spoiled[1].split("or run: ")[1])
    assert arguments[-1] == str(tmp_path / "cache")
    process = start(hub, tmp_path, str(Path(sys.executable).parent / program), *arguments)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert same(load(), checkpoint)


def test_a_damaged_cache_is_healed_by_deleting_the_file_and_fetching_it_again(spoiled, checkpoint, tmp_path):
    (snapshot(tmp_path) / spoiled[0]).unlink()
    assert same(load(), checkpoint)


def test_a_fault_that_the_hub_sent_is_not_blamed_on_the_cache(hub, published):
    published.files["model.safetensors"] = published.files["model.safetensors"][:-4]
    assert "force_download" not in str(refused(CheckpointError, "4 fewer"))


def test_force_download_fetches_every_file_that_is_needed_once(hub, published):
    load()
    first = sorted(p.split("/")[-1] for p in hub.requests("GET"))
    hub.log.clear()
    load(force_download=True)
    assert sorted(p.split("/")[-1] for p in hub.requests("GET")) == first and len(set(first)) == len(first)
    hub.log.clear()
    gptneo_fast.GPT2Tokenizer.from_pretrained(NAME, force_download=True)
    assert hub.requests("GET", "tokenizer.json")


def test_force_download_is_not_taken_for_granted_without_the_hub(hub, published):
    load()
    refused(SetupError, "force_download=True", "local_files_only=True", local_files_only=True, force_download=True)
    hub.close()
    refused(SetupError, "force_download=True", "cannot be reached", force_download=True)
