"""The absolute paths of the project, once."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
RUNS = ROOT / "papermill_runs"
PARAMETERS = RUNS / "parameters"
FIGURES = ROOT / "figures"
DATA = ROOT / "data"
PROCESSED = DATA / "processed"
TOKENS = DATA / "tokens"  # item texts as tokens, by content


def raw_data() -> Path:
    """Return the folder of raw data sets: `$TEXTREC_DATA` where it is set, else `data/raw`; never written to."""
    configured = os.environ.get("TEXTREC_DATA")
    return Path(configured).expanduser().resolve() if configured else DATA / "raw"
