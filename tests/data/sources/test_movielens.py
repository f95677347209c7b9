"""MovieLens in its published forms."""

import gzip

import pytest

from textrec.data.preparing import known_sets, prepare

MOVIES = (
    "1::Toy Story (1995)::Animation|Children's\n2::Misérables, Les (1995)::Drama|Musical\n3::Unrated (1999)::Drama\n"
)


def folder_for(tmp_path, name: str, contents: dict[str, str], encoding: str = "latin-1"):
    for role, text in contents.items():
        path = tmp_path / known_sets()[name].files[role]
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode(encoding)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return {"raw": tmp_path, "processed": tmp_path / "out"}


def test_1m(tmp_path):
    ratings = "1::2::5::978300760\n1::1::3::978300700\n2::2::4::978300800\n"
    prepared = prepare("ml-1m", **folder_for(tmp_path, "ml-1m", {"interactions": ratings, "items": MOVIES}))
    assert prepared.catalogue["title"].tolist() == ["Toy Story (1995)", "Misérables, Les (1995)"]
    assert prepared.catalogue["genres"].tolist() == ["Animation, Children's", "Drama, Musical"]
    assert prepared.histories.items_E.tolist() == [1, 2, 2]
    assert prepared.histories.times_E.tolist() == [978300700, 978300760, 978300800]


def test_1m_with_every_listed_movie_as_a_candidate(tmp_path):
    ratings = "1::2::5::978300760\n"
    places = folder_for(tmp_path, "ml-1m", {"interactions": ratings, "items": MOVIES})
    assert prepare("ml-1m", **places, catalogue="all").catalogue["item"].tolist() == ["1", "2", "3"]


def test_100k(tmp_path):
    flags, other = "0|0|1|" + "|".join("0" * 16), "1|1|" + "|".join("0" * 17)
    contents = {
        "interactions": "196\t242\t3\t881250949\n196\t302\t3\t881250950\n",
        "items": f"242|Kolya (1996)|24-Jan-1997||http://x|{flags}\n302|Café|01-Jan-1997|||{other}\n",
        "genres": "unknown|0\nAction|1\nAdventure|2\n" + "".join(f"Genre{k}|{k}\n" for k in range(3, 19)) + "\n",
    }
    prepared = prepare("ml-100k", **folder_for(tmp_path, "ml-100k", contents))
    assert prepared.catalogue["title"].tolist() == ["Kolya (1996)", "Café"]
    assert prepared.catalogue["genres"].tolist() == ["Adventure", "unknown, Action"]


def test_csv(tmp_path):
    contents = {
        "interactions": "userId,movieId,rating,timestamp\n10,2,4.0,7\n9,11,0.5,5\n10,11,3.5,6\n",
        "items": "movieId,title,genres\n"
        '2,"American President, The (1995)",Comedy|Drama\n11,"""Quoted""",(no genres listed)\n',
    }
    prepared = prepare("ml-latest-small", **folder_for(tmp_path, "ml-latest-small", contents, "utf-8"))
    assert prepared.users.tolist() == ["9", "10"]
    assert prepared.catalogue["title"].tolist() == ["American President, The (1995)", '"Quoted"']
    assert prepared.histories.items_E.tolist() == [2, 2, 1]


def test_csv_without_a_column_is_refused(tmp_path):
    contents = {"interactions": "user,movieId,rating,timestamp\n1,1,1,1\n", "items": "movieId,title,genres\n1,a,b\n"}
    with pytest.raises(ValueError, match=r'ratings.csv.* cannot be read: Referenced column "userId" not found'):
        prepare("ml-latest-small", **folder_for(tmp_path, "ml-latest-small", contents, "utf-8"))


def test_sasrec_text_gets_its_titles_through_the_map(tmp_path):
    contents = {"interactions": "1 2\n1 1\n2 1\n", "item_to_movie": "1 2\n2 77\n", "items": MOVIES}
    prepared = prepare("ml-1m-w1", **folder_for(tmp_path, "ml-1m-w1", contents))
    assert prepared.catalogue["title"].tolist() == ["Misérables, Les (1995)", ""]  # movie 77 is not listed
    assert prepared.histories.items_E.tolist() == [2, 1, 1]


@pytest.mark.real
@pytest.mark.parametrize(("name", "title"), [("ml-100k", "Star Wars (1977)"), ("ml-latest-small", "Toy Story (1995)")])
def test_every_real_movie_has_a_title(real_data, tmp_path, name, title):
    titles = prepare(name, raw=real_data, processed=tmp_path).catalogue["title"]
    assert (titles != "").all() and title in set(titles)
    assert not titles.str.contains("\ufffd").any()
