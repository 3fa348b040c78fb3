"""The fuzzer sees each kind of failure, makes the same case again, and finds none in a few seconds of cases."""

import random
import sys
import time

import pytest

from gptneo_fast.errors import CheckpointError
from tests.support import fuzz_loaders


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return fuzz_loaders.corpora(tmp_path_factory.mktemp("good"))


def spin():
    while True:
        time.monotonic()


def hoard():
    bytearray(fuzz_loaders.GROWTH + (8 << 20))


def bare():
    raise KeyError("type")


def unprintable():
    raise CheckpointError("tensor '\0' is odd")


def refuse():
    raise CheckpointError("tensor 'x' is odd")


@pytest.mark.parametrize(
    ("loader", "outcome", "detail"),
    [
        (spin, "FAILED", "2.0 s of processor time"),
        (hoard, "FAILED", "MB of memory, of at most 256"),
        (bare, "FAILED", "bare KeyError"),
        (unprintable, "FAILED", "characters that are not printed"),
        (refuse, "refused", "CheckpointError"),
        (lambda: None, "accepted", ""),
    ],
)
def test_each_kind_of_failure_is_seen(loader, outcome, detail):
    found = fuzz_loaders.judge(loader)
    assert found[0] == outcome and detail in found[1]


def test_a_crash_of_the_process_is_seen_and_the_next_case_is_tried(tmp_path, monkeypatch):
    """A child that dies in its second case, as one would whose loader has a segmentation fault."""
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, signal, sys\n"
        "seed, number = map(int, sys.argv[2].split(':'))\n"
        "for n in range(number, 6):\n"
        "    print(json.dumps({'case': f'{seed}:{n}', 'what': 'x'}), flush=True)\n"
        "    if n == 1: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    print(json.dumps({'outcome': 'accepted', 'detail': ''}), flush=True)\n"
        "import time; time.sleep(float(sys.argv[4]))\n"
    )
    monkeypatch.setattr(fuzz_loaders, "__file__", str(child))
    counts, failures = fuzz_loaders.supervise(5, 2.0)
    assert counts["x", "accepted", ""] == 5
    (failure,) = failures
    assert failure.startswith("5:1 (x): the process died, -11")


def test_a_case_is_made_from_its_seed_and_number_alone(good, tmp_path):
    def contents(folder):
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    for number in range(12):
        one, two = (fuzz_loaders.Case(good, tmp_path / name, 3, number) for name in "ab")
        assert one.what == two.what and contents(one.work) == contents(two.work)
    assert contents(tmp_path / "a") != contents(good[one.kind])


def test_an_edit_of_json_changes_no_value_that_later_cases_take():
    """An ancestor set into a shared list made a circle, and a case depended on the cases before it."""
    import json

    before = json.dumps(fuzz_loaders.VALUES)
    data = json.dumps({"a": [1, 2, {"b": [1]}], "c": {"d": {"e": 2}}}).encode()
    for seed in range(3000):
        fuzz_loaders.damage_json(random.Random(seed), data)
    assert json.dumps(fuzz_loaders.VALUES) == before


def test_damaged_containers_are_right_on_the_outside(good):
    """Else every case would end at the first check."""
    import io
    import json
    import zipfile

    data = (good["safetensors"] / "model.safetensors").read_bytes()
    archive = (good["pickle"] / "pytorch_model.bin").read_bytes()
    for seed in range(20):
        damaged = fuzz_loaders.damage_safetensors(random.Random(seed), data)
        json.loads(damaged[8 : 8 + int.from_bytes(damaged[:8], "little")])
        assert zipfile.ZipFile(io.BytesIO(fuzz_loaders.damage_archive(random.Random(seed), archive))).testzip() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_few_hundred_cases_find_nothing(good, tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(300):
            case = fuzz_loaders.Case(good, tmp_path / "case", 20261124, number)
            outcome, detail = fuzz_loaders.judge(lambda case=case: fuzz_loaders.load(case.kind, case.work))
            assert outcome != "FAILED", f"{case.name} ({case.what}): {detail}"
