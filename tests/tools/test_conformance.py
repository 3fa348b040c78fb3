"""`python -m gptneo_fast.tools.conformance`: right engines conform, wrong ones are told where."""

import json
import sys

import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import InputError, SetupError
from gptneo_fast.tools.conformance import ENGINES, NEW, check, main, random_model, table

WINDOW = 16
ME = __name__


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("random"), WINDOW, 96)


def reference(folder, **changes):
    return gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder, backend="reference", dtype=torch.float32, **changes).eval()


@torch.no_grad()
def logits(folder, ids, **changes):
    return reference(folder, **changes)(torch.tensor([ids])).logits[0]


# Engines, as a user would write them


def right(folder, ids):
    return logits(folder, ids).tolist()


def without_a_window(folder, ids):
    return logits(folder, ids, window_size=len(ids))


def one_key_too_few(folder, ids):
    return logits(folder, ids, window_size=WINDOW - 1)


def one_key_too_many(folder, ids):
    return logits(folder, ids, window_size=WINDOW + 1)


def not_a_number_at_five(folder, ids):
    found = logits(folder, ids)
    found[5, 7] = float("nan")
    return found


def one_short(folder, ids):
    return logits(folder, ids)[1:]


def greedy(folder, ids, **changes):
    model = reference(folder, **changes)
    out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return out[0, len(ids) :].numpy()


def greedy_without_a_window(folder, ids):
    return greedy(folder, ids, window_size=96)


def too_few(folder, ids):
    return greedy(folder, ids)[: NEW - 1]


def no_tensor(folder, ids):
    return "Once upon a time"


def test_ours_conforms(folder):
    found = check("gptneo_fast", folder)
    assert [f.case for f in found] == ["one pass", "steps", "padded steps"]
    for f in found:
        assert f.first_wrong is None and f.window == WINDOW
        assert 0 < f.before <= f.allowed and 0 < f.past <= f.allowed < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_eager_conforms(folder, dtype):
    pytest.importorskip("transformers")
    assert [f.first_wrong for f in check("transformers", folder, dtype=dtype)] == [None] * 3


def test_a_static_cache_longer_than_the_window_is_wrong_from_the_first_token(folder):
    """transformers 5.24 cuts the local mask where the cache ends, not where the text does: before the window, too."""
    transformers = pytest.importorskip("transformers")
    found = check("transformers-static-cache", folder)
    if all(f.first_wrong is None for f in found):
        pytest.skip(f"transformers {transformers.__version__} has mended its static cache")
    for f in found:
        assert f.first_wrong is not None and f.first_wrong <= WINDOW
        assert f.past > 1000 * f.allowed


def test_a_static_cache_is_right_for_a_model_without_local_layers(tmp_path):
    """So what it is judged wrong for is the window."""
    pytest.importorskip("transformers")
    model = gptneo_fast.GPTNeoForCausalLM.from_pretrained(random_model(tmp_path, WINDOW, 96))
    model.config.attention_layers = ["global"] * 3
    model.config.attention_types = [[["global"], 3]]
    model.save_pretrained(tmp_path)
    assert [f.first_wrong for f in check("transformers-static-cache", tmp_path)] == [None] * 3


def test_a_function_that_returns_logits(folder):
    (found,) = check(f"{ME}:right", folder)
    assert found.first_wrong is None and found.case == "one pass"
    (found,) = check(f"{ME}:not_a_number_at_five", folder)
    assert found.first_wrong == 5 and found.before != found.before and found.past <= found.allowed


def test_an_engine_without_the_window_is_wrong_from_the_first_position_past_it(folder):
    (found,) = check(f"{ME}:without_a_window", folder)
    assert found.first_wrong == WINDOW and found.before <= found.allowed < 1e-3 * found.past


def test_a_window_that_is_off_by_one_is_told_apart(folder):
    assert [check(f"{ME}:one_key_too_{n}", folder)[0].first_wrong for n in ("few", "many")] == [WINDOW - 1, WINDOW]


def test_a_function_that_returns_tokens(folder):
    after, across = check(f"{ME}:greedy", folder)
    assert after.first_wrong is across.first_wrong is None
    assert after.before is None and after.past <= after.allowed and across.before <= across.allowed
    after, across = check(f"{ME}:greedy_without_a_window", folder)
    assert after.first_wrong >= WINDOW and after.past > after.allowed
    assert across.first_wrong >= WINDOW - 1 and across.before <= across.allowed


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("transformer", "choose from " + ", ".join(ENGINES)),
        ("transformer", "did you mean 'transformers'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        (f"{ME}:no_such_function", "no_such_function"),
        (f"{ME}:WINDOW", "give a function"),
        (f"{ME}:one_short", "logits are"),
        (f"{ME}:too_few", f"at least {NEW}"),
        (f"{ME}:no_tensor", r"give logits \[T, V\] or tokens \[N\]"),
    ],
)
def test_what_is_no_engine_is_named(folder, name, says):
    with pytest.raises(InputError, match=says):
        check(name, folder)


def test_what_does_not_run_here_is_named(folder, monkeypatch):
    transformers = pytest.importorskip("transformers")
    if not transformers.GPTNeoForCausalLM._supports_sdpa:
        with pytest.raises(SetupError, match="does not run GPT-Neo by sdpa here"):
            check("transformers-sdpa", folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SetupError, match="pip install transformers"):
        check("transformers", folder)


def test_a_model_without_positions_past_its_window_is_refused(tmp_path):
    with pytest.raises(InputError, match="a window of 96 takes more than 112"):
        check("gptneo_fast", random_model(tmp_path, 96, 100))


def test_the_command(folder, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert main(["gptneo_fast", f"{ME}:right", "-m", str(folder), "--json", str(file)]) == 0
    assert capsys.readouterr().out.count("| none ") == 4
    found = json.loads(file.read_text())
    assert found["dtype"] == "float32" and [f["first_wrong"] for f in found["findings"]] == [None] * 4

    assert main([f"{ME}:without_a_window", f"{ME}:not_a_number_at_five", "-m", str(folder), "--json", str(file)]) == 1
    assert [f["first_wrong"] for f in json.loads(file.read_text())["findings"]] == [WINDOW, 5]
    assert json.loads(file.read_text())["findings"][1]["before"] is None

    assert main(["gptneo_fast", "vllm", "-m", str(folder)]) == 2
    assert main(["gptneo_fast", "-m", str(folder), "--json", str(tmp_path / "no" / "where")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_command_has_models_of_its_own_of_which_one_has_the_window_of_256(capsys):
    assert main([f"{ME}:without_a_window"]) == 1
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[2], row[4]) for row in rows[:2]] == [("random, window 16", "16"), ("random, window 256", "256")]
    assert rows[2][2] == "embedded, window 256" and int(rows[2][4]) >= 256


def test_a_table_says_where_nothing_was_measured(folder):
    assert table(check(f"{ME}:greedy", folder)).splitlines()[2].split("|")[5].strip() == "-"
