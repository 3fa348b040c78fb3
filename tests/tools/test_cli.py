"""The command line: text, JSON, exit codes, interruption, start-up time."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gptneo_fast import __version__
from gptneo_fast.demo import FOLDER
from gptneo_fast.tools import cli

GENERATE = ["generate", "Once upon a time", "--device", "cpu"]


def test_generate_prints_the_prompt_and_its_continuation(capsys):
    assert cli.main([*GENERATE, "--seed", "0", "-n", "60"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Once upon a time")
    assert len(out.split()) > 20
    assert cli.main([*GENERATE, "--seed", "0", "-n", "60"]) == 0
    assert capsys.readouterr().out == out
    assert cli.main([*GENERATE, "--seed", "1", "-n", "60"]) == 0
    assert capsys.readouterr().out != out


def test_json_has_the_same_text(capsys):
    assert cli.main([*GENERATE, "--greedy", "-n", "20"]) == 0
    text = capsys.readouterr().out
    assert cli.main([*GENERATE, "--greedy", "-n", "20", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt"] + answer["text"] + "\n" == text
    assert answer["device"] == "cpu" and answer["dtype"] == "float16" and answer["seconds"] > 0


def test_temperature_0_is_greedy(capsys):
    texts = []
    for options in (["--greedy"], ["--temperature", "0"]):
        assert cli.main([*GENERATE, "-n", "20", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_dash_reads_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("One morning the little fox"))
    assert cli.main(["generate", "-", "--greedy", "-n", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("One morning the little fox")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*GENERATE, "--top-p", "1.5"], "top_p=1.5 is not a number from 0 to 1"),
        ([*GENERATE, "-n", "5000"], "past the model's 512 positions"),
        ([*GENERATE, "-m", "no/such/model/here"], "no/such/model/here"),
        ([*GENERATE, "--dtype", "int7"], "dtype 'int7' is unknown"),
        ([*GENERATE, "--backend", "triton", "--dtype", "bfloat16"], "backend='triton'"),
    ],
)
def test_a_request_that_fails_exits_1_and_says_why_on_stderr(argv, words, capsys):
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert words in err and err.startswith("gptneo-fast: ") and "Traceback" not in err
    assert words not in out


@pytest.mark.parametrize("argv", [[], ["generate"], ["write", "x"], [*GENERATE, "-n", "many"]])
def test_a_wrong_command_line_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_info_of_the_machine_says_why_a_backend_is_not_usable(capsys):
    assert cli.main(["info", "--json"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert machine["gptneo_fast"] == __version__
    assert "usable" in machine["backend reference"]
    assert machine["backend triton"]


def test_info_of_a_model_gives_its_sizes(capsys):
    assert cli.main(["info", str(FOLDER), "--device", "cpu", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    parameters = int(model["parameters"].replace(",", ""))
    assert parameters * 2 == int(model["bytes in float16"].replace(",", ""))
    assert model["cache bytes per token"].startswith(f"{2 * 4 * 256 * 2:,} ")
    assert cli.main(["info", str(FOLDER), "--device", "cpu"]) == 0
    assert "parameters" in capsys.readouterr().out


def command(*argv, **options):
    return subprocess.Popen([sys.executable, "-m", "gptneo_fast.tools.cli", *argv], text=True, **options)


def test_help_answers_without_torch_and_at_once():
    best = 9.0
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "gptneo_fast.tools.cli", "--help"], capture_output=True, text=True
        )
        best = min(best, time.perf_counter() - began)
        assert done.returncode == 0 and "exit codes" in done.stdout
        assert not any(line.endswith((" torch", " tokenizers", " numpy")) for line in done.stderr.splitlines())
    assert best < 0.3


def test_ctrl_c_ends_quietly_with_130():
    """Also where a shell's background, in which the tests run, ignores it."""
    for _ in range(9):
        process = command("generate", "Once upon a time", "-n", "480", "--seed", "0", "--device", "cpu",
                          "--backend", "reference",  # which takes seconds
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
        process.stdout.read(1)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if process.returncode:  # else it had ended before it could be interrupted, as on a busy machine
            break
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_error_worth_a_traceback():
    process = command("generate", "Once upon a time", "-n", "480", "--seed", "0", "--device", "cpu",
                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    process.stdout.read(20)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert "Traceback" not in process.stderr.read()


def run(*words, shell="", **environment):
    """A command with its streams as a shell would set them."""
    line = f"{sys.executable} -m gptneo_fast.tools.cli {' '.join(words)} {shell}"
    return subprocess.run(["sh", "-c", line], capture_output=True, env=os.environ | environment, timeout=120)


SHORT = ["--greedy", "-n", "4", "--device", "cpu"]


def test_characters_that_the_output_has_not_are_replaced_or_escaped():
    done = run("generate", "'für 🦊'", *SHORT, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith(b"f?r ?") and b"Traceback" not in done.stderr
    done = run("generate", "'für 🦊'", *SHORT, "--json", PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["prompt"] == "für 🦊"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("json", [[], ["--json"]], ids=str)
def test_a_full_disk_is_one_line_and_exit_code_1(json):
    done = run("generate", "Once", *SHORT, *json, shell="> /dev/full")
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1] == "gptneo-fast: the output cannot be written: No space left on device"
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_a_closed_output_is_nobody_who_reads():
    assert run("generate", "Once", *SHORT, shell=">&-").returncode == 0


@pytest.mark.parametrize(
    ("shell", "words"), [("<&-", "standard input is closed"), (r"< \"$BYTES\"", "standard input cannot be read as text")]
)
def test_an_input_that_is_no_text_is_one_line_and_exit_code_1(shell, words, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    done = run(
        "generate",
        "-",
        *SHORT,
        shell=shell.replace("\\", ""),
        BYTES=str(tmp_path / "bytes"),
        PYTHONUTF8="1",
        PYTHONIOENCODING="utf-8:strict",
    )
    assert done.returncode == 1 and words in done.stderr.decode() and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "how"), [([], ("int4", 64)), (["--to", "int8"], ("int8", 64)), (["--group", "32"], ("int4", 32))]
)
def test_quantize_writes_a_model_that_loads_as_it_was_made(options, how, tmp_path, capsys):
    import torch

    import gptneo_fast

    out = tmp_path / "small"
    assert cli.main(["quantize", str(FOLDER), str(out), "--device", "cpu", *options]) == 0
    assert f"{how[0]}, " in capsys.readouterr().out
    made, want = gptneo_fast.load(out, device="cpu"), gptneo_fast.load(FOLDER, device="cpu").quantize_(*how)
    assert all(map(torch.equal, made.state_dict().values(), want.state_dict().values()))
    assert made.tokenizer.encode("Once upon") == want.tokenizer.encode("Once upon")
    assert cli.main(["info", str(out), "--device", "cpu"]) == 0
    assert "bytes in int" in capsys.readouterr().out


def test_quantize_says_what_it_cannot_do(tmp_path, capsys):
    out, texts = str(tmp_path / "small"), tmp_path / "texts"
    texts.write_text("Once upon a time there was a fox.\n" * 3)
    for options, words in (
        (["--to", "int3"], "quantize='int3' is unknown"),
        (["--group", "48"], "group=48 is not offered"),
        (["--calibrate", "no/such/file"], "no/such/file cannot be read as text"),
        (["--quantize", "int8"], "say --to int8"),
    ):
        assert cli.main(["quantize", str(FOLDER), out, "--device", "cpu", *options]) == 1
        assert words in capsys.readouterr().err
    assert cli.main(["quantize", str(FOLDER), out, "--device", "cpu", "--calibrate", str(texts)]) == 0
    assert cli.main([*GENERATE, "-m", out, "-n", "3"]) == 0
    assert cli.main([*GENERATE, "-m", out, "-n", "3", "--quantize", "int8"]) == 1
    assert "in groups of 64 already" in capsys.readouterr().err
