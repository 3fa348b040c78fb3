"""`gptneo-fast score`: a line of scores for each line of text, in blocks, resumable."""

import io
import json
import sys

import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.tools import cli, lines

TEXTS = ["Once upon a time there was a dog.", "", "The", "He said \u00e9\u2028 and ran.", "One day " * 40]
SCORE = ["score", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def model():
    return gptneo_fast.load(FOLDER, dtype=torch.float32)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def test_each_line_has_its_scores_in_order(texts, model, capsys):
    assert cli.main([*SCORE, str(texts), "--want", "logprob", "rank"]) == 0
    found = rows(capsys.readouterr().out)
    for number, (text, row) in enumerate(zip(TEXTS, found, strict=True), 1):
        score = model.score(text, want=("logprob", "rank"))
        assert row["line"] == number and row["tokens"] == len(score.tokens)
        assert row["logprob"] == pytest.approx(score.total, abs=1e-3)
        assert row["logprobs"] == pytest.approx(score.logprob.tolist(), abs=1e-4) and row["ranks"] == score.rank.tolist()


def test_json_lines_with_contexts_and_lines_that_cannot_be_scored(tmp_path, model, capsys):
    given = [
        {"text": " a time", "context": "Once upon"},
        " plain",
        {"text": 3},
        {"text": " a dog", "context": "Once upon"},
        {"text": " x" * 600},
        {"text": "y", "context": ""},
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in given) + "{broken\n")
    assert cli.main([*SCORE, str(path), "--jsonl"]) == 1
    found = rows(capsys.readouterr().out)
    assert [row["line"] for row in found] == list(range(1, 8))
    assert found[0]["logprob"] == pytest.approx(model.score(" a time", "Once upon").total, abs=1e-3)
    assert found[3]["logprob"] == pytest.approx(model.score(" a dog", "Once upon").total, abs=1e-3)
    assert found[5]["logprob"] == pytest.approx(model.score("y", "").total, abs=1e-3)
    assert "neither a string nor an object" in found[2]["error"] and "is not JSON" in found[6]["error"]
    assert "the text has" in found[4]["error"] and "scores up to 513" in found[4]["error"]


def test_a_run_that_was_cut_off_goes_on_behind_its_last_whole_line(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK", 2)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert cli.main([*SCORE, str(texts), "-o", str(whole)]) == 0
    begun = whole.read_text().splitlines(keepends=True)
    out.write_text("".join(begun[:3]) + begun[3][:9])
    assert cli.main([*SCORE, str(texts), "-o", str(out), "--resume"]) == 0
    got, want = rows(out.read_text()), rows(whole.read_text())
    assert [row["line"] for row in got] == [1, 2, 3, 4, 5]
    assert [row["logprob"] for row in got] == pytest.approx([row["logprob"] for row in want], abs=1e-3)


def test_standard_input_and_a_first_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS)))
    assert cli.main([*SCORE, "-", "--from-line", "4"]) == 0
    assert [row["line"] for row in rows(capsys.readouterr().out)] == [4, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such/file"], "no/such/file cannot be read: No such file"),
        (["-", "--resume"], "name it with --output"),
        (["-", "--from-line", "0"], "--from-line 0 is no line"),
        (["-", "--want", "ranks"], "did you mean 'rank'"),
    ],
)
def test_what_cannot_be_done_is_said(words, message, capsys):
    assert cli.main([*SCORE, *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["my notes\n", "my notes"])
def test_a_file_of_something_else_is_left_alone(texts, tmp_path, capsys, text):
    other = tmp_path / "notes.txt"
    other.write_text(text)
    assert cli.main([*SCORE, str(texts), "-o", str(other), "--resume"]) == 1
    assert "no result of `score`" in capsys.readouterr().err and other.read_text() == text
