"""Reading the originals, `google/bertseq2seq/*`: TF1 Hub modules from strings to strings.

Everything comes from the module itself: sizes and sharing from its variables (named as
Hugging Face's converter of these modules reads them), activation, epsilon and heads from the graph
of its layers, the search from its loop, the tokenizer from its ops, and the treatment of the source
from running that part of it on texts.
"""

import dataclasses
import re
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bertgen_tf.checkpoints.hub import modules
from bertgen_tf.checkpoints.hub.encoders import VERIFY_TOLERANCE
from bertgen_tf.checkpoints.hub.graph import Graph, Tensor
from bertgen_tf.checkpoints.hub.known import check_known
from bertgen_tf.checkpoints.hub.layers import depth, layer_rules, normalized, read_layers, scope_of
from bertgen_tf.checkpoints.hub.modules import Module, Tensors
from bertgen_tf.checkpoints.hub.search import Found, read_search
from bertgen_tf.checkpoints.hub.text import (
    PROBES,
    Text,
    check_answers,
    read_ids,
    read_source,
    read_text,
    read_tokenizer,
    run_part,
)
from bertgen_tf.checks import first_line
from bertgen_tf.config import TOKEN_IDS, BertGenerationConfig, GenerationConfig
from bertgen_tf.generation.search.sequences import gnmt_penalty
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.models.pretrained import Model, Tokenizer
from bertgen_tf.network import weights
from bertgen_tf.network.precision import exact
from bertgen_tf.network.stacks import BertGenerationDecoder, BertGenerationEncoder
from bertgen_tf.network.weights import Rule
from bertgen_tf.tokenizers import BertTokenizer

# What must be known; only the last has a default that is right for most modules.
SETTINGS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "max_source_length",
    "max_new_tokens",
    "num_beams",
    "gnmt_alpha",
    "hidden_token_ids",
    "normalize_unfinished",
)
# The texts on which the two are compared: the last is truncated.
_VERIFIED = (
    *PROBES,
    '"Caf\u00e9"  in K\u00f6ln; who\'s there?\tNobody.',
    " ".join(PROBES * 30),
)
# Hypotheses that do not exist score no more than this; scores are sums of log-probabilities.
_NO_SCORE = -1e6
_EMBEDDINGS = (
    Rule("bert/embeddings/word_embeddings", "embeddings/word_embeddings/embeddings"),
    Rule("bert/embeddings/position_embeddings", "embeddings/position_embeddings/embeddings"),
    Rule("bert/embeddings/LayerNorm/(gamma|beta)", r"embeddings/layer_norm/\1"),
)
_STEP = Rule("(.*/)?global_step", None)


def read_original(
    handle: str,
    given: dict[str, Any],
    known: dict[str, Any],
    verify: bool,
    name: str,
    model_class: type[Model],
) -> Model:
    """Builds the model of an original.

    Args:
        handle: as `fetch.resolve` takes it.
        given: field of `SETTINGS` -> value, for what need not be read.
        known: the same, for what cannot be found in the graph.
        verify: compares the model with the module.
        name: of the model.
        model_class: what to build.
    """
    module = modules.open_module(handle)
    layout = _layout_of(module)
    modules.check_names(module)
    graph = module.graph()
    _check_variables(module, graph, layout)
    nodes = graph.variables()
    text = read_text(module, graph, nodes[layout.scope + "bert/embeddings/word_embeddings"])
    found = read_search(
        graph,
        nodes[f"{layout.scope}{layout.decoder_embeddings}/word_embeddings"],
        nodes[layout.scope + layout.last_norm],
        layout.tensors.shapes["bert/embeddings/word_embeddings"][0],
        text.output,
    )
    settings = _Settings(module.handle, found, given, known)
    parts = _read_parts(module, graph, layout, text, found, settings)
    options = {"source_checkpoint": {"model": handle}, "name": name}
    # In float32 whatever the dtype policy, to be compared with the module.
    encoder, decoder = parts.build_stacks(dtype="float32")
    model = parts.build(model_class, encoder, decoder, **options)
    if found.ids is not None and "hidden_token_ids" not in settings.given:
        check_answers(module, graph, text, found.ids, model.preprocessor)
    _assign(model, layout, module.handle)
    if verify:
        _verify(module, graph, layout.scope, text, found.scores, model)
    if model.encoder.dtype_policy == keras.config.dtype_policy():
        return model
    module.unload()
    encoder, decoder = parts.build_stacks()
    encoder.set_weights(model.encoder.get_weights())
    decoder.set_weights(model.decoder.get_weights())
    return parts.build(model_class, encoder, decoder, **options)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which variables a module has.

    Attributes:
        scope: what precedes `bert/` in their names.
        tensors: by their names without the scope.
    """

    scope: str
    tensors: Tensors

    @property
    def one_stack(self) -> bool:
        """Whether encoder and decoder are one stack, except cross-attention."""
        return not any(name.startswith("bert/decoder/layer_") for name in self.tensors)

    @property
    def two_tables(self) -> bool:
        """Whether the decoder has embeddings of its own."""
        return "bert/decoder/embeddings/word_embeddings" in self.tensors

    @property
    def sharing(self) -> str:
        """As for `BertGenerationDecoder`."""
        return "all" if self.one_stack else ("none" if self.two_tables else "word_embeddings")

    @property
    def decoder(self) -> str:
        """The scope of the decoder's layers."""
        return "bert/encoder" if self.one_stack else "bert/decoder"

    @property
    def decoder_embeddings(self) -> str:
        """The scope of the decoder's embeddings."""
        return "bert/decoder/embeddings" if self.two_tables else "bert/embeddings"

    @property
    def last_norm(self) -> str:
        """The last variable before the logits."""
        layers = depth(self.decoder + r"/layer_(\d+)/", self.tensors)
        return f"{self.decoder}/layer_{layers - 1}/output/LayerNorm/beta"


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a model is built from, except the weights.

    Attributes:
        encoder, decoder: the sizes of the stacks.
        sharing: as for `BertGenerationDecoder`.
        tokenizer: the module's.
        values: field of `SETTINGS` -> value.
        special_tokens: `add_bos` and `add_eos`.
    """

    encoder: BertGenerationConfig
    decoder: BertGenerationConfig
    sharing: str
    tokenizer: Tokenizer
    values: dict[str, Any]
    special_tokens: dict[str, bool]

    def build_stacks(self, **dtype: Any) -> tuple[BertGenerationEncoder, BertGenerationDecoder]:
        """Encoder and decoder, with random weights."""
        encoder = BertGenerationEncoder(self.encoder, **dtype)
        shared = None if self.sharing == "none" else encoder
        return encoder, BertGenerationDecoder(self.decoder, shared, self.sharing, **dtype)

    def build(
        self,
        model_class: type[Model],
        encoder: BertGenerationEncoder,
        decoder: BertGenerationDecoder,
        **options: Any,
    ) -> Model:
        """The model of the two stacks."""
        values = self.values
        limit = min(values["max_new_tokens"] + 1, self.decoder.max_position_embeddings)
        return model_class(
            encoder,
            decoder,
            self.tokenizer,
            max_source_length=values["max_source_length"],
            max_target_length=limit,
            hidden_token_ids=values["hidden_token_ids"],
            prose=not isinstance(self.tokenizer, BertTokenizer),
            **self.special_tokens,
            generation_config=GenerationConfig(
                max_new_tokens=values["max_new_tokens"],
                num_beams=values["num_beams"],
                beam_scorer="gnmt",
                gnmt_alpha=values["gnmt_alpha"],
                normalize_unfinished=values["normalize_unfinished"],
            ),
            **options,
        )


def _read_parts(
    module: Module,
    graph: Graph,
    layout: _Layout,
    text: Text,
    found: Found,
    settings: "_Settings",
) -> _Parts:
    """Tokenizer, sizes and settings; `found` gets what the ids of a few texts show."""
    read = read_ids(module, graph, text)
    found.read("pad_token_id", lambda: int(read(["", PROBES[0]])[0, -1]))
    ids = {n: settings.get(n) for n in TOKEN_IDS}
    settings.check()  # the tokenizer needs them
    tokenizer = read_tokenizer(module, graph, text, ids)
    check_known(module.handle, settings.known, layout.one_stack, tokenizer)
    positions = layout.tensors.shapes["bert/embeddings/position_embeddings"][0]
    found.values["max_source_length"], special_tokens = read_source(
        module.handle, read, tokenizer, positions
    )
    for problems in (found.unread, found.hidden):
        if "shown" in problems:
            problems["hidden_token_ids"] = problems.pop("shown")
    shown = found.values.pop("shown", None)
    if shown is not None:
        found.read("hidden_token_ids", lambda: _hidden_ids(shown[: tokenizer.vocab_size], ids))
    if "normalize_unfinished" not in found.unread:
        found.values.setdefault("normalize_unfinished", False)
    values = {field: settings.get(field) for field in SETTINGS}
    settings.check()
    encoder, decoder = _read_configs(module, graph, layout, ids)
    return _Parts(encoder, decoder, layout.sharing, tokenizer, values, special_tokens)


def is_original(meta_graphs: list[Any]) -> bool:
    """Whether a SavedModel has the variables of an original."""
    return any(
        re.search(r"bert/(en|de)coder/layer_0/attention/encdec/", node.name)
        for meta_graph in meta_graphs
        for node in meta_graph.graph_def.node
    )


class _Settings:
    """Settings by precedence: given, read, known; what is missing is collected."""

    def __init__(self, handle: str, found: Found, given: dict, known: dict):
        self.handle = handle
        self.found = found
        self.given = {n: v for n, v in given.items() if v is not None}
        self.known = known
        self.missing: dict[str, str] = {}

    def get(self, field: str) -> Any:
        if field in self.given:
            return self.given[field]
        if field in self.found.values:
            return self.found.values[field]
        # What the graph does differently is not a gap that a table could fill.
        if field in self.known and field not in self.found.unread:
            return self.known[field]
        reason = self.found.unread.get(field) or self.found.hidden.get(field)
        self.missing[field] = reason or "it is not in the graph"
        return None

    def check(self) -> None:
        if problem := self.found.unread.get("search"):
            raise ValueError(
                f"{self.handle} should search as tensor2tensor does, with the log-probabilities of "
                f"BERT's decoder, but {problem}."
            )
        if self.missing:
            reasons = "; ".join(f"{name} ({why})" for name, why in self.missing.items())
            remedy = f"Pass {', '.join(f'{name}=' for name in self.missing)} to from_hub"
            if not self.known and not set(self.missing) & set(self.found.unread):
                remedy += (
                    ', or original="roberta24_bbc" etc. if it is one of bertgen_tf.hub.ORIGINALS'
                )
            raise ValueError(
                f"{self.handle} should specify its settings, but could not be read for {reasons}. "
                f"{remedy}."
            )


def _layout_of(module: Module) -> _Layout:
    """The variables of a module, after a check that they are an original's."""
    scope = scope_of(module.tensors)
    missing = []
    if scope is None:
        missing.append("bert/embeddings/word_embeddings")
    if not any("/encdec/" in name for name in module.tensors):
        missing.append("bert/encoder/layer_0/attention/encdec/query/kernel")
    if module.signature("default") is None:
        missing.append("signature default")
    if missing:
        raise ValueError(
            f"{module.handle} should be an encoder-decoder like google/bertseq2seq/*, with the "
            f"variables of google-research/bert, but it has no {', '.join(missing)}. "
            f"Found {modules.found_variables(module)}. "
            "from_hub(encoder=...) warm-starts from BERT encoders."
        )
    return _Layout(scope or "", module.tensors.without(scope or ""))


def _check_variables(module: Module, graph: Graph, layout: _Layout) -> None:
    """Raises unless checkpoint and graph have what sizes and the graph's parts are read from."""
    scope = layout.scope
    sides = ("encoder",) if layout.one_stack else ("encoder", "decoder")
    embeddings = sorted({"bert/embeddings", layout.decoder_embeddings})
    needed = [f"{e}/{part}_embeddings" for e in embeddings for part in ("word", "position")]
    for side in sides:
        layers = depth(rf"bert/{side}/layer_(\d+)/", layout.tensors)
        needed += [f"bert/{side}/layer_{i}/output/LayerNorm/beta" for i in range(max(layers, 1))]
        needed += [
            f"bert/{side}/layer_0/attention/self/query/kernel",
            f"bert/{side}/layer_0/intermediate/dense/kernel",
        ]
    for where, names in (("checkpoint", module.tensors), ("graph", graph.variables())):
        missing = [scope + name for name in needed if scope + name not in names]
        if missing:
            parts = [n for n in names if re.search(r"/part_\d+$", n)]
            split = f" ({parts[0]} and such are partitioned variables)" if parts else ""
            raise ValueError(
                f"{module.handle} should have the variables of google-research/bert, but its "
                f"{where} has no {', '.join(missing[:4])}{split}."
            )


def _hidden_ids(shown: np.ndarray, ids: dict[str, int]) -> tuple[int, ...]:
    for name in ("pad_token_id", "bos_token_id"):
        if shown[ids[name]] and ids[name] != ids["eos_token_id"]:
            raise ValueError(f"it shows {ids[name]}, its {name}, which our text never contains")
    return tuple(sorted(set(np.flatnonzero(~shown).tolist()) - set(ids.values())))


def _read_configs(
    module: Module, graph: Graph, layout: _Layout, ids: dict[str, int]
) -> tuple[BertGenerationConfig, BertGenerationConfig]:
    tensors = layout.tensors

    def config(side: str, embeddings: str, cross: bool) -> BertGenerationConfig:
        bert = re.escape(layout.scope) + "bert/"
        layer = f"bert/{side}/layer_"
        vocab_size, hidden_size = tensors.shapes[f"{embeddings}/word_embeddings"]
        return BertGenerationConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=depth(layer + r"(\d+)/", tensors),
            intermediate_size=tensors.shapes[f"{layer}0/intermediate/dense/kernel"][1],
            max_position_embeddings=tensors.shapes[f"{embeddings}/position_embeddings"][0],
            add_cross_attention=cross,
            **read_layers(
                graph,
                module.handle,
                f"{bert}({embeddings.removeprefix('bert/')}|{side}/.*)/LayerNorm/gamma",
                f"{bert}{side}/layer_\\d+/",
            ),
            **ids,
        )

    encoder = config("encoder", "bert/embeddings", False)
    if layout.one_stack:
        return encoder, encoder.replace(add_cross_attention=True)
    return encoder, config("decoder", layout.decoder_embeddings, True)


def _assign(model: EncoderDecoderModel, layout: _Layout, source: str) -> None:
    decoder, tensors = weights.named_variables(model.decoder), layout.tensors
    if layout.one_stack:
        rules = (*_EMBEDDINGS, *layer_rules("bert/encoder"), _STEP)
        weights.assign(decoder, tensors, rules, source=source, new="output_bias")
        return
    ignored = Rule("bert/decoder/.*", None)
    rules = (*_EMBEDDINGS, *layer_rules("bert/encoder"), ignored, _STEP)
    weights.assign(weights.named_variables(model.encoder), tensors, rules, source=source)
    embeddings = [
        Rule(rule.source.replace("bert/embeddings", layout.decoder_embeddings), rule.target)
        for rule in _EMBEDDINGS
    ]
    of_encoder = [Rule("bert/encoder/.*", None)]
    if layout.two_tables:
        of_encoder.append(Rule("bert/embeddings/.*", None))
    rules = (*embeddings, *layer_rules("bert/decoder"), *of_encoder, _STEP)
    weights.assign(decoder, tensors, rules, source=source, new="output_bias")


def _verify(
    module: Module,
    graph: Graph,
    scope: str,
    text: Text,
    scores: tuple[str, str] | None,
    model: EncoderDecoderModel,
) -> None:
    """Compares the encoder's output, and the answers of both with their scores."""
    texts = list(_VERIFIED)
    remedy = "verify=False loads the weights anyway."
    output = _encoder_output(module, graph, scope, model.encoder.config.num_hidden_layers)
    with exact():
        batch = model.preprocessor.generate_preprocess(texts)
        ours = model.encoder(batch["input_ids"], batch["attention_mask"]).numpy()
        result = model.generate(batch, jit_compile=False)
        said = model.preprocessor.generate_postprocess(result.sequences[:, 0])
        try:
            theirs = run_part(module, graph, text, output)(texts)
            answers = module.loaded.signatures["default"](**{text.key: tf.constant(texts)})
            expected = answers[text.answer].numpy().tolist()
            their_scores = _module_scores(module, graph, text, scores, model, texts)
        except Exception as error:  # whatever the module's graph raises
            raise ValueError(
                f"{module.handle} should answer texts, but running it failed: "
                f"{first_line(error)}. {remedy}"
            ) from error
    theirs = theirs.reshape(len(texts), -1, ours.shape[-1])[:, : ours.shape[1]]
    difference = np.inf
    if theirs.shape == ours.shape:
        difference = np.abs(ours - theirs)[batch["attention_mask"].numpy() == 1].max()
    if not difference <= VERIFY_TOLERANCE:  # NaN is not
        raise ValueError(
            f"{module.handle} should give the same encoder output as our encoder with its weights, "
            f"within {VERIFY_TOLERANCE}, but differs by {difference:.3g}. {remedy}"
        )
    for probe, mine, answer in zip(texts, said.numpy().tolist(), expected, strict=True):
        if mine != answer:
            raise ValueError(
                f"{module.handle} should say the same as our model with its weights, but to "
                f"{probe[:160]!r} it says {answer.decode(errors='replace')!r} and ours "
                f"{mine.decode()!r}. {remedy}"
            )
    if their_scores is not None:
        difference = np.abs(result.scores[:, 0] - their_scores) / np.maximum(
            1, np.abs(their_scores)
        )
        if not difference.max() <= VERIFY_TOLERANCE:
            raise ValueError(
                f"{module.handle} should give its answers the same scores as our model with its "
                f"weights, within {VERIFY_TOLERANCE}, but they differ by {difference.max():.3g}. "
                f"{remedy}"
            )


def _module_scores(
    module: Module,
    graph: Graph,
    text: Text,
    scores: tuple[str, str] | None,
    model: EncoderDecoderModel,
    texts: list[str],
) -> np.ndarray | None:
    """The scores of the module's best hypotheses; None if its graph does not expose them."""
    ends = [graph.after_loop(name) for name in scores or ()]
    if not ends or None in ends:
        return None
    sums, finished = (run_part(module, graph, text, end)(texts) for end in ends)
    if sums.shape != finished.shape or sums.ndim != 2:
        return None
    config = model.generation_config
    if config.normalize_unfinished:
        sums = sums / gnmt_penalty(config.max_new_tokens, config.gnmt_alpha).numpy()
    return np.where(finished[:, 0] > _NO_SCORE, finished[:, 0], sums[:, 0])


def _encoder_output(module: Module, graph: Graph, scope: str, layers: int) -> Tensor:
    """The last normalisation of the encoder."""
    nodes = graph.variables()
    beta = nodes[f"{scope}bert/encoder/layer_{layers - 1}/output/LayerNorm/beta"]
    cross = {node for name, node in nodes.items() if "/encdec/" in name}
    for name in normalized(graph, beta):
        if not set(graph.before([(name, 0)])) & (cross | graph.loop_variables):
            return name, 0
    raise ValueError(f"{module.handle} should normalise its encoder's output, but does not.")
