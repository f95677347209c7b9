"""Raw Amazon JSON to a prepared set: ours against a plain script (json.loads per line, dicts), from the same files.

    python tests/benchmarks/bench_prepare.py --copies 60 [--unpacked]

The real files of three categories are copied with new user ids, so that the 5-core has work to do. Each side runs in a
process of its own and must find the same histories; time and peak memory are those of the process.
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

REVIEWS = ("All_Beauty_5.json.gz", "Gift_Cards_5.json.gz", "Magazine_Subscriptions_5.json.gz")
METADATA = ("meta_Gift_Cards.json.gz", "meta_Magazine_Subscriptions.json.gz")
CORE = 5
SIDES = ("plain", "ours")


def open_text(path: Path, mode: str = "rt"):
    return gzip.open(path, mode, encoding="utf-8") if path.suffix == ".gz" else path.open(mode, encoding="utf-8")


def write_copies(raw: Path, folder: Path, copies: int, ending: str) -> int:
    """Write the copied reviews and a tenth as many copies of the metadata; return the unpacked characters."""
    size = 0
    for name, sources, key, count in (
        ("reviews", REVIEWS, '"reviewerID": "', copies),
        ("meta", METADATA, '"asin": "', max(copies // 10, 1)),
    ):
        text = "".join(open_text(raw / source).read() for source in sources)
        with open_text(folder / f"{name}{ending}", "wt") as file:
            for copy in range(count):
                size += file.write(text.replace(key, f"{key}{copy}-") if copy else text)
    return size


def plain(reviews: Path, meta: Path, folder: Path) -> str:
    """Do what scripts of this field do: a dict a line, the whole log in lists, a k-core in Python; return a hash."""
    log = []
    with open_text(reviews) as file:
        for line in file:
            review = json.loads(line)
            log.append((review["reviewerID"], review["asin"], review["unixReviewTime"]))
    items = {}
    with open_text(meta) as file:
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


def digest(items) -> str:
    import numpy as np

    return hashlib.sha256(np.asarray(items, dtype=np.int32).tobytes()).hexdigest()


def measure(side: str, arguments: list[str]) -> dict:
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, "--side", side, *arguments], stdout=subprocess.PIPE, text=True
    )
    output = process.stdout.read().strip()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the side {side!r} failed")
    cpu = usage.ru_utime + usage.ru_stime
    return {"hash": output, "seconds": time.perf_counter() - started, "cpu": cpu, "peak_mib": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, default=Path(os.environ.get("TEXTREC_DATA", "data/raw"), "raw/amazon-2018"))
    parser.add_argument("--copies", type=int, default=60)
    parser.add_argument("--unpacked", action="store_true", help="plain .json instead of .json.gz")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ending = ".json" if arguments.unpacked else ".json.gz"
    if arguments.side:
        files = (arguments.folder / f"{name}{ending}" for name in ("reviews", "meta"))
        print({"plain": plain, "ours": ours}[arguments.side](*files, arguments.folder))
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-prepare-"))
    try:
        size = write_copies(arguments.raw, folder, arguments.copies, ending)
        passed = ["--folder", str(folder), *(["--unpacked"] if arguments.unpacked else [])]
        results = {side: measure(side, passed) for side in SIDES}
    finally:
        shutil.rmtree(folder)
    if results["plain"]["hash"] != results["ours"]["hash"]:
        raise SystemExit("the two sides found different histories")
    print(f"{size / 2**20:,.0f} MiB of JSON as {ending}; both sides found the same histories")
    print(f"{'':<6}{'wall s':>9}{'CPU s':>9}{'peak MiB':>10}")
    for side, result in results.items():
        print(f"{side:<6}{result['seconds']:>9.1f}{result['cpu']:>9.1f}{result['peak_mib']:>10,.0f}")
    ratios = [results["plain"][key] / results["ours"][key] for key in ("seconds", "cpu", "peak_mib")]
    print(f"{'ratio':<6}{ratios[0]:>9.2f}{ratios[1]:>9.2f}{ratios[2]:>10.2f}")


if __name__ == "__main__":
    main()
