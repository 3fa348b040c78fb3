"""The classes of processors, warpers and criteria, made as scripts for transformers make them, score and stop as theirs."""

import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import InputError
from tests.support.peers import peers

transformers = pytest.importorskip("transformers")

V = 40
MADE = {  # class -> arguments and keywords
    "MinLengthLogitsProcessor": [((9, 3), {}), ((9, [3, 5]), {"device": "cpu"}), ((4, 3), {})],
    "MinNewTokensLengthLogitsProcessor": [((6, 2, 3), {}), ((3, 2, torch.tensor([3, 4])), {})],
    "RepetitionPenaltyLogitsProcessor": [((1.7,), {}), ((0.6,), {"prompt_ignore_length": 2})],
    "NoRepeatNGramLogitsProcessor": [((1,), {}), ((2,), {}), ((30,), {})],
    "SequenceBiasLogitsProcessor": [(({(7,): 2.0, (1, 2, 9): -3.0, (4, 4): 9.0},), {}), (([[[7], 2.0], [[2, 9], -1.0]],), {})],
    "NoBadWordsLogitsProcessor": [(([[3], [7], [2, 9]], 3), {}), (([[3], [1, 2, 8]],), {"eos_token_id": [4]})],
    "PrefixConstrainedLogitsProcessor": [
        ((lambda row, ids: [row + 1, int(ids[-1])], 1), {}),
        ((lambda row, ids: [row], 2), {}),
    ],
    "ForcedBOSTokenLogitsProcessor": [((5,), {})],
    "ForcedEOSTokenLogitsProcessor": [((7, 5), {}), ((7, [5, 6]), {}), ((9, 5), {})],
    "InfNanRemoveLogitsProcessor": [((), {})],
    "ExponentialDecayLengthPenalty": [(((1, 1.3), 3, 2), {}), (((0, 1.1), [3, 4], 4), {}), (((9, 1.3), 3, 2), {})],
    "SuppressTokensLogitsProcessor": [(([3, 7],), {})],
    "SuppressTokensAtBeginLogitsProcessor": [(([3, 7], 6), {}), (([3, 7], 5), {})],
    "TemperatureLogitsWarper": [((0.3,), {}), ((2.0,), {})],
    "TopKLogitsWarper": [((3,), {}), ((3,), {"min_tokens_to_keep": 6}), ((3,), {"filter_value": -1e4}), ((99,), {})],
    "TopPLogitsWarper": [((0.4,), {}), ((0.01,), {"min_tokens_to_keep": 3}), ((0.5,), {"filter_value": -1e4})],
    "TopHLogitsWarper": [((0.4,), {})],
    "MinPLogitsWarper": [((0.2,), {}), ((0.9,), {"min_tokens_to_keep": 3})],
    "TypicalLogitsWarper": [((), {}), ((0.3,), {"min_tokens_to_keep": 2})],
    "EpsilonLogitsWarper": [((0.03,), {}), ((0.9,), {"min_tokens_to_keep": 2})],
    "EtaLogitsWarper": [((0.1,), {}), ((0.9,), {"min_tokens_to_keep": 2, "device": "cpu"})],
    "LogitNormalization": [((), {})],
}


@pytest.mark.parametrize("name", MADE)
def test_a_processor_made_by_hand_scores_as_transformers(name):
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 1, 2, 1, 2], [4, 4, 4, 7, 8, 9]])
    scores = torch.randn(2, V) * 3
    for args, keywords in MADE[name]:
        ours, theirs = (getattr(of, name)(*args, **keywords) for of in (gptneo_fast, transformers.generation.logits_process))
        for T in (1, 5, 6):
            expected = theirs(ids[:, :T], scores.clone())
            torch.testing.assert_close(ours(ids[:, :T], scores), expected, msg=f"{args} {keywords} {T}")


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("TemperatureLogitsWarper", (0.0,), "temperature=0.0"),
        ("TopKLogitsWarper", (0,), "top_k=0"),
        ("TopPLogitsWarper", (1.5,), "top_p=1.5"),
        ("MinPLogitsWarper", (0.1, 0.0, 0), "min_tokens_to_keep=0"),
        ("EtaLogitsWarper", (1.0,), "epsilon=1.0"),
        ("RepetitionPenaltyLogitsProcessor", (-1.0,), "penalty=-1.0"),
        ("NoRepeatNGramLogitsProcessor", (0,), "ngram_size=0"),
        ("MinLengthLogitsProcessor", (-1, 3), "min_length=-1"),
        ("MinNewTokensLengthLogitsProcessor", (3, -1, 3), "min_new_tokens=-1"),
        ("NoBadWordsLogitsProcessor", ([[-1]],), "bad_words_ids"),
        ("SequenceBiasLogitsProcessor", ({},), "sequence_bias"),
        ("StopStringCriteria", (None, ["x"]), "tokenizer"),
    ],
)
def test_a_processor_names_the_argument_that_will_not_do(name, args, words):
    with pytest.raises(InputError, match=words):
        getattr(gptneo_fast, name)(*args)


def test_criteria_made_by_hand_stop_as_transformers():
    ids = torch.tensor([[1, 2, 3], [3, 4, 5]])
    scores = (torch.tensor([[0.0, 5.0, 0.0, 1.0, 0.0, 0.0]]),)
    for name, args in [
        ("MaxLengthCriteria", (3,)),
        ("MaxLengthCriteria", (4, 10)),
        ("MaxTimeCriteria", (100.0,)),
        ("MaxTimeCriteria", (100.0, 0.0)),
        ("EosTokenCriteria", (3,)),
        ("EosTokenCriteria", ([5, 3],)),
        ("EosTokenCriteria", (torch.tensor([5]),)),
        ("ConfidenceCriteria", (0.4,)),
        ("ConfidenceCriteria", (0.001,)),
    ]:
        ours = gptneo_fast.StoppingCriteriaList([getattr(gptneo_fast, name)(*args)])(ids, scores)
        theirs = getattr(transformers.generation.stopping_criteria, name)(*args)(ids, scores)
        if isinstance(theirs, torch.Tensor):  # one for each text, of a criterion by itself, too
            assert getattr(gptneo_fast, name)(*args)(ids, scores).tolist() == theirs.tolist(), (name, args)
        assert ours.tolist() == torch.as_tensor(theirs).expand(2).tolist(), (name, args)


def test_forced_tokens_are_kept_under_transformers_names_and_may_be_set():
    ids, scores = torch.tensor([[7]]), torch.zeros(1, V)
    for of in (gptneo_fast, transformers):
        first, last = of.ForcedBOSTokenLogitsProcessor(5), of.ForcedEOSTokenLogitsProcessor(9, [5, 6])
        assert first.bos_token_id == 5 and list(last.eos_token_id) == [5, 6] and last.max_length == 9
        first.bos_token_id, last.eos_token_id, last.max_length = 3, torch.tensor([4]), 2
        assert first(ids, scores).argmax() == 3 and last(ids, scores).argmax() == 4


def test_processors_tell_what_they_were_made_of_under_transformers_names():
    for of in (gptneo_fast, transformers):
        decay = of.ExponentialDecayLengthPenalty((3, 1.5), 2, 4)
        assert (decay.regulation_start, decay.regulation_factor) == (7, 1.5)
        assert of.NoBadWordsLogitsProcessor([[1, 2], [3]], 3).bad_word_ids == [[1, 2], [3]]


def test_criteria_get_a_length_where_they_have_none_as_in_transformers():
    for of in (gptneo_fast, transformers.generation.stopping_criteria):
        none = of.StoppingCriteriaList([of.EosTokenCriteria(3)])
        made = of.validate_stopping_criteria(none, 7)
        assert none.max_length is None and made.max_length == 7 and len(made) == 2 and len(none) == 1
        assert len(of.validate_stopping_criteria(made, 7)) == 2
        with pytest.warns(UserWarning, match="max_length"):
            assert of.validate_stopping_criteria(made, 8).max_length == 7


def test_generate_takes_processors_and_criteria_made_by_hand():
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (2, 5))
    theirs, ours = peers()
    found = []
    for model, of in ((theirs, transformers), (ours, gptneo_fast)):
        processors = of.LogitsProcessorList(
            [of.MinLengthLogitsProcessor(12, 2), of.TopKLogitsWarper(4), of.TemperatureLogitsWarper(0.7)]
        )
        criteria = of.StoppingCriteriaList([of.MaxLengthCriteria(11)])
        torch.manual_seed(1)
        found.append(
            model.generate(ids, do_sample=True, logits_processor=processors, stopping_criteria=criteria, max_new_tokens=20)
        )
    assert found[0].shape == (2, 11) and torch.equal(*found)
