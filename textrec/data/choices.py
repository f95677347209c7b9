"""Everything that changes who is tested on what, as one validated object."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from textrec.data.filtering import CORE_ORDERS
from textrec.data.splitting import SPLITS
from textrec.schema import InputError

ALLOWED = {
    "duplicate_rule": ("keep_all", "keep_first", "keep_last"),
    "core_order": CORE_ORDERS,
    "time_tie_rule": ("stable", "hash", "item_id", "given"),
    "missing_time_rule": ("refuse", "drop", "row_order"),
    "split": SPLITS,
    "cold_targets": ("keep", "drop"),
    "catalogue": ("interacted", "all"),
    "unknown_items": ("keep", "drop", "refuse"),
    "duplicate_items": ("first_non_empty", "refuse"),
}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Everything that changes who is tested on what, in the order in which it is applied."""

    missing_time_rule: str = "refuse"  # row_order: a blank time is that of the user's preceding row
    min_rating: float | None = None  # keep interactions rated at least this; blank ratings go
    time_tie_rule: str = "stable"  # equal times: file order | hash of user, item, time | item id; given: file order
    duplicate_rule: str = "keep_all"  # repeated user-item pairs, first and last in the order above
    unknown_items: str = "keep"  # items of the interactions without a row in the item table
    min_user: int = 0  # interactions per user
    min_item: int = 0  # interactions per item
    core_order: str = "together"  # what is counted before what is dropped
    core_repeat: bool = False  # until nothing is lost: the k-core
    user_sample: int | None = None  # users kept at random; the catalogue stays whole
    catalogue: str = "interacted"  # candidates: items with interactions, or every listed item, too
    duplicate_items: str = "first_non_empty"  # several rows of one item in the item table
    split: str = "leave_one_out"
    validation: str | int = "all"  # all | none | the number of random users who give up a validation target
    test_share: float = 0.1  # of splits other than leave_one_out
    cold_targets: str = "keep"  # targets whose item no training interaction has
    seed: int = 0  # of the user sample, the split and the validation users

    def __post_init__(self):
        for name, allowed in ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name} is {value!r}; expected one of {', '.join(allowed)}{closest(value, allowed)}")
        for name, low in (("min_user", 0), ("min_item", 0), ("seed", 0), ("user_sample", 1)):
            value = getattr(self, name)
            if not (value is None and name == "user_sample") and (type(value) is not int or value < low):
                raise InputError(f"{name} is {value!r}; expected a whole number of at least {low}")
        if type(self.core_repeat) is not bool:
            raise InputError(f"core_repeat is {self.core_repeat!r}; expected true or false")
        if self.min_rating is not None and type(self.min_rating) not in (int, float):
            raise InputError(f"min_rating is {self.min_rating!r}; expected a number")
        if type(self.test_share) is not float or not 0 < self.test_share < 0.5:
            raise InputError(f"test_share is {self.test_share!r}; expected a number between 0 and 0.5")
        if self.validation not in ("all", "none") and (type(self.validation) is not int or self.validation < 1):
            hint = closest(self.validation, ("all", "none"))
            raise InputError(f"validation is {self.validation!r}; expected all, none or a number of users{hint}")

    @classmethod
    def of(cls, values: Mapping) -> "Choices":
        """Build from a mapping; a misspelt name is an error that names the closest one."""
        return configured(cls, values, "choice of data preparation", tuples=False)


def configured(kind: type, settings: Mapping[str, Any], what: str, *, tuples: bool = True) -> Any:
    """Build a configuration from a mapping, lists as `tuples`; an unknown name and a wrong value are `InputError`s.

    `what` is what its names are, e.g. "setting of the pretraining".
    """
    names = [entry.name for entry in fields(kind)]
    for name in settings:
        if name not in names:
            raise InputError(f"{name!r} is no {what}{closest(name, names)}")
    try:
        return kind(**{k: tuple(v) if tuples and isinstance(v, list) else v for k, v in settings.items()})
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"{what}: {error}") from error


def closest(value: object, names: Iterable[str]) -> str:
    """Return the end of a sentence that proposes the name closest to a misspelt one, or nothing."""
    found = difflib.get_close_matches(str(value), list(names), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def matching(name: str, patterns: Iterable[str]) -> tuple[str | None, str]:
    """Return the pattern that `name` means, None where there is none, and what stands in place of its {category}."""
    for pattern in patterns:
        prefix, placeholder, _ = pattern.partition("{category}")
        category = name.removeprefix(prefix)
        if placeholder and name.startswith(prefix) and category[:1].isupper():
            return pattern, category
        if pattern == name and not placeholder:
            return pattern, ""
    return None, ""
