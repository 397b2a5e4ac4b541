"""SentencePiece tokenizer of the BertGeneration checkpoints."""

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import sentencepiece
import tensorflow as tf
import tensorflow_text as tf_text
from sentencepiece import sentencepiece_model_pb2
from tensorflow_text.python.ops import sentencepiece_tokenizer

from bertgen_tf.tokenizers.interface import (
    Ids,
    TextTokenizer,
    file_name_in_config,
    kept_ids,
    one_string,
    read_around,
    read_file,
    text_vector,
    visible_ids,
    write_file,
)

SPACE = "\u2581"


class _SentencepieceModel(sentencepiece_tokenizer._SentencepieceModelResource):
    """The model's resource under a name of its own.

    Without a name its kernel owns it, and `keras.utils.set_random_seed`, which empties TensorFlow's
    cache of kernels, deletes it under a live tokenizer. The name is a hash of the content, so equal
    models share one resource.
    """

    def _create_resource(self) -> tf.Tensor:
        name = f"bertgen_tf_{hashlib.sha256(self._model).hexdigest()}"
        return sentencepiece_tokenizer.gen_sentencepiece_tokenizer.sentencepiece_op(
            model=self._model, shared_name=name
        )


@keras.saving.register_keras_serializable("bertgen_tf", "BertGenerationTokenizer")
class BertGenerationTokenizer(TextTokenizer):
    """SentencePiece tokenizer of the BertGeneration checkpoints.

    Ids are those of the `sentencepiece` package; special tokens are found by their piece in the
    model, as in Hugging Face's `BertGenerationTokenizer`, and none is ever added to the text. The
    calls that the two classes share give the same results (tested against transformers 5.23),
    except for the differences that `TextTokenizer` lists and these:

    - `tokenizer(text)` is the graph call, not a dictionary of lists.
    - Byte pieces become their characters in `decode`, where Hugging Face shows "<0xE2>".
    - `save_vocabulary` creates the folder and returns one path, not a tuple.

    Args:
        proto: path of a `spiece.model`, or its bytes.
        pad_token, bos_token, eos_token, unk_token: pieces that the model must contain.
        sep_token: piece between the sentences of a split; `sep_token_id` is None if the model has
            none. It is part of the text in both directions: `detokenize` shows it unless it is a
            control piece of the model.
        split_special_tokens: how every call reads a special token that is spelled out in a text.
            False, as in Hugging Face: as the special token, cut out before SentencePiece sees the
            rest. True: as ordinary text, as for the TF Hub originals, so that nobody can smuggle
            an eos into a source.
        added_tokens: further pieces that are cut out of a text before SentencePiece sees the rest:
            each the piece itself, or a dictionary of Hugging Face's options, `content`, `special`,
            `normalized` (which changes nothing here), `lstrip` and `rstrip`.
        sp_model_kwargs: sampling of pieces while training, with Hugging Face's names:
            `enable_sampling` (bool), `nbest_size` (over 1: sample among the best; below 0, the
            default: among all; BPE models ignore it), `alpha` (default 0.1: smoothing, in BPE
            models the probability of skipping a merge). Every call that reads text then samples,
            with a seed that cannot be set; generate and export with a tokenizer that does not.

    Attributes:
        sp_model_kwargs, split_special_tokens, added_tokens: as given.
        mask_token_id: None, for the interface of `BertTokenizer`. See `TextTokenizer` for the rest.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a SentencePiece model, a special token is missing, or `sp_model_kwargs` has
            unknown names or values that do not fit the model.
    """

    def __init__(
        self,
        proto: str | os.PathLike | bytes,
        *,
        pad_token: str = "<pad>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        sep_token: str = "<::::>",
        split_special_tokens: bool = False,
        added_tokens: Sequence[str | Mapping[str, Any]] = (),
        sp_model_kwargs: dict[str, Any] | None = None,
    ):
        where = "The SentencePiece model" if isinstance(proto, bytes) else os.fspath(proto)
        content = proto if isinstance(proto, bytes) else read_file(proto, "proto")
        try:
            model = sentencepiece_model_pb2.ModelProto.FromString(content)
            if not model.pieces:
                raise ValueError("it has no pieces.")
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except Exception as error:  # protobuf and sentencepiece raise classes of their own
            raise ValueError(
                "`proto` must be a SentencePiece model; received "
                f"{len(content)} bytes that are not one ({where}): {error}"
            ) from error
        tokens = {
            "pad": pad_token,
            "bos": bos_token,
            "eos": eos_token,
            "unk": unk_token,
            "sep": sep_token,
        }
        pieces = [piece.piece for piece in model.pieces]
        super().__init__(
            pieces,
            tokens,
            "bert_generation_tokenizer",
            where,
            added_tokens=added_tokens,
            split_special_tokens=split_special_tokens,
        )
        self._proto = content
        self._processor = processor
        self._sp_model_kwargs = dict(sp_model_kwargs or {})
        nbest_size, alpha = _sampling(self._sp_model_kwargs, model)
        with tf.init_scope():
            resource = _SentencepieceModel(content, None)
            self._tokenizer, self._surfaces = (
                tf_text.SentencepieceTokenizer(
                    content, out_type=out_type, nbest_size=nbest_size, alpha=alpha
                )
                for out_type in (tf.int32, tf.string)
            )
            self._tokenizer._model_resource = self._surfaces._model_resource = resource

    @property
    def sp_model_kwargs(self) -> dict[str, Any]:
        return dict(self._sp_model_kwargs)

    def __call__(self, text: Any) -> Ids:
        """Turns text into ids, without special tokens.

        Args:
            text: string scalar or vector [batch] (tensor, array, str or list of str).

        Returns:
            int32 [length] for a scalar, ragged int32 [batch, None] for a vector.
        """
        text, scalar = text_vector(text)
        ids = self._pieces(text, self._tokenizer, "id")
        return ids[0] if scalar else ids

    def detokenize(self, ids: Any) -> tf.Tensor:
        """Turns ids into text: everything up to the first eos, without pad and bos.

        Args:
            ids: integers [length] or [batch, length], dense or ragged. Ids outside the vocabulary
                are dropped.

        Returns:
            string scalar or [batch], valid UTF-8. The unknown token shows as SentencePiece's " ⁇ ".
        """
        hidden = [self.pad_token_id, self.bos_token_id]
        ids, row = visible_ids(ids, self.eos_token_id, hidden, self.vocab_size)
        text = self._tokenizer.detokenize(ids)
        return text[0] if row else text

    def tokenize(self, text: str) -> list[str]:
        """Returns the pieces of one string; what the vocabulary lacks stays as written."""
        text, _ = text_vector(one_string(text))
        pieces = self._pieces(text, self._surfaces, "token")
        return [piece.decode("utf-8") for piece in pieces[0].numpy()]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Ids of pieces; a piece that is not in the vocabulary gets `unk_token_id`."""
        return self._processor.piece_to_id(tokens if isinstance(tokens, str) else list(tokens))

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Joins pieces; spaces are where the pieces have them, not at the ends of the text."""
        return b"".join(map(self._spelling, tokens)).decode("utf-8", "replace").strip()

    def save_vocabulary(
        self, directory: str | os.PathLike, filename_prefix: str | None = None
    ) -> str:
        """Writes `spiece.model`, byte for byte what was loaded, and returns its path."""
        return write_file(directory, "spiece.model", self._proto, filename_prefix)

    def get_config(self) -> dict[str, Any]:
        """JSON-serialisable arguments of `from_config`, with the model itself in base64."""
        return {"proto": base64.b64encode(self._proto).decode("ascii"), **self._options()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BertGenerationTokenizer":
        """Rebuilds a tokenizer from `get_config`.

        Raises:
            ValueError: `proto` is not base64, or names a file, as that of a preset does.
        """
        proto = config["proto"]
        if isinstance(proto, str) and proto.endswith(".model"):  # There is no full stop in base64.
            raise file_name_in_config("proto", proto)
        try:
            proto = base64.b64decode(proto, validate=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"proto must be a SentencePiece model in base64: {error}.") from error
        return cls(**{**config, "proto": proto})

    def subset(self, ids: Iterable[int]) -> tuple["BertGenerationTokenizer", np.ndarray]:
        """Returns a tokenizer that has only some of the pieces.

        A text whose ids in this tokenizer are all kept has the same pieces in the new one. To make
        this exact, more than `ids` is kept: every piece that is not a normal one (special,
        user-defined and byte pieces); the normal pieces of lowest and highest score, from which
        unigram models derive the score of unknown characters; and in BPE models the pieces that
        the merges of kept pieces pass through.

        Args:
            ids: ids of this tokenizer.

        Returns:
            The new tokenizer, and int32 [kept]: the old id of each new id, ascending.

        Raises:
            ValueError: an id is not in [0, vocab_size).
        """
        model = sentencepiece_model_pb2.ModelProto.FromString(self._proto)
        normal = [i for i, piece in enumerate(model.pieces) if piece.type == piece.NORMAL]
        always = {i for i, piece in enumerate(model.pieces) if piece.type != piece.NORMAL}
        always |= {*self.all_special_ids, *self._added_ids}
        if normal:
            always.add(min(normal, key=lambda i: model.pieces[i].score))
            always.add(max(normal, key=lambda i: model.pieces[i].score))
        kept = kept_ids(ids, always, self.vocab_size)
        if model.trainer_spec.model_type == model.trainer_spec.BPE:
            kept = kept_ids(kept, _merge_path(model, kept), self.vocab_size)

        # Not a copy with fewer pieces: a model can hold test sentences for the whole vocabulary.
        small = sentencepiece_model_pb2.ModelProto(
            pieces=[model.pieces[i] for i in kept.tolist()],
            trainer_spec=model.trainer_spec,
            normalizer_spec=model.normalizer_spec,
        )
        if model.HasField("denormalizer_spec"):
            small.denormalizer_spec.CopyFrom(model.denormalizer_spec)
        new_ids = {piece.piece: i for i, piece in enumerate(small.pieces)}
        spec = small.trainer_spec
        spec.vocab_size = len(small.pieces)
        for role in ("unk", "bos", "eos", "pad"):  # Other readers of the file rely on these.
            setattr(spec, f"{role}_id", new_ids.get(getattr(spec, f"{role}_piece"), -1))
        return type(self)(small.SerializeToString(), **self._options()), kept

    def _options(self) -> dict[str, Any]:
        return {
            **{f"{role}_token": piece for role, piece in self._tokens.items()},
            "split_special_tokens": self.split_special_tokens,
            "added_tokens": self.added_tokens,
            "sp_model_kwargs": self.sp_model_kwargs,
        }

    def _pieces(
        self,
        text: tf.Tensor,
        tokenizer: tf_text.SentencepieceTokenizer,
        field: str,
    ) -> tf.RaggedTensor:
        """Pieces [batch, None] of strings [batch], in the type of `tokenizer`.

        `field` of `Spelled` has that type.
        """
        tokens = [*self._spelled(False), *self._spelled(True)]
        values = [getattr(token, field) for token in tokens]
        return read_around(text, tokens, values, tokenizer.tokenize)

    def _spelling(self, token: str) -> bytes:
        if self._processor.is_byte(self._processor.piece_to_id(token)):
            return bytes.fromhex(token[3:5])  # <0xE2>
        return token.replace(SPACE, " ").encode("utf-8")


def _sampling(options: dict[str, Any], model) -> tuple[int, float]:
    """Checks `sp_model_kwargs`; returns what the op takes: nbest_size, alpha."""
    allowed = {"enable_sampling": [bool], "nbest_size": [int], "alpha": [int, float]}
    for name, value in options.items():
        if type(value) not in allowed.get(name, []):
            raise ValueError(
                "`sp_model_kwargs` may hold enable_sampling (bool), nbest_size (int) and alpha "
                f"(float); received {name}={value!r}."
            )
    if not options.get("enable_sampling", False):
        return 0, 1.0
    nbest_size, alpha = options.get("nbest_size", -1), options.get("alpha", 0.1)
    spec = model.trainer_spec
    if nbest_size in (0, 1):
        raise ValueError(
            "`sp_model_kwargs` with enable_sampling=True needs nbest_size below 0 or over 1; "
            f"received {nbest_size}."
        )
    if spec.model_type not in (spec.UNIGRAM, spec.BPE):
        raise ValueError(
            "`sp_model_kwargs` with enable_sampling=True needs a unigram or BPE model; received a "
            f"{spec.ModelType.Name(spec.model_type).lower()} model."
        )
    return nbest_size, float(alpha)


def _merge_path(model, ids: np.ndarray) -> set[int]:
    """Ids of the intermediate pieces from which BPE builds the pieces `ids`.

    No merge crosses the borders of a resulting piece, so its merges are those of the piece alone:
    always the adjacent pair with the highest score, the leftmost of equals.
    """
    usable = (
        model.SentencePiece.NORMAL,
        model.SentencePiece.USER_DEFINED,
        model.SentencePiece.UNUSED,
    )
    rank = {p.piece: (p.score, i) for i, p in enumerate(model.pieces) if p.type in usable}
    found = set()
    for i in ids.tolist():
        if model.pieces[i].type not in (model.SentencePiece.NORMAL, model.SentencePiece.UNUSED):
            continue
        symbols = list(model.pieces[i].piece)
        while True:
            found |= {rank[symbol][1] for symbol in symbols if symbol in rank}
            pairs = [a + b for a, b in zip(symbols, symbols[1:], strict=False)]
            scores = [rank[pair][0] if pair in rank else float("-inf") for pair in pairs]
            if not scores or max(scores) == float("-inf"):
                break
            at = scores.index(max(scores))
            symbols[at : at + 2] = [pairs[at]]
    return found
