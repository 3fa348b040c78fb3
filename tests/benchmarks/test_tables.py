"""The README's figures are those of the committed results."""

import json

from benchmarks import tables


def test_the_readme_is_what_the_results_make_of_it():
    text = tables.README.read_text()
    assert tables.readme(text) == text, "run `make tables`"


def test_the_plot_is_what_the_results_make_of_it(tmp_path):
    results = json.loads((tables.RESULTS / "cpu.json").read_text())
    tables.cpu_plot(results, tmp_path / "cpu.svg")
    drawn = (tmp_path / "cpu.svg").read_text()
    committed = (tables.RESULTS / "cpu.svg").read_text()
    peers = {(r["work"], r["dtype"], r["threads"]) for r in results["rows"] if r["runner"] == tables.PEER}
    ours = [r for r in results["rows"] if r["runner"] == tables.OURS and (r["work"], r["dtype"], r["threads"]) in peers]
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
