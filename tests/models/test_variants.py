import keras
import numpy as np

from bertgen_tf.models.variants import with_config, with_dtype
from tests.helpers import make_small_model


def test_other_settings_and_the_same_weights():
    model = make_small_model()
    variant = with_config(model, max_source_length=5)
    assert model.preprocessor.max_source_length != variant.preprocessor.max_source_length == 5
    for mine, its in zip(model.get_weights(), variant.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_other_policies_and_back():
    model = make_small_model()
    assert with_dtype(model, "float32") is model
    half = with_dtype(model, "mixed_bfloat16")
    policies = {layer.compute_dtype for layer in half._flatten_layers() if layer.weights}
    assert policies == {"bfloat16"} and half.decoder.dtype_policy.name == "mixed_bfloat16"
    again = with_dtype(half, keras.dtype_policies.serialize(model.dtype_policy))
    assert again.get_config() == model.get_config()
    ids = np.array([[3, 4, 5]], np.int32)
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :2]}
    np.testing.assert_array_equal(model(batch), again(batch))
