"""Turns word pieces into readable prose, inside the graph.

BERT's tokenizer drops the spaces of the text, so they are restored by the rules of common
English typography: punctuation and brackets close up, apostrophes, numbers and hyphenated
words are joined, quotation marks come in pairs. What cannot be recovered: case and accents
that the vocabulary lacks; line breaks and repeated spaces; `''` and two backticks, which
become `"`; spaces around a hyphen or slash (written without) and around dashes (with); a
comma between a number and one of three digits (a thousands separator); a full stop between
digits (a decimal point); quotation marks without a partner (spaces on both sides).
"""

import tensorflow as tf
import tensorflow_text as tf_text

# (RE2 pattern, rewrite) over tokens with single spaces between them, applied in this order. A rule
# appears twice if its matches overlap. `_X` is a letter or a digit.
_X = r"[\pL\pN]"
_HAN = r"[\p{Han}、。〈〉《》「」『』【】！（），：；？]"
# Words in -s that are not possessive: the mark after them opens a quotation; after other words in
# -s it makes a possessive plural.
_NOT_POSSESSIVE = r"(?:is|was|as|has|this|his|its|says|means|thus|versus|plus|across)"
RULES = (
    (r" ##", ""),
    (r"^ ", ""),
    # Two backticks or two apostrophes are a double quotation mark.
    (r"` `|' '", '"'),
    # Apostrophes: contractions and possessives, elisions before and after, names (o'neill,
    # l'amour).
    (r"(?i) (['’]) (s|t|re|ve|ll|d|m)\b", r"\1\2"),
    (r"(?i) (['’]) (s|t|re|ve|ll|d|m)\b", r"\1\2"),
    (r"(?i)(^| )(['’]) (tis|twas|em|til|cause|n|\d0s)\b", r"\1\2\3"),
    (r"(?i)(^|[ (\[\"])([dlocjmn]|qu) (['’]) (\pL)", r"\1\2\3\4"),
    (r"(?i)('n) (['’])( |$)", r"\1\2\3"),
    # Quotations: marks come in pairs. No space inside a pair.
    (r'" ([^"]*[^" ]) "', r'"\1"'),
    (r"„ ([^„“”]*[^„“” ]) ([“”])", r"„\1\2"),
    (r"“ ([^“”]*[^“” ]) ”", r"“\1”"),
    (r"‘ ([^‘’]*[^‘’ ]) ’( |$)", r"‘\1’\2"),
    (r"« ([^«»]*[^«» ]) »", r"«\1»"),
    (
        rf"(?i)(^|[^s ] |['’]s |\b{_NOT_POSSESSIVE} )' ([^' ][^ ]*(?: [^' ][^ ]*)*?) '( |$)",
        r"\1'\2'\3",
    ),
    (r"(?i)(s) (['’])( |$)", r"\1\2\3"),
    # Numbers: 1,000,000 and 3.5 and 10:30 and $5 and #1.
    (r"\b(\d{1,3}) , (\d{3})\b", r"\1,\2"),
    (r"\b(\d{1,3}) , (\d{3})\b", r"\1,\2"),
    (r"(\d) \. (\d)", r"\1.\2"),
    (r"(\d) \. (\d)", r"\1.\2"),
    (r"\b(\d{1,2}) : (\d{1,2})\b", r"\1:\2"),
    (r"([$£€¥]) (\d)", r"\1\2"),
    (rf"(^| )# ({_X})", r"\1#\2"),
    # Abbreviations (u.s., p.m.) and host names.
    (r"\b(\pL) \. (\pL) \.", r"\1.\2."),
    (r"\b(\pL) ?\. (\pL) \.", r"\1.\2."),
    (r"\b(www) \. ", r"\1."),
    (r" \. (com|org|net|edu|gov)\b", r".\1"),
    # Hyphens and slashes between words: in untokenised text hardly any have spaces around them.
    (rf"({_X}) ([-/]) ({_X})", r"\1\2\3"),
    (rf"({_X}) ([-/]) ({_X})", r"\1\2\3"),
    (r"(\d) – (\d)", r"\1–\2"),
    # Punctuation: no space before closing marks, none after opening ones.
    (r" ([.,;:!?…%)\]}])", r"\1"),
    (r"([(\[{¿¡]) ", r"\1"),
    # Chinese characters are words of their own to BERT.
    (rf"({_HAN}) ({_HAN})", r"\1\2"),
    (rf"({_HAN}) ({_HAN})", r"\1\2"),
)


def join_word_pieces(pieces: tf.RaggedTensor) -> tf.Tensor:
    """Joins the pieces of each row: ragged strings [batch, None] -> strings [batch]."""
    text = tf.strings.join([" ", tf.strings.reduce_join(pieces, axis=-1, separator=" ")])
    for pattern, rewrite in RULES:
        text = tf.strings.regex_replace(text, pattern, rewrite)
    # Lower-case vocabularies spell Korean in decomposed letters.
    return tf_text.normalize_utf8(text, "NFC")
