"""The pages' figures are those of the committed results."""

import json

import pytest

from benchmarks import tables


@pytest.mark.parametrize(("page", "made"), [(tables.README, tables.headline), (tables.PERFORMANCE, tables.measured)])
def test_a_page_is_what_the_results_make_of_it(page, made):
    text = page.read_text()
    assert tables.renewed(text, made()) == text, "run `make tables`"


@pytest.mark.parametrize("path", tables.of_kinds("cpu"), ids=lambda path: path.stem)
def test_the_plot_is_what_the_results_make_of_it(path, tmp_path):
    results = json.loads(path.read_text())
    tables.cpu_plot(results, tmp_path / "cpu.svg")
    drawn = (tmp_path / "cpu.svg").read_text()
    committed = (tables.PLOTS / f"{path.stem}.svg").read_text()
    rows = [r for r in results["rows"] if "tokens_per_second" in r]
    peers = {(r["work"], r["dtype"], r["threads"]) for r in rows if r["runner"] == tables.PEER}
    ours = [r for r in rows if r["runner"] == tables.OURS and (r["work"], r["dtype"], r["threads"]) in peers]
    assert ours
    for text in (drawn, committed):
        assert all(f"<!-- {r['tokens_per_second']:.0f}/s -->" in text for r in ours), "run `make tables`"


def test_a_ratio_is_that_of_the_speeds_beside_it():
    row = {"work": "w", "dtype": "fp32", "threads": 1, "ms": 1.0}
    results = {
        **dict.fromkeys(("when", "commit", "cpu", "cores", "torch", "transformers", "python"), "x"),
        "rows": [
            row | {"runner": tables.PEER, "tokens_per_second": 20.0},
            row | {"runner": tables.OURS, "tokens_per_second": 50.0},
            row | {"work": "alone", "runner": tables.OURS, "tokens_per_second": 5.0},
        ],
    }
    text = tables.cpu_table(results)
    assert "| w | fp32 | 1 | 20.0 | 50.0 | 2.50 |" in text and "| alone | fp32 | 1 | - | 5.0 | - |" in text


MACHINE = dict.fromkeys(("when", "commit", "cpu", "cores", "torch", "transformers", "python"), "x")


def test_a_step_is_shown_beside_its_floor_and_a_start_in_a_table_of_its_own():
    row = {"dtype": "fp32", "threads": 1, "runner": tables.OURS, "ms": 1500.0}
    step = {"step_ms": 4.0, "floor_ms": 3.0, "share_of_floor": 0.75, "read_gb_per_s": 10.0}
    rows = [
        row | step | {"work": "decode", "tokens_per_second": 50.0},
        row | {"work": "start", "peak_mb": 751.2, "weights_mb": 500.9},
    ]
    text = tables.cpu_table({**MACHINE, "rows": rows})
    assert "| decode | fp32 | 1 | 3.00 | 4.00 | 75% |" in text and "10.0 GB/s on 1 threads" in text
    assert "| start, fp32 | gptneo_fast | 1.50 | 751 | 501 |" in text and "| start | fp32" not in text


def test_peers_stand_in_a_line_with_their_share_and_reasons():
    row = {"dtype": "fp32", "threads": 1, "ms": 1.0, "read_gb_per_s": 10.0, "tokens": "equal"}
    rows = [
        row | {"work": "w", "runner": tables.OURS, "tokens_per_second": 50.0, "share_of_floor": 0.8},
        row | {"work": "w", "runner": "other", "tokens_per_second": 25.0, "share_of_floor": 0.4},
        row | {"work": "v", "runner": tables.OURS, "tokens_per_second": 5.0, "share_of_floor": 1.2},
    ]
    lacks = [{"runner": "third", "dtype": "bf16", "why": "it cannot"}]
    text = tables.peers_table({**MACHINE, "openvino": "1.2", "rows": rows, "missing": lacks})
    assert "| CPU | dtype | gptneo_fast | other | third |" in text and "openvino 1.2" in text
    assert "| w | fp32 | 50.0 (80%) | 25.0 (40%) | - |" in text and "| v | fp32 | 5.0 (120%) | - | - |" in text
    assert "third, bf16: it cannot." in text and "All tokens are transformers'." in text
    rows[1]["tokens"] = "equal up to token 9"
    assert "other, w, fp32: equal up to token 9." in tables.peers_table({**MACHINE, "rows": rows, "missing": []})


def test_a_run_is_split_into_rows_beside_runtimes_and_all_others():
    def bench(name, work, **more):
        return {"fullname": name, "stats": {"rounds": 5}, "extra_info": {"rows": [{"work": work}]} | more}

    lacks = [{"runner": "a", "dtype": "bf16", "why": "no"}]
    raw = {
        "machine_info": {"python_version": "3.11"},
        "datetime": "2026-01-02T03",
        "commit_info": {},
        "benchmarks": [
            bench("benchmarks/cpu/bench_cpu.py::test_a", "mine"),
            bench("benchmarks/cpu/bench_peers.py::test_b", "theirs", missing=lacks),
            bench("benchmarks/cpu/bench_peers.py::test_c", "theirs, too", missing=lacks),
        ],
    }
    cpu, peers = tables.reduce(raw), tables.reduce(raw, peers=True)
    assert [r["work"] for r in cpu["rows"]] == ["mine"] and "missing" not in cpu
    assert [r["work"] for r in peers["rows"]] == ["theirs", "theirs, too"] and peers["missing"] == lacks


def test_of_several_runs_the_last_counts_and_each_row_says_its_commit():
    def run(commit, *works):
        rows = [{"work": w, "dtype": "fp32", "threads": 1, "runner": tables.OURS, "ms": float(len(commit))} for w in works]
        return {**MACHINE, "commit": commit, "rows": rows}

    got = tables.merge([run("a", "x", "y"), run("bb", "y", "z")])
    assert [(r["work"], r["commit"], r["ms"]) for r in got["rows"]] == [("x", "a", 1.0), ("y", "bb", 2.0), ("z", "bb", 2.0)]
    assert got["commit"] == "a, bb"


def test_works_of_one_round_and_other_runtimes_are_said():
    row = {"work": "many", "dtype": "fp32", "threads": 2, "ms": 1.0}
    rows = [
        row | {"runner": tables.OURS, "tokens_per_second": 90.0, "rounds": 1},
        row | {"runner": "other", "tokens_per_second": 30.0, "rounds": 1},
        row | {"work": "short", "runner": tables.OURS, "tokens_per_second": 90.0, "rounds": 5},
    ]
    text = tables.cpu_table({**MACHINE, "rows": rows})
    assert "Of one round, which is hundreds of calls: many." in text and "other, many, 2 threads: 30.0 tokens/s." in text


def test_the_memory_of_scores_is_said():
    row = {"work": "scores", "dtype": "fp32", "threads": 2, "ms": 1.0, "tokens_per_second": 1.0}
    rows = [row | {"runner": tables.OURS, "extra_mb": 99.6}, row | {"runner": tables.PEER, "extra_mb": 2000.0}]
    text = tables.cpu_table({**MACHINE, "rows": rows})
    assert "scores: 100 MB (gptneo_fast, 2 threads), 2000 MB (transformers eager, 2 threads)." in text
