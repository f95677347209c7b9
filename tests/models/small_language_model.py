"""A tiny Mistral made on the spot, for the tests of whatever asks a language model."""

from pathlib import Path

import pandas as pd

from textrec.training.small_mistral import rehearsed_prompts, small_mistral

TITLES = ["red glue", "blue glue", "paint brush", "round brush", "sharp knife", "paper", "card", "pen"]
CATALOGUE = pd.DataFrame({"title": TITLES, "brand": ["Kzogg", "Qwumm"] * 4})


def tiny(folder: Path, seed: int = 0, steps: int = 2, **more) -> Path:
    texts = [*TITLES, *rehearsed_prompts(TITLES, 20, 4, seed)]
    return small_mistral(CATALOGUE, texts, folder, seed=seed, steps=steps, num_tokens=300, length=64, **more)
