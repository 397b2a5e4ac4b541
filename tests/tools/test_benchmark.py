"""Tests of tools/benchmark, with tiny models; other engines only where they are installed."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import benchmark
import benchmark_engines
import benchmark_report
import benchmark_sentences
import benchmark_weights
import numpy as np
import pytest

import bertgen_tf as bg

TINY = benchmark.Size(
    num_hidden_layers=2,
    hidden_size=36,
    num_attention_heads=3,
    intermediate_size=52,
    vocab_size=211,
    source_length=7,
    max_batch=3,
    max_position_embeddings=40,
)
INSTALLED = [
    engine
    for engine in benchmark_engines.ENGINES
    if all(importlib.util.find_spec(name) for name in benchmark_engines.LIBRARIES.get(engine, ()))
    and (benchmark_engines.ONNX_PYTHON.exists() or not engine.startswith("onnx"))
]
INPUTS = np.random.default_rng(5).integers(3, 211, (3, 7))


@pytest.fixture(scope="module", params=["none", "all"])
def built(request, tmp_path_factory) -> tuple[Path, dict, str]:
    """A folder with weights, what building it told, and what the model shares."""
    folder = tmp_path_factory.mktemp(f"built_{request.param}")
    size = dataclasses.asdict(TINY) | {"sharing": request.param}
    result = benchmark_weights.build(str(folder), size, 0, True, "ctranslate2" in INSTALLED)
    return folder, result, request.param


@pytest.fixture(scope="module")
def ours(built):
    return benchmark_engines.load_ours(str(built[0]), "plain")(INPUTS, 1, 32)


def test_random_weights_make_models_talk(ours):
    """What repeats one token, or says the same to every source, would compare nothing."""
    assert ours.shape == (3, 32)
    assert benchmark_engines.EOS not in ours
    assert len(set(ours.ravel())) >= 12
    assert len({tuple(row) for row in ours.tolist()}) == 3


def test_weights_are_counted(built):
    folder, result, sharing = built
    model = bg.EncoderDecoderModel.from_huggingface(str(folder / "huggingface"))
    assert model.decoder.sharing == sharing
    weights = {id(weight): weight for weight in model.weights}.values()
    counts = {weight.path: int(np.prod(weight.shape)) for weight in weights}
    floats = [weight for weight in weights if weight.dtype == "float32"]
    assert result["weight_bytes"] == 4 * sum(counts[weight.path] for weight in floats)
    read = [
        *(
            count
            for layer in (model.decoder.blocks[i] for i in range(2))
            for part in (layer.self_attention, layer.cross_attention, layer.feed_forward)
            for weight in part.weights
            if weight.dtype == "float32"
            and not (part is layer.cross_attention and weight.path.split("/")[-2] == "key_value")
            for count in [int(np.prod(weight.shape))]
        ),
        211 * 36,  # the output matrix
        211,  # and its bias
    ]
    assert TINY.weights_per_token() == sum(read)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["huggingface", "ctranslate2", "ctranslate2-int8"])
@pytest.mark.parametrize("beams", [1, 4])
def test_other_engines_agree(built, ours, engine, beams):
    if engine not in INSTALLED:
        pytest.skip(f"{engine} is not installed")
    folder = str(built[0])
    if beams > 1:
        ours = benchmark_engines.load_ours(folder, "plain")(INPUTS, beams, 32)
    kind = "int8" if engine.endswith("int8") else "float32"
    generate = benchmark_engines.load_engine(engine, folder, threads=1, kind=kind)
    ids = np.array(generate(INPUTS, beams, 32))
    assert ids.shape == (3, 32)
    if not engine.endswith("int8"):
        np.testing.assert_array_equal(ids, ours)


@pytest.mark.slow
def test_benchmark_from_end_to_end(tmp_path, monkeypatch, capfd):
    tiny = dataclasses.replace(TINY, num_hidden_layers=1)
    monkeypatch.setattr(benchmark, "SIZES", {"tiny": tiny})
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda threads: 1e10)
    arguments = ["--batch", "1,3,8", "--beams", "1,2", "--engines", ",".join(INSTALLED)]
    files = ["--work-folder", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")]
    status = benchmark.main([*arguments, *files, "--repeat", "2", "--threads", "1"])
    printed = capfd.readouterr()
    assert status == 0, printed.out + printed.err
    assert "All float32 engines returned the same ids." in printed.out
    content = json.loads((tmp_path / "out.json").read_text())
    (result,) = content["results"]
    assert {"xla", "plain"} <= set(result["engines"]) <= set(INSTALLED)
    cases = [(case["batch"], case["beams"], case["new_tokens"]) for case in result["cases"]]
    assert cases == [(1, 1, 32), (1, 2, 32), (3, 1, 32), (3, 2, 32), (1, 1, 2)]
    for case in result["cases"]:
        assert set(case["engines"]) == set(result["engines"])
        for timed in case["engines"].values():
            assert len(timed["seconds"]) == 2 and min(timed["seconds"]) > 0
        # Tracing and compiling take seconds, and only the first time.
        assert case["engines"]["xla"]["first_seconds"] > 2 * case["engines"]["xla"]["median"]
    assert content["machine"]["threads"] == 1
    assert content["machine"]["tensorflow"] in printed.out


def _timed(seconds, first, equal, before, peaks):
    return {
        "first_seconds": first,
        "first_peak": None,
        "equal_tokens": equal,
        "seconds": [seconds],
        "median": seconds,
        "before": before,
        "peaks": peaks,
    }


def _result(**engines):
    """Of one size with 1000 weights a token; each engine gives (32 tokens, 2 tokens) in seconds."""
    engines = {name.replace("_", "-"): values for name, values in engines.items()}
    return {
        "size": "tiny",
        "weight_bytes": 8_000_000,
        "weights_per_token": 1_000_000,
        "bandwidth": 4e9,
        "engines": {name: {"imported": 5_000_000, "loaded": 13_000_000} for name in engines},
        "differences": [],
        "cases": [
            {
                "batch": 1,
                "beams": 1,
                "new_tokens": tokens,
                "engines": {
                    name: _timed(values[i], 9, 0.75, [14_000_000, 15_000_000], [18_000_000] * 2)
                    for name, values in engines.items()
                },
            }
            for i, tokens in enumerate((32, 2))
        ],
    }


def test_report_divides_by_our_times():
    result = _result(
        xla=(0.5, 0.2), int8=(0.25, 0.1), huggingface=(2, 1), ctranslate2_int8=(1, 0.4)
    )
    lines = benchmark_report.report([result], repeat=5).splitlines()
    header, _, times = lines[2:5]
    assert header == "| size | batch | beams | xla | int8 | huggingface | ctranslate2-int8 |"
    # CTranslate2's int8 against ours, all others against XLA.
    assert times == "| tiny | 1 | 1 | 0.500 | 0.250 (0.50) | 2.000 (4.00) | 1.000 (4.00) |"
    assert "| tiny | 1 | 1 | 8.5 | 8.8 |" in lines  # compiling
    assert "| tiny | xla | 8 | 5 | 8 (1.00) | 10 (1.25) | 13 (1.62) | 4 (0.50) |" in lines
    # 30 tokens of 4 MB in 0.3 s, of 1 MB in 0.15 s
    assert "| tiny | xla | 4 | 10.00 | 0.4 | 4.0 | 10% |" in lines
    assert "| tiny | int8 | 1 | 5.00 | 0.2 | 4.0 | 5% |" in lines
    assert "| tiny | 1 | 1 | 75.0% | 75.0% |" in lines
    assert lines[-1] == "All float32 engines returned the same ids."


def test_report_leaves_out_what_was_not_measured():
    result = _result(xla=(0.5, 0.6))
    result["engines"]["xla"]["imported"] = None
    lines = benchmark_report.report([result], repeat=1).splitlines()
    assert [line for line in lines if line.startswith("| tiny | xla")] == []


def test_report_without_ours_and_with_differences():
    result = _result(huggingface=(2, 1), ctranslate2=(1, 0.5))
    result["differences"] = ["tiny: something"]
    text = benchmark_report.report([result, {**result, "cases": result["cases"][:1]}], repeat=1)
    assert "| tiny | 1 | 1 | 2.000 | 1.000 (0.50) |" in text
    assert "compiling" not in text and "random weights" not in text
    assert text.endswith("The float32 engines DIFFER:\n\n- tiny: something\n- tiny: something")


def test_ids_are_compared():
    ids = {
        "int8": [[7, 8], [9, 9]],
        "xla": [[1, 2], [3, 4]],
        "plain": [[1, 2], [3, 4]],
        "huggingface": [[1, 2], [3, 5]],
        "ctranslate2": [[1, 2], [3]],
        "ctranslate2-int8": [[1, 2], [9, 9]],
    }
    assert benchmark.compare_engines(ids) == [
        "huggingface differs from xla: row 1, token 1 is 5 and not 4",
        "ctranslate2 differs from xla: row 1, token 1 is -1 and not 4",
    ]
    assert benchmark.equal_share([[1, 2], [9, 4]], ids["xla"]) == 0.75
    assert benchmark.equal_share(ids["ctranslate2"], ids["xla"]) == 0.75


def test_missing_libraries_are_named(monkeypatch, capsys):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else object()
    )
    assert benchmark.main(["--sizes", "minilm", "--engines", "xla,huggingface"]) == 2
    error = capsys.readouterr().err
    assert 'huggingface needs torch: pip install "bertgen_tf[benchmark]"' in error


def test_an_engine_that_fails_says_why(tmp_path):
    worker = benchmark.Worker("xla", {"threads": 1}, tmp_path / "log")
    with pytest.raises(benchmark.BenchmarkError, match="xla ended with status 1: KeyError"):
        benchmark.run(worker, INPUTS, benchmark.Case(1, 1))
    worker.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "huge"], "huge is not one of minilm, base, large"),
        (["--engines", "xla,jax"], "jax is not one of xla"),
        (["--engines", "xla,serve"], "--engines serve needs --sentences"),
        (["--batch", "0"], "must be at least 1, received 0"),
        (["--beams", "1,x"], "expected"),
        (["--repeat", "0"], "must be at least 1"),
        (["--sizes", "large", "--batch", "8"], "--batch is above what is run for large"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_what_was_measured_is_printed_when_a_later_size_fails(tmp_path, monkeypatch, capsys):
    def run_size(name, *others):
        if name == "base":
            raise benchmark.BenchmarkError("base is too large")
        return _result(xla=(0.5, 0.2))

    monkeypatch.setattr(benchmark, "run_size", run_size)
    file = tmp_path / "out.json"
    arguments = ["--sizes", "minilm,base", "--engines", "xla", "--json", str(file)]
    assert benchmark.main(arguments) == 2
    printed = capsys.readouterr()
    assert "| tiny | 1 | 1 | 0.500 |" in printed.out
    assert printed.err == "error: base is too large\n"
    assert len(json.loads(file.read_text())["results"]) == 1


def test_differing_ids_are_a_failure(monkeypatch, capsys):
    result = {**_result(xla=(0.5, 0.2)), "differences": ["tiny: something"]}
    monkeypatch.setattr(benchmark, "run_size", lambda *arguments: result)
    assert benchmark.main(["--sizes", "minilm", "--engines", "xla"]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_weights_are_written_once(tmp_path, monkeypatch):
    built = []

    class Builder:
        def __init__(self, name, settings, log):
            built.append(settings["seed"])

        def answer(self):
            return {"weight_bytes": 123}

        def close(self):
            pass

    monkeypatch.setattr(benchmark, "Worker", Builder)
    for seed, engines in ((0, ["xla"]), (0, ["plain"]), (1, ["xla"]), (1, ["int8"])):
        assert benchmark.write_weights(tmp_path / "new", "tiny", TINY, seed, engines) == 123
    assert built == [0, 1, 1]


def test_cases():
    large = benchmark.SIZES["large"]
    assert benchmark.cases_of(large, [1, 8], [4]) == [(1, 4, 32)]
    assert benchmark.cases_of(large, [1], [1, 4]) == [(1, 1, 32), (1, 4, 32), (1, 1, 2)]
    assert benchmark.cases_of(benchmark.SIZES["base"], [2, 1], [3]) == [(2, 3, 32), (1, 3, 32)]


def test_bandwidth_is_plausible():
    assert 1e8 < benchmark.read_bandwidth(1, megabytes=8, rounds=1) < 1e13


@pytest.mark.slow
def test_bart_is_the_same_function(built):
    """What ONNX Runtime gets; the checkpoint's tensors fill BART's, each once."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = benchmark_weights.as_bart(*benchmark_weights.read_checkpoint(str(built[0])))
    theirs = transformers.EncoderDecoderModel.from_pretrained(str(built[0] / "huggingface")).eval()
    ids = torch.from_numpy(INPUTS)
    inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    with torch.inference_mode():
        logits, expected = model(**inputs).logits, theirs(**inputs).logits
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


class FakeWorker:
    """An engine that takes as long as its settings say, and answers in capitals."""

    closed: list[str] = []  # noqa: RUF012

    def __init__(self, name, settings, log, environment, script):
        self.name = f"{name} {environment}"

    def answer(self):
        return {}

    def facts(self):
        return f"facts of {self.name}"

    def close(self, seconds=0):
        self.closed.append(self.name)


def test_the_best_setting_takes_part(tmp_path, monkeypatch):
    settings = [benchmark_engines.Setting(name, name) for name in ("MKL", "oneDNN", "third")]
    monkeypatch.setattr(benchmark_engines, "settings_of", lambda engine: settings)
    monkeypatch.setattr(benchmark_engines, "Worker", FakeWorker)
    FakeWorker.closed.clear()
    times = {("MKL", 1): 2, ("oneDNN", 1): 1, ("MKL", 8): 1, ("oneDNN", 8): 2}
    running = benchmark_engines.Engines({}, tmp_path)
    running.start("ct", [1, 8], lambda worker, case: times.get((worker.name[3:], case), 3))
    assert (running.setting("ct", 1), running.setting("ct", 8)) == ("oneDNN", "MKL")
    assert running.worker("ct", 8).name == "ct MKL"
    assert FakeWorker.closed == ["ct third"]
    assert running.tuned[0] == {
        "engine": "ct",
        "case": "1",
        "seconds": {"MKL": 2, "oneDNN": 1, "third": 3},
    }
    printed = benchmark_report.tuned_parts(running.tuned, running.facts())
    assert "| ct | 1 | 2.000 | **1.000** | 3.000 |" in printed[1].splitlines()
    running.close()
    assert sorted(FakeWorker.closed) == ["ct MKL", "ct oneDNN", "ct third"]


def test_settings_of_ctranslate2(monkeypatch):
    types = {"1": ["float32", "int16", "int8", "int8_bfloat16", "int8_float32"]}
    monkeypatch.setattr(
        benchmark_engines,
        "ctranslate2_types",
        lambda variables: types.get(variables["CT2_USE_MKL"], ["float32", "int8", "int8_float32"]),
    )
    monkeypatch.setattr(benchmark_engines.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(benchmark_engines, "cpu_flags", set)
    assert benchmark_engines.settings_of("huggingface") == [benchmark_engines.Setting()]
    found = [setting[::2] for setting in benchmark_engines.settings_of("ctranslate2-int8")]
    assert found == [
        ("MKL, int8_bfloat16", "int8_bfloat16"),
        ("MKL, int8_float32", "int8_float32"),
        ("oneDNN", "int8_float32"),
    ]
    monkeypatch.setattr(benchmark_engines, "cpu_flags", lambda: benchmark_engines.AVX512)
    names = [setting.name for setting in benchmark_engines.settings_of("ctranslate2")]
    assert names == ["MKL", "oneDNN", "MKL, AVX-512", "oneDNN, AVX-512"]


def test_sentences_are_read_and_put_into_buckets(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text("One .\tTwo .\n\nThree .\nFour .\n", encoding="utf-8")
    assert benchmark_sentences.read_texts(file, 3) == ["One .", "Three ."]
    with pytest.raises(benchmark.BenchmarkError, match="at least 2 sentences; found 1"):
        benchmark_sentences.read_texts(file, 1)
    assert benchmark_sentences.first_of_buckets([17, 16, 3, 33, 64, 32]) == [0, 1, 3]


def _row(engine, texts, p50, rate, setting="", beams=1):
    names = ("engine", "texts", "p50", "per_second", "setting", "beams")
    values = dict(zip(names, (engine, texts, p50, rate, setting, beams), strict=True))
    return {**values, "p99": 2 * p50, "batch_setting": setting}


def test_report_of_sentences():
    rows = [
        _row("xla", ["a b.", "c"], 0.2, 10),
        _row("serve", ["a b .", '"c"'], 0.3, 8),
        _row("int8", ["a b.", "c"], 0.1, 20),
        _row("ctranslate2", ["ab .", "d"], 0.4, 5, "MKL"),
        _row("ctranslate2-int8", ["ab .", "c"], 0.15, 10, "oneDNN"),
    ]
    benchmark_sentences.compare(rows)
    result = {"sentences": 2, "batch": 2, "batches": 1, "rows": rows, "tuned": [], "facts": {}}
    lines = benchmark_sentences.report(result).splitlines()
    assert "| xla | 1 | 200 | 400 | 10.0 | 100.0% |  |" in lines
    assert "| serve | 1 | 300 (3.00) | 600 | 8.0 (0.40) | 50.0% |  |" in lines
    assert "| ctranslate2 | 1 | 400 (2.00) | 800 | 5.0 (0.50) | 50.0% | MKL |" in lines
    assert "| ctranslate2-int8 | 1 | 150 (1.50) | 300 | 10.0 (0.50) | 100.0% | oneDNN |" in lines
    assert lines[-1] == "- ctranslate2: 50.0% of the texts are those of xla"


def test_engines_take_turns_with_sentences():
    asked = []

    class Running:
        def worker(self, engine, case):
            return self

        def ask(self, request):
            asked.append((len(request["texts"]), request["batch"]))
            return {"texts": request["texts"], "seconds": [0.5]}

    parts = [["a", "b"], ["c", "d"]]
    case = benchmark_sentences.Case(2, 4)
    results = benchmark_sentences.take_turns(Running(), ["xla", "serve"], parts, case)
    assert results == {
        "xla": (["a", "b", "c", "d"], [0.5, 0.5]),
        "serve": (["a", "b", "c", "d"], [0.5]),
    }
    assert asked == [(2, 2), (4, 2), (2, 2)]


def test_texts_are_compared_whatever_their_spaces_and_quotation_marks():
    ours = '"ronnie mitchell\'s" daughter (amy).'
    theirs = "' ' ronnie mitchell ' s ' ' daughter ( amy )."
    assert benchmark_sentences.without_prose(ours) == benchmark_sentences.without_prose(theirs)
    assert benchmark_sentences.without_prose(ours) != benchmark_sentences.without_prose(ours[1:])
