"""Public files: several mirrors, resume after a cut, a checksum before the rename, and a cache that needs no network.

`downloads.yaml` knows the files. A file in the making is `<name>.partial`, without a process number, because the next
attempt goes on from it; a lock keeps two processes from writing it at once.
"""

import fcntl
import http.client
import json
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from textrec.data.choices import matching
from textrec.data.files import naming_full_disk, replacing
from textrec.data.storage import sha256_of
from textrec.paths import raw_data
from textrec.schema import InputError

TIMEOUT_SECONDS = 30
ATTEMPTS = 4  # at one mirror, each from where the one before was cut
BLOCK_BYTES = 2**20
Progress = Callable[[str, int, int | None], None]  # file name, bytes so far, bytes in all where the mirror says it
UNREACHABLE = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


@cache
def known_downloads() -> dict[str, dict]:
    """Return `downloads.yaml`: name -> page and files."""
    import yaml

    return yaml.safe_load((Path(__file__).parent / "downloads.yaml").read_text(encoding="utf-8"))


def download_set(name: str, raw: Path | None = None, *, progress: Progress | None = None) -> list[str]:
    """Fetch and unpack what is missing of the set `name`; return a line per file: where it is, what vouches for it."""
    raw = Path(raw) if raw else raw_data()
    entry = _entry(name)
    lines = []
    for file in entry["files"]:
        path = raw / file["path"]
        members = {member: raw / target for member, target in file.get("members", {}).items()}
        if members and all(target.is_file() for target in members.values()):
            lines.append(f"{', '.join(map(str, members.values()))}: already there")
            continue
        sha256 = file.get("sha256")
        download(
            path.name, path.parent, mirrors=file.get("mirrors", []), sha256=sha256, size=file.get("bytes"),
            page=entry["page"], progress=progress,
        )  # fmt: skip
        lines.append(f"{path}: {'sha256 as pinned' if sha256 else f'not pinned, its sha256 is {sha256_of(path)}'}")
        _unpack(path, members)
    return lines


def download(
    name: str,
    folder: Path,
    *,
    mirrors: Sequence[str],
    sha256: str | None = None,
    size: int | None = None,
    page: str = "its publisher",
    progress: Progress | None = None,
) -> Path:
    """Return `folder/name`, fetched from the first mirror that delivers it whole; a file at hand is used as it is.

    Raises `InputError` where no mirror delivers, or where the file at hand is not the pinned one.
    """
    path = Path(folder) / name
    partial = path.with_name(f"{name}.partial")
    if path.is_file():
        return _cached(path, sha256, size, page)
    failures = []
    with _locked(partial, path) as file:
        if path.is_file():  # another process has finished meanwhile
            return _cached(path, sha256, size, page)
        for url in mirrors:
            try:
                _fetch_whole(url, file, partial, pinned=sha256 is not None, progress=progress)
            except UNREACHABLE as error:
                failures.append(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}")
                continue
            wrong = _difference(partial, sha256, size)
            if not wrong:
                os.fsync(file.fileno())
                os.replace(partial, path)
                return path
            failures.append(f"{url}: the file {wrong}")
            _start_anew(file)
    tried = f" ({'; '.join(failures)})" if failures else ", as there is no public address for it"
    raise InputError(f"{path} could not be downloaded{tried}: get {name} from {page} and put it there")


def _cached(path: Path, sha256: str | None, size: int | None, page: str) -> Path:
    wrong = _difference(path, sha256, size)
    if wrong:
        raise InputError(f"{path} {wrong}: delete it to fetch it again, or put the right one there from {page}")
    return path


def _fetch_whole(url: str, file: BinaryIO, partial: Path, *, pinned: bool, progress: Progress | None) -> None:
    for attempt in range(ATTEMPTS):
        before = file.tell()
        try:
            with naming_full_disk(partial, "download again, it resumes"):
                return _fetch(url, file, partial, pinned=pinned, progress=progress)
        except (http.client.IncompleteRead, ConnectionError, TimeoutError):
            if attempt == ATTEMPTS - 1 or file.tell() == before:
                raise


def _fetch(url: str, file: BinaryIO, partial: Path, *, pinned: bool, progress: Progress | None) -> None:
    """Append what is missing to `file`; start anew where what is there may be of another file."""
    origin = partial.with_name(f"{partial.name}-origin")  # address and version of the bytes so far
    known_url, _, version = origin.read_text(encoding="utf-8").partition("\n") if origin.is_file() else ("", "", "")
    headers = {"User-Agent": "textrec", "Accept-Encoding": "identity"}
    if file.tell() and (pinned or (known_url == url and version)):
        headers |= {"Range": f"bytes={file.tell()}-"} | ({} if pinned else {"If-Range": version})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") == f"bytes */{file.tell()}":  # all of it was here before
            return
        _start_anew(file)
        raise ConnectionError("what was there is longer than the file") from error
    with response:
        if response.headers.get_content_type() == "text/html":
            raise urllib.error.URLError("a web page came in place of the file")
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            _start_anew(file)
        origin.write_text(f"{url}\n{response.headers.get('ETag') or response.headers.get('Last-Modified') or ''}")
        length = response.headers.get("Content-Length")
        total = file.tell() + int(length) if length else None
        while block := response.read(BLOCK_BYTES):
            _write(file, block)
            if progress:
                progress(partial.name.removesuffix(".partial"), file.tell(), total)
    if total is not None and file.tell() < total:
        raise ConnectionError(f"the connection was cut after {file.tell()} of {total} bytes")


def _write(file: BinaryIO, block: bytes) -> None:
    view = memoryview(block)
    while view:  # an unbuffered write may take less than it is given
        view = view[file.write(view) :]


def _start_anew(file: BinaryIO) -> None:
    file.truncate(0)
    file.seek(0)


def _difference(path: Path, sha256: str | None, size: int | None) -> str:
    """Return what is wrong with a file, or nothing."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"has {found} bytes, expected {size}"
    if sha256 is not None and sha256_of(path) != sha256:
        return f"has another sha256 than {sha256}"
    return ""


@contextmanager
def _locked(partial: Path, path: Path) -> Iterator[BinaryIO]:
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{path} is being downloaded by another process: wait for it") from error
        try:
            yield file
        finally:
            if partial.exists() and partial.stat().st_size == 0:
                partial.unlink()
            if not partial.exists():
                partial.with_name(f"{partial.name}-origin").unlink(missing_ok=True)


def _unpack(archive: Path, members: Mapping[str, Path]) -> None:
    """Take named files out of a zip archive, whatever folder they lie in there."""
    if not members:
        return
    try:
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
            for member, target in members.items():
                found = [name for name in names if f"/{name}".endswith(f"/{member}")]
                if len(found) != 1:
                    raise InputError(f"{archive} holds {len(found)} files named {member}; expected one")
                with replacing(target) as partial, opened.open(found[0]) as source, partial.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    except zipfile.BadZipFile as error:
        raise InputError(f"{archive} is no readable zip archive ({error}): delete it and download it again") from error


def _entry(name: str) -> dict:
    """Return the entry that `name` means, its category filled in."""
    entries = known_downloads()
    pattern, category = matching(name, entries)
    if pattern is None:
        told = f"no public download of {name!r} is known (known: {', '.join(entries)})"
        raise InputError(f"{told}: put its files by hand where `textrec data prepare` looks for them")
    return json.loads(json.dumps(entries[pattern]).replace("{category}", category))
