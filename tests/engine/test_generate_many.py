"""`generate_many`: order, room, seeds, errors."""

import pytest
import torch

from gptneo_fast import Engine
from gptneo_fast.errors import InputError, SetupError
from tests.support.peers import SMALL
from tests.support.serial import require_same, serial

V = SMALL["vocab_size"]


class TestGenerateMany:
    def test_order_is_kept_and_prompts_are_asked_for_as_there_is_room(self, model):
        asked = 0

        def prompts():
            nonlocal asked
            for i in range(200):
                asked += 1
                yield [4 + i % 90] * (1 + i % 7)

        engine = Engine(model, 3, max_waiting=2)
        most = 0
        for i, got in enumerate(engine.generate_many(prompts(), max_new_tokens=4)):
            most = max(most, asked - i)
            require_same(model, [4 + i % 90] * (1 + i % 7), got, serial(model, [4 + i % 90] * (1 + i % 7), max_new_tokens=4))
        assert asked == 200 and most <= 3 + 2 + 2
        engine.close()

    def test_options_of_single_prompts_and_seeds(self, model):
        prompts = [[5], {"prompt": [6, 7], "max_new_tokens": 2}, {"prompt": [8], "do_sample": False}]
        got = list(model.generate_many(prompts, max_rows=2, max_new_tokens=5, do_sample=True, seed=11))
        assert got[0] == serial(model, [5], max_new_tokens=5, do_sample=True, seed=11)
        assert got[1] == serial(model, [6, 7], max_new_tokens=2, do_sample=True, seed=12)
        assert got[2] == serial(model, [8], max_new_tokens=5)

    def test_errors_are_raised_or_stand_where_the_result_would(self, model):
        def bad(ids, scores):
            raise ZeroDivisionError("mine")

        prompts = [[5], {"prompt": [6], "logits_processor": [bad]}, [7]]
        got = list(model.generate_many(prompts, max_new_tokens=3, errors="return"))
        assert got[0] == serial(model, [5], max_new_tokens=3) and got[2] == serial(model, [7], max_new_tokens=3)
        assert isinstance(got[1], ZeroDivisionError)
        with pytest.raises(ZeroDivisionError, match="mine"):
            list(model.generate_many(prompts, max_new_tokens=3))

    def test_a_prompt_that_cannot_be_served_stands_in_its_place(self, model):
        prompts = [[5], [V], [], [7]]
        got = list(model.generate_many(prompts, max_new_tokens=3, errors="return"))
        assert got[0] == serial(model, [5], max_new_tokens=3) and got[3] == serial(model, [7], max_new_tokens=3)
        assert all(isinstance(error, InputError) for error in got[1:3])
        found = model.generate_many(prompts, max_new_tokens=3)
        assert next(found) == got[0]
        with pytest.raises(InputError, match=f"is {V}"):
            next(found)

    def test_a_closed_engine_is_said_once_and_not_of_every_prompt(self, model):
        engine = Engine(model, 1)
        engine.close()
        with pytest.raises(SetupError, match="this engine is closed"):
            next(engine.generate_many(([5] for _ in range(10**9)), errors="return"))

    def test_prefix_processors_and_the_seed_of_one_prompt(self, model):
        def ban(ids, scores):
            return scores.index_fill(1, torch.arange(30), -float("inf"))

        how = {"prefix": [8, 9, 10], "logits_processor": [ban], "max_new_tokens": 9}
        plain, drawn = model.generate_many([[5], {"prompt": [6], "seed": 4, "do_sample": True}], num_return_sequences=3, **how)
        assert plain[0] == plain[1] == serial(model, [8, 9, 10, 5], max_new_tokens=9, logits_processor=[ban])
        for j, got in enumerate(drawn):
            more = {"do_sample": True, "seed": 4 + j, "logits_processor": [ban]}
            assert got == serial(model, [8, 9, 10, 6], max_new_tokens=9, **more)

    def test_what_the_prompts_raise_reaches_the_caller(self, model):
        def prompts():
            yield [5]
            raise OSError("the file ended")

        found = model.generate_many(prompts(), max_new_tokens=3)
        with pytest.raises(OSError, match="the file ended"):
            list(found)

    def test_leaving_early_ends_what_is_under_way(self, model):
        engine = Engine(model, 2)
        for _ in engine.generate_many(([5] for _ in range(10**9)), max_new_tokens=3):
            break
        assert engine.submit([5], max_new_tokens=3).result(60) == serial(model, [5], max_new_tokens=3)
        engine.close()

    def test_a_bar_and_texts(self, stories, capsys):
        prompts = ["Once upon", "The"]
        assert list(stories.generate_many(prompts, max_new_tokens=9, progress=True)) == stories.generate_text(
            prompts, max_new_tokens=9
        )
        assert "2/2" in capsys.readouterr().err
