"""What is known about the modules `google/bertseq2seq/*`, besides what they hold themselves."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from bertgen_tf.tokenizers import BertTokenizer


@dataclasses.dataclass(frozen=True)
class Original:
    """What is known about a module `google/bertseq2seq/*`, besides what it holds itself.

    Sources: the paper (Rothe, Narayan, Severyn 2020, arXiv 1907.12461) for task and lengths; the
    model cards of Hugging Face's copies for the example and the tokenizer's kind; the size of those
    copies for the sharing. Fields marked "inferred" were never published: they follow from
    the defaults of Hugging Face's classes and the sizes of its files.

    Attributes:
        task: what it was fine-tuned for.
        max_source_length, max_target_length: the paper's, in tokens.
        tokenizer: "sentencepiece" or "wordpiece".
        shared: whether encoder and decoder are one stack (for bert24_* inferred).
        card_input, card_output: the example of the model card, made with Hugging Face's copy and
            its settings, not with the module; None if the text is not known here, see `note`.
        pad_token_id, bos_token_id, eos_token_id: inferred for all but roberta24_cnndm.
        num_beams: inferred, except for translation, where it is the paper's.
        gnmt_alpha: the paper's for translation; None for the rest, for which no source gives it
            (the sizes of the files of Hugging Face's copies argue against 0.6).
        note: what else the sources say about the module and its example.
    """

    task: str
    max_source_length: int
    max_target_length: int
    tokenizer: str
    shared: bool
    card_input: str | None
    card_output: str | None
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 1
    num_beams: int = 4
    gnmt_alpha: float | None = None
    note: str = ""


_TRANSLATION = (
    "Most likely the paper's BERT2RND with a vocabulary of its own (inferred). The card's input is "
    "encoded without special tokens (add_special_tokens=False)."
)

# These fill gaps that the graph of a module leaves; see `load_original`.
ORIGINALS: Mapping[str, Original] = {
    "google/bertseq2seq/bert24_en_de/1": Original(
        "translation, English to German (WMT14)",
        128,
        128,
        "wordpiece",
        False,
        "Would you like to grab a coffee with me this week?",
        "Möchten Sie diese Woche einen Kaffee mit mir schnappen?",
        gnmt_alpha=0.6,
        note=_TRANSLATION,
    ),
    "google/bertseq2seq/bert24_de_en/1": Original(
        "translation, German to English (WMT14)",
        128,
        128,
        "wordpiece",
        False,
        "Willst du einen Kaffee trinken gehen mit mir?",
        "Want to drink a kaffee go with me? .",
        gnmt_alpha=0.6,
        note=_TRANSLATION,
    ),
    "google/bertseq2seq/roberta24_bbc/1": Original(
        "extreme summarisation (BBC XSum)",
        512,
        64,
        "sentencepiece",
        True,
        None,
        "Some Sony PlayStation gamers are being advised to stay away from the network because of "
        "a problem with the PlayStation 3 network.",
        note="The card's input is a whole article about the PlayStation 3, with line breaks, whose "
        "text is not in the sources of this table. With the same article as one line, the copy "
        "gives another answer.",
    ),
    "google/bertseq2seq/roberta24_cnndm/1": Original(
        "summarisation (CNN/DailyMail)",
        512,
        128,
        "sentencepiece",
        True,
        None,
        "Fox is developing a two-hour remake of the 1975 cult classic. The special will be "
        "directed, executive-produced and choreographed by Kenneth Ortega. \n The special is "
        "timed to celebrate the 40th anniversary of the film, which has grossed more than "
        "$112 million.",
        note="The card's input is a whole article about the Rocky Horror Picture Show, whose text "
        "is not in the sources of this table.",
    ),
    "google/bertseq2seq/roberta24_discofuse/1": Original(
        "sentence fusion (DiscoFuse)",
        128,
        128,
        "sentencepiece",
        True,
        "As a run-blocker, Zeitler moves relatively well. Zeitler often struggles at the point of "
        "contact in space.",
        "As a run-blocker, Zeitler moves relatively well. However, Zeitler often struggles at the "
        "point of contact in space.",
        note='It was not trained on the character ": the card asks for a back tick in its place. '
        "The card's output ends with two more spaces.",
    ),
    "google/bertseq2seq/roberta24_gigaword/1": Original(
        "headlines (Gigaword)",
        128,
        32,
        "sentencepiece",
        True,
        "australian shares closed down #.# percent monday\nfollowing a weak lead from the united "
        "states and\nlower commodity prices , dealers said .",
        "australian shares close down #.# percent.",
    ),
    "google/bertseq2seq/roberta24_wikisplit/1": Original(
        "sentence splitting (WikiSplit)",
        128,
        128,
        "sentencepiece",
        True,
        "Due to the hurricane, Lobsterfest has been canceled, making Bob very happy about it and "
        "he decides to open Bob 's Burgers for customers who were planning on going to "
        "Lobsterfest.",
        "Due to the hurricane, Lobsterfest has been canceled, making Bob very happy about it. He "
        "decides to open Bob's Burgers for customers who were planning on going to Lobsterfest.",
        note="It was not trained on the character \". The card's input is encoded between bos and "
        "eos, though Hugging Face's documentation says that neither is needed.",
    ),
}


def known_original(handle: str, original: str | None = None) -> Original | None:
    """The entry of `ORIGINALS` that a URL names, or `original` for short ("roberta24_bbc")."""
    if original is None:
        match = re.match(
            r"https?://(?:www\.)?tfhub\.dev/(google/bertseq2seq/\w+/\d+)(?:$|[/?])",
            os.fspath(handle),
        )
        return ORIGINALS.get(match[1]) if match else None
    names = {key: key for key in ORIGINALS} | {key.split("/")[2]: key for key in ORIGINALS}
    if original not in names:
        raise ValueError(
            f"original must be one of {', '.join(key.split('/')[2] for key in ORIGINALS)}, "
            f"received {original!r}."
        )
    return ORIGINALS[names[original]]


def check_known(handle: str, known: dict[str, Any], shared: bool, tokenizer: Any) -> None:
    """Raises if the module is not the one of `ORIGINALS` that it should be."""
    found = {
        "shared": shared,
        "tokenizer": "wordpiece" if isinstance(tokenizer, BertTokenizer) else "sentencepiece",
    }
    for field, value in found.items():
        if known.get(field, value) != value:
            raise ValueError(
                f"{handle} should match its entry in bertgen_tf.hub.ORIGINALS, with {field}="
                f"{known[field]!r}, but has {value!r}. Leave original= out, or name another."
            )
