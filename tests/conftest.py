"""Fixtures shared by all tests: the real data sets and the originals' numbers, where they are at hand."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped, with the reason, where it is absent."""
    configured = os.environ.get("TEXTREC_DATA")
    if not configured or not Path(configured).is_dir():
        pytest.skip("needs the real data sets: set TEXTREC_DATA to their folder")
    return Path(configured).resolve()


@pytest.fixture(scope="session")
def golden(real_data: Path) -> Path:
    """The folder of numbers recorded from the original implementations, beside the data sets."""
    folder = real_data.parent / "golden"
    if not folder.is_dir():
        pytest.skip(f"needs the recorded numbers of the original implementations beside {real_data.name}/")
    return folder
