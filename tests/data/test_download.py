"""Downloads from servers on this machine that fail, cut, lie and answer ranges."""

import hashlib
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from textrec.data import download as downloads
from textrec.data.download import download, download_set, known_downloads
from textrec.schema import InputError

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """/good, /cut (half of what was asked, once per request), /corrupt, /missing, /page, /changed (new version)."""

    requests: list[tuple[str, str | None, int]] = []
    version = '"1"'

    def do_GET(self):
        path, wanted = self.path, self.headers.get("Range")
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        condition = self.headers.get("If-Range")
        if path == "/changed" and condition and condition != Handler.version:
            start = 0
        status = 404 if path == "/missing" else 416 if start >= len(CONTENT) else 206 if start else 200
        Handler.requests.append((path, wanted, status))
        body = b"" if status in (404, 416) else (b"?" * len(CONTENT) if path == "/corrupt" else CONTENT)[start:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "text/html" if path == "/page" else "application/octet-stream")
        self.send_header("ETag", Handler.version)
        if status in (206, 416):
            place = f"{start}-{len(CONTENT) - 1}" if body else "*"
            self.send_header("Content-Range", f"bytes {place}/{len(CONTENT)}")
        self.end_headers()
        self.wfile.write(body[: (len(body) + 1) // 2] if path == "/cut" else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Handler.requests, Handler.version = [], '"1"'
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join()


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_first_mirror_that_delivers_wins(server, tmp_path):
    steps = []
    mirrors = [
        "http://127.0.0.1:9/nobody",
        f"{server}/missing",
        f"{server}/page",
        f"{server}/good",
        f"{server}/corrupt",
    ]
    path = download(
        "a.bin", tmp_path, mirrors=mirrors, sha256=SHA256, size=len(CONTENT), progress=lambda *step: steps.append(step)
    )
    assert path.read_bytes() == CONTENT
    assert left(tmp_path) == ["a.bin"]
    assert [request[0] for request in Handler.requests] == ["/missing", "/page", "/good"]
    assert steps[-1] == ("a.bin", len(CONTENT), len(CONTENT))


def test_a_cut_connection_is_resumed_by_range(server, tmp_path):
    with pytest.raises(InputError, match="cut after"):
        download("a.bin", tmp_path, mirrors=[f"{server}/cut"], sha256=SHA256)
    starts = [int(wanted[6:-1]) if wanted else 0 for _, wanted, _ in Handler.requests]
    assert starts == [len(CONTENT) * (2**n - 1) // 2**n for n in range(downloads.ATTEMPTS)]
    assert left(tmp_path) == ["a.bin.partial", "a.bin.partial-origin"]
    path = download("a.bin", tmp_path, mirrors=[f"{server}/good"], sha256=SHA256)  # pinned: any mirror may go on
    assert Handler.requests[-1][2] == 206
    assert path.read_bytes() == CONTENT
    assert left(tmp_path) == ["a.bin"]


def test_an_unpinned_file_is_resumed_only_in_the_same_version_from_the_same_mirror(server, tmp_path):
    partial, origin = tmp_path / "a.bin.partial", tmp_path / "a.bin.partial-origin"
    for version, url, status in (('"1"', "/changed", 206), ('"0"', "/changed", 200), ('"1"', "/good", 200)):
        partial.write_bytes(CONTENT[:1000])
        origin.write_text(f"{server}/changed\n{version}", encoding="utf-8")
        path = download("a.bin", tmp_path, mirrors=[server + url])
        assert Handler.requests[-1][2] == status
        assert path.read_bytes() == CONTENT
        path.unlink()


def test_a_whole_partial_file_is_finished_without_another_byte(server, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(CONTENT)
    assert download("a.bin", tmp_path, mirrors=[f"{server}/good"], sha256=SHA256).read_bytes() == CONTENT
    assert [request[2] for request in Handler.requests] == [416]


def test_a_partial_file_that_is_too_long_is_started_anew(server, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(CONTENT + b"more")
    assert download("a.bin", tmp_path, mirrors=[f"{server}/good"], sha256=SHA256).read_bytes() == CONTENT


def test_a_corrupt_file_is_refused_and_removed(server, tmp_path):
    with pytest.raises(
        InputError, match=r"a.bin could not be downloaded .*another sha256.*get a.bin from the page"
    ) as caught:
        download("a.bin", tmp_path, mirrors=[f"{server}/corrupt"], sha256=SHA256, page="the page")
    assert left(tmp_path) == []
    assert str(tmp_path) in str(caught.value)


def test_a_wrong_size_is_refused(server, tmp_path):
    with pytest.raises(InputError, match="has 1048576 bytes, expected 7"):
        download("a.bin", tmp_path, mirrors=[f"{server}/good"], size=7)


def test_a_file_at_hand_needs_no_network(tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    assert download("a.bin", tmp_path, mirrors=["http://127.0.0.1:9/nobody"], sha256=SHA256) == tmp_path / "a.bin"


def test_a_wrong_file_at_hand_is_named_and_kept(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match="delete it to fetch it again"):
        download("a.bin", tmp_path, mirrors=[], sha256=SHA256)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"


def test_no_public_address_says_where_to_get_and_to_put_it(tmp_path):
    with pytest.raises(InputError, match=r"raw/hm/transactions_train.csv could not be .* from https://www.kaggle.com/"):
        download_set("hm", tmp_path)


def test_two_processes_do_not_write_one_file(server, tmp_path):
    with (
        downloads._locked(tmp_path / "a.bin.partial", tmp_path / "a.bin"),
        pytest.raises(InputError, match="another process"),
    ):
        download("a.bin", tmp_path, mirrors=[f"{server}/good"])


@pytest.fixture
def archive(server, tmp_path, monkeypatch):
    """A set of one archive that is at hand already, so that only unpacking is left."""
    path = tmp_path / "raw" / "toy" / "toy.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("toy-1/ratings.dat", "1::2::5::10\n")
        opened.writestr("toy-1/old/movies.dat", "two")
        opened.writestr("toy-1/movies.dat", "one")
    file = {"path": "raw/toy/toy.zip", "members": {"ratings.dat": "raw/toy/ratings.dat"}}
    monkeypatch.setattr(downloads, "known_downloads", lambda: {"toy": {"page": "nowhere", "files": [file]}})
    return path, file


def test_archives_are_unpacked_and_unpinned_ones_say_so(archive, tmp_path):
    path, _ = archive
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert download_set("toy", tmp_path) == [f"{path}: not pinned, its sha256 is {digest}"]
    assert (tmp_path / "raw/toy/ratings.dat").read_text(encoding="utf-8") == "1::2::5::10\n"
    path.unlink()  # what was taken out is enough
    assert download_set("toy", tmp_path) == [f"{tmp_path / 'raw/toy/ratings.dat'}: already there"]


@pytest.mark.parametrize(("member", "count"), [("movies.dat", 2), ("users.dat", 0)])
def test_a_member_must_be_there_once(archive, tmp_path, member, count):
    archive[1]["members"] = {member: "raw/toy/out"}
    with pytest.raises(InputError, match=f"holds {count} files named {member}"):
        download_set("toy", tmp_path)


def test_a_damaged_archive_is_one_sentence(archive, tmp_path):
    archive[0].write_bytes(archive[0].read_bytes()[:50])
    with pytest.raises(InputError, match="no readable zip archive"):
        download_set("toy", tmp_path)
    assert not (tmp_path / "raw/toy/ratings.dat").exists()


def test_categories_fill_the_amazon_entries(server, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        downloads, "download", lambda name, folder, **options: seen.append((name, options["mirrors"][0]))
    )
    monkeypatch.setattr(downloads, "sha256_of", lambda path: "unknown")
    download_set("amazon-2018-Industrial_and_Scientific", tmp_path)
    assert [name for name, _ in seen] == [
        "Industrial_and_Scientific_5.json.gz",
        "meta_Industrial_and_Scientific.json.gz",
    ]
    assert all("{" not in url and url.startswith("https://") for _, url in seen)
    with pytest.raises(InputError, match="no public download of 'amazon-2018-scientific' is known"):
        download_set("amazon-2018-scientific", tmp_path)


def test_every_known_file_can_be_named_fetched_or_got_by_hand():
    for name, entry in known_downloads().items():
        assert entry["page"].startswith("https://"), name
        for file in entry["files"]:
            assert set(file) <= {"path", "mirrors", "sha256", "bytes", "members"}, name
            assert file["path"].startswith("raw/")
            assert len(file.get("sha256", "0" * 64)) == 64


@pytest.mark.real
def test_pinned_files_are_those_at_hand(real_data):
    pinned = {}
    for line in (real_data / "MANIFEST.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        path, size, sha256 = line.split("\t")
        pinned[path] = {"bytes": int(size), "sha256": sha256}
    described = [file for entry in known_downloads().values() for file in entry["files"] if file["path"] in pinned]
    assert len(described) == 5
    for file in described:
        assert {key: file[key] for key in ("bytes", "sha256")} == pinned[file["path"]]
