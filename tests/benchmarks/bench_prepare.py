"""Raw Amazon JSON to a prepared set: ours against what scripts of this field do, from the same files.

    python tests/benchmarks/bench_prepare.py [--copies 60] [--rounds 3] [--unpacked]

The real files of three categories are copied with new user ids, so that the 5-core has work to do. Every side runs in a
process of its own, one after the other, round after round; times are the best of the rounds, start of Python included.
`zlib`, `isal` and `scan` do nothing with what they read: no reader that unpacks or parses as they do takes less.
"""

import argparse
import gzip
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from _ratio import machine

REVIEWS = ("All_Beauty_5.json.gz", "Gift_Cards_5.json.gz", "Magazine_Subscriptions_5.json.gz")
METADATA = ("meta_Gift_Cards.json.gz", "meta_Magazine_Subscriptions.json.gz")
CORE = 5


def open_binary(path: Path, mode: str = "rb"):
    return gzip.open(path, mode) if path.suffix == ".gz" else path.open(mode)


def write_copies(raw: Path, folder: Path, copies: int, ending: str) -> tuple[int, int]:
    """Write the copied reviews and a tenth as many copies of the metadata; return lines and unpacked bytes."""
    lines = size = 0
    for name, sources, key, count in (
        ("reviews", REVIEWS, b'"reviewerID": "', copies),
        ("meta", METADATA, b'"asin": "', max(copies // 10, 1)),
    ):
        text = b"".join(open_binary(raw / source).read() for source in sources)
        with open_binary(folder / f"{name}{ending}", "wb") as file:
            for copy in range(count):
                size += file.write(text.replace(key, b"%s%d-" % (key, copy)) if copy else text)
        lines += count * text.count(b"\n")
    return lines, size


def plain(reviews: Path, meta: Path, folder: Path) -> str:
    """Do what scripts of this field do: a dict a line, the whole log in lists, a k-core in Python; return a hash."""
    log = []
    with open_binary(reviews) as file:
        for line in file:
            review = json.loads(line)
            log.append((review["reviewerID"], review["asin"], review["unixReviewTime"]))
    items = {}
    with open_binary(meta) as file:
        for line in file:
            record = json.loads(line)
            title = re.sub("<[^>]*>", " ", html.unescape(record.get("title") or ""))
            items.setdefault(record["asin"], (title, record.get("brand"), " ".join(record.get("category") or [])))
    before = None
    while before != len(log):
        before = len(log)
        users, counts = defaultdict(int), defaultdict(int)
        for user, item, _ in log:
            users[user] += 1
            counts[item] += 1
        log = [row for row in log if users[row[0]] >= CORE and counts[row[1]] >= CORE]
    histories = defaultdict(list)
    for user, item, seconds in log:
        histories[user].append((seconds, item))
    numbers = {item: number for number, item in enumerate(sorted({item for _, item, _ in log}), start=1)}
    sequences = {}
    for user in sorted(histories):
        sequences[user] = [numbers[item] for _, item in sorted(histories[user], key=lambda row: row[0])]
    texts = {item: items.get(item) for item in numbers}
    (folder / "plain.json").write_text(json.dumps({"sequences": sequences, "items": texts}), encoding="utf-8")
    return digest([item for sequence in sequences.values() for item in sequence])


def ours(reviews: Path, meta: Path, folder: Path) -> str:
    from textrec.data.choices import Choices
    from textrec.data.preparing import SetRecipe, prepare_recipe

    choices = Choices(min_user=CORE, min_item=CORE, core_repeat=True)
    recipe = SetRecipe(name="bench", reader="amazon.read")
    files = {"interactions": reviews, "items": meta}
    return digest(prepare_recipe("bench", recipe, files, choices, folder / "processed").histories.items_E)


def unpack(reviews: Path, meta: Path, folder: Path, opener=gzip.open) -> str:
    for path in (reviews, meta):
        with opener(path) as file:
            while file.read(1 << 18):
                pass
    return ""


def unpack_isal(reviews: Path, meta: Path, folder: Path) -> str:
    from isal import igzip

    return unpack(reviews, meta, folder, igzip.open)


def scan(reviews: Path, meta: Path, folder: Path) -> str:
    """Unpack both files and let DuckDB read and count the named fields, as our reader does."""
    from textrec.data.sources import amazon
    from textrec.data.storage import database

    with database(folder / "work") as connection:
        tables = amazon.read(connection, {"interactions": reviews, "items": meta})
        for query, names in ((tables.interactions, "user, item, time"), (tables.items, "item, title, brand, category")):
            counted = ", ".join(f"count({name})" for name in names.split(", "))
            connection.execute(f"SELECT {counted} FROM ({query})").fetchall()
    return ""


def digest(items) -> str:
    import numpy as np

    return hashlib.sha256(np.asarray(items, dtype=np.int32).tobytes()).hexdigest()


WORKS = {"plain": plain, "ours": ours, "scan": scan, "zlib": unpack, "isal": unpack_isal}
SIDES = {"plain": ("plain", 1), "ours, 1 core": ("ours", 1), "ours, 2 cores": ("ours", 2), "scan, 1 core": ("scan", 1),
         "zlib": ("zlib", 1), "isal": ("isal", 1)}  # fmt: skip


def measure(work: str, cores: int, folder: Path, ending: str) -> dict:
    """Run one side in a process of its own on so many cores."""
    shutil.rmtree(folder / "processed", ignore_errors=True)
    command = [sys.executable, __file__, "--work", work, "--cores", str(cores), "--folder", str(folder)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--ending", ending], stdout=subprocess.PIPE, text=True)
    output = process.stdout.read().strip()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{work!r} failed")
    cpu = usage.ru_utime + usage.ru_stime
    return {"hash": output, "wall": time.perf_counter() - started, "cpu": cpu, "peak_mib": usage.ru_maxrss / 1024}


def compare(raw: Path, copies: int, ending: str, rounds: int) -> None:
    """Measure all sides on files of one size and print them as a table."""
    folder = Path(tempfile.mkdtemp(prefix="bench-prepare-"))
    try:
        lines, size = write_copies(raw, folder, copies, ending)
        runs = {side: [] for side in SIDES if ending == ".json.gz" or side not in ("zlib", "isal")}
        for _ in range(rounds):
            for side in runs:
                runs[side].append(measure(*SIDES[side], folder, ending))
    finally:
        shutil.rmtree(folder)
    if len({run["hash"] for side in runs for run in runs[side]} - {""}) > 1:
        raise SystemExit("the sides found different histories")
    best = {side: {key: min(run[key] for run in runs[side]) for key in ("wall", "cpu", "peak_mib")} for side in runs}
    print(f"\n{lines:,} lines, {size / 2**20:,.0f} MiB of JSON as {ending}; best of {rounds}; same histories\n")
    print("| side | wall s | CPU s | peak MiB | plain / side, wall | CPU |\n|---|--:|--:|--:|--:|--:|")
    for side, took in best.items():
        ratios = [best["plain"][key] / took[key] for key in ("wall", "cpu")]
        numbers = f"{took['wall']:.1f} | {took['cpu']:.2f} | {took['peak_mib']:,.0f}"
        print(f"| {side} | {numbers} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, default=Path(os.environ.get("TEXTREC_DATA", "data/raw"), "raw/amazon-2018"))
    parser.add_argument("--copies", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unpacked", action="store_true", help="plain .json instead of .json.gz")
    for hidden, kind in (("--work", str), ("--cores", int), ("--folder", Path), ("--ending", str)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])  # DuckDB takes a thread a core
        files = (arguments.folder / f"{name}{arguments.ending}" for name in ("reviews", "meta"))
        print(WORKS[arguments.work](*files, arguments.folder))
        return
    print(machine())
    ending = ".json" if arguments.unpacked else ".json.gz"
    for copies in (arguments.copies // 10, arguments.copies):  # does memory grow with the file?
        compare(arguments.raw, copies, ending, arguments.rounds)


if __name__ == "__main__":
    main()
