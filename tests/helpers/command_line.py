"""Texts and flags of the tests of the command line."""

import json
from pathlib import Path

SOURCES = [
    "the old man sang",
    "a bird left, and the house found a woman.",
    "who saw the bird?",
    "young woman",
    "the man found the old house and left",
    "a house",
    "the bird sang and the man saw",
]


PAIRS = [(source, " ".join(source.split()[::-1])) for source in SOURCES]


def write_pairs(path: Path, pairs=PAIRS) -> str:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"source": s, "target": t, "note": 1}) for s, t in pairs]
    else:
        lines = [f"{s}\t{t}" for s, t in pairs]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return str(path)
