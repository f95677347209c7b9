"""Answers of a language model on disk: what was asked once of one model under one decoding is never asked again.

One file of JSON lines, which only grows; each line holds the question, the model, the decoding, the answer and their
key. Whole chunks are written and synced, so that a killed run loses one chunk; a line that it left unfinished is cut
off and asked again. Whoever has the file can score the answers anew without the model.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from textrec.schema import InputError


class Generations:
    """The answers in one file; they may be texts or numbers, whatever JSON knows."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._answers: dict[str, Any] = {}
        self._read_to = 0  # bytes

    def answers(
        self, questions: Sequence[Any], make: Callable[[list], Sequence[Any]], *, model: str,
        decoding: Mapping[str, Any], chunk: int = 64,
    ) -> list[Any]:  # fmt: skip
        """Return the answer to each question; `make` gives those that the file lacks, `chunk` questions at a time.

        `model` names the weights and the kind of server, `decoding` all that decides an answer beside them: a
        difference in either is another question. Raises `InputError` for a file with a line that is no answer.
        """
        keys = [answer_key(question, model, decoding) for question in questions]
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # whoever asks the same waits, and then reads
            self._read(file)
            missing = {key: q for key, q in zip(keys, questions, strict=True) if key not in self._answers}
            for start in range(0, len(missing), chunk):
                part = list(missing.items())[start : start + chunk]
                made = list(make([question for _, question in part]))
                if len(made) != len(part):
                    raise ValueError(f"{len(made)} answers were made to {len(part)} questions")
                told = {"model": model, "decoding": dict(decoding)}
                lines = [json.dumps({"key": key, **told, "question": question, "answer": answer}) + "\n"
                         for (key, question), answer in zip(part, made, strict=True)]  # fmt: skip
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
                self._read(file)
        return [self._answers[key] for key in keys]

    def _read(self, file) -> None:
        """Take in the lines behind those that are known, and cut off one that has no end."""
        file.seek(self._read_to)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                told = json.loads(line)
                self._answers[told["key"]] = told["answer"]
            except (ValueError, KeyError, TypeError):
                where = f"{self.path}: line {number} after byte {self._read_to}"
                raise InputError(f"{where} is no recorded answer; remove it, and it is asked again") from None
        self._read_to += len(whole)
        if len(whole) < len(content):
            file.truncate(self._read_to)


def answer_key(question: Any, model: str, decoding: Mapping[str, Any]) -> str:
    """Return the hash under which the answer is kept: of the question, the model and the decoding."""
    told = json.dumps([question, model, dict(decoding)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()
