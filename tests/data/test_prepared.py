"""Opening a prepared folder."""

import pytest

from textrec.data.prepared import PreparedSet
from textrec.data.preparing import prepare_frames
from textrec.schema import InputError


def test_a_folder_without_a_fingerprint_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="holds no prepared data set"):
        PreparedSet.load(tmp_path)


def test_external_ids_and_catalogue_rows_belong_to_the_internal_ids(tmp_path):
    log = tmp_path / "log.tsv"
    log.write_text("user_id\titem_id\ttimestamp\nbob\tx10\t3\nbob\tx9\t1\nann\tx9\t5\nbob\tx1\t2\n", encoding="utf-8")
    prepared = PreparedSet.load(prepare_frames("small", log, processed=tmp_path).folder)
    assert prepared.name == "small" and prepared.num_items == 3
    assert prepared.users.tolist() == ["ann", "bob"]
    assert prepared.catalogue["item"].tolist() == ["x1", "x10", "x9"]
    named = [prepared.catalogue["item"][item - 1] for item in prepared.histories.items_E]
    assert named == ["x9", "x9", "x1", "x10"]  # ann, then bob by time
    assert prepared.histories.times_E.tolist() == [5, 1, 2, 3]
    assert prepared.fingerprint == prepared.details["fingerprint"]
