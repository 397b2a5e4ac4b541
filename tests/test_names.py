import pytest

import bertgen_tf as bg


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


def test_all_names_are_there():
    assert all(hasattr(bg, name) for name in bg.__all__)
    assert len(set(bg.__all__)) == len(bg.__all__)
