"""The page says what the records say, stands alone, and the README's verdicts are those of the records."""

import base64
import html.parser
import re
import types

import pandas
import pytest
from study.invented import failed, record, row

from textrec.paths import ROOT
from textrec.schema import InputError
from textrec.study import figures, report
from textrec.study.records import Record
from textrec.study.tables import judge_study

SEEDS = (0, 1, 2)


def study(scale="laptop"):
    rows = [row("sasrec_ce", 0.181, changed="reference: softmax"), row("sasrec_bce", 0.11)]
    rows.append(failed("gsasrec", "a <b> & c"))
    return [record(rows, seed=seed, scale=scale, deviations=["two <i>rows</i> at another commit"]) for seed in SEEDS]


def page(records, scale="laptop", folder=ROOT / "no-such-folder"):
    return report.render(records, judge_study(records, scale), scale, folder)


class Tables(html.parser.HTMLParser):
    """The tables of a page as lists of rows of text, by the heading before them."""

    def __init__(self, text):
        super().__init__()
        self.found, self.heading, self.cell, self.inside = {}, "", None, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag if tag in ("h2", "h3") else self.inside
        if tag in ("h2", "h3"):
            self.heading = ""
        elif tag == "tr":
            self.found.setdefault(self.heading, []).append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("h2", "h3"):
            self.inside = None
        elif tag in ("td", "th"):
            self.found[self.heading][-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data
        elif self.inside:
            self.heading += data


def test_the_page_stands_alone_and_escapes_what_records_say():
    text = page(study())
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)|@import|url\(""", text)
    assert "a &lt;b&gt; &amp; c" in text and "two &lt;i&gt;rows" in text and "a <b> & c" not in text


def test_verdicts_gates_failures_costs_and_commands_are_on_the_page():
    found = Tables(page(study())).found
    verdicts = {(line[1], line[2]): line for line in found["Verdicts"][1:]}
    ce, bce = verdicts["sasrec_ce", "ndcg@10"], verdicts["sasrec_bce", "ndcg@10"]
    assert ce[3:8] == ["0.1821", "0.1810 [0.1710, 0.1910]", "-0.6%", "3", "reproduced"]
    assert bce[7] == "not reproduced"
    assert found["Make it again"][1][1] == "textrec run 01 --scale laptop --variant ml-1m-w1 --seeds 0 1 2"
    gates = {(line[1], line[2]): line[7] for line in found["Gates of this project"][1:]}
    assert gates["sasrec_ce", "ndcg@10"] == "reproduced" and gates["sasrec_bce", "ndcg@10"] == "not reproduced"
    failures = [line[:4] for line in found["What failed"][1:]]
    assert failures == [["01-ml-1m-w1", str(seed), "gsasrec", "failed"] for seed in SEEDS]
    rows = {line[0]: line for line in found["01-ml-1m-w1 on ml-1m-w1"][1:]}
    assert rows["gsasrec"][-2:] == ["failed", "a <b> & c"] and rows["sasrec_ce"][-2] == "ok"
    cost = {line[1]: line for line in found["Cost"][1:]}["sasrec_ce"]
    assert cost[2:6] == ["3", "30", "57", "1.5"]
    why = {(line[1], line[2]): line[8] for line in found["Not attempted"][1:]}
    assert why["gsasrec", "ndcg@10"] == "row gsasrec: failed, a <b> & c"
    assert why["statistics", "users"].startswith("no record of notebook 00")


def test_every_published_number_is_listed():
    ledger = Tables(page([])).found["Every published number in the ledger"]
    assert len(ledger) > 300 and ["ml-1m-w1", "SASRec+", "ndcg@10", "0.1821"] in [line[:4] for line in ledger]


def test_smoke_says_plumbing_only_and_puts_no_number_beside_a_published_one():
    text = page(study("smoke"), "smoke")
    found = Tables(text).found
    assert "Plumbing only" in text
    for heading in ("Verdicts", "Gates of this project"):
        assert {line[7] for line in found[heading][1:]} == {"plumbing only"}
        assert {line[4] for line in found[heading][1:]} == {"–"}


def test_numbers_sort_as_numbers():
    cells = re.findall(r'data-sort="([^"]+)">([^<]+)<', page(study()))
    assert ("0.1821", "0.1821") in cells and all(float(key) or key == "0" for key, _ in cells)


def test_figures_are_inlined_and_one_of_other_data_is_marked(tmp_path):
    run = types.SimpleNamespace(scale="laptop", label="01-ml-1m-w1", seed=0, state=("c" * 40, False))
    points = [{"row": "a", "x": 1, "y": 2}]
    for name, fingerprint in (("now", "f" * 16), ("before", "0" * 16)):
        figure = figures.plot_scatter(points, xlabel="x", ylabel="y")
        figures.save_figure(figure, run, name, points, fingerprint=fingerprint, folder=tmp_path)
    text = page(study(), folder=tmp_path)
    images = [base64.b64decode(image) for image in re.findall(r"base64,([^\"]+)", text)]
    assert len(images) == 2 and all(b"<svg" in image for image in images)
    assert text.count("drawn from other data") == 1


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Laptop and smoke records in a folder of their own, with a README beside them."""
    monkeypatch.setattr("textrec.study.records.RUNS", tmp_path / "runs")
    for scale in ("laptop", "smoke"):
        for one in study(scale):
            one.write(tmp_path / "runs" / scale / one.label / f"seed{one.seed}" / "record.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.START}\nold\n{report.END}\n\nrest\n", encoding="utf-8")
    return tmp_path


def test_laptop_writes_page_tables_and_readme(on_disk):
    written = report.write_report("laptop", folder=on_disk / "figures", readme=on_disk / "README.md")
    names = ["report.html", "11_results.csv", "11_results.tex", "11_verdicts.csv", "11_verdicts.tex", "README.md"]
    assert [path.name for path in written] == names and all(path.is_file() for path in written)
    results = pandas.read_csv(on_disk / "figures/laptop/11_results.csv").set_index("row")
    assert results.loc["sasrec_ce", "ndcg@10"] == pytest.approx(0.181)
    assert results.loc["gsasrec", "status"] == "a <b> & c"
    readme = (on_disk / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# Title") and readme.endswith("rest\n") and "old" not in readme
    line = "| ml-1m-w1 | sasrec_ce | ndcg@10 | 0.1821 | 0.1810 [0.1710, 0.1910] | 3 | reproduced | laptop |"
    assert line in readme and "textrec" not in readme  # gates are counted, not listed as published
    before = {path: path.read_bytes() for path in written}
    report.write_report("laptop", folder=on_disk / "figures", readme=on_disk / "README.md")
    assert before == {path: path.read_bytes() for path in written}


def test_smoke_writes_the_page_and_nothing_that_is_tracked(on_disk):
    readme = (on_disk / "README.md").read_bytes()
    written = report.write_report("smoke", folder=on_disk / "figures", readme=on_disk / "README.md")
    assert [path.name for path in written] == ["report.html"]
    assert readme == (on_disk / "README.md").read_bytes()


def test_the_studys_own_record_holds_every_verdict_and_is_not_read_back(on_disk):
    records = report.study_records("laptop")
    judged = judge_study(records, "laptop")
    run = types.SimpleNamespace(notebook="11", variant=None, scale="laptop", seed=0, state=("c" * 40, False),
                                folder=on_disk / "runs/laptop/11/seed0")  # fmt: skip
    report.write_study_record(run, records, judged)
    told = Record.read(run.folder / "record.json")
    assert {claim["id"]: claim["verdict"] for claim in told.claims}["dross/sasrec-plus/ndcg@10"] == "reproduced"
    assert report.study_records("laptop") == records


# ---- the README ------------------------------------------------------------------------------------------------------


def test_the_paper_scale_comes_before_the_laptop_scale():
    paper = [record([row("sasrec_ce", 0.25)], scale="paper")]
    block = report.readme_block({"laptop": study(), "paper": paper})
    assert "| sasrec_ce | ndcg@10 | 0.1821 | 0.2500 [0.2400, 0.2600] | 1 | not reproduced | paper |" in block
    assert "| sasrec_bce | ndcg@10 | 0.1341 | 0.1100 [0.1000, 0.1200] | 3 | not reproduced | laptop |" in block


def test_without_records_the_block_says_how_to_get_them():
    assert report.readme_block({"laptop": [], "paper": []}) == report.NO_RECORDS


@pytest.mark.parametrize("text", ["no markers", f"{report.END}\n{report.START}", f"{report.START}\n" * 2 + report.END])
def test_a_readme_without_its_two_markers_is_an_error(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(InputError, match="must hold the line"):
        report.update_readme(path, "block")
    assert path.read_text() == text


def test_the_readme_of_the_project_is_not_stale():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split(report.START)[1].split(report.END)[0].strip()
    assert block == report.readme_block(), "the verdicts in README.md are not those of the records: run `make report`"
