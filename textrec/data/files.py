"""Writing files so that nothing half-written looks finished, and the full disk that comes in between."""

import errno
import gzip
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from textrec.schema import InputError

BLOCK = 2**18  # bytes unpacked at a time: they stay in the processor's cache
ROOM = 20  # a file is unpacked where the disk has room for so many times its size; JSON grows 4 to 10 times
NO_SPACE = re.compile("No space left on device|Disk quota exceeded")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a partial path beside `path`; when the block ends well it is synced and takes its place, else it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears under its name only when it is complete and on the disk."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove_partials(folder: Path, name: str = "**/*") -> None:
    """Remove what killed processes left in `folder` of partial files and folders called `name` (a pattern).

    A partial of this process's own number is of an earlier process: nothing may be half-written at the time.
    """
    for path in sorted(folder.glob(f"{name}.partial-*")):
        pid = int(re.search(r"\.partial-(\d+)", path.name)[1])
        if pid == os.getpid() or not _alive(pid):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, as another user's
        pass
    return True


@contextmanager
def naming_full_disk(folder: Path, then: str) -> Iterator[None]:
    """Turn the error of a full disk, Python's or a library's, into one sentence that ends with what to do `then`."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and not NO_SPACE.search(str(error)):
            raise
        raise InputError(f"the disk of {folder} is full: free some space and {then}") from error


def unpacked(path: Path, folder: Path) -> Path:
    """Return a copy of a gzip file in `folder`, unpacked by isal in a third of zlib's time; `path` on a small disk.

    Raises `InputError` where the file is no gzip, ends too early or fails its checksum.
    """
    if shutil.disk_usage(folder).free < ROOM * path.stat().st_size:
        return path
    from isal import igzip, isal_zlib

    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=folder)
    try:
        with open(descriptor, "wb") as copy, igzip.open(path) as file:
            shutil.copyfileobj(file, copy, BLOCK)
    except (EOFError, gzip.BadGzipFile, isal_zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return Path(name)
