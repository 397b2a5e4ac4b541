"""Prints how many parameters each recipe of `bertgen_tf.warm_start` has at the base size.

    ./tools/recipe_table

The checkpoints are BERT-Base Cased (28,996 pieces), RoBERTa base (50,265) and GPT-2 (50,257;
512 of its positions are kept). Nothing is read, and no weight is made: only shapes are counted. The
column "paper" is the total in Table 1 of Rothe, Narayan, Severyn 2020.
"""

import argparse

import keras

import bertgen_tf as bg
from bertgen_tf.checkpoints import recipes

BERT = bg.BertGenerationConfig(
    vocab_size=28996,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=512,
)
CONFIGS = {
    recipes.BERT: BERT,
    recipes.ROBERTA: BERT.replace(vocab_size=50265),
    recipes.GPT2: BERT.replace(vocab_size=50257, norm_first=True),
}
PAPER = {
    "RND2RND": 221,
    "BERT2RND": 221,
    "RND2BERT": 221,
    "BERT2BERT": 221,
    "BERTSHARE": 136,
    "ROBERTASHARE": 152,
    "GPT": 125,
    "RND2GPT": 238,
    "BERT2GPT": 260,
    "ROBERTA2GPT": 276,
}


def count(name: str) -> bg.WarmStartReport:
    """The counts of a recipe's model."""
    recipe = bg.RECIPES[name]
    known = [kind for kind in (recipe.encoder, recipe.decoder) if kind in CONFIGS]
    # A random side has the sizes of the other one, and BERT's blocks.
    one = CONFIGS[known[0] if known else recipes.BERT]
    source_config = CONFIGS.get(recipe.encoder, one.replace(norm_first=False))
    target_config = CONFIGS.get(recipe.decoder, one).replace(add_cross_attention=True)
    sharing = "word_embeddings"
    if recipe.encoder is None:
        source_config = target_config = one.replace(source_positions=384)
        sharing = "all"
    elif recipe.share:
        sharing = "all"
    elif source_config.vocab_size != target_config.vocab_size:
        sharing = "none"
    with keras.StatelessScope(initialize_variables=False):
        encoder = bg.BertGenerationEncoder(source_config)
        shared = None if sharing == "none" else encoder
        decoder = bg.BertGenerationDecoder(target_config, shared, sharing)
        source = {
            side: kind
            for side, kind in (("encoder", recipe.encoder), ("decoder", recipe.decoder))
            if kind in CONFIGS
        }
        return bg.warm_start_report(
            bg.EncoderDecoderModel(encoder, decoder, source_checkpoint=source)
        )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("| recipe | encoder | decoder | total | embedding | initialised | random | paper |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, recipe in bg.RECIPES.items():
        report = count(name)
        sides = [recipe.encoder or "-", recipe.decoder]
        if recipe.share:
            sides[1] = "the same stack"
        sizes = (report.total, report.embedding, report.initialised, report.random)
        cells = [name, *sides, *(f"{size / 1e6:.1f}M" for size in sizes)]
        cells.append(f"{PAPER[name]}M" if name in PAPER else "")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
