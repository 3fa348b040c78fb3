"""The command line: `gptneo-fast generate | score | eval | quantize | info | bench`. torch is imported once a command runs.

Exit codes: 0 done, 1 the request failed (the reason is on stderr), 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..errors import GPTNeoFastError, InputError, SetupError, nearest
from ..progress import shown

_WANT = ("logprob", "rank", "greedy", "entropy", "mean", "variance")  # as scoring.score has it, which imports torch


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where it cannot write every character
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        if sys.stdout is not None:  # as it is where it was closed
            sys.stdout.flush()  # here, not when the interpreter ends
        return code
    except GPTNeoFastError as error:
        print(f"gptneo-fast: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        advice = "pip install 'torch>=2.11', then install gptneo-fast again, which builds its extension for it"
        print(f"gptneo-fast: torch is not installed in this environment; {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader left: nothing more to say to it
        sys.stderr.close()
        return 1
    except OSError as error:  # what files are to us raises our own errors
        print(f"gptneo-fast: the output cannot be written: {error.strerror or error}", file=sys.stderr)
        _abandon(sys.stdout)
        return 1


def _abandon(stream: Any) -> None:
    """Drop what a stream still holds, which the interpreter would try to write at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _read_prompt() -> str:
    """The text on standard input.

    Raises:
        InputError: it is closed, or no text.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("standard input is closed; give the prompt as an argument")
    try:
        return sys.stdin.read()
    except (OSError, ValueError) as error:  # UnicodeDecodeError is one
        raise InputError(f"standard input cannot be read as text: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptneo-fast",
        description="GPT-Neo, exact past the window and near the limit of the chip.",
        epilog="exit codes: 0 done, 1 the request failed, 2 wrong command line, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"gptneo-fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt, piece by piece.")
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt", help="the text to continue; '-' reads it from standard input")
    _model_options(generate)
    generate.add_argument("-n", "--max-new-tokens", type=int, default=200, metavar="N", help="default 200")
    generate.add_argument("--greedy", action="store_true", help="take the likeliest token instead of drawing one")
    generate.add_argument("--temperature", type=float, default=0.7, metavar="X", help="default 0.7; 0 is greedy")
    generate.add_argument("--top-k", type=int, default=40, metavar="K", help="default 40; 0 for all tokens")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1")
    generate.add_argument("--seed", type=int, metavar="S", help="the same seed draws the same text")
    generate.add_argument("--truncate", choices=["left"], help="drop the oldest tokens of a prompt that is too long")
    generate.add_argument("--json", action="store_true", help="one JSON object at the end instead of text")

    score = commands.add_parser(
        "score",
        help="log-probabilities of the lines of a file",
        description="Log-probabilities of the lines of a file: a JSON object a line, in their order.",
        epilog="A line that cannot be scored has an 'error' in its place, and the exit code is 1.",
    )
    score.set_defaults(run=_score)
    score.add_argument("file", metavar="FILE", help="texts, one a line; '-' reads standard input")
    _model_options(score)
    score.add_argument("--jsonl", action="store_true", help='lines are JSON: a string, or {"text": ..., "context": ...}')
    score.add_argument("--want", nargs="+", default=[], metavar="W", help="of each token: " + ", ".join(_WANT))
    score.add_argument("-o", "--output", metavar="OUT", help="a file in the place of standard output")
    score.add_argument("--resume", action="store_true", help="go on behind the last whole line of OUT")
    score.add_argument("--from-line", type=int, default=1, metavar="N", help="leave out the lines before this one; default 1")

    _eval_parser(commands)
    _quantize_parser(commands)

    info = commands.add_parser("info", help="this machine, and a model", description="This machine, and a model's size.")
    info.set_defaults(run=_info)
    info.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id")
    _model_options(info, positional_model=True)
    info.add_argument("--json", action="store_true", help="one JSON object")

    bench = commands.add_parser("bench", help="tokens per second of a model", description="Greedy decoding, checked and timed.")
    bench.set_defaults(run=_bench)
    _model_options(bench)
    bench.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B", help="rows; default 1 8")
    bench.add_argument("--context", type=int, nargs="+", default=[128, 1024], metavar="T", help="prompt; default 128 1024")
    bench.add_argument("-n", "--new", type=int, default=64, metavar="N", help="new tokens; default 64")
    bench.add_argument("--no-peer", action="store_true", help="leave transformers out where it is installed")
    bench.add_argument("--json", action="store_true", help="one JSON object at the end instead of a table")
    bench.add_argument("--plot", metavar="FILE", help="bars beside the floor, .svg or .png (needs matplotlib)")
    return parser


def _eval_parser(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="tasks of the evaluation harness",
        description="Run tasks of the evaluation harness (lm_eval), and print its table.",
        epilog="Needs: pip install 'gptneo-fast[eval]'. Elsewhere in the harness, import gptneo_fast.integrations.lm_eval and "
        "say model='gptneo_fast'.",
    )
    evaluate.set_defaults(run=_eval)
    evaluate.add_argument("tasks", nargs="+", metavar="TASK", help="names, as `lm_eval ls tasks` has them")
    _model_options(evaluate)
    evaluate.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question; default: the task's")
    evaluate.add_argument("--limit", type=float, metavar="N", help="questions of each task; below 1 a share of them")
    evaluate.add_argument("--batch-size", type=int, metavar="B", help="texts that are generated together")
    evaluate.add_argument("--include-path", metavar="DIR", help="a folder with tasks of your own")
    evaluate.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def _quantize_parser(commands: Any) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="a model in 8 or 4 bits, to a folder",
        description="Write a model with its layers in 8 or 4 bits, and its tokenizer, to a folder.",
        epilog="Loaded from there it needs no word of it. 4 bits are a quarter of the bytes of float16.",
    )
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("model", metavar="MODEL", help="folder or hub id")
    quantize.add_argument("out", metavar="OUT", help="folder to write")
    quantize.add_argument("--to", default="int4", metavar="FORMAT", help="int8 or int4; default int4")
    quantize.add_argument(
        "--group", type=int, default=64, metavar="N", help="numbers a scale, in int4: 32, 64 or 128; default 64"
    )
    quantize.add_argument("--calibrate", metavar="FILE", help="texts, one a line, on which errors are made to cancel (GPTQ)")
    _model_options(quantize, positional_model=True)


def _model_options(parser: argparse.ArgumentParser, positional_model: bool = False) -> None:
    if not positional_model:
        parser.add_argument("-m", "--model", metavar="MODEL", help="folder or hub id; default: the embedded story model")
    parser.add_argument(
        "--dtype", default="auto", help="float32, float16, bfloat16; default: bfloat16 on CUDA, else the file's own"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: CUDA where there is a device")
    parser.add_argument("--quantize", metavar="FORMAT", help="int8 or int4: round the layers while they are loaded")
    parser.add_argument("--backend", default="auto", help="auto, triton or reference")
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument("--offline", action="store_true", help="use downloaded files only")


def _load(args: argparse.Namespace) -> Any:
    from ..demo import FOLDER
    from ..models.load import load

    return load(
        args.model or FOLDER,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        local_files_only=args.offline,
        backend=args.backend,
        quantize=args.quantize,
    )


def _eval(args: argparse.Namespace) -> int:
    try:
        from ..integrations.lm_eval import evaluate
    except ModuleNotFoundError as missing:
        raise SetupError(f"eval needs {missing.name}; pip install 'gptneo-fast[eval]'") from missing
    how = {"num_fewshot": args.num_fewshot, "limit": args.limit}
    found, table = evaluate(_load(args), args.tasks, args.batch_size, args.include_path, **how)
    print(json.dumps({"results": found["results"], "versions": found["versions"]}, default=str) if args.json else table)
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from pathlib import Path

    if args.quantize:
        raise InputError("--quantize is for commands that run a model; say --to int8 or --to int4")
    texts = None
    if args.calibrate:
        try:
            texts = [line for line in Path(args.calibrate).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{args.calibrate} cannot be read as text: {error}") from error
    args.quantize = args.to if texts is None and args.group == 64 else None  # then no more than a layer of floats is held
    model = _load(args)
    if args.quantize is None:
        model.quantize_(args.to, group=args.group, calibrate=texts)
    model.save_pretrained(args.out)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {model.config.name_or_path} in {args.to}, {model.get_memory_footprint():,} bytes")
    return 0


def _generate(args: argparse.Namespace) -> int:
    prompt = _read_prompt() if args.prompt == "-" else args.prompt
    model = _load(args)
    pieces = model.stream(
        prompt,
        max_new_tokens=args.max_new_tokens,
        do_sample=not args.greedy,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        truncate=args.truncate,
    )
    began = time.perf_counter()
    if args.json:
        text = "".join(pieces)
        print(
            json.dumps(
                {
                    "model": model.config.name_or_path,
                    "prompt": prompt,
                    "text": text,
                    "seed": args.seed,
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "device": str(model.device),
                    "seconds": round(time.perf_counter() - began, 3),
                },
                ensure_ascii=not (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf"),
            )
        )
        return 0
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _score(args: argparse.Namespace) -> int:
    from pathlib import Path

    from .lines import lines_done, score_lines

    if args.resume and not args.output:
        raise InputError("--resume goes on behind the last line of a file; name it with --output")
    if args.from_line < 1:
        raise InputError(f"--from-line {args.from_line} is no line; the first is 1")
    if wrong := [name for name in args.want if name not in _WANT]:
        raise InputError(f"--want {wrong[0]} is unknown; choose from {', '.join(_WANT)}{nearest(wrong[0], _WANT)}")
    first = args.from_line
    with contextlib.ExitStack() as stack:
        try:
            lines = sys.stdin if args.file == "-" else stack.enter_context(open(args.file, encoding="utf-8", newline="\n"))
        except OSError as error:
            raise InputError(f"{args.file} cannot be read: {error.strerror}") from error
        if lines is None or lines.closed:
            raise InputError("standard input is closed; name a file")
        if args.resume and Path(args.output).exists():
            first = max(first, lines_done(Path(args.output)) + 1)
        model = _load(args)
        out = sys.stdout
        if args.output:
            out = stack.enter_context(open(args.output, "a" if args.resume else "w", encoding="utf-8"))
        lines = itertools.islice(shown(lines, "line") if sys.stderr.isatty() else lines, first - 1, None)
        failed = False
        try:
            for block in score_lines(model, lines, args.want, is_json=args.jsonl, first=first):
                failed = failed or any("error" in row for row in block)
                out.writelines(json.dumps(row) + "\n" for row in block)
                out.flush()
        except UnicodeDecodeError as error:
            raise InputError(f"{args.file} cannot be read as text: {error}") from error
    return 1 if failed else 0


def _bench(args: argparse.Namespace) -> int:
    from . import bench as speed
    from .info import machine

    model = _load(args)
    context = [c for c in args.context if c + args.new <= model.config.max_position_embeddings] or args.context
    results = speed.measure(
        model,
        batches=args.batch,
        contexts=context,
        new_tokens=args.new,
        peer=False if args.no_peer else None,
        report=lambda r: print(f"{r.runner}, batch {r.batch}, context {r.context}: {r.check}", file=sys.stderr),
    )
    if args.plot:
        speed.plot(results, args.plot)
    if args.json:
        facts = {"model": model.config.name_or_path, "dtype": str(model.dtype).removeprefix("torch."), **machine()}
        print(json.dumps({**facts, "results": speed.as_dicts(results)}))
    else:
        print(speed.table(results))
    return 0 if all(r.check == "equal" for r in results) else 1


def _info(args: argparse.Namespace) -> int:
    from .info import machine, model_facts

    facts = {"machine": machine()}
    if args.model:
        facts["model"] = model_facts(_load(args))
    if args.json:
        print(json.dumps(facts))
        return 0
    for title, rows in facts.items():
        print(f"{title}:")
        width = max(map(len, rows))
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
