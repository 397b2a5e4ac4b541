"""Modules in TF1 Hub format as somebody else could have written them, beside what we read of them.

The modules come from `tools/fixtures/make_tf1_module.py`, which shares no code with bertgen_tf.
They are checked first, by a search in plain numpy; then our models must say what the modules say.
"""

import dataclasses
import io
import math

import make_tf1_module as maker
import numpy as np
import pytest
import sentencepiece
import tensorflow as tf
import tensorflow_hub

import bertgen_tf as bg
from bertgen_tf.checkpoints.hub import graph
from tests.helpers import CORPUS, PIECES

pytestmark = pytest.mark.slow

TEXTS = [
    *CORPUS,
    "an owl",
    "a fox; quick!",
    "sang",
    "the bird sang, the old man left.",
    "who saw a bird?",
    "house",
    "a young man found the old house and left",
    "woman",
    "birds sang and sang and sang and sang",
    "x",
    "Saw the FOX",
    "old old old",
    "?",
    "found a young woman",
    "the the",
    "left; found; saw; sang",
    "who but the old man",
]
# Special tokens where nobody would guess them.
CASED_PIECES = ["The", "S", "##AW", *PIECES[9:], "[CLS]", "[UNK]", "[SEP]", "[PAD]", "[MASK]"]
CASED_IDS = {
    "pad_id": CASED_PIECES.index("[PAD]"),
    "start_id": CASED_PIECES.index("[CLS]"),
    "eos_id": CASED_PIECES.index("[SEP]"),
}
SMALL = {"num_layers": 1, "decode_length": 6}
ACTIVATIONS = {"erf": "gelu", "tanh": "gelu_new", "relu": "relu"}

# Vocabulary and settings. Seeds: the models say different things, some of which end in time.
ORIGINALS = {
    "shared": ("spiece", {}),
    "shared_functional": (
        "spiece",
        {
            "seed": 1,
            "functional": True,
            "einsum": True,
            "activation": "tanh",
            "epsilon": 1e-5,
            "scale": "divide",
            "mask_value": -1e9,
            "fused_norm": False,
            "fixed_source": True,
            "num_heads": 2,
            "num_layers": 3,
            "beam_size": 2,
            "alpha": 1.1,
            "decode_length": 7,
            "normalize_unfinished": True,
        },
    ),
    "shared_uncached": (
        "spiece",
        {
            "seed": 7,
            "scope": "a/b/",
            "cached": False,
            "resource_variables": False,
            "activation": "relu",
            "epsilon": 1e-3,
            "scale": "query",
            "mask_from_pad": True,
            "early_stop": False,
            "num_heads": 4,
            "hidden_size": 16,
            "beam_size": 4,
            "alpha": 0.3,
            "max_source_length": 9,
        },
    ),
    "unshared": ("pieces", {"seed": 4}),
    "unshared_functional": (
        "cased",
        {
            **CASED_IDS,
            "hidden_ids": tuple(CASED_IDS.values()),
            "seed": 3,
            "shared": False,
            "lower_case": False,
            "decoder_embeddings": True,
            "functional": True,
            "cached": False,
            "train_graph": True,
            "beam_size": 1,
            "max_positions": 17,
            "fixed_source": True,
        },
    ),
    "unshared_spiece": (
        "spiece",
        {
            "seed": 4,
            "shared": False,
            "einsum": True,
            "add_bos": True,
            "add_eos": True,
            "hidden_ids": (3, 0),
            "decode_length": 11,
        },
    ),
}
ENCODERS = {
    "gelu": {"mlm": True, "train_graph": True},
    "tanh": {
        "activation": "tanh",
        "epsilon": 1e-4,
        "num_heads": 4,
        "lower_case": False,
        "resource_variables": False,
        "type_vocab_size": 3,
        "mlm": True,
    },
    "relu": {
        "activation": "relu",
        "epsilon": 1e-3,
        "einsum": True,
        "scope": "module/",
        "mask_value": -1e9,
        "scale": "divide",
        "fused_norm": False,
        "num_heads": 2,
        "num_layers": 3,
    },
    "query": {"scale": "query", "pooler_activation": False, "num_heads": 6, "seed": 4},
}


@dataclasses.dataclass
class Original:
    """A module, and what it says."""

    folder: str
    settings: maker.Seq2Seq
    tokenizer: object
    loaded: object
    answers: list[str]

    def answer(self, texts: list[str]) -> list[str]:
        result = self.loaded.signatures["default"](default=tf.constant(texts))["default"]
        return [text.decode() for text in result.numpy()]


def make_original(folder, spiece: bytes, vocabulary: str, settings: dict) -> Original:
    folder = str(folder)
    if vocabulary == "spiece":
        made = maker.make_shared_original(folder, spiece, **settings)
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=spiece).encode
    else:
        pieces = CASED_PIECES if vocabulary == "cased" else PIECES
        made = maker.make_unshared_original(folder, pieces, **settings)
        ours = bg.BertTokenizer(list(pieces), lowercase=made.lower_case)

        def tokenizer(text: str) -> list[int]:
            return ours(text).numpy().tolist()

    original = Original(folder, made, tokenizer, tensorflow_hub.load(folder), [])
    original.answers = original.answer(TEXTS)
    return original


@pytest.fixture(scope="session", params=ORIGINALS)
def original(request, tmp_path_factory, spiece) -> Original:
    vocabulary, settings = ORIGINALS[request.param]
    folder = tmp_path_factory.mktemp("original") / request.param
    return make_original(folder, spiece, vocabulary, settings)


@pytest.fixture(scope="session")
def read(original) -> bg.EncoderDecoderModel:
    return bg.EncoderDecoderModel.from_hub(original.folder)


# The modules themselves, by a network and a search in numpy.


class Reference:
    """One text at a time, without padding, in float64."""

    def __init__(self, original: Original):
        self.made = made = original.settings
        self.tokenizer = original.tokenizer
        weights = maker.read_weights(original.folder)
        assert all(name.startswith(made.scope) or name == "global_step" for name in weights)
        self.weights = {k.removeprefix(made.scope): v.astype(float) for k, v in weights.items()}
        self.stack = "bert/encoder" if made.shared else "bert/decoder"
        self.embeddings = "bert/embeddings"
        if made.decoder_embeddings:
            self.embeddings = "bert/decoder/embeddings"

    def best(self, text: str) -> tuple[list[int], float]:
        made = self.made
        ids = self.tokenizer(text)[: made.max_source_length - made.add_bos - made.add_eos]
        ids = [made.start_id] * made.add_bos + ids + [made.eos_id] * made.add_eos
        memory = self.embed(ids, "bert/embeddings")
        for i in range(made.num_layers):
            name = f"bert/encoder/layer_{i}"
            memory = self.feed_forward(self.attend(memory, memory, name, "self", "output"), name)
        alive, ended = [(0.0, [made.start_id])], []
        for length in range(1, made.decode_length + 1):
            grown = []
            for total, sequence in alive:
                log_probs = self.next_log_probs(sequence, memory)
                grown += [(total + p, [*sequence, t]) for t, p in enumerate(log_probs)]
            grown = sorted(grown, reverse=True)[: 2 * made.beam_size]
            over = [(total / self.penalty(length), s) for total, s in grown if s[-1] == made.eos_id]
            ended = sorted(ended + over, reverse=True)[: made.beam_size]
            alive = [item for item in grown if item[1][-1] != made.eos_id][: made.beam_size]
        if ended:
            return ended[0][1], ended[0][0]
        total, sequence = alive[0]
        scale = self.penalty(made.decode_length) if made.normalize_unfinished else 1.0
        return sequence, total / scale

    def penalty(self, length: int) -> float:
        return ((5 + length) / 6) ** self.made.alpha

    def next_log_probs(self, ids: list[int], memory: np.ndarray) -> np.ndarray:
        hidden = self.embed(ids, self.embeddings)
        for i in range(self.made.num_layers):
            name = f"{self.stack}/layer_{i}"
            hidden = self.attend(hidden, hidden, name, "self", "output", causal=True)
            hidden = self.attend(hidden, memory, name, "encdec", "encdec_output")
            hidden = self.feed_forward(hidden, name)
        logits = self.weights[f"{self.embeddings}/word_embeddings"] @ hidden[-1]
        return logits - np.log(np.exp(logits).sum())

    def embed(self, ids: list[int], name: str) -> np.ndarray:
        positions = self.weights[f"{name}/position_embeddings"][: len(ids)]
        return self.norm(self.weights[f"{name}/word_embeddings"][ids] + positions, name)

    def attend(self, hidden, memory, layer, attention, output, causal=False):
        heads = self.made.num_heads
        query, key, value = (
            self.dense(x, f"{layer}/attention/{attention}/{part}").reshape(len(x), heads, -1)
            for x, part in ((hidden, "query"), (memory, "key"), (memory, "value"))
        )
        scores = np.einsum("qad,kad->aqk", query, key) / math.sqrt(query.shape[-1])
        if causal:
            scores = np.where(np.tri(len(hidden)) == 1, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        context = np.einsum("aqk,kad->qad", weights, value).reshape(len(hidden), -1)
        name = f"{layer}/attention/{output}"
        return self.norm(hidden + self.dense(context, f"{name}/dense"), name)

    def feed_forward(self, hidden, layer):
        inner = self.dense(hidden, f"{layer}/intermediate/dense")
        if self.made.activation == "relu":
            inner = np.maximum(inner, 0)
        elif self.made.activation == "erf":
            inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
        else:
            cubic = math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)
            inner = inner * (1 + np.tanh(cubic)) / 2
        result = self.dense(inner, f"{layer}/output/dense")
        return self.norm(hidden + result, f"{layer}/output")

    def dense(self, x, name):
        return x @ self.weights[f"{name}/kernel"] + self.weights[f"{name}/bias"]

    def norm(self, x, name):
        gamma, beta = (self.weights[f"{name}/LayerNorm/{part}"] for part in ("gamma", "beta"))
        variance = x.var(-1, keepdims=True) + self.made.epsilon
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance) * gamma + beta


def test_modules_do_what_their_settings_say(original):
    fetches = ["search/sequences:0", "search/scores:0"]
    search = original.loaded.prune("input_texts:0", fetches)
    reference = Reference(original)
    for text in TEXTS[::3]:
        sequences, scores = (tensor.numpy()[0] for tensor in search(tf.constant([text])))
        expected, score = reference.best(text)
        assert sequences.tolist()[: len(expected)] == expected, text
        assert scores == pytest.approx(score, rel=1e-4)


def test_modules_answer_alone_as_in_a_batch_and_not_always_the_same(original):
    assert [original.answer([text])[0] for text in TEXTS] == original.answers
    assert len(set(original.answers)) >= 8
    ids = original.loaded.prune("input_texts:0", "search/sequences:0")(tf.constant(TEXTS)).numpy()
    ended = (ids[:, 1:] == original.settings.eos_id).any(axis=1)
    assert 0 < ended.sum() < len(TEXTS)


def test_modules_are_not_written_over_and_not_half_written(tmp_path, spiece):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there"):
        maker.make_shared_original(tmp_path / "there", spiece)
    with pytest.raises(ValueError, match="activation"):
        maker.make_shared_original(tmp_path / "new", spiece, activation="swish")
    with pytest.raises(ValueError, match="-1"):  # of TensorFlow, when the graph is half made
        maker.make_shared_original(tmp_path / "new", spiece, max_positions=-1)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_command_line_makes_modules_and_tells_errors_in_a_line(tmp_path, spiece, monkeypatch):
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    (tmp_path / "spiece.model").write_bytes(spiece)

    def run(*arguments: str) -> None:
        paths = [str(tmp_path / argument) for argument in arguments[1:3]]
        monkeypatch.setattr("sys.argv", ["make_tf1_module", arguments[0], *paths, *arguments[3:]])
        maker.main()

    run("encoder", "vocab.txt", "encoder")
    run("unshared", "vocab.txt", "unshared", "--seed", "5")
    run("shared", "spiece.model", "shared")
    assert (tmp_path / "encoder/assets/vocab.txt").read_text().splitlines() == PIECES
    for name in ("encoder", "unshared", "shared"):
        assert (tmp_path / name / "tfhub_module.pb").read_bytes() == b"\x08\x03"
    answers = tensorflow_hub.load(str(tmp_path / "unshared")).signatures["default"]
    assert answers(default=tf.constant(["sang"]))["default"].shape == [1]
    for arguments in (("shared", "vocab.txt", "new"), ("encoder", "vocab.txt", "encoder")):
        with pytest.raises(SystemExit, match="^error: "):
            run(*arguments)
    with pytest.raises(SystemExit, match="^error: .*absent"):
        run("encoder", "absent", "new")
    assert not (tmp_path / "new").exists()


# What we read of them.


def test_originals_say_what_their_modules_say(original, read):
    in_fives = [
        answer
        for start in range(0, len(TEXTS), 5)
        for answer in read.generate(TEXTS[start : start + 5], jit_compile=False)
    ]
    assert in_fives == original.answers
    alone = [read.generate(text, jit_compile=False) for text in TEXTS]
    assert alone == original.answers
    if original.folder.endswith("/shared"):  # one is enough of what takes long
        assert read.generate(TEXTS) == original.answers  # compiled


def test_original_settings_are_read(original, read):
    made = original.settings
    generation = read.generation_config
    assert generation.beam_scorer == "gnmt"
    assert generation.num_beams == made.beam_size
    assert generation.gnmt_alpha == made.alpha
    assert generation.max_new_tokens == made.decode_length
    assert generation.normalize_unfinished == made.normalize_unfinished
    preprocessor = read.preprocessor
    assert preprocessor.max_source_length == made.max_source_length
    assert (preprocessor.add_bos, preprocessor.add_eos) == (made.add_bos, made.add_eos)
    for config in (read.encoder.config, read.decoder.config):
        assert config.hidden_act == ACTIVATIONS[made.activation]
        assert config.layer_norm_eps == made.epsilon
        assert config.hidden_size == made.hidden_size
        assert config.num_hidden_layers == made.num_layers
        assert config.num_attention_heads == made.num_heads
        assert config.intermediate_size == made.intermediate_size
        assert config.max_position_embeddings == made.max_positions
        ids = (config.pad_token_id, config.bos_token_id, config.eos_token_id)
        assert ids == (made.pad_id, made.start_id, made.eos_id)
    assert (read.decoder.sharing == "all") == made.shared
    if isinstance(read.tokenizer, bg.BertTokenizer):
        assert read.tokenizer.lowercase == made.lower_case


def test_scores_are_those_of_the_module(original, read):
    texts = TEXTS[::4]
    expected = original.loaded.prune("input_texts:0", "search/scores:0")(tf.constant(texts)).numpy()
    result = read.generate(read.preprocessor.generate_preprocess(texts), jit_compile=False)
    np.testing.assert_allclose(result.scores[:, 0], expected, rtol=1e-4)


# Small ones, to be read: as settings of the maker, keywords, and what is to be read.
READ = {
    "flat": ({"lookup": "flat"}, {}, {}),
    "one_hot": ({"lookup": "one_hot", "functional": True}, {}, {}),
    "no_penalty": ({"penalty": "none"}, {"original": "roberta24_bbc"}, {"gnmt_alpha": 0.0}),
    "not_or": ({"go_on": "not_or"}, {"original": "roberta24_bbc"}, {}),
    "penalty": ({"penalty": "hidden"}, {"gnmt_alpha": 0.6}, {}),
    "beams": ({"hidden_beams": True}, {"num_beams": 3}, {}),
    "cond": ({"limit": "cond"}, {"max_new_tokens": 3}, {"max_new_tokens": 3}),
    "rows": ({"extra_rows": 5}, {}, {}),
}


@pytest.mark.parametrize("case", READ)
def test_other_ways_are_read(case, tmp_path, spiece):
    settings, given, expected = READ[case]
    maker.make_shared_original(tmp_path / "module", spiece, **SMALL, **settings)
    model = bg.EncoderDecoderModel.from_hub(str(tmp_path / "module"), verify=False, **given)
    config = model.generation_config
    read = {name: getattr(config, name) for name in ("max_new_tokens", "num_beams", "gnmt_alpha")}
    assert read == {"max_new_tokens": 6, "num_beams": 3, "gnmt_alpha": 0.6, **expected}
    loaded = tensorflow_hub.load(str(tmp_path / "module")).signatures["default"]
    answers = loaded(default=tf.constant(TEXTS))["default"].numpy().tolist()
    assert model.generate(TEXTS, jit_compile=False) == [answer.decode() for answer in answers]


@pytest.mark.parametrize("functional", [False, True])
def test_a_table_gives_what_the_graph_hides(functional, tmp_path, spiece):
    """A limit beyond the source's length, as in tensor2tensor, is 32 for one of the seven."""
    settings = {"limit": "source", "max_positions": 64, "functional": functional}
    maker.make_shared_original(tmp_path / "module", spiece, **SMALL, **settings)
    folder = str(tmp_path / "module")
    with pytest.raises(ValueError, match=r'max_new_tokens .*input_texts.*original="roberta') as _:
        bg.EncoderDecoderModel.from_hub(folder)
    model = bg.EncoderDecoderModel.from_hub(folder, original="roberta24_gigaword", verify=False)
    assert model.generation_config.max_new_tokens == 32
    assert model.generation_config.num_beams == 3  # the graph goes before the table
    given = bg.EncoderDecoderModel.from_hub(folder, max_new_tokens=9, verify=False)
    assert given.generation_config.max_new_tokens == 9


def test_no_table_gives_another_alpha_than_it_has(tmp_path, spiece):
    maker.make_shared_original(tmp_path / "module", spiece, **SMALL, penalty="hidden")
    with pytest.raises(ValueError, match=r"gnmt_alpha .*exponent.* Pass gnmt_alpha= to from_hub.$"):
        bg.EncoderDecoderModel.from_hub(str(tmp_path / "module"), original="roberta24_bbc")


def test_ids_as_the_originals_have_them(tmp_path):
    """Padding 0, eos 1, bos 2, unknown 100, nothing between, and more rows than pieces."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, " ".join(PIECES[9:])] * 4),
        model_writer=content,
        vocab_size=150,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=100,
        control_symbols=[f"<reserved_{i}>" for i in range(97)],
        minloglevel=2,
        num_threads=1,
    )
    spiece = content.getvalue()
    settings = {"hidden_ids": tuple(range(101)), "extra_rows": 7, "seed": 3, "lookup": "flat"}
    original = make_original(tmp_path / "module", spiece, "spiece", settings)
    model = bg.EncoderDecoderModel.from_hub(original.folder)
    tokenizer = model.tokenizer
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert ids == (0, 1, 2) and tokenizer.unk_token_id == 100
    assert model.preprocessor.hidden_token_ids == tuple(range(3, 101))
    assert model.decoder.config.vocab_size == tokenizer.vocab_size + 7
    assert len(set(original.answers)) > 4
    assert model.generate(TEXTS, jit_compile=False) == original.answers


REFUSED = {
    "power": ({"penalty": "power"}, "gnmt_alpha .the length penalty of .* is not"),
    "ids": ({"penalty": "ids"}, "gnmt_alpha .* divides scores by Pow .* counts no steps"),
    "placeholder": ({"limit": "placeholder"}, "decode_limit"),
    "cond": ({"limit": "cond"}, "max_new_tokens .*search/cond"),
    "cond_functional": ({"limit": "cond", "functional": True}, "max_new_tokens .*search/short"),
    "beams": ({"hidden_beams": True}, "num_beams .it depends on search/beam_width"),
    "variable": ({"extra_variables": ("bert/adapter/scale",)}, "bert/adapter/scale"),
    "logits": ({"logit_scale": 0.5}, "stand between the logits and .* log-prob.* another function"),
    "hidden": ({"twist": "hidden"}, "Mul .* between the decoder's last normalisation and its log"),
    "ban": ({"twist": "ban"}, "Sub, .* stand between the logits and"),
    "late_ban": ({"twist": "late_ban"}, "Sub, .* log-probabilities: .* computed from Merge"),
    "once": ({"twist": "penalize_once"}, "RealDiv, .* stand between the logits and"),
    "first": ({"twist": "first"}, "All .* stops it while a hypothesis could still win"),
    "any": ({"twist": "any"}, "Any .* stops it while a hypothesis could still win"),
    "quotes": ({"twist": "quotes"}, "RegexReplace .* changes the text before SentencePiece"),
    "period": ({"twist": "period"}, "RegexReplace .* changes the text after SentencePiece"),
    "cut_last": ({"twist": "cut_last", "add_eos": True}, "adds them first and then cuts them off"),
    "show_pad": ({"twist": "show_pad"}, "hidden_token_ids .it shows 3, its pad_token_id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case, tmp_path, spiece):
    settings, message = REFUSED[case]
    maker.make_shared_original(tmp_path / "module", spiece, **SMALL, **settings)
    with pytest.raises(ValueError, match=message) as caught:
        bg.EncoderDecoderModel.from_hub(str(tmp_path / "module"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("twist", "message"),
    [
        ("limit_words", "max_bytes_per_word 30 instead of 100"),
        ("quotes", "RegexReplace .* changes the text before WordPiece"),
        ("period", r"turn ids into text as our tokenizer does, but of \[.* it makes"),
    ],
)
def test_what_word_pieces_do_otherwise_is_refused(twist, message, tmp_path):
    maker.make_unshared_original(tmp_path / "module", PIECES, **SMALL, twist=twist)
    with pytest.raises(ValueError, match=message):
        bg.EncoderDecoderModel.from_hub(str(tmp_path / "module"), verify=False)


def test_a_module_is_not_taken_for_another(tmp_path, spiece):
    maker.make_shared_original(tmp_path / "module", spiece, **SMALL)
    for original, message in (("bert24_en_de", "with shared=False, but has True"),):
        with pytest.raises(ValueError, match=message):
            bg.EncoderDecoderModel.from_hub(str(tmp_path / "module"), original=original)


def test_missing_variables_are_named(tmp_path, spiece, monkeypatch):
    settings = {"shared": False, "decoder_embeddings": True}
    maker.make_shared_original(tmp_path / "module", spiece, **SMALL, **settings)
    variables = graph.Graph.variables

    def partitioned(self: graph.Graph) -> dict[str, str]:
        found = variables(self)
        name = "module/bert/embeddings/word_embeddings"
        return {f"{n}/part_0" if n == name else n: node for n, node in found.items()}

    monkeypatch.setattr(graph.Graph, "variables", partitioned)
    message = "graph has no module/bert/embeddings/word_embeddings .*part_0 and such are partit"
    with pytest.raises(ValueError, match=message):
        bg.EncoderDecoderModel.from_hub(str(tmp_path / "module"))


@pytest.mark.parametrize("case", ENCODERS)
def test_encoders_give_what_their_modules_give(case, tmp_path):
    settings = {"num_layers": 2, **ENCODERS[case]}
    pieces = PIECES if settings.get("lower_case", True) else CASED_PIECES
    made = maker.make_encoder(tmp_path / "module", pieces, **settings)
    encoder = bg.BertGenerationEncoder.from_hub(str(tmp_path / "module"))
    config = encoder.config
    assert config.hidden_act == ACTIVATIONS[made.activation]
    assert config.layer_norm_eps == made.epsilon
    assert config.num_attention_heads == made.num_heads
    assert config.num_hidden_layers == made.num_layers
    assert config.pad_token_id == pieces.index("[PAD]")

    ids = np.random.default_rng(0).integers(0, len(pieces), (3, 11), dtype=np.int32)
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    tokens = tensorflow_hub.load(str(tmp_path / "module")).signatures["tokens"]
    inputs = dict(zip(maker.ENCODER_SIGNATURE, (ids, mask, np.zeros_like(ids)), strict=True))
    theirs = tokens(**{name: tf.constant(array) for name, array in inputs.items()})
    difference = np.abs(encoder(ids, mask) - theirs["sequence_output"])[mask == 1]
    # Of values up to 4: processors without AVX-512 sum in another order.
    assert difference.max() < 1e-5 * max(1, np.abs(theirs["sequence_output"]).max())


def test_encoder_modules_warm_start_with_their_vocabulary(tmp_path):
    maker.make_encoder(tmp_path / "module", CASED_PIECES, lower_case=False, scope="module/")
    model = bg.EncoderDecoderModel.from_hub(encoder=str(tmp_path / "module"), share=True)
    assert model.tokenizer.tokenize("The fox") == ["The", "f", "##o", "##x"]
    assert model.tokenizer.eos_token_id == CASED_IDS["eos_id"]


def test_encoder_with_a_variable_of_no_bert_is_refused(tmp_path):
    maker.make_encoder(tmp_path / "module", PIECES, extra_variables=("bert/adapter/scale",))
    with pytest.raises(ValueError, match="bert/adapter/scale"):
        bg.BertGenerationEncoder.from_hub(str(tmp_path / "module"))
