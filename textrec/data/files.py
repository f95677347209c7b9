"""Writing files so that nothing half-written looks finished, and the full disk that comes in between."""

import errno
import gzip
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from textrec.schema import InputError

BLOCK = 2**18  # bytes unpacked at a time: they stay in the processor's cache
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


@contextmanager
def unpacking(pipes: Mapping[Path, Path]) -> Iterator[None]:
    """Make named pipes (pipe: gzip file) and unpack the files into them while the block reads: no disk holds them whole.

    isal takes a third of zlib's time. What breaks off the unpacking is raised as `InputError` in place of the block's
    complaint about half a file.
    """
    from concurrent.futures import ThreadPoolExecutor

    for pipe in pipes:
        os.mkfifo(pipe)
    with ThreadPoolExecutor(len(pipes) or 1) as pool:
        tasks = {pipe: pool.submit(_unpack, path, pipe) for pipe, path in pipes.items()}
        try:
            yield
        finally:
            for pipe, task in tasks.items():
                while not task.done():  # it waits for a reader that never came
                    os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
                    time.sleep(0.001)
            for task in tasks.values():
                task.result()


def _unpack(path: Path, pipe: Path) -> None:
    from isal import igzip, isal_zlib

    try:
        with suppress(BrokenPipeError), pipe.open("wb") as unpacked, igzip.open(path) as file:
            shutil.copyfileobj(file, unpacked, BLOCK)
    except (EOFError, gzip.BadGzipFile, isal_zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
