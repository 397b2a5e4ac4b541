"""Makes tests/data/huggingface.zip: tiny checkpoints as transformers writes them, and its numbers.

    python tools/make_huggingface_golden.py tests/data/huggingface.zip

Needs transformers and torch (the extra `compare`). Which version ran is part of each name: with
transformers 5 the folders `v5_*` are made anew, with transformers 4 the folders `v4_*`; the others
of an existing archive are kept. `golden.npz` in each folder has inputs and outputs, `golden.json`
the options of what `generate` gave.
"""

import argparse
import io
import json
import pathlib
import tempfile
import zipfile

import numpy as np
import sentencepiece
import torch
import transformers
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertGenerationTokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

MAJOR = int(transformers.__version__.split(".")[0])
SIZES = {
    "vocab_size": 47,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "intermediate_size": 10,
    "initializer_range": 0.4,
}
GENERATE = {
    "greedy": {"num_beams": 1, "max_new_tokens": 9},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9},
}

TEXTS = [
    "the old man saw a house, and the bird sang.",
    "who sang?",
    "an owl, a fox; quick!",
    "the man</s> sang",
    "<s>a house <pad> the bird",
    "a <unk> b </s>",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=pathlib.Path)
    archive = parser.parse_args().archive
    prefix = f"v{MAJOR}_"
    kept = {}
    if archive.exists():
        with zipfile.ZipFile(archive) as file:
            kept = {n: file.read(n) for n in file.namelist() if not n.startswith(prefix)}
    makers = {4: (_shared,), 5: (_pair, _language_model, _bert, _roberta, _mixed, _tokenizer)}[
        MAJOR
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for i, maker in enumerate(makers):
            torch.manual_seed(i)
            maker(root / f"{prefix}{maker.__name__[1:]}")
        new = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in sorted({**kept, **new}.items()):
            file.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, 9)
    print(f"{archive}: {archive.stat().st_size} bytes")


def _pair(folder: pathlib.Path) -> None:
    """An encoder-decoder of different stacks, in shards."""
    model = _encoder_decoder(
        BertGenerationConfig(**SIZES, num_hidden_layers=1, max_position_embeddings=21),
        BertGenerationConfig(
            **{**SIZES, "intermediate_size": 8, "num_attention_heads": 2},
            num_hidden_layers=2,
            max_position_embeddings=19,
            hidden_act="gelu_new",
            is_decoder=True,
            add_cross_attention=True,
        ),
    )
    model.generation_config.update(max_length=12, num_beams=2, length_penalty=0.7, min_length=3)
    model.save_pretrained(folder, max_shard_size="9KB")
    _write_golden(folder, model)


def _mixed(folder: pathlib.Path) -> None:
    """RoBERTa as encoder, which keeps its pooler."""
    model = _encoder_decoder(
        RobertaConfig(**SIZES, num_hidden_layers=1, max_position_embeddings=23),
        BertGenerationConfig(
            **SIZES,
            num_hidden_layers=1,
            max_position_embeddings=19,
            is_decoder=True,
            add_cross_attention=True,
        ),
    )
    model.generation_config.update(max_length=10)
    model.save_pretrained(folder)
    _write_golden(folder, model)


def _shared(folder: pathlib.Path) -> None:
    """A shared encoder-decoder, whose variables transformers 4 stores under one name."""
    sizes = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 20}
    model = _encoder_decoder(
        BertGenerationConfig(**sizes),
        BertGenerationConfig(**sizes, is_decoder=True, add_cross_attention=True),
        tie_encoder_decoder=True,
    )
    model.save_pretrained(folder)
    _write_golden(folder, model)


def _encoder_decoder(encoder, decoder, **options) -> EncoderDecoderModel:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=2, pad_token_id=0, eos_token_id=1, **options
    )
    model = EncoderDecoderModel(config=config).eval()
    _shake(model)
    return model


def _language_model(folder: pathlib.Path) -> None:
    """A lone decoder without cross-attention."""
    config = BertGenerationConfig(
        **SIZES, num_hidden_layers=2, max_position_embeddings=18, is_decoder=True
    )
    model = BertGenerationDecoder(config).eval()
    _shake(model)
    model.save_pretrained(folder)
    ids, mask = _ids(3, 8, first=3)
    with torch.no_grad():
        logits = model(**_tensors(input_ids=ids, attention_mask=mask)).logits
    np.savez_compressed(
        folder / "golden.npz", input_ids=ids, attention_mask=mask, logits=logits.numpy()
    )


def _bert(folder: pathlib.Path) -> None:
    """BERT with its pre-training heads, in bfloat16."""
    config = BertConfig(
        **SIZES, num_hidden_layers=2, max_position_embeddings=22, hidden_act="gelu_pytorch_tanh"
    )
    _encoder(folder, BertForPreTraining(config), "bert", torch.bfloat16)


def _roberta(folder: pathlib.Path) -> None:
    """RoBERTa with its head, in float16."""
    config = RobertaConfig(
        **SIZES,
        num_hidden_layers=2,
        max_position_embeddings=25,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    _encoder(folder, RobertaForMaskedLM(config), "roberta", torch.float16)


def _encoder(folder: pathlib.Path, model, name: str, dtype: torch.dtype) -> None:
    _shake(model)
    model.to(dtype).save_pretrained(folder)
    ids, mask = _ids(3, 9, first=5, padding=model.config.pad_token_id)
    with torch.no_grad():
        stack = getattr(model, name).to(torch.float32).eval()
        output = stack(**_tensors(input_ids=ids, attention_mask=mask)).last_hidden_state
    np.savez_compressed(
        folder / "golden.npz", input_ids=ids, attention_mask=mask, output=output.numpy()
    )


def _tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer whose vocabulary lacks the separator, which transformers then adds."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS[:3], "a young woman found birds but left!"] * 4),
        model_writer=model,
        vocab_size=42,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        normalization_rule_name="identity",
        minloglevel=2,
        num_threads=1,
    )
    with tempfile.TemporaryDirectory() as temporary:
        path = pathlib.Path(temporary) / "spiece.model"
        path.write_bytes(model.getvalue())
        tokenizer = BertGenerationTokenizer(str(path))
        tokenizer.save_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    (folder / "golden.json").write_text(json.dumps({"texts": TEXTS, "ids": ids}))


def _shake(model) -> None:
    """Large weights that disagree about tokens; zeros and ones hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "word_embeddings" in name:
                parameter[0].normal_(0, 0.4)  # the padding's row


def _ids(rows: int, length: int, first: int, padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows * length)
    mask = (np.arange(length) < length - 2 * np.arange(rows)[:, None]).astype(np.int64)
    return np.where(mask == 1, rng.integers(first, 47, mask.shape), padding), mask


def _tensors(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _write_golden(folder: pathlib.Path, model) -> None:
    ids, mask = _ids(3, 9, first=3)
    labels, label_mask = _ids(3, 7, first=3)
    labels = np.where(label_mask == 1, labels, -100)
    # As transformers shifts them: the start token first, padding in place of what is ignored.
    decoder_ids = np.concatenate([np.full((3, 1), 2), np.maximum(labels[:, :-1], 0)], 1)
    decoder_mask = (decoder_ids != 0).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    batch = {**inputs, "decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask}
    arrays = {**batch, "labels": labels}
    with torch.no_grad():
        output = model(**_tensors(**batch, labels=labels))
        arrays["encoder_last_hidden_state"] = output.encoder_last_hidden_state.numpy()
        arrays["decoder_logits"] = output.logits.numpy()
        arrays["loss"] = output.loss.numpy()
        own = {name: {} for name in ("own",) if MAJOR == 5}  # with the settings of the folder
        for name, options in {**GENERATE, **own}.items():
            options = {**options, "do_sample": False, "return_dict_in_generate": True}
            generated = model.generate(**_tensors(**inputs), output_scores=True, **options)
            arrays[f"generate/{name}/sequences"] = generated.sequences.numpy()
            if generated.get("sequences_scores") is not None:
                arrays[f"generate/{name}/scores"] = generated.sequences_scores.numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    (folder / "golden.npz").write_bytes(buffer.getvalue())
    (folder / "golden.json").write_text(
        json.dumps({"transformers": transformers.__version__, "generate": {**GENERATE, **own}})
    )


if __name__ == "__main__":
    main()
