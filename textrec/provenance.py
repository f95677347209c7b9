"""Which code made a result: the commit, and a hash of source files that comments and docstrings do not change."""

import ast
import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from textrec.paths import ROOT


def code_hash(files: Iterable[Path]) -> str:
    """Return a hash of what the Python `files` do: their syntax trees without docstrings."""
    digest = hashlib.sha256()
    for path in sorted(files):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
                node.body = node.body[1:]
        digest.update(path.name.encode() + b"\0" + ast.dump(tree).encode() + b"\0")
    return digest.hexdigest()[:16]


def commit_state(files: Iterable[Path] = ()) -> tuple[str, bool]:
    """Return the commit and whether `files` (all tracked files where none are named) differ from it.

    Outside a git checkout the commit is "unknown" and the state counts as dirty.
    """
    names = [str(path) for path in files]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", *names],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return commit.stdout.strip(), bool(status.stdout.strip())
