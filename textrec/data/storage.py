"""Folders that appear whole or not at all, arrays written by appending, and the database that works beside them."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MEMORY_LIMIT = "2GB"  # of DuckDB; beyond it, tables spill to the partial folder


def write_header(file, dtype, shape: tuple[int, ...]) -> None:
    """Write the head of a .npy file; NumPy leaves room in it for the first number to grow."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


class ArrayFile:
    """A .npy file of known length that grows by appending; plain writes, as a full disk kills a memory map."""

    def __init__(self, file, dtype, length: int):
        write_header(file, dtype, (length,))
        self.file, self.dtype, self.digest = file, dtype, hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)


@contextmanager
def array_file(path: Path, dtype, length: int) -> Iterator[ArrayFile]:
    with path.open("wb") as file:
        yield ArrayFile(file, dtype, length)


@contextmanager
def staged_folder(folder: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a partial folder beside `folder` that takes its place, synced, when the block ends well; else it goes.

    With `keep_existing`, for a folder named by its content, what another process has put there meanwhile stays: that
    process may be reading it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        _take_place(partial, folder, keep_existing)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_place(partial: Path, folder: Path, keep_existing: bool) -> None:
    old = partial.with_name(f"{partial.name}-old")
    for _attempt in range(10):  # another process may put its own copy in place between the two renames
        if folder.exists() and not keep_existing:
            folder.rename(old)
        try:
            partial.rename(folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if keep_existing:
                break
        finally:
            shutil.rmtree(old, ignore_errors=True)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def database(folder: Path, memory_limit: str = MEMORY_LIMIT) -> Iterator:
    """Yield a DuckDB connection whose tables live in memory and spill to `folder`, which is gone afterwards."""
    import duckdb

    folder.mkdir()
    try:
        with duckdb.connect(config={"memory_limit": memory_limit, "temp_directory": str(folder)}) as connection:
            yield connection
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
