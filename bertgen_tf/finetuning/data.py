"""The batch of any step of a training: the same one in every run with the same seed.

N pairs, B batch size, S and T source and target length of a batch.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from bertgen_tf.checks import check_integer
from bertgen_tf.config import LONG_TARGETS
from bertgen_tf.data.progress import show_progress
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor
from bertgen_tf.training.batches import lengths_of_batches

Batch = tuple[dict[str, Any], Any, Any]
_CHUNK = 1024  # texts that are encoded together
_NAMES = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


class Texts(NamedTuple):
    """Encoded texts, one after another.

    Args:
        ids: int32 [all tokens + 1], the last of which belongs to no text.
        starts, lengths: int64 [N]; text i is the `lengths[i]` ids from `starts[i]` on.
    """

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class TrainingData:
    """Pairs of texts, encoded once, in batches of few shapes; the step's number determines a batch.

    Each epoch has every pair once, in an order that (seed, epoch) determines. Pairs of similar
    length share a batch, padded to one of `batches.lengths_of_batches`, each of which compiles the
    training step once. Every batch has `batch_size` rows; the last batch of each length is filled
    up with rows of weight 0. Batches are numbered across epochs: the epoch of step i is
    `i // steps_per_epoch`.

    Args:
        pairs: (source, target).
        preprocessor: the model's.
        batch_size: B.
        seed: determines the order.
        shuffle: False keeps the order of the pairs within a length, in every epoch.
        long_targets: what to do with pairs whose target has more tokens than fit: "cut", "skip" or
            "error".
        verbose: 1 shows progress on stderr, 0 does not; "auto" shows it on a terminal.

    Raises:
        ValueError: there are no pairs, or all are skipped; a target is too long, with "error".
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        preprocessor: Seq2SeqPreprocessor,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        long_targets: str = "cut",
        verbose: Any = "auto",
    ):
        check_integer("batch_size", batch_size)
        if long_targets not in LONG_TARGETS:
            raise ValueError(
                f"long_targets must be one of {', '.join(LONG_TARGETS)}, received {long_targets!r}."
            )
        if not pairs:
            raise ValueError("pairs must hold at least one pair of texts, but is empty.")
        self.preprocessor = preprocessor
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._sources, self._targets = _encode(pairs, preprocessor, verbose)
        sources, targets = zip(*pairs, strict=True)
        p = preprocessor
        room = p.max_source_length - p.add_bos - p.add_eos
        long = self._sources.lengths >= p.max_source_length
        self._long_sources = _longer(p.tokenizer, sources, long, room)
        room = p.max_target_length - 1 - p.mask_first
        long = self._targets.lengths >= p.max_target_length - 1
        self._long_targets = _longer(p.target_tokenizer, targets, long, room)
        self._empty = [i for i, pair in enumerate(pairs) if not all(text.strip() for text in pair)]
        self._skips = long_targets == "skip"
        kept = np.arange(len(pairs))
        if self._long_targets and long_targets == "error":
            raise ValueError(f"{self._too_long()}.")
        if self._skips:
            kept = np.setdiff1d(kept, self._long_targets)
            if not len(kept):
                raise ValueError(f"All {len(pairs):,} pairs are skipped: {self._too_long()}.")
        self._rows = kept
        self._lengths = lengths_of_batches(preprocessor)
        longest = np.maximum(self._sources.lengths, self._targets.lengths + 1)
        self._buckets = np.searchsorted(self._lengths, longest[kept])
        counts = np.bincount(self._buckets, minlength=len(self._lengths))
        self.steps_per_epoch = int((-(-counts // batch_size)).sum())
        self._plan = functools.lru_cache(2)(self._make_plan)

    def __len__(self) -> int:
        """The number of pairs in an epoch."""
        return len(self._rows)

    def notes(self, unit: str = "lines") -> list[str]:
        """What users should know about their texts, in sentences.

        Args:
            unit: what the pairs are called, which are counted from 1.
        """
        notes = []
        if self._long_targets:
            notes.append(self._too_long(unit, "skipped" if self._skips else "cut"))
        if self._long_sources:
            limit = self.preprocessor.max_source_length
            notes.append(_describe_long("source", self._long_sources, limit, unit, "cut"))
        if self._empty:
            notes.append(
                f"{len(self._empty):,} of the pairs have an empty side, "
                f"{_places(self._empty, unit)}"
            )
        return notes

    def tokens(self, step: int) -> int:
        """How many tokens the real rows of a batch have, source and target (with end token)."""
        rows, _ = self._at(step)
        rows = rows[rows >= 0]
        return int((self._sources.lengths[rows] + self._targets.lengths[rows] + 1).sum())

    def target_tokens(self, step: int) -> int:
        """How many tokens the loss of a batch is averaged over."""
        rows, _ = self._at(step)
        rows = rows[rows >= 0]
        return int((self._targets.lengths[rows] + 1).sum())

    def target_counts(self) -> np.ndarray:
        """How often each token is to be predicted in an epoch, end tokens included, int64 [V]."""
        kept = np.isin(np.arange(len(self._targets.lengths)), self._rows)
        ids = self._targets.ids[:-1][np.repeat(kept, self._targets.lengths)]
        tokenizer = self.preprocessor.target_tokenizer
        counts = np.bincount(ids, minlength=tokenizer.vocab_size)
        counts[tokenizer.eos_token_id] += len(self)
        return counts

    def batch(self, step: int, part: slice = slice(None)) -> Batch:
        """What `Seq2SeqPreprocessor.pack` gives for the pairs of a step, padded to one length.

        Args:
            step: counted from 0 across epochs.
            part: the rows to return.

        Returns:
            (x, y, sample_weight), arrays [B, S] and [B, T].
        """
        rows, length = self._at(step)
        rows = rows[part]
        p, special = self.preprocessor, self.preprocessor.target_tokenizer
        real = rows >= 0
        rows = np.where(real, rows, self._rows[0])
        source = _gather(
            self._sources, rows, min(length, p.max_source_length), p.tokenizer.pad_token_id
        )
        # Its last column is padding in every row, which the start or end token replaces.
        target_length = min(length, p.max_target_length)
        target = _gather(self._targets, rows, target_length, special.pad_token_id)
        ends = self._targets.lengths[rows]
        columns = np.arange(target_length)
        labels = np.where(columns == ends[:, None], special.eos_token_id, target)
        inputs = np.roll(target, 1, axis=1)
        inputs[:, 0] = special.bos_token_id
        source_mask = np.arange(source.shape[1]) < self._sources.lengths[rows][:, None]
        target_mask = columns <= ends[:, None]
        arrays = (source, source_mask, inputs, target_mask)
        x = {name: a.astype(np.int32) for name, a in zip(_NAMES, arrays, strict=True)}
        return x, labels.astype(np.int32), (target_mask & real[:, None]).astype(np.float32)

    def dataset(self, first: int, last: int, part: slice = slice(None)) -> tf.data.Dataset:
        """The batches of the steps from `first` up to `last`, made ahead of use.

        Args:
            first, last: steps.
            part: rows of each batch.
        """
        types = [tf.int32] * 5 + [tf.float32]

        def load(step: Any) -> list[np.ndarray]:
            x, y, weight = self.batch(int(step), part)
            return [*x.values(), y, weight]

        def make(step: Any) -> Batch:
            *x, y, weight = tf.numpy_function(load, [step], types, stateful=False)
            for tensor in (*x, y, weight):
                tensor.set_shape([None, None])
            return dict(zip(_NAMES, x, strict=True)), y, weight

        steps = tf.data.Dataset.range(first, last)
        return steps.map(make, num_parallel_calls=2, deterministic=True).prefetch(8)

    def _at(self, step: int) -> tuple[np.ndarray, int]:
        """Indices of the pairs of a step, -1 for rows without one, and the batch's length."""
        epoch, place = divmod(step, self.steps_per_epoch)
        batches, buckets = self._plan(epoch if self.shuffle else 0)
        return batches[place], self._lengths[buckets[place]]

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the pairs [steps_per_epoch, B] and the bucket of each batch."""
        random = np.random.default_rng([self.seed, epoch])
        order = np.arange(len(self._rows))
        if self.shuffle:
            random.shuffle(order)
        batches, buckets = [], []
        for bucket in range(len(self._lengths)):
            places = order[self._buckets[order] == bucket]
            count = -(-len(places) // self.batch_size)
            rows = np.full(count * self.batch_size, -1)
            rows[: len(places)] = self._rows[places]
            batches.append(rows.reshape(count, self.batch_size))
            buckets.append(np.full(count, bucket))
        batches, buckets = np.concatenate(batches), np.concatenate(buckets)
        if self.shuffle:
            order = random.permutation(len(batches))
            batches, buckets = batches[order], buckets[order]
        return batches, buckets

    def _too_long(self, unit: str = "lines", done: str = "") -> str:
        limit = self.preprocessor.max_target_length
        return _describe_long("target", self._long_targets, limit, unit, done)


def _encode(
    pairs: Sequence[tuple[str, str]], preprocessor: Seq2SeqPreprocessor, verbose: Any
) -> tuple[Texts, Texts]:
    sources, targets = (list(side) for side in zip(*pairs, strict=True))
    chunks = (
        tf.data.Dataset.from_tensor_slices((sources, targets))
        .batch(_CHUNK)
        .map(
            lambda source, target: (
                preprocessor.encode_source(source),
                preprocessor.encode_target(target),
            ),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        .prefetch(tf.data.AUTOTUNE)
    )
    ids: tuple[list, list] = ([], [])
    lengths: tuple[list, list] = ([], [])
    with show_progress(verbose, len(pairs), 16 * _CHUNK) as advance:
        for chunk in chunks:
            for side, ragged in enumerate(chunk):
                ids[side].append(ragged.flat_values.numpy())
                lengths[side].append(ragged.row_lengths().numpy())
            advance(len(lengths[0][-1]))
    sides = []
    for side in range(2):
        counts = np.concatenate(lengths[side])
        flat = np.concatenate([*ids[side], [0]]).astype(np.int32)
        sides.append(Texts(flat, np.cumsum(counts) - counts, counts))
    return sides[0], sides[1]


def _longer(tokenizer: Any, texts: Sequence[str], full: np.ndarray, room: int) -> list[int]:
    """Which of the texts that fill the available length have more tokens than fit."""
    candidates = np.flatnonzero(full)
    if not len(candidates):
        return []
    lengths = tokenizer(tf.constant([texts[i] for i in candidates])).row_lengths().numpy()
    return candidates[lengths > room].tolist()


def _gather(texts: Texts, rows: np.ndarray, length: int, pad: int) -> np.ndarray:
    """The ids of some texts [rows, length], padded."""
    columns = np.arange(length)
    mask = columns < texts.lengths[rows][:, None]
    places = texts.starts[rows][:, None] + columns
    return np.where(mask, texts.ids[np.where(mask, places, -1)], pad)


def _describe_long(noun: str, rows: list[int], limit: int, unit: str, done: str) -> str:
    one = len(rows) == 1
    count = f"1 {noun} is" if one else f"{len(rows):,} {noun}s are"
    done = done and f" and {'was' if one else 'were'} {done}"
    return f"{count} longer than {limit} tokens{done}, {_places(rows, unit)}"


def _places(rows: list[int], unit: str) -> str:
    first = ", ".join(f"{row + 1}" for row in rows[:3])
    unit = unit if len(rows) > 1 else unit.removesuffix("s")
    return f"first in {unit} {first}" if len(rows) > 3 else f"in {unit} {first}"
