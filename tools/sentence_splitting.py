"""A small grammar of complex sentences and their splits into two simple ones.

    python tools/sentence_splitting.py --train 5

Each pair is (complex sentence, "first sentence. second sentence."), the task of WikiSplit (Botha et
al. 2018) in small. The split needs copying (names, years), reordering, inflection (the second
sentence gets a verb where the first had an apposition) and pronouns, whose gender only the name
shows. It is a function of the source, so that exact match is a fair measure.
"""

import argparse
import random

WOMEN = "alice anna clara diana emma grace helen jane julia laura maria nina rosa sarah".split()
MEN = (
    "albert arthur carl david edward frank george henry jack martin oscar paul peter victor".split()
)
SURNAMES = (
    "adams baker brown carter clark cooper davis evans fisher foster green harris hughes king "
    "lewis moore morgan palmer parker reed scott smith stone turner walker white wilson young"
).split()
PLACES = (
    "berlin boston cairo chicago denver dublin geneva istanbul lisbon london madrid milan moscow "
    "paris prague rome sydney tokyo toronto vienna"
).split()
YEARS = [str(year) for year in range(1901, 2000, 6)]
PROFESSIONS = (
    "actor architect artist baker banker dancer doctor engineer farmer historian judge lawyer "
    "painter photographer pilot poet scientist sculptor singer teacher"
).split()
BUILDINGS = (
    "bridge castle cathedral church factory hospital hotel library museum palace school station "
    "temple theatre tower university"
).split()
BUILDING_ADJECTIVES = "famous grand large modern old small".split()
BUILT = "built completed damaged designed opened restored sold".split()
BUILDING_FATES = [
    "became a symbol of the city",
    "closed after the war",
    "attracts many visitors",
    "stands near the river",
    "burned down during a storm",
    "belongs to a rich family",
]
# What people did: verb in the past tense, and what it was done to.
WORKS = {
    "wrote": ["a novel", "a short story", "two plays", "several poems"],
    "painted": ["a portrait", "several landscapes", "the ceiling of a church"],
    "founded": ["a school", "a newspaper", "an orchestra", "a small company"],
    "won": ["a gold medal", "the first prize", "an important award"],
    "recorded": ["an album", "three songs", "a live concert"],
    "studied": ["law", "music", "medicine", "ancient history"],
    "taught": ["mathematics", "physics", "french literature"],
    "bought": ["a boat", "an old farm", "a house by the sea"],
    "lost": ["the election", "a lot of money", "the final match"],
    "invented": ["a new engine", "a simple machine"],
}


def _person(rng: random.Random, other_than: str = "") -> tuple[str, str]:
    """A full name, whose first name differs from the given one's, and its pronoun."""
    names, pronoun = rng.choice([(WOMEN, "she"), (MEN, "he")])
    first = rng.choice([name for name in names if not other_than.startswith(f"{name} ")])
    return f"{first} {rng.choice(SURNAMES)}", pronoun


def _deed(rng: random.Random, other_than: str = "") -> str:
    """A verb phrase in the past tense, whose verb differs from the given one's."""
    verb = rng.choice([verb for verb in WORKS if not other_than.startswith(verb)])
    return f"{verb} {rng.choice(WORKS[verb])}"


def _profession(rng: random.Random) -> str:
    profession = rng.choice(PROFESSIONS)
    return f"{'an' if profession[0] in 'aeiou' else 'a'} {profession}"


def _building(rng: random.Random) -> str:
    return f"the {rng.choice(BUILDING_ADJECTIVES)} {rng.choice(BUILDINGS)}"


def _pair(rng: random.Random) -> tuple[str, str]:
    """One pair. The templates differ in their function words, so that no source has two splits."""
    name, pronoun = _person(rng)
    other, other_pronoun = _person(rng, other_than=name)
    deed = _deed(rng)
    deed2 = _deed(rng, other_than=deed)
    place, year = rng.choice(PLACES), rng.choice(YEARS)
    profession, building = _profession(rng), _building(rng)
    built, fate = rng.choice(BUILT), rng.choice(BUILDING_FATES)
    connective = rng.choice(["later", "never", "soon", "also"])
    return rng.choice(
        [
            (
                f"{name}, {profession} from {place}, {deed} in {year}.",
                f"{name} was {profession} from {place}. {pronoun} {deed} in {year}.",
            ),
            (
                f"{name}, who {deed} in {year}, {deed2}.",
                f"{name} {deed2}. {pronoun} {deed} in {year}.",
            ),
            (
                f"{name} {deed} in {place}, and {pronoun} {connective} {deed2}.",
                f"{name} {deed} in {place}. {pronoun} {connective} {deed2}.",
            ),
            (
                f"{name} {deed} in {year}, but {pronoun} {connective} {deed2}.",
                f"{name} {deed} in {year}. however, {pronoun} {connective} {deed2}.",
            ),
            (
                f"although {name} {deed}, {pronoun} {deed2} in {place}.",
                f"{name} {deed}. however, {pronoun} {deed2} in {place}.",
            ),
            (
                f"after {name} {deed}, {pronoun} moved to {place}.",
                f"{name} {deed}. then {pronoun} moved to {place}.",
            ),
            (
                f"before {pronoun} {deed} in {place}, {name} {deed2}.",
                f"{name} {deed2}. then {pronoun} {deed} in {place}.",
            ),
            (
                f"{name} moved to {place} in {year}, where {pronoun} {deed}.",
                f"{name} moved to {place} in {year}. there {pronoun} {deed}.",
            ),
            (
                f"{name} became famous in {year} because {pronoun} {deed} and {deed2}.",
                f"{name} {deed} and {deed2}. so {pronoun} became famous in {year}.",
            ),
            (
                f"born in {place} in {year}, {name} {deed}.",
                f"{name} was born in {place} in {year}. {pronoun} {deed}.",
            ),
            (
                f"{name} met {other}, {profession} who {deed} in {place}.",
                f"{name} met {other}. {other_pronoun} was {profession} and {deed} in {place}.",
            ),
            (
                f"{name} and {other} met in {place}, where they {deed}.",
                f"{name} and {other} met in {place}. there they {deed}.",
            ),
            (
                f"{building} in {place}, which was {built} in {year}, {fate}.",
                f"{building} in {place} was {built} in {year}. it {fate}.",
            ),
            (
                f"{name} visited {building} in {place}, which {fate}.",
                f"{name} visited {building} in {place}. it {fate}.",
            ),
            (
                f"{building} that {name} visited in {year} {fate}.",
                f"{name} visited {building} in {year}. it {fate}.",
            ),
        ]
    )


def generate(
    seed: int, train: int = 2000, held_out: int = 200
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Makes training and held-out pairs of (complex sentence, its two sentences).

    The same arguments give the same pairs. No source occurs twice, neither within a set nor in
    both, and every word of the held-out pairs occurs in the training pairs.

    Raises:
        ValueError: `train` pairs contain too few words to make `held_out` pairs from them alone.
    """
    rng = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < train:
        pairs.update([_pair(rng)])
    training = list(pairs.items())

    words = {word for pair in training for text in pair for word in split_words(text)}
    unseen: dict[str, str] = {}
    for _ in range(100 * held_out):
        if len(unseen) == held_out:
            break
        source, target = _pair(rng)
        if source not in pairs and words.issuperset(split_words(f"{source} {target}")):
            unseen[source] = target
    if len(unseen) < held_out:
        raise ValueError(
            f"train={train} pairs contain too few words to make held_out={held_out} pairs from "
            f"them alone: raise train"
        )
    return training, list(unseen.items())


def split_words(text: str) -> list[str]:
    """The words and punctuation marks of one of the grammar's texts."""
    return text.replace(",", " ,").replace(".", " .").split()


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints training pairs, tab-separated.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2000, help="how many (default 2000)")
    arguments = parser.parse_args()
    for source, target in generate(arguments.seed, arguments.train, held_out=0)[0]:
        print(f"{source}\t{target}")


if __name__ == "__main__":
    main()
