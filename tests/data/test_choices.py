"""Every choice is checked by name, type and value before a file is opened."""

import pytest

from textrec.data.choices import ALLOWED, Choices, closest
from textrec.schema import InputError


def test_defaults_are_valid_and_every_allowed_word_is_accepted():
    for name, words in ALLOWED.items():
        assert getattr(Choices(), name) in words
        for word in words:
            assert getattr(Choices(**{name: word}), name) == word


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"splitt": "users"}, "'splitt' is no choice of data preparation (did you mean 'split'?)"),
        (
            {"split": "leave_one_uot"},
            "split is 'leave_one_uot'; expected one of leave_one_out, global_time, ratio, users",
        ),
        ({"min_user": "5"}, "min_user is '5'; expected a whole number of at least 0"),
        ({"min_item": 5.0}, "min_item is 5.0; expected a whole number of at least 0"),
        ({"min_item": True}, "min_item is True; expected a whole number"),
        ({"min_rating": "4"}, "min_rating is '4'; expected a number"),
        ({"core_repeat": 1}, "core_repeat is 1; expected true or false"),
        ({"test_share": 1}, "test_share is 1; expected a number between 0 and 0.5"),
        ({"validation": "non"}, "validation is 'non'; expected all, none or a number of users (did you mean 'none'?)"),
        ({"validation": 0}, "validation is 0; expected all, none or a number of users"),
        ({"user_sample": 0}, "user_sample is 0; expected a whole number of at least 1"),
        ({"seed": -1}, "seed is -1; expected a whole number of at least 0"),
        ({"time_tie_rule": ["stable"]}, "time_tie_rule is ['stable']; expected one of stable, hash, item_id, given"),
    ],
)
def test_a_wrong_choice_is_one_sentence(values, sentence):
    with pytest.raises(InputError) as caught:
        Choices.of(values)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_closest_proposes_nothing_for_a_word_like_no_other():
    assert closest("stabel", ("stable", "hash")) == " (did you mean 'stable'?)"
    assert closest("zzz", ("stable", "hash")) == ""
