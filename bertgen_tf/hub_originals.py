"""Reading the originals, `google/bertseq2seq/*`: TF1 Hub modules from strings to strings.

Everything comes from the module itself: sizes and sharing from its variables (named as
HuggingFace's converter of these modules reads them), activation, epsilon and heads from its layers'
graph, the search from its loop, the tokenizer from its ops, and the treatment of the source from
running that part of it on texts.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import sentencepiece
import tensorflow as tf

from bertgen_tf import hub_modules, weights
from bertgen_tf.config import BertGenerationConfig, GenerationConfig
from bertgen_tf.encoder_decoder import EncoderDecoderModel
from bertgen_tf.graph import Graph, Tensor
from bertgen_tf.hub_encoders import VERIFY_TOLERANCE, depth, exact, layer_rules, scope_of
from bertgen_tf.hub_layers import ADDS, gathers, read_layers
from bertgen_tf.hub_modules import Module
from bertgen_tf.hub_search import Found, read_search
from bertgen_tf.models import BertGenerationDecoder, BertGenerationEncoder
from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer
from bertgen_tf.weights import Rule, first_line

Tokenizer = BertTokenizer | BertGenerationTokenizer

# What must be known; all but the last two have no value that would be right for most modules.
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
PROBES = (
    "The old house by the river was sold again, and nobody knew why.",
    "Yes.",
    "A young woman found the letter that her father had hidden in the garden behind the house "
    "many years ago; she never told anyone what it said.",
)
_EMBEDDINGS = (
    Rule("bert/embeddings/word_embeddings", "embeddings/word_embeddings/embeddings"),
    Rule("bert/embeddings/position_embeddings", "embeddings/position_embeddings/embeddings"),
    Rule("bert/embeddings/LayerNorm/(gamma|beta)", r"embeddings/layer_norm/\1"),
)
_STEP = Rule("(.*/)?global_step", None)
_REQUIRED = (
    "bert/embeddings/position_embeddings",
    "bert/encoder/layer_0/attention/self/query/kernel",
    "bert/encoder/layer_0/intermediate/dense/kernel",
)


@dataclasses.dataclass(frozen=True)
class _Text:
    """The signature of a module: where text goes in and comes out, and the ids between."""

    input: str
    output: Tensor
    key: str
    answer: str
    source_ids: Tensor


def read_original(
    handle: str, given: dict[str, Any], known: dict[str, Any], verify: bool, name: str
) -> EncoderDecoderModel:
    """Builds the model of an original.

    Args:
        handle: as `hub_modules.resolve` takes it.
        given: field of `SETTINGS` -> value, for what need not be read.
        known: the same, for what cannot be found in the graph.
        verify: compares the model with the module.
        name: of the model.
    """
    module = hub_modules.open_module(handle)
    scope = _check_original(module)
    hub_modules.check_names(module)
    graph = module.graph()
    tensors = {n.removeprefix(scope): value for n, value in module.tensors.items()}
    shared = not any(n.startswith("bert/decoder/layer_") for n in tensors)
    own = "bert/decoder/embeddings/word_embeddings" in tensors
    nodes = graph.variables()
    word = scope + ("bert/decoder" if own else "bert") + "/embeddings/word_embeddings"
    text = _text(module, graph, nodes[scope + "bert/embeddings/word_embeddings"])
    vocab_size = len(tensors["bert/embeddings/word_embeddings"])
    found = read_search(graph, nodes[word], vocab_size, text.output)
    read_ids = _run(module, graph, text, text.source_ids)
    found.read("pad_token_id", lambda: int(read_ids(["", PROBES[0]])[0, -1]))
    settings = _Settings(module.handle, found, given, known)
    ids = {n: settings.get(n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    settings.check()  # the tokenizer needs them
    tokenizer = _read_tokenizer(module, graph, text, ids)
    positions = len(tensors["bert/embeddings/position_embeddings"])
    added = _read_source(module.handle, found, read_ids, tokenizer, positions)
    shown = found.values.pop("shown", None)
    if shown is not None:
        dropped = set(np.flatnonzero(~shown).tolist()) - set(ids.values())
        found.values["hidden_token_ids"] = tuple(sorted(dropped))
    elif "shown" in found.unread:
        found.unread["hidden_token_ids"] = found.unread.pop("shown")
    found.values.setdefault("normalize_unfinished", False)
    values = {field: settings.get(field) for field in SETTINGS}
    settings.check()

    configs = _read_configs(module, graph, scope, tensors, shared, ids)
    sharing = "all" if shared else ("none" if own else "word_embeddings")

    def build(encoder_weights: Any = None, decoder_weights: Any = None, **dtype: Any):
        encoder = BertGenerationEncoder(configs[0], **dtype)
        decoder = BertGenerationDecoder(
            configs[1], None if sharing == "none" else encoder, sharing, **dtype
        )
        if encoder_weights is not None:
            encoder.set_weights(encoder_weights)
            decoder.set_weights(decoder_weights)
        limit = min(values["max_new_tokens"] + 1, configs[1].max_position_embeddings)
        return EncoderDecoderModel(
            encoder,
            decoder,
            tokenizer,
            max_source_length=values["max_source_length"],
            max_target_length=limit,
            hidden_token_ids=values["hidden_token_ids"],
            prose=not isinstance(tokenizer, BertTokenizer),
            **added,
            generation_config=GenerationConfig(
                max_new_tokens=values["max_new_tokens"],
                num_beams=values["num_beams"],
                beam_scorer="gnmt",
                gnmt_alpha=values["gnmt_alpha"],
                normalize_unfinished=values["normalize_unfinished"],
            ),
            name=name,
        )

    # In float32 whatever the dtype policy, to be compared with the module.
    model = build(dtype="float32")
    _assign(model, tensors, shared, own, module.handle)
    if verify:
        _verify(module, graph, scope, text, model, configs[0].num_hidden_layers)
    if model.encoder.dtype_policy == keras.config.dtype_policy():
        return model
    return build(model.encoder.get_weights(), model.decoder.get_weights())


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
        # What the graph does in another way is no gap, that a table could fill.
        if field in self.known and field not in self.found.unread:
            return self.known[field]
        self.missing[field] = self.found.unread.get(field, "it is not in the graph")
        return None

    def check(self) -> None:
        if problem := self.found.unread.get("logits"):
            raise ValueError(
                f"{self.handle} should search with the log-probabilities of BERT's decoder, but "
                f"{problem}."
            )
        if self.missing:
            reasons = "; ".join(f"{name} ({why})" for name, why in self.missing.items())
            raise ValueError(
                f"{self.handle} should tell its settings, but could not be read for {reasons}. "
                f"Give {', '.join(f'{name}=' for name in self.missing)} to from_hub, or "
                'original="roberta24_bbc" or such if it is one of bertgen_tf.hub.ORIGINALS.'
            )


def _check_original(module: Module) -> str:
    """The scope of the variables, after a check that they are an original's."""
    scope = scope_of(module.tensors) or ""
    names = {name.removeprefix(scope) for name in module.tensors}
    missing = [name for name in _REQUIRED if name not in names]
    if not any("/encdec/" in name for name in names):
        missing.append("bert/encoder/layer_0/attention/encdec/query/kernel")
    signatures = getattr(module.loaded, "signatures", {})
    if "default" not in signatures:
        missing.append("signature default")
    if missing or scope_of(module.tensors) is None:
        raise ValueError(
            f"{module.handle} should be an encoder-decoder as google/bertseq2seq/*, with the "
            f"variables of google-research/bert, but it has no "
            f"{', '.join(missing) or 'bert/embeddings/word_embeddings'}. "
            f"Found {hub_modules.found_variables(module)}. "
            "from_hub(encoder=...) warm-starts from BERT encoders."
        )
    return scope


def _text(module: Module, graph: Graph, embeddings: str) -> _Text:
    signature = module.signature("default")
    sides = (signature.inputs, signature.outputs)
    string = tf.string.as_datatype_enum
    if any(len(side) != 1 or next(iter(side.values())).dtype != string for side in sides):
        raise ValueError(
            f"{module.handle} should take and give strings, but its signature default takes "
            f"{', '.join(signature.inputs) or 'nothing'} and gives {', '.join(signature.outputs)}."
        )
    ((key, source),) = signature.inputs.items()
    ((answer, result),) = signature.outputs.items()
    text = graph.resolve(source.name)
    found = set()
    for _, ids in gathers(graph, embeddings):
        before = graph.before([ids])
        if text[0] in before and not graph.loop_variables & set(before):
            found.add(ids)
    if len(found) != 1:
        raise ValueError(
            f"{module.handle} should look the ids of its text up in its word embeddings once, but "
            f"does so at {len(found)} places."
        )
    return _Text(source.name, graph.resolve(result.name), key, answer, found.pop())


def _run(module: Module, graph: Graph, text: _Text, tensor: Tensor) -> Callable:
    """Texts -> the value of a tensor of the module."""
    if tensor[0] not in graph.main:
        raise ValueError(
            f"{module.handle} should compute {tensor[0]} outside of functions, to be compared."
        )
    function = module.loaded.prune(text.input, f"{tensor[0]}:{tensor[1]}")

    def run(texts: list[str]) -> np.ndarray:
        try:
            return function(tf.constant(texts)).numpy()
        except tf.errors.OpError as error:
            raise ValueError(
                f"{module.handle} should compute {tensor[0]} for texts, but running it failed: "
                f"{first_line(error)}"
            ) from error

    return run


def _read_tokenizer(module: Module, graph: Graph, text: _Text, ids: dict[str, int]) -> Tokenizer:
    names = graph.before([text.source_ids])
    by_op = {graph.nodes[name].op: graph.nodes[name] for name in names}
    try:
        if "SentencepieceOp" in by_op:
            proto = by_op["SentencepieceOp"].attr["model"].s
            processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
            pieces = [processor.id_to_piece(i) for i in ids.values()]
            roles = dict(zip(("pad_token", "bos_token", "eos_token"), pieces, strict=True))
            return BertGenerationTokenizer(
                proto, unk_token=processor.id_to_piece(processor.unk_id()), **roles
            )
        if "WordpieceTokenizeWithOffsets" in by_op:
            node = by_op["WordpieceTokenizeWithOffsets"]
            pieces = _read_table(module, graph, node.inputs[1])
            roles = dict(
                zip(
                    ("pad_token", "bos_token", "eos_token"),
                    (pieces[i] for i in ids.values()),
                    strict=True,
                )
            )
            return BertTokenizer(
                pieces,
                lowercase=bool({"CaseFoldUTF8", "StringLower"} & set(by_op)),
                unk_token=node.attr["unknown_token"].s.decode(),
                **roles,
            )
    except (IndexError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{module.handle} should hold its vocabulary, but reading it failed: "
            f"{first_line(error)}"
        ) from error
    strings = [n for n in names if "Token" in graph.nodes[n].op or "piece" in graph.nodes[n].op]
    raise ValueError(
        f"{module.handle} should tokenize with SentencepieceOp or WordpieceTokenizeWithOffsets, "
        f"but has {graph.ops_of(strings) or graph.ops_of(names)}."
    )


def _read_table(module: Module, graph: Graph, table: Tensor) -> list[str]:
    """The keys of a table from strings to ids, in the order of ids."""
    name = graph.source(table)[0]
    for node, index in graph.uses(name):
        if index == 0 and node.op.startswith("InitializeTableFromTextFile"):
            source = graph.source(node.inputs[1])
            path = module.asset(f"{source[0]}:{source[1]}")
            columns = (node.attr["key_index"].i, node.attr["value_index"].i)
            if path and columns == (-2, -1):  # whole lines, and their numbers
                lines = pathlib.Path(path).read_text(encoding="utf-8").rstrip("\r\n").split("\n")
                return [line.rstrip("\r") for line in lines]
        elif index == 0 and node.op in ("InitializeTableV2", "LookupTableImportV2"):
            keys, ids = (graph.constant(tensor) for tensor in node.inputs[1:3])
            if keys is not None and ids is not None:
                pieces = dict(zip(ids.tolist(), keys.tolist(), strict=True))
                return [pieces[i].decode() for i in range(len(pieces))]
    raise ValueError(f"the table {name} is not filled from an asset or constants")


def _read_source(
    handle: str, found: Found, read_ids: Callable, tokenizer: Tokenizer, positions: int
) -> dict[str, bool]:
    """`max_source_length`, and which special tokens a source gets; by running that part."""
    short = PROBES[0]
    ours = tokenizer(short).numpy().tolist()
    text = " ".join([short] * (2 * positions // max(len(ours), 1) + 2))
    ours = tokenizer(text).numpy().tolist()
    theirs = read_ids([text])[0].tolist()
    for bos, eos in itertools.product((False, True), repeat=2):
        length = len(theirs) - bos - eos
        expected = [tokenizer.bos_token_id] * bos + ours[:length] + [tokenizer.eos_token_id] * eos
        if theirs == expected:
            found.values["max_source_length"] = min(len(theirs), positions)
            return {"add_bos": bos, "add_eos": eos}
    raise ValueError(
        f"{handle} should read a text as our tokenizer does with its vocabulary, but its ids of a "
        f"text begin with {theirs[:6]}, and ours with {ours[:6]}."
    )


def _read_configs(
    module: Module, graph: Graph, scope: str, tensors: dict, shared: bool, ids: dict[str, int]
) -> tuple[BertGenerationConfig, BertGenerationConfig]:
    def config(side: str, embeddings: str, cross: bool) -> BertGenerationConfig:
        bert = re.escape(scope) + "bert/"
        layer = f"bert/{side}/layer_"
        word = tensors[f"{embeddings}/word_embeddings"]
        return BertGenerationConfig(
            vocab_size=word.shape[0],
            hidden_size=word.shape[1],
            num_hidden_layers=depth(layer + r"(\d+)/", tensors),
            intermediate_size=tensors[f"{layer}0/intermediate/dense/kernel"].shape[1],
            max_position_embeddings=len(tensors[f"{embeddings}/position_embeddings"]),
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
    if shared:
        return encoder, encoder.replace(add_cross_attention=True)
    own = "bert/decoder/embeddings"
    own = own if f"{own}/word_embeddings" in tensors else "bert/embeddings"
    return encoder, config("decoder", own, True)


def _assign(
    model: EncoderDecoderModel, tensors: dict[str, Any], shared: bool, own: bool, source: str
) -> None:
    decoder = weights.named_variables(model.decoder)
    if shared:
        rules = (*_EMBEDDINGS, *layer_rules("bert/encoder"), _STEP)
        weights.assign(decoder, tensors, rules, source=source, new="output_bias")
        return
    ignored = Rule("bert/decoder/.*", None)
    rules = (*_EMBEDDINGS, *layer_rules("bert/encoder"), ignored, _STEP)
    weights.assign(weights.named_variables(model.encoder), tensors, rules, source=source)
    of_encoder = [Rule("bert/encoder/.*", None), Rule("bert/embeddings/.*", None)] if own else [
        Rule("bert/encoder/.*", None)]  # fmt: skip
    embeddings = [
        Rule(r.source.replace("bert/", "bert/decoder/"), r.target) for r in _EMBEDDINGS
    ] if own else list(_EMBEDDINGS)  # fmt: skip
    rules = (*embeddings, *layer_rules("bert/decoder"), *of_encoder, _STEP)
    weights.assign(decoder, tensors, rules, source=source, new="output_bias")


def _verify(
    module: Module,
    graph: Graph,
    scope: str,
    text: _Text,
    model: EncoderDecoderModel,
    layers: int,
) -> None:
    """Compares the encoder's output, and what module and model say."""
    texts = list(PROBES)
    remedy = "verify=False takes up the weights all the same."
    try:
        with exact():
            batch = model.preprocessor.generate_preprocess(texts)
            ours = model.encoder(batch["input_ids"], batch["attention_mask"]).numpy()
            theirs = _run(module, graph, text, _encoder_output(module, graph, scope, layers))(texts)
            said = model.generate(texts, jit_compile=False)
            answers = module.loaded.signatures["default"](**{text.key: tf.constant(texts)})
            expected = [answer.decode() for answer in answers[text.answer].numpy().tolist()]
    except Exception as error:  # whatever the module's graph raises
        raise ValueError(
            f"{module.handle} should answer texts, but running it failed: {first_line(error)}. "
            f"{remedy}"
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
    for probe, mine, answer in zip(texts, said, expected, strict=True):
        if mine != answer:
            raise ValueError(
                f"{module.handle} should say the same as our model with its weights, but to "
                f"{probe!r} it says {answer!r} and ours {mine!r}. {remedy}"
            )


def _encoder_output(module: Module, graph: Graph, scope: str, layers: int) -> Tensor:
    """The last normalisation of the encoder."""
    nodes = graph.variables()
    beta = nodes[f"{scope}bert/encoder/layer_{layers - 1}/output/LayerNorm/beta"]
    cross = {node for name, node in nodes.items() if "/encdec/" in name}
    for node, _ in graph.uses(beta):
        names = [node.name] if node.op in ADDS else []
        if node.op == "Sub":  # batch_normalization: beta - mean * scale, before the rest is added
            names = [n for n, _ in graph.consumers[node.name] if graph.op((n, 0)) in ADDS]
        for name in names:
            if not set(graph.before([(name, 0)])) & (cross | graph.loop_variables):
                return name, 0
    raise ValueError(f"{module.handle} should normalise its encoder's output, but does not.")
