import pytest

import bertgen_tf as bg
from bertgen_tf.training import freezing, losses, optimizers


@pytest.mark.parametrize(
    "old, new",
    [
        ("BertForSeqGenerationConfig", "BertGenerationConfig"),
        ("BertForSeqGenerationTokenizer", "BertGenerationTokenizer"),
        ("BertForSeqGenerationEncoder", "BertGenerationEncoder"),
        ("BertForSeqGenerationEncoderModel", "BertGenerationEncoder"),
        ("BertForSeqGenerationDecoder", "BertGenerationDecoder"),
    ],
)
def test_older_names_are_the_classes_of_today(old, new):
    assert getattr(bg, old) is getattr(bg, new)
    assert getattr(bg, new).__name__ == new  # the name that saved files hold


def test_the_documented_names_are_those_of_the_modules():
    assert bg.averaged_weights is optimizers.averaged_weights
    assert bg.default_loss is losses.default_loss
    for name in ("GradualUnfreezing", "freeze", "unfreeze"):
        assert getattr(bg, name) is getattr(freezing, name)


def test_all_names_are_there():
    assert all(hasattr(bg, name) for name in bg.__all__)
    assert bg.__all__ == sorted(set(bg.__all__))
