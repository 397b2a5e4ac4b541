"""The Markdown files of the repository, and the blocks of code in them."""

import dataclasses
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "saved_models/README.md",
        *(ROOT / "tools").rglob("*.md"),
        *(ROOT / "bertgen_tf").rglob("*.md"),
    ]
)


@dataclasses.dataclass(frozen=True)
class Block:
    """What lies between two lines of three backquotes.

    Attributes:
        document: path in the repository.
        heading: that it stands under.
        number: of blocks of this language under this heading, from 1.
        language: what stands behind the backquotes; empty for outputs.
    """

    document: str
    heading: str
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        """Where it is."""
        return f"{self.document}, {self.heading or 'top'}, {self.language} {self.number}"


def read_blocks(text: str, document: str) -> list[Block]:
    """All blocks of a Markdown text.

    Raises:
        ValueError: one does not end.
    """
    blocks: list[Block] = []
    heading, language, lines = "", None, []
    for line in text.splitlines():
        if language is None and line.startswith("#"):
            heading = line.lstrip("# ")
        elif language is None and line.startswith("```"):
            language, lines = line.removeprefix("```").strip(), []
        elif language is not None and line.strip() == "```":
            alike = [b for b in blocks if (b.heading, b.language) == (heading, language)]
            text = "".join(f"{line}\n" for line in lines)
            blocks.append(Block(document, heading, len(alike) + 1, language, text))
            language = None
        elif language is not None:
            lines.append(line)
    if language is not None:
        raise ValueError(f"{document}: the last block under {heading!r} does not end")
    return blocks


def all_blocks(*languages: str) -> list[Block]:
    """Those of the repository, in the given languages, or in any."""
    found = []
    for path in DOCUMENTS:
        name = path.relative_to(ROOT).as_posix()
        found += read_blocks(path.read_text(encoding="utf-8"), name)
    return [block for block in found if not languages or block.language in languages]
