"""`bertgen-tf finetune` while it runs: killed, stopped, resumed; full disks, lost losses."""

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf import finetuning
from bertgen_tf.cli import finetune as cli_finetune
from bertgen_tf.cli import main as cli
from bertgen_tf.cli.flags.errors import UserError
from bertgen_tf.finetuning import state as training_state
from bertgen_tf.finetuning.data import TrainingData
from tests.helpers import ROOT, TESTS, WORDS, fails, make_deep_model, make_small_model

RANDOM = np.random.default_rng(0)


def pairs(longest: int) -> list[tuple[str, ...]]:
    """50: 7 batches of 8 an epoch."""
    sizes = (longest, longest - 1)
    return [
        tuple(" ".join(RANDOM.choice(WORDS, RANDOM.integers(1, n))) for n in sizes)
        for _ in range(50)
    ]


PAIRS = pairs(14)  # which are all padded to 16, so that a step is traced once
TWO_LENGTHS = pairs(20)  # to 16 and to 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, and a model with dropout."""
    folder = tmp_path_factory.mktemp("finetune")
    files = {"train": PAIRS, "validation": PAIRS[:9], "two_lengths": TWO_LENGTHS}
    for name, lines in files.items():
        text = "".join(f"{source}\t{target}\n" for source, target in lines)
        (folder / f"{name}.tsv").write_text(text)
    model = make_small_model("all", max_source_length=20, max_target_length=19)
    assert model.encoder.config.hidden_dropout_prob > 0
    model.save_to_preset(str(folder / "preset"))
    return folder


def command(folder: Path, output: str, *flags: str, validate: bool = False) -> list[str]:
    files = {"train": "train.tsv", "preset": "preset"}
    if validate:
        files["validation"] = "validation.tsv"
    given = [part for name, file in files.items() for part in (f"--{name}", str(folder / file))]
    return ["finetune", *given, "--output", str(folder / output), "--batch-size", "8", *flags]


def start(arguments: list[str], kill_at: int | None = None, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    if kill_at is not None:
        environment["KILL_AT"] = str(kill_at)
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(TESTS / "helpers/killed_training.py"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(output: Path) -> list[np.ndarray]:
    return bg.EncoderDecoderModel.from_preset(str(output)).get_weights()


def epochs(output: Path) -> list[dict]:
    """What the log has of each epoch, without what depends on the machine's speed."""
    lines = Path(f"{output}.training/log.jsonl").read_text().splitlines()
    logs = [json.loads(line) for line in lines]
    speed = ("tokens_per_second", "waited_for_data")
    return [{k: v for k, v in log.items() if k not in speed} for log in logs if "epoch" in log]


@pytest.mark.slow
def test_killed_twice_and_resumed_it_ends_with_the_same_bits(folder, capsys):
    flags = ["--epochs", "3", "--learning-rate", "0.01", "--ema", "0.7", "--monitor", "loss"]
    flags += ["--train", str(folder / "two_lengths.tsv")]
    flags += ["--gradient-accumulation", "2", "--checkpoint-every", "3"]
    assert cli.main(command(folder, "whole", *flags, validate=True)) == 0
    whole, whole_log = weights(folder / "whole"), epochs(folder / "whole")
    assert [log["step"] for log in whole_log] == [7, 14, 21]
    states = folder / "killed.training"
    chosen = random.Random(1)
    first, second = chosen.randrange(3, 7), chosen.randrange(15, 21)

    again = command(folder, "killed", *flags, validate=True)
    process = start(again, first)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in states.glob("state-*")] == [
        f"state-{first // 3 * 3:08d}.safetensors"
    ]
    assert not (folder / "killed").exists()
    capsys.readouterr()
    assert "a training that did not end; --resume continues it" in fails(capsys, *again)
    other = [*again, "--resume", "--learning-rate", "0.02", "--seed", "3"]
    assert "had another --learning-rate, --seed; --overwrite" in fails_late(capsys, other)

    process = start([*again, "--resume"], second)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    newest = f"state-{second // 3 * 3:08d}.safetensors"
    assert sorted(path.name for path in states.glob("state-*"))[1:] == [newest]
    # Half of it is lost; the one before will do.
    content = (states / newest).read_bytes()
    (states / newest).write_bytes(content[: len(content) // 2])
    assert cli.main([*again, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert f"{newest} is damaged" in err
    assert f"\ncontinuing after step {second // 3 * 3 - 3} of 21\n" in out
    killed = weights(folder / "killed")
    assert all(np.array_equal(a, b) for a, b in zip(whole, killed, strict=True))
    assert epochs(folder / "killed") == whole_log
    start_weights = weights(folder / "preset")
    assert any(np.abs(a - b).max() > 0.01 for a, b in zip(whole, start_weights, strict=True))

    # Complete: nothing is left to do, and nothing heavy lies around.
    assert not list(states.glob("*.safetensors"))
    assert cli.main([*again, "--resume"]) == 0
    assert capsys.readouterr().err == f"bertgen-tf: {folder / 'killed'} is complete\n"


def fails_late(capsys, arguments: list[str]) -> str:
    """The last line of an error that comes when the data was looked at."""
    assert cli.main(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_stopped_it_loses_nothing(folder, capsys, monkeypatch):
    output = "stopped"
    tokens = TrainingData.tokens
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def stop(self, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return tokens(self, step)

    monkeypatch.setattr(TrainingData, "tokens", stop)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    arguments = command(folder, output, "--steps", "9", "--resume")
    assert cli.main(arguments) == 130
    out, err = capsys.readouterr()
    assert out.endswith("\n") and "/9" in out.splitlines()[-1]  # the line of the bar ends
    assert err == (
        f"bertgen-tf: {folder / output}.training holds no training to continue: starting with the "
        "first step\n"
        "bertgen-tf: interrupted after step 5, which is saved: the same command with --resume "
        "continues\n"
    )
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (folder / f"{output}.training" / "state-00000005.safetensors").exists()
    assert not (folder / output).exists()


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_at_once(folder, capsys):
    flags = ["--epochs", "2", "--checkpoint-every", "1", "--learning-rate", "1e30"]
    error = fails_late(capsys, command(folder, "diverged", *flags))
    assert "training diverged, nothing was saved: " in error
    assert error.endswith("nan at step 2, with the learning rate 1e+30; lower --learning-rate")
    assert not (folder / "diverged").exists()
    for path in (folder / "diverged.training").glob("state-*"):
        tensors, _ = training_state.load_tensors(path)
        assert all(np.isfinite(t).all() for n, t in tensors.items() if n.startswith("model/"))


@pytest.mark.slow
def test_a_full_disk_keeps_the_state_before(folder, capsys, monkeypatch):
    """Files of at most 10 kB, for the second state and then for the model."""
    save, save_model = training_state.save_tensors, bg.EncoderDecoderModel.save_to_preset
    saved = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(function, *args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            function(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def save_with_limit(path, *args):
        limited(save, path, *args) if saved else save(path, *args)
        saved.append(path)

    monkeypatch.setattr(training_state, "save_tensors", save_with_limit)
    flags = ["--steps", "6", "--checkpoint-every", "2"]
    error = fails_late(capsys, command(folder, "full", *flags))
    states = folder / "full.training"
    kept = f"{states} keeps what was saved before: the same command with --resume continues"
    file = f"{states}/state-00000004.safetensors"
    assert error == f"bertgen-tf: error: {file}: File too large; {kept}"
    left = {path.name for path in states.iterdir()} - {"log.jsonl"}
    assert left == {"run.json", "state-00000002.safetensors"}
    monkeypatch.undo()
    monkeypatch.setattr(
        bg.EncoderDecoderModel, "save_to_preset", lambda *args: limited(save_model, *args)
    )
    again = command(folder, "full", *flags, "--resume")
    file = f"{folder}/full/model.weights.h5"
    assert fails_late(capsys, again) == f"bertgen-tf: error: {file}: File too large; {kept}"
    assert not (folder / "full").exists()
    monkeypatch.undo()
    assert cli.main(again) == 0
    assert (folder / "full").exists()


@pytest.mark.slow
def test_a_worker_that_is_killed_comes_back(folder, capsys):
    """Two workers have the losses of one process; the other ends when one is killed."""
    config = bg.EncoderDecoderModel.from_preset(str(folder / "preset")).get_config()
    for side in ("encoder", "decoder"):  # dropout is another for each share of a batch
        rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        config[side]["config"].update(rates)
    model = bg.EncoderDecoderModel.from_config(config)
    model.set_weights(weights(folder / "preset"))
    model.save_to_preset(str(folder / "no_dropout"))
    flags = ["--preset", str(folder / "no_dropout"), "--epochs", "2", "--learning-rate", "0.01"]
    flags += ["--checkpoint-every", "2", "--monitor", "loss"]
    assert cli.main(command(folder, "one", *flags, validate=True)) == 0
    capsys.readouterr()

    def run_workers(*flags: str, kill_at: tuple = (None, None)) -> list[tuple[int, str, str]]:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(2)]
            workers = [f"localhost:{s.getsockname()[1]}" for s in sockets]
        processes = [
            start(
                command(folder, "workers", *flags, validate=True),
                kill_at[i],
                TF_CONFIG=json.dumps(
                    {"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}}
                ),
            )
            for i in range(2)
        ]
        outputs = [process.communicate(timeout=300) for process in processes]
        return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]

    first, second = run_workers(*flags, kill_at=(None, 10))
    assert second[0] == -signal.SIGKILL
    assert first[0] == 2, first
    assert first[2].splitlines()[-1] == (
        "bertgen-tf: error: another worker of TF_CONFIG is gone, or cannot be reached: start all "
        "of them again, with --resume"
    )
    assert (folder / "workers.training" / "state-00000010.safetensors").exists()
    first, second = run_workers(*flags, "--resume")
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "14 steps of up to 8 pairs on 2 devices" in first[1]
    assert second[1] == ""
    expected, logs = epochs(folder / "one"), epochs(folder / "workers")
    assert [log["step"] for log in logs] == [7, 14]
    for log, other in zip(logs, expected, strict=True):
        assert log == pytest.approx(other, rel=1e-4)
    for a, b in zip(weights(folder / "one"), weights(folder / "workers"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--monitor", "loss"], "--monitor needs --validation"),
        (["--metrics", "bleu", "--patience", "2"], "--metrics, --patience needs --validation"),
        (["--metrics", "x"], "--metrics needs --validation"),
        (["--metrics", "x", "--validation", "train.tsv"], "metrics must be among exact, sari,"),
        (["--tokenize", "zh", "--lowercase"], "--lowercase, --tokenize needs --metrics"),
        (["--monitor", "loss", "--validation", "train.tsv", "--normalize-with", "x"], "with needs"),
        (
            ["--metrics", "bleu", "--validation", "train.tsv", "--normalize-with", "x"],
            "x should be a preset that save_to_preset wrote",
        ),
        (["--monitor", "x", "--validation", "train.tsv"], "--monitor must be loss, accuracy or"),
        (["--checkpoint-every", "0"], "expected steps, such as 500, or a time, such as 10m"),
        (["--checkpoint-every", "5d"], "expected steps, such as 500, or a time, such as 10m"),
        (["--resume", "--overwrite"], "not allowed with argument --resume"),
        (["--freeze", "encoder:x"], "expected parts such as embeddings, encoder or encoder:6"),
        (["--lora-rank", "2", "--freeze", "encoder"], "--lora-rank freezes all"),
        (["--ema", "1"], "expected a number of at least 0 and below 1, received '1'"),
        (["--preset", "PRESET", "--recipe", "BERT2BERT"], "--recipe applies to --encoder only"),
        (["--data", "wikisplit"], "argument --data: not allowed with argument --train"),
        (["--reverse"], "--reverse applies to --data only"),
        (["--output", "other"], "other.training should be new or the folder of a training"),
        (["--output", "file"], "file.training should be a folder for the training, but is a file"),
    ],
)
def test_refused_before_it_starts(flags, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.tsv").write_text("a\tb\n")
    Path("other.training").mkdir()
    Path("other.training/thesis.txt").write_text("mine")
    Path("file.training").write_text("mine")
    given = [str(folder / "preset") if flag == "PRESET" else flag for flag in flags]
    given = given if "--preset" in given else ["--preset", str(folder / "preset"), *given]
    arguments = ["--train", "train.tsv", "--output", "new", *given]
    before = sorted(Path().rglob("*"))
    assert message in fails(capsys, "finetune", *arguments)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.slow
def test_what_was_frozen_is_free_in_the_preset(folder):
    old = make_deep_model("all", max_source_length=20, max_target_length=19)
    old.save_to_preset(str(folder / "two_layers"))
    flags = ["--preset", str(folder / "two_layers"), "--steps", "2", "--freeze", "encoder:1"]
    assert cli.main(command(folder, "frozen", *flags)) == 0
    new = bg.EncoderDecoderModel.from_preset(str(folder / "frozen"))
    for layer, same in ((0, True), (1, False)):
        before, after = (model.encoder.blocks[layer].feed_forward for model in (old, new))
        pairs = zip(before.get_weights(), after.get_weights(), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == same
    assert "frozen_layers" not in new.get_config()
    assert len(new.trainable_variables) == len(new.weights)


@pytest.mark.slow
def test_a_data_set_of_the_paper(folder, tmp_path, capsys, monkeypatch):
    for split, count in (("train", 5), ("validation", 3)):
        lines = [f"a man {i} sang\ta man <::::> sang {i}\n" for i in range(count)]
        (tmp_path / f"{split}.tsv").write_text("".join(lines))
    seen = {}

    def train(model, data, *, validation, callbacks, **kwargs):
        seen.update(data=data, validation=validation, samples=callbacks[0])
        raise finetuning.Diverged("here")

    monkeypatch.setattr(finetuning, "train", train)
    arguments = ["finetune", "--data", "wikisplit", "--data-folder", str(tmp_path)]
    arguments += ["--preset", str(folder / "preset"), "--output", str(folder / "set")]
    # The paper's 128 tokens are more than this model can read.
    assert "max_source_length must not exceed max_position" in fails(capsys, *arguments)
    arguments += ["--max-source-length", "20", "--max-target-length", "18", "--metrics", "bleu"]
    assert "training diverged" in fails_late(capsys, arguments)
    assert (len(seen["data"]), len(seen["validation"])) == (5, 3)
    assert seen["samples"].references == [f"a man sang {i}" for i in range(3)]
    options = {"lowercase": False, "tokenize": "none", "rouge_tokenize": "rouge-score"}
    assert seen["samples"].options == options
    message = fails(capsys, *arguments, "--source-column", "x")
    assert "--source-column applies to --train and --validation only" in message


@pytest.mark.slow
def test_texts_are_compared_as_evaluate_does(folder, tmp_path, capsys, monkeypatch):
    seen = {}

    def train(model, data, *, callbacks, **kwargs):
        seen.update(model=model, options=callbacks[0].options)
        raise finetuning.Diverged("here")

    monkeypatch.setattr(finetuning, "train", train)
    preset = str(folder / "preset")
    (tmp_path / "v.csv").write_text("text;split\nThe man;a  Man SANG\n")
    arguments = command(folder, str(tmp_path / "new"), "--validation", str(tmp_path / "v.csv"))
    (tmp_path / "t.csv").write_text("text,split\na man,a man\n,x\n")
    arguments += ["--train", str(tmp_path / "t.csv"), "--source-column", "text"]
    arguments += ["--target-column", "split", "--monitor", "rouge1"]
    flags = ["--lowercase", "--tokenize", "char", "--normalize-with", preset]
    assert "training diverged" in fails_late(capsys, [*arguments, *flags])
    normalize = seen["options"].pop("normalize")
    options = {"lowercase": True, "tokenize": "char", "rouge_tokenize": "unicode"}
    assert seen["options"] == options
    assert normalize(["a  Man SANG"]) == ["a man sang"]
    error = fails_late(capsys, [*arguments, "--resume"])
    assert "had another --lowercase, --tokenize, --normalize-with; --overwrite" in error
    # The model itself, by the name that it will have.
    itself = ["--overwrite", "--normalize-with", f"{tmp_path / 'new'}/"]
    assert "training diverged" in fails_late(capsys, [*arguments, *itself])
    assert seen["options"]["normalize"].__self__ is seen["model"].preprocessor


def test_damaged_states_have_one_way_on(tmp_path):
    run = training_state.RunFolder(tmp_path / "model")
    run.begin({})
    (run / "state-00000004.safetensors").write_bytes(b"")
    replicas = finetuning.Replicas(tf.distribute.get_strategy())
    with pytest.raises(UserError) as error, cli_finetune._errors(replicas):
        run.load(lambda message: None)
    assert str(error.value) == f"{run.path} holds no undamaged state: --overwrite starts anew"


def test_a_run_that_began_before_there_were_scoring_flags_is_resumed(folder, tmp_path):
    arguments = cli.make_parser().parse_args(command(folder, "x", "--monitor", "bleu"))
    settings = cli_finetune._settings(arguments, 1, PAIRS, PAIRS[:9])
    names = ("--lowercase", "--tokenize", "--rouge-tokenize")
    run = training_state.RunFolder(tmp_path / "model")
    run.begin({name: value for name, value in settings.items() if name not in names})
    run.check_same(settings)
    arguments.lowercase = True
    with pytest.raises(ValueError, match="had another --lowercase; overwrite"):
        run.check_same(cli_finetune._settings(arguments, 1, PAIRS, PAIRS[:9]))


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ("{", [], "TF_CONFIG must be a JSON object"),
        ("[]", [], "TF_CONFIG must be a JSON object"),
        ('{"cluster": 5}', [], "TF_CONFIG must name workers that can be reached: TypeError: "),
        ("", ["--gradient-accumulation", "9", "--steps", "8"], "must be at most all 8 steps"),
        ("", ["--freeze", "encoder:9"], "encoder_layers must be a number from 0 to 1"),
        ("", ["--lora-rank", "90"], "rank must be a whole number from 1 to"),
        ("", ["--long-targets", "error", "--max-target-length", "9"], "longer than 9 tokens, firs"),
    ],
)
def test_settings_that_do_not_fit(config, flags, message, folder, capsys, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    assert message in fails(capsys, *command(folder, "none", *flags))
    assert not (folder / "none.training").exists()
