"""What requests cost: seconds, estimated from their sizes and from how long batches took.

The time of a batch is taken to be `fixed + slope * work`. Work counts tokens, as far as a server
can know them that has not tokenized: rows, times the tokens of the longest, since all are padded to
it, and a few more for each row. A signature's own batches say what the rest makes of it: beams, the
size of the model, the machine.
"""

from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]

# A token of English is 4 to 5 bytes long, one of Chinese 3.
_BYTES_PER_TOKEN = 4
# What a row costs however short it is, in tokens.
_TOKENS_PER_ROW = 16
# Normalising and splitting a text of punctuation; what is cut off afterwards costs the same.
_SECONDS_PER_BYTE = 2e-6
# What a batch counts when the next one has been seen.
_DECAY = 0.9


class Size(NamedTuple):
    """The size of rows that are run together, or of several such batches.

    Args:
        work: the number of rows, times the tokens of the longest and some more for each.
        bytes: of their strings.
    """

    work: float
    bytes: float


class RowSizes(NamedTuple):
    """The sizes of a request's rows.

    Args:
        tokens: of each row, an estimate.
        bytes: of the strings of each row.
    """

    tokens: np.ndarray
    bytes: np.ndarray

    def rows(self, start: int, stop: int | None = None) -> "RowSizes":
        """Those of some of the rows."""
        return RowSizes(self.tokens[start:stop], self.bytes[start:stop])

    @property
    def padded(self) -> Size:
        """What they are as one batch."""
        count = len(self.tokens)
        longest = float(self.tokens.max()) if count else 0.0
        return Size(count * (longest + _TOKENS_PER_ROW), float(self.bytes.sum()))

    @property
    def total(self) -> Size:
        """What they are among rows as long as they."""
        return Size(float((self.tokens + _TOKENS_PER_ROW).sum()), float(self.bytes.sum()))


def row_sizes(inputs: Arrays, rows: int | None, max_length: int | None) -> RowSizes:
    """The sizes of a request's rows.

    Args:
        inputs: strings as objects of bytes.
        rows: how many there are; None if the request has no rows: it counts as one.
        max_length: how many tokens of a row a model reads; None for all.
    """
    count = 1 if rows is None else rows
    tokens, size = np.zeros(count), np.zeros(count)
    for x in inputs.values():
        parts = x.reshape(count, -1) if count and x.size else np.zeros([count, 0])
        if x.dtype == object:
            # The texts of a row are read one after the other, each cut to the same length.
            lengths = np.array([[len(text) for text in part] for part in parts], float)
            lengths = lengths.reshape(count, -1)
            size += lengths.sum(axis=1)
            tokens += np.minimum(lengths / _BYTES_PER_TOKEN, max_length or np.inf).sum(axis=1)
        else:  # ids and their mask
            tokens = np.maximum(tokens, min(parts.shape[1], max_length or np.inf))
    return RowSizes(tokens, size)


class Cost:
    """What batches of a signature cost.

    Args:
        prior: the cost of a signature that is like this one, used before this one has run, and
            for how its time depends on work before that is known.
    """

    def __init__(self, prior: "Cost | None" = None):
        self._prior = prior
        # Sums over batches: their number, work, seconds, work squared, work times seconds.
        self._sums = (0.0,) * 5

    @property
    def is_known(self) -> bool:
        """Whether this signature, or the one that is like it, has run."""
        return any(self._line())

    def seconds(self, size: Size) -> float:
        """How long a batch will probably take, as far as is known."""
        fixed, slope = self._line()
        return fixed + slope * size.work + _SECONDS_PER_BYTE * size.bytes

    def target(self, size: Size, rows: int, batch_seconds: float) -> float:
        """How long batches of such rows should take: some time, but at least that of two rows.

        Where a single row takes all the time, batches of several would never be tried.
        """
        row = Size(size.work / rows, size.bytes / rows)
        return max(batch_seconds, 2 * self.seconds(row))

    def price(self, size: Size, rows: int, batch_seconds: float) -> float:
        """How long `rows` rows will probably take, in batches that should take `batch_seconds`.

        Args:
            size: `RowSizes.total`.
        """
        fixed, slope = self._line()
        rest = slope * size.work + _SECONDS_PER_BYTE * size.bytes
        if not rows:
            return 0.0
        return (
            rest * (1 + fixed / (self.target(size, rows, batch_seconds) - fixed)) if rest else 0.0
        )

    def fade(self) -> None:
        """Takes past batches for faster than they were.

        For what was refused on an idle server: only another batch can tell whether a price was due
        to something that slowed one. If it was right, the next batch says so.
        """
        count, work, seconds, squares, products = self._sums
        self._sums = count, work, _DECAY * seconds, squares, _DECAY * products
        if not work and self._prior:
            self._prior.fade()

    def learn(self, size: Size, seconds: float) -> None:
        """Takes note of a batch of `size` that took `seconds`."""
        seconds, work = max(seconds - _SECONDS_PER_BYTE * size.bytes, 0.0), size.work
        new = (1.0, work, seconds, work * work, work * seconds)
        self._sums = tuple(_DECAY * x + y for x, y in zip(self._sums, new, strict=True))

    def _line(self) -> tuple[float, float]:
        """`fixed` and `slope`, by least squares."""
        count, work, seconds, squares, products = self._sums
        prior = self._prior._line() if self._prior else (0.0, 0.0)
        if not work:
            return prior
        spread = count * squares - work * work
        if spread > 0.05 * work * work:
            slope = (count * products - work * seconds) / spread
            fixed = (seconds - slope * work) / count
            if slope > 0 and fixed >= 0:
                return fixed, slope
        # All batches had the same size, or something else slowed some of them.
        expected = count * prior[0] + work * prior[1]
        if not expected:
            return 0.0, seconds / work
        return prior[0] * seconds / expected, prior[1] * seconds / expected
