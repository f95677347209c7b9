"""The command line: examples parse, mistakes are one sentence and status 2, output is plain where nobody watches."""

import errno
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import typer
from commands import parse

from textrec import cli
from textrec.data.histories import Histories
from textrec.paths import ROOT
from textrec.schema import InputError


def textrec(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "textrec.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def all_commands(command=None, path=("textrec",)):
    """Yield `(words, command)` of every command and group."""
    command = command or typer.main.get_command(cli.app)
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from all_commands(below, (*path, name))


COMMANDS = dict(all_commands())


def run_main(monkeypatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["textrec", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(path, capsys):
    command = COMMANDS[path]
    assert command.help
    for parameter in command.params:
        assert parameter.help, parameter.name


@pytest.mark.parametrize("path", [p for p, c in COMMANDS.items() if not hasattr(c, "commands")], ids=" ".join)
def test_examples_of_the_help_are_commands(path):
    examples = [line.strip() for line in COMMANDS[path].help.splitlines() if line.strip().startswith("textrec ")]
    assert examples
    for line in examples:
        assert line.startswith(" ".join(path))
        parse(line)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("docter",), "doctor"),
        (("data", "prepair"), "prepare"),
        (("run", "01", "--seads", "1"), "--seeds"),
        (("run", "01", "--scale", "huge"), "smoke"),
        (("study", "--jobs", "0"), "1"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_closest(arguments, hint):
    outcome = textrec(*arguments)
    assert outcome.returncode == 2
    assert hint in outcome.stderr and "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("data", "prepare", "no-such-set"), "no-such-set"),
        (("data", "prepare", "mine", "--interactions", "absent.csv"), "absent.csv"),
        (("data", "prepare", "mine", "--items", "products.csv"), "--interactions"),
        (("data", "prepare", "mine", "--from", "recbole_atomic"), "--raw"),
        (("data", "prepare", "synthetic", "--choice", "split"), "name=value"),
        (("data", "prepare", "synthetic", "--choice", "time_tie_rul=hash"), "time_tie_rule"),
        (("run", "99"), "99"),
        (("convert", "no/such/checkpoint", "out"), "no/such/checkpoint"),
        (("convert", "README.md", "textrec"), "textrec exists"),
        (("convert", "README.md", "out"), "README.md cannot be read"),
        (("convert", "no-such-set", "out", "--to", "recbole_atomic"), "no-such-set"),
        (("recommend", "--run", "absent", "--row", "popularity", "--user", "u1"), "absent"),
        (("recommend", "--user", "u1"), "--embedder"),
        (("recommend", "--embedder", "docs", "--user", "u1"), "--interactions"),
        (("recommend", "--embedder", "x", "--run", "r", "--row", "y", "--user", "u1"), "no --run"),
        (("embed", "absent.csv", "--model", "x", "--out", "v.safetensors"), "absent.csv"),
        (("embed", "README.md", "--model", "x", "--out", "no/such/v.safetensors"), "no/such"),
        (("embed", "README.md", "--model", "textrec", "--out", "v.safetensors"), "textrec holds no text embedder"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, named):
    outcome = textrec(*arguments)
    assert outcome.returncode == 2, outcome.stderr
    assert named in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1 and outcome.stderr.startswith("textrec: ")


def test_a_full_disk_is_one_sentence(monkeypatch, capsys):
    def fill(*words):
        raise OSError(errno.ENOSPC, "No space left on device", "items.npy")

    monkeypatch.setattr(cli, "app", lambda **options: fill())
    assert run_main(monkeypatch, "doctor") == 2
    assert capsys.readouterr().err == "textrec: items.npy could not be written: No space left on device\n"


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def break_down(**options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cli, "app", break_down)
    monkeypatch.setattr(sys, "argv", ["textrec", "doctor"])
    with pytest.raises(OSError, match="Input/output"):
        cli.main()


def test_options_take_several_values():
    assert list(cli.spread(["run", "01", "--seeds", "0", "1", "2", "--force"])) == [
        *("run", "01", "--seeds", "0", "--seeds", "1", "--seeds", "2", "--force"),
    ]
    assert parse("textrec run 01 --seeds 0 1 2")["seeds"] == [0, 1, 2]
    assert parse("textrec run 01 --seeds 0 --seeds 1")["seeds"] == [0, 1]
    assert parse("textrec run 01 --scale laptop")["number"] == "01"


class Shelf:
    """Two users and four items with external ids, as much of a prepared set as recommending needs."""

    name = "shelf"
    users = pd.Series(["anna", "ben"])
    catalogue = pd.DataFrame({"item": ["a", "b", "c", "d"], "title": ["Ant", "Bee", "Cat", "Dog"]})
    histories = Histories(np.array([1, 2, 4], dtype=np.int32), np.array([10, 20, 30]), np.array([0, 2, 3]))


def test_a_history_is_named_by_user_or_by_items():
    items = Shelf.catalogue["item"]
    assert cli.history_of(Shelf, "anna", None, items) == ([1, 2], [10, 20])
    assert cli.history_of(Shelf, "ben", None, items) == ([4], [30])
    assert cli.history_of(Shelf, None, ["d", "a"], items) == ([4, 1], [])
    assert cli.history_of(Shelf, None, ["new", "a"], [*items, "new"]) == ([5, 1], [])


@pytest.mark.parametrize(
    ("user", "history", "sentence"),
    [
        ("carl", None, "'carl' is no user of shelf"),
        (None, ["a", "z"], "'z', which is no item of shelf"),
        (None, None, "either --user or --history"),
        ("anna", ["a"], "either --user or --history"),
    ],
)
def test_an_unknown_history_is_refused(user, history, sentence):
    with pytest.raises(InputError, match=sentence):
        cli.history_of(Shelf, user, history, Shelf.catalogue["item"])


def test_failed_runs_fail_the_command(monkeypatch, capsys):
    from textrec.study import runner

    def run_notebook(number, *, seed, progress, **options):
        if progress:
            progress(f"{number} seed {seed}: cell 1 of 2")
        return runner.Outcome(number, seed, "failed" if seed else "ok", "ValueError: no" if seed else None, 1.0)

    monkeypatch.setattr(runner, "run_notebook", run_notebook)
    assert run_main(monkeypatch, "run", "00", "--seeds", "0") == 0
    assert capsys.readouterr().out == "00 seed 0: cell 1 of 2\n00 seed 0: ok, 1 s\n"
    assert run_main(monkeypatch, "run", "00", "--seeds", "0", "1", "--quiet") == 1
    assert capsys.readouterr().out == "00 seed 0: ok, 1 s\n00 seed 1: failed, 1 s: ValueError: no\n"


@pytest.fixture
def run_dir(tmp_path):
    """A run folder on the synthetic set with one untrained model."""
    from textrec.data.preparing import prepare
    from textrec.models.sasrec import SASRec, SASRecConfig

    prepared = prepare("synthetic")
    SASRec(SASRecConfig(num_items=prepared.num_items)).save_pretrained(tmp_path / "rows" / "sasrec_ce" / "model")
    dataset = {"name": prepared.name, "fingerprint": prepared.fingerprint}
    (tmp_path / "record.json").write_text(json.dumps({"dataset": dataset}), encoding="utf-8")
    return tmp_path


def test_recommended_items_carry_titles_and_are_not_of_the_history(monkeypatch, capsys, run_dir):
    words = ["recommend", "--run", str(run_dir), "--row", "sasrec_ce", "--history", "3", "17", "4", "-k", "57"]
    assert run_main(monkeypatch, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    ids = {line.split()[1] for line in lines}
    assert ids == {str(item) for item in range(1, 61)} - {"3", "17", "4"}
    assert all(len(line.split()) > 2 for line in lines)
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)


def test_an_embedder_recommends_on_two_own_files_and_writes_vectors(monkeypatch, capsys, tmp_path):
    from textrec import paths
    from textrec.data import preparing
    from textrec.data.item_text import item_attributes
    from textrec.data.tokenizing import train_tokenizer
    from textrec.models.text_encoder import save_random_embedder

    items = pd.DataFrame({"item": ["a", "b", "c", "d"], "title": ["tin kettle", "red kettle", "blue tent", "rope"]})
    items.to_csv(tmp_path / "items.csv", index=False)
    pd.DataFrame({"user": ["u", "u", "v"], "item": ["a", "c", "b"]}).to_csv(tmp_path / "sales.csv", index=False)
    save_random_embedder(train_tokenizer(item_attributes(items), 300), tmp_path / "model")
    for module, name in ((preparing, "PROCESSED"), (paths, "DATA")):
        monkeypatch.setattr(module, name, tmp_path / "data")
    words = ["--interactions", f"{tmp_path}/sales.csv", "--items", f"{tmp_path}/items.csv", "--user", "u", "-k", "4"]
    assert run_main(monkeypatch, "recommend", "--embedder", f"{tmp_path}/model", *words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
    assert {line.split()[1]: "(new)" in line for line in lines} == {"b": False, "d": True}
    out = tmp_path / "v.safetensors"
    assert (
        run_main(monkeypatch, "embed", f"{tmp_path}/items.csv", "--model", f"{tmp_path}/model", "--out", str(out)) == 0
    )
    assert capsys.readouterr().out.endswith(f"wrote 4 vectors of 32 numbers to {out}\n") and out.is_file()


def test_the_time_of_a_request_is_told_to_a_row_that_reads_times(monkeypatch, capsys, run_dir):
    import torch

    from textrec.models.hstu import HSTU, HSTUConfig

    torch.manual_seed(0)
    model = HSTU(HSTUConfig(num_items=60))
    with torch.no_grad():
        for block in model.blocks:  # the clock decides: a minute and a year read the history differently
            block.buckets.uniform_(-5, 5)
    model.save_pretrained(run_dir / "rows" / "hstu" / "model")
    words, told = ["recommend", "--run", str(run_dir), "--user"], {}
    user = str(prepared_users("synthetic").iloc[0])
    for at in (None, "1", "31536000"):
        assert run_main(monkeypatch, *words, user, "--row", "hstu", *(["--at", at] if at else [])) == 0
        told[at] = capsys.readouterr().out
    assert len(set(told.values())) == 3
    assert run_main(monkeypatch, *words, user, "--row", "sasrec_ce", "--at", "1") == 2
    assert "--at 1: expected a row that reads times" in capsys.readouterr().err


def prepared_users(name):
    from textrec.data.preparing import prepare

    return prepare(name).users


def test_new_items_are_recommended_by_their_texts_and_marked(monkeypatch, capsys, run_dir, tmp_path):
    from training.text_sets import SMALL

    from textrec.data.item_text import item_attributes
    from textrec.data.preparing import prepare
    from textrec.data.tokenizing import train_tokenizer
    from textrec.models.recformer import RecFormer
    from textrec.seeding import seed_everything
    from textrec.training.pretraining import save_tokenizer

    seed_everything(0)
    place = run_dir / "rows" / "two_stage" / "model"
    RecFormer(SMALL).save_pretrained(place)
    save_tokenizer(train_tokenizer(item_attributes(prepare("synthetic").catalogue), 400), place)
    new = [
        {"item": "n1", "title": "Kettle &amp; cup", "brand": None, "category": ["Tea", "Cups"]},
        {"item": "3", "title": "the set knows this one"},
        {"item": "n2", "title": "Rope"},
    ]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, new)), encoding="utf-8")

    def told(row: str, *words: str) -> list[str]:
        assert run_main(monkeypatch, "recommend", "--run", str(run_dir), "--row", row, *words) == 0
        return capsys.readouterr().out.splitlines()

    lines = told("two_stage", "--history", "3", "17", "4", "-k", "60")
    assert {line.split()[1] for line in lines} == {str(item) for item in range(1, 61)} - {"3", "17", "4"}
    added = ("--items", str(tmp_path / "new.jsonl"))
    lines = told("two_stage", "--user", "7", "--keep-seen", "-k", "62", *added)
    marked = [line for line in lines if line.endswith("  (new)")]
    assert len(lines) == 62 and sorted(line.split()[1] for line in marked) == ["n1", "n2"]
    assert any(line.endswith("n1  Kettle & cup  (new)") for line in marked)
    assert "n2" not in {line.split()[1] for line in told("two_stage", "--history", "n2", "3", "-k", "61", *added)}
    for words, named in (
        (("--row", "sasrec_ce", "--user", "7", *added), "--items needs a row with a model that reads texts"),
        (("--row", "two_stage", "--user", "7", "--items", "absent.jsonl"), "absent.jsonl is not a file"),
        (("--row", "two_stage", "--user", "7", "-k", "63", *added), "k=63"),
        (("--row", "zero_shot", "--user", "7"), "holds no saved model"),
    ):
        assert run_main(monkeypatch, "recommend", "--run", str(run_dir), *words) == 2
        refusal = capsys.readouterr().err
        assert refusal.startswith("textrec: ") and named in refusal and len(refusal.splitlines()) == 1


def test_a_model_of_another_version_of_the_set_is_refused(monkeypatch, capsys, run_dir):
    record = run_dir / "record.json"
    record.write_text(json.dumps({"dataset": {"name": "synthetic", "fingerprint": "0"}}), encoding="utf-8")
    assert run_main(monkeypatch, "recommend", "--run", str(run_dir), "--row", "sasrec_ce", "--user", "7") == 2
    assert "run it again" in capsys.readouterr().err


PUBLISHED = {  # our names and RecFormer's, as far as they differ
    "encoder.word_table": "longformer.embeddings.word_embeddings",
    "encoder.position_table": "longformer.embeddings.position_embeddings",
    "encoder.type_table": "longformer.embeddings.token_type_embeddings",
    "encoder.item_position_table": "longformer.embeddings.item_position_embeddings",
    "encoder.embedding_norm": "longformer.embeddings.LayerNorm",
    "encoder.blocks.0.attention_output": "longformer.encoder.layer.0.attention.output.dense",
    "encoder.blocks.0.attention_norm": "longformer.encoder.layer.0.attention.output.LayerNorm",
    "encoder.blocks.0.attention": "longformer.encoder.layer.0.attention.self",
    "encoder.blocks.0.enter": "longformer.encoder.layer.0.intermediate.dense",
    "encoder.blocks.0.leave": "longformer.encoder.layer.0.output.dense",
    "encoder.blocks.0.forward_norm": "longformer.encoder.layer.0.output.LayerNorm",
    "head.dense": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
    "head.decoder": "lm_head.decoder",
}


def test_a_published_recformer_becomes_a_folder_of_ours(tmp_path, monkeypatch, capsys):
    import torch

    from textrec.models.recformer import RecFormerConfig, RecFormerForPretraining

    config = RecFormerConfig(
        vocabulary_size=30, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12, num_positions=22,
        max_tokens=20, max_items=4, attention_window=4,
    )  # fmt: skip
    model = RecFormerForPretraining(config).eval()
    published = {}
    for name, value in model.state_dict().items():
        ours = max((each for each in PUBLISHED if name.startswith(each + ".")), key=len)
        published[f"_forward_module.model.{PUBLISHED[ours]}{name.removeprefix(ours)}"] = value
    settings = {
        "model_type": "longformer", "hidden_act": "gelu", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 22, "pad_token_id": 1,
        "layer_norm_eps": 1e-5, "token_type_size": 4, "max_item_embeddings": 5, "max_token_num": 20,
        "attention_window": [4],
    }  # fmt: skip
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    torch.save({"state_dict": published}, theirs / "pytorch_model.bin")
    (theirs / "config.json").write_text(json.dumps(settings))
    assert run_main(monkeypatch, "convert", str(theirs), str(tmp_path / "ours")) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'ours'}\n"
    converted = RecFormerForPretraining.from_pretrained(tmp_path / "ours")
    packed = torch.tensor([0, 5, 6, 7]), torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 1]), torch.tensor([4])
    scores = [each(*packed, torch.arange(4)) for each in (model, converted)]
    assert converted.config == config and torch.equal(*scores) and scores[0].std() > 0
    assert run_main(monkeypatch, "convert", str(theirs / "pytorch_model.bin"), str(tmp_path / "again")) == 2
    told = capsys.readouterr().err
    assert (
        told.startswith(f"textrec: {theirs / 'pytorch_model.bin'} does not fit") and not (tmp_path / "again").exists()
    )


def test_a_set_is_written_in_another_format(tmp_path, monkeypatch, capsys):
    from textrec.data.sources import recbole_atomic

    monkeypatch.setattr(cli, "load", lambda name, raw: name)
    monkeypatch.setattr(recbole_atomic, "export", lambda prepared, folder: folder / prepared)
    assert run_main(monkeypatch, "convert", "mine", str(tmp_path), "--to", "recbole_atomic") == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'mine'}\n"
