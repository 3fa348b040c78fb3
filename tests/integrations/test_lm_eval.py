"""lm-eval's HFLM over our models and over transformers', and our own LM: the same likelihoods, texts and results of tasks."""

import json

import pytest
import torch

from tests.support.peers import demo

HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import gptneo_fast  # noqa: E402
from gptneo_fast.demo import FOLDER  # noqa: E402
from gptneo_fast.errors import InputError  # noqa: E402
from gptneo_fast.integrations.lm_eval import LM, evaluate  # noqa: E402
from gptneo_fast.tools import cli  # noqa: E402

STORY = "Once upon a time there was a little fox who lived in a wood and sang."
PAIRS = [
    ("Once upon a time", " there was a little fox"),
    ("The dog", " went to the river"),
    ("", " hello"),
    (STORY * 9, " Then"),
]
TEXTS = [STORY * 60, "The cat", "Hello"]  # the first is longer than the model, and is rolled over
UNTIL = [
    ("Once upon a time", {"until": ["."], "max_gen_toks": 30}),
    ("The dog", {"until": ["."], "max_gen_toks": 30}),
    (STORY * 9, {"until": ["\n"], "max_gen_toks": 40, "do_sample": False}),
    ("A girl", {"until": ["\n"], "max_gen_toks": 40, "do_sample": False}),
]


def asked(method, arguments):
    requests = [Instance(request_type=method.__name__, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]
    return method(requests, disable_tqdm=True)


@pytest.fixture(scope="module")
def expected():
    return answers("plain", 2)


def answers(kind, batch_size):
    model, tokenizer = demo(kind)
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    pairs = asked(judge.loglikelihood, PAIRS)
    return (
        torch.tensor([logprob for logprob, _ in pairs]),
        [greedy for _, greedy in pairs],
        torch.tensor(asked(judge.loglikelihood_rolling, [(text,) for text in TEXTS])),
        asked(judge.generate_until, UNTIL),
    )


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["accelerated", "converted", "ours"])
def test_likelihoods_and_texts_are_those_over_transformers(kind, batch_size, expected, fused_calls):
    likelihoods, greedy, rolled, texts = answers(kind, batch_size)
    torch.testing.assert_close(likelihoods, expected[0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(rolled, expected[2], atol=1e-3, rtol=1e-4)
    assert greedy == expected[1] and texts == expected[3] and all(texts)
    assert set(fused_calls) == {0, 1, 2, 3}


def ours():
    return gptneo_fast.load(FOLDER, dtype="float32")


def test_our_own_gives_the_answers_of_the_harness_s(expected, fused_calls):
    judge = LM(ours())
    pairs = asked(judge.loglikelihood, PAIRS)
    torch.testing.assert_close(torch.tensor([logprob for logprob, _ in pairs]), expected[0], atol=1e-3, rtol=1e-4)
    assert [greedy for _, greedy in pairs] == expected[1]
    rolled = torch.tensor(asked(judge.loglikelihood_rolling, [(text,) for text in TEXTS]))
    torch.testing.assert_close(rolled, expected[2], atol=1e-3, rtol=1e-4)
    assert asked(judge.generate_until, UNTIL) == expected[3]
    assert set(fused_calls) == {0, 1, 2, 3}


def test_a_task_may_limit_context_and_continuation_together():
    judge, context = LM(ours()), "Once upon a time"
    how = {"until": ["\n"], "do_sample": False, "max_gen_toks": 30}
    whole, short = asked(judge.generate_until, [(context, how), (context, how | {"max_length": 12})])
    tokens = len(judge.tok_encode(context + short))
    assert whole.startswith(short) and short and tokens == 12 < len(judge.tok_encode(context + whole))


def test_a_context_that_many_have_is_computed_once(monkeypatch):
    judge = LM(ours())
    kept, past = [], judge.model._past
    monkeypatch.setattr(judge.model, "_past", lambda ids: kept.append(len(ids)) or past(ids))
    together = asked(judge.loglikelihood, [(STORY * 4, f" {word}") for word in ("Then", "The fox", "A dog ran", "Then")])
    assert len(kept) == 1
    monkeypatch.setattr("gptneo_fast.integrations.lm_eval._SHARED", 10**9)
    alone = asked(judge.loglikelihood, [(STORY * 4, f" {word}") for word in ("Then", "The fox", "A dog ran", "Then")])
    assert len(kept) == 1
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), atol=1e-4, rtol=1e-5)


TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_until": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: bleu}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks whose questions lie beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {
            "question": f"{STORY} The {a}",
            "choices": [" sang.", " lived in a wood.", " was very happy and went home."],
            "answer": i % 3,
        }
        for i, a in enumerate(("fox", "dog", "bird", "king", "girl"))
    ]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in questions))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


def numbers(results):
    return {
        (task, metric): value
        for task, found in results.items()
        for metric, value in found.items()
        if isinstance(value, float) and "stderr" not in metric
    }


@pytest.fixture(scope="module")
def of_the_harness(tasks):
    model, tokenizer = demo("plain")
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    manager = TaskManager(include_path=str(tasks))
    return numbers(simple_evaluate(model=judge, tasks=list(TASKS), task_manager=manager)["results"])


def test_tasks_have_the_results_of_the_harness_s_own_model(tasks, of_the_harness):
    found, table = evaluate(ours(), list(TASKS), include_path=str(tasks))
    got = numbers(found["results"])
    assert got == pytest.approx(of_the_harness, rel=1e-3) and len(got) >= 5
    assert "tiny_choice" in table
    with pytest.raises(InputError, match="task 'tiny_chioce' is unknown"):
        evaluate(ours(), ["tiny_chioce"], include_path=str(tasks))


def test_the_command_line_and_the_registry_know_it(tasks, of_the_harness, capsys):
    assert cli.main(["eval", "tiny_choice", "--include-path", str(tasks), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert numbers(said["results"]) == pytest.approx(
        {k: v for k, v in of_the_harness.items() if k[0] == "tiny_choice"}, rel=1e-3
    )
    assert get_model("gptneo_fast") is LM


def test_bad_input_says_what_is_wrong():
    model = ours()
    with pytest.raises(InputError, match="max_length=10000 is not from 1 to"):
        LM(model, max_length=10000)
    with pytest.raises(InputError, match="max_gen_toks=4000 leaves no room"):
        asked(LM(model).generate_until, [("Once", {"until": ["."], "max_gen_toks": 4000})])
    with pytest.raises(InputError, match=r"a continuation has \d+ tokens, and the model sees 16"):
        asked(LM(model, max_length=16).loglikelihood, [("Once", STORY * 3)])
    rows = LM(model, batch_size="auto:4"), LM(model, batch_size="3"), LM(model)
    assert [lm.rows for lm in rows] == [None, 3, None]
