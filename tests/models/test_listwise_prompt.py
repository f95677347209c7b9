"""What an answer says: a table of answers, points by hand, counters, bias towards places, and texts that leak."""

import numpy as np
import pytest

from textrec.models import listwise_prompt as prompting
from textrec.models.listwise_prompt import Parsed, answer_points, leaked, listwise_prompt, parse, points

HISTORY, CANDIDATES = ["Glue", "Glue Gun"], ["Red Paint", "Brush", "Glue Stick"]


@pytest.mark.parametrize(
    ("answer", "order", "kind", "duplicates", "out_of_range"),
    [
        ("3, 1, 2", (2, 0, 1), "strict", 0, 0),
        (" 3 > 1 > 2.\n", (2, 0, 1), "strict", 0, 0),
        ("3\n1\n2\n", (2, 0, 1), "strict", 0, 0),
        ("3,1,2,", (2, 0, 1), "strict", 0, 0),
        ("The order is 3, 1, 2", (2, 0, 1), "complete", 0, 0),
        ("[3], [1], [2]", (2, 0, 1), "complete", 0, 0),
        ("3, 1, 3, 2", (2, 0, 1), "complete", 1, 0),
        ("3, 1, 4, 2", (2, 0, 1), "complete", 0, 1),
        ("3, 0, 12, 1", (2, 0), "partial", 0, 2),
        ("2", (1,), "partial", 0, 0),
        ("1st, 2.5 or v2", (), "empty", 0, 0),
        ("none of them", (), "empty", 0, 0),
        ("", (), "empty", 0, 0),
        ("3, 1", (2, 0), "partial", 0, 0),
        ("-1, 2", (0, 1), "partial", 0, 0),
    ],
)
def test_an_answer_is_read(answer, order, kind, duplicates, out_of_range):
    parsed = parse(answer, 3)
    assert (parsed.order, parsed.kind, parsed.duplicates, parsed.out_of_range) == (
        order, kind, duplicates, out_of_range)  # fmt: skip


def test_points_are_places_and_what_is_not_named_ties():
    assert points((2, 0, 1), 3).tolist() == [2, 1, 3]
    assert points((2,), 4).tolist() == [2, 2, 4, 2]  # the rest share 3, 2 and 1
    assert points((), 3).tolist() == [2, 2, 2]


def test_points_belong_to_candidates_not_to_places():
    shown_NC = np.array([[2, 0, 1], [0, 1, 2]])
    told = answer_points([parse("1, 2, 3", 3), parse("well: 3, 2, 1", 3)], shown_NC)
    assert told.tolist() == [[2, 1, 3], [1, 2, 3]]  # what was shown first is candidate 2
    strict = answer_points([parse("1, 2, 3", 3), parse("well: 3, 2, 1", 3)], shown_NC, strict=True)
    assert strict.tolist() == [[2, 1, 3], [2, 2, 2]]


def test_counters_are_shares_of_answers():
    told = prompting.counters([parse(answer, 3) for answer in ("1, 2, 3", "so 1, 2, 3", "1, 1, 9", "no")])
    assert told == {"strict": 0.25, "complete": 0.25, "partial": 0.25, "empty": 0.25, "duplicates": 0.25,
                    "out_of_range": 0.25}  # fmt: skip


def test_a_model_that_copies_the_order_shown_is_biased_and_one_that_does_not_is_not():
    copied = [Parsed((0, 1, 2, 3), True)] * 5
    rng = np.random.default_rng(0)
    drawn = [Parsed(tuple(rng.permutation(4)), True) for _ in range(4000)]
    assert prompting.position_bias(copied, 4) == pytest.approx(1)
    assert abs(prompting.position_bias(drawn, 4)) < 0.03
    assert prompting.first_places(copied, 4).tolist() == [5, 0, 0, 0]
    assert prompting.position_bias([Parsed((), False)], 4) == 0


def test_the_prompt_holds_history_and_numbered_candidates_within_the_wrap():
    prompt = listwise_prompt(HISTORY, CANDIDATES, "[INST] {} [/INST]")
    assert prompt.startswith("[INST] ") and prompt.endswith("Answer: [/INST]")
    assert "\n- Glue\n- Glue Gun\n" in prompt and "\n1. Red Paint\n2. Brush\n3. Glue Stick\n" in prompt
    braces = listwise_prompt(["{curly}"], ["{}", "a"])  # of a text, they are text
    assert "- {curly}" in braces and "1. {}" in braces
    assert "- Brush\n" in prompting.pointwise_prompt(HISTORY, "Brush") and "nothing yet" in listwise_prompt([], ["a"])


def test_a_target_in_the_prompt_leaks_unless_it_was_to_be_shown():
    shown = [*HISTORY, *CANDIDATES]
    honest = listwise_prompt(HISTORY, CANDIDATES)
    assert not any(leaked(honest, text, shown) for text in ("Red Paint", "Glue", "Varnish"))
    assert leaked(listwise_prompt([*HISTORY, "Varnish"], CANDIDATES), "Varnish", shown)
    assert leaked(f"{honest}\nHint: Glue", "Glue", shown)  # although the history explains three of its places
    assert not leaked(honest, "", shown)


def test_items_are_described_with_and_without_the_template():
    item = {"title": "Glue", "brand": "", "size": "1 l"}
    assert prompting.described_item(item, False) == "{'title': 'Glue', 'brand': '', 'size': '1 l'}"
    assert prompting.described_item(item, True) == "Item Title: Glue, Brand: , size: 1 l"
    assert prompting.described_history(["b", "a"], False) == "b, a"
    assert prompting.described_history(["b", "a"], True).endswith("as follows: b, a")


def test_choices_end_so_that_none_begins_another():
    told = prompting.choices(12)
    assert len(told) == 12 and not [pair for pair in zip(told, told[1:], strict=False) if pair[1].startswith(pair[0])]
    assert not any(b.startswith(a) for a in told for b in told if a != b)


def test_shuffled_orders_are_seeded_and_differ_by_row():
    orders = prompting.shuffled_orders(50, 6, 3, "x")
    assert (np.sort(orders, axis=1) == np.arange(6)).all() and len(np.unique(orders, axis=0)) > 30
    assert (orders == prompting.shuffled_orders(50, 6, 3, "x")).all()
    assert (orders != prompting.shuffled_orders(50, 6, 4, "x")).any()
