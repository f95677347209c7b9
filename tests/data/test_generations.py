"""Answers are asked for once, survive a killed writer, and are another model's or decoding's for nobody."""

import json
import os

import pytest

from textrec.data.generations import Generations, answer_key
from textrec.schema import InputError

GREEDY = {"temperature": 0.0, "choices": ("1,", "2,")}


def upper(asked):
    return lambda questions: asked.extend(questions) or [question.upper() for question in questions]


def test_only_what_the_file_lacks_is_asked_once_each(tmp_path):
    asked, path = [], tmp_path / "deep" / "answers.jsonl"
    first = Generations(path).answers(["a", "b", "a"], upper(asked), model="m", decoding=GREEDY)
    again = Generations(path).answers(["b", "c", "a"], upper(asked), model="m", decoding=GREEDY)
    assert (first, again, asked) == (["A", "B", "A"], ["B", "C", "A"], ["a", "b", "c"])
    line = json.loads(path.read_text().splitlines()[0])
    assert line["key"] == answer_key("a", "m", GREEDY) and (line["question"], line["answer"]) == ("a", "A")


@pytest.mark.parametrize(("model", "decoding"), [("other", GREEDY), ("m", GREEDY | {"temperature": 0.5})])
def test_another_model_or_decoding_is_asked_anew(tmp_path, model, decoding):
    asked, path = [], tmp_path / "answers.jsonl"
    Generations(path).answers(["a"], upper(asked), model="m", decoding=GREEDY)
    Generations(path).answers(["a"], upper(asked), model=model, decoding=decoding)
    assert asked == ["a", "a"] and len(path.read_text().splitlines()) == 2


def test_a_line_without_an_end_is_dropped_and_asked_again(tmp_path):
    asked, path = [], tmp_path / "answers.jsonl"
    Generations(path).answers(["a", "b"], upper(asked), model="m", decoding={})
    os.truncate(path, path.stat().st_size - 9)
    told = Generations(path).answers(["a", "b"], upper(asked), model="m", decoding={})
    assert (told, asked) == (["A", "B"], ["a", "b", "b"])
    assert [json.loads(line)["answer"] for line in path.read_text().splitlines()] == ["A", "B"]


def test_a_killed_run_loses_no_chunk_that_it_had_finished(tmp_path):
    asked, path = [], tmp_path / "answers.jsonl"

    def dying(questions):
        if len(asked) == 4:
            raise KeyboardInterrupt
        return upper(asked)(questions)

    with pytest.raises(KeyboardInterrupt):
        Generations(path).answers(list("abcdef"), dying, model="m", decoding={}, chunk=2)
    assert Generations(path).answers(list("abcdef"), upper(asked), model="m", decoding={}) == list("ABCDEF")
    assert asked == list("abcdef")


def test_two_that_write_one_file_read_each_other(tmp_path):
    asked, (one, other) = [], (Generations(tmp_path / "answers.jsonl") for _ in range(2))
    for each in (one, other, one):
        each.answers(["a", "b"], upper(asked), model="m", decoding={})
    assert asked == ["a", "b"]


@pytest.mark.parametrize("line", ["no json", '{"key": 1}', "[]"])
def test_a_line_that_is_no_answer_is_named(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"answers\.jsonl: line 1 .* is no recorded answer"):
        Generations(path).answers(["a"], upper([]), model="m", decoding={})


def test_as_many_answers_as_questions(tmp_path):
    with pytest.raises(ValueError, match="1 answers were made to 2 questions"):
        Generations(tmp_path / "answers.jsonl").answers(["a", "b"], lambda _: ["A"], model="m", decoding={})
