"""Column names, special ids and the error a user's mistake raises. Imports nothing of ours.

Shape suffixes used in models, losses and ranking:
B batch of histories · L history length · T real (unpadded) positions of a batch · I catalogue + 1
N negatives · D width · H heads · U users · E interactions
"""

PADDING_ID = 0  # items are 1..num_items; 0 pads a history and is never a candidate


class Column:
    """The canonical names of the interaction and item tables."""

    user = "user"
    item = "item"
    time = "time"  # unix seconds
    row = "row"  # position in the publisher's file, from 0
    rating = "rating"
    title = "title"


class InputError(ValueError):
    """A user's mistake in one sentence: it names the file, row or parameter and what was expected.

    The command line prints the sentence without a traceback and exits with status 2.
    """
