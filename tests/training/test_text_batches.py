"""What the loops read: joined sets keep their texts, batches are those of any number of processes, every user comes."""

import numpy as np
import pytest
from training.text_sets import brand_set

from textrec.data.examples import FinetuningExamples, PretrainingExamples
from textrec.data.item_text import item_attributes
from textrec.data.tokenizing import train_tokenizer
from textrec.schema import InputError
from textrec.training.batches import GlobalBatches
from textrec.training.text_batches import ContrastBatches, ExampleBatches, joined
from textrec.training.text_ranking import TextSet


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[TextSet]:
    folder = tmp_path_factory.mktemp("sets")
    prepared = [brand_set(folder / str(seed), seed, num_users=10 + seed) for seed in (0, 1)]
    tokenizer = train_tokenizer(item_attributes(prepared[0].catalogue), 400)
    return [TextSet.of(each, tokenizer) for each in prepared]


def test_joined_sets_keep_their_sequences_and_their_texts(sets):
    tokens, histories, ends_U = joined(sets)
    assert histories.num_users == 21 and (ends_U == histories.lengths_U).all()
    for user, each, own in ((3, sets[0], 3), (10, sets[1], 0), (20, sets[1], 10)):
        shift = 0 if each is sets[0] else 240
        mine, _ = each.prepared.histories.prefixes(np.array([own]), each.prepared.histories.lengths_U[[own]])
        there, _ = histories.prefixes(np.array([user]), histories.lengths_U[[user]])
        assert (there == mine + shift).all()
        for item, moved in zip(mine, there, strict=True):
            for name in ("token_ids_T", "type_ids_T", "word_starts_T"):
                own_T = vars(each.tokens)[name][each.tokens.offsets_I1[item] : each.tokens.offsets_I1[item + 1]]
                moved_T = vars(tokens)[name][tokens.offsets_I1[moved] : tokens.offsets_I1[moved + 1]]
                assert len(own_T) and (own_T == moved_T).all()
    assert (joined(sets, "train")[2] == ends_U - 2).all()
    assert joined(sets[:1])[0] is sets[0].tokens


def test_sets_of_different_tokenizers_are_refused(sets):
    other = TextSet.of(sets[1].prepared, train_tokenizer(item_attributes(sets[1].prepared.catalogue), 300))
    with pytest.raises(InputError, match="different tokenizers"):
        joined([sets[0], other])


def targets(batches) -> list[list[int]]:
    return [batch["targets_B"].tolist() for batch in batches]


def test_contrast_batches_are_those_of_any_number_of_processes_and_of_any_round(sets):
    tokens, histories, ends_U = joined(sets)
    examples = PretrainingExamples(item_tokens=tokens, histories=histories, ends_U=ends_U, special=sets[0].special,
                                   seed=0)  # fmt: skip
    whole = targets(ContrastBatches(examples, 8, 6, 0, 0, 1))
    halves = [targets(ContrastBatches(examples, 8, 6, 0, rank, 2)) for rank in (0, 1)]
    assert all(sorted(a + b) == sorted(both) for a, b, both in zip(*halves, whole, strict=True))
    rounds = []
    for number in range(3):
        batches = ContrastBatches(examples, 8, 2, 0, 0, 1)
        batches.sampler.set_epoch(number)
        assert len(batches) == 2
        rounds += targets(batches)
    assert rounds == whole and len({str(each) for each in whole}) == 6  # 2 batches a pass: the third pass has begun
    with pytest.raises(InputError, match="multiple of the 3 processes"):
        ContrastBatches(examples, 8, 6, 0, 0, 3)
    with pytest.raises(InputError, match="at most the 21 sequences"):
        ContrastBatches(examples, 32, 6, 0, 0, 1)


def test_negatives_may_be_those_of_one_set_alone(sets):
    tokens, histories, ends_U = joined(sets)
    examples = PretrainingExamples(item_tokens=tokens, histories=histories, ends_U=ends_U, special=sets[0].special,
                                   seed=0)  # fmt: skip

    def of_first(*first_users):  # 240 items are the first set's, 10 of the users
        batches = ContrastBatches(examples, 5, 40, 0, 0, 1, *first_users)
        return {sum(item <= 240 for item in batch) for batch in targets(batches)}

    assert of_first([0, 10]) == {0, 5} and len(of_first()) > 2
    one_pass = ContrastBatches(examples, 5, 4, 0, 0, 1, [0, 10])._pass(np.random.default_rng(0)).ravel().tolist()
    assert len(set(one_pass)) == 20 and set(range(10)) < set(one_pass)
    with pytest.raises(InputError, match="at most the 10 sequences"):
        ContrastBatches(examples, 11, 6, 0, 0, 1, [0, 10])


def test_every_user_has_one_example_an_epoch_and_parts_divide_a_step(sets):
    each = sets[0]
    examples = FinetuningExamples(
        item_tokens=each.tokens, histories=each.prepared.histories, ends_U=each.prepared.split.train_end_U,
        special=each.special, seed=0,
    )  # fmt: skip
    whole = ExampleBatches(examples, GlobalBatches(10, 4, 0))
    parts = ExampleBatches(examples, GlobalBatches(10, 4, 0, parts=2))
    assert (len(whole), len(parts)) == (3, 6)
    assert [batch["rows_in_step"] for batch in whole] == [4, 4, 2]
    assert [batch["rows_in_step"] for batch in parts] == [4, 4, 4, 4, 2, 2]
    assert sorted(sum(targets(parts), [])) == sorted(sum(targets(whole), []))
    again = targets(whole)
    whole.sampler.set_epoch(1)
    assert targets(whole) != again
