"""`bertgen-tf evaluate` from the files to the report."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bertgen_tf as bg
from bertgen_tf import metrics
from bertgen_tf.checkpoints import presets
from bertgen_tf.cli import main as cli
from bertgen_tf.metrics import plot as metrics_plot
from bertgen_tf.metrics import significance
from tests.helpers import EXPORT_OPTIONS, eagerly, fails, make_small_model

pytest.importorskip("sacrebleu", reason="needs the extra metrics")
pytest.importorskip("rouge_score", reason="needs the extra metrics")

SOURCES = ["the old man sang", "a bird left", "who saw the bird ?", "the house", "a fox"] * 8
REFERENCES = [" ".join(source.split()[::-1]) for source in SOURCES]
PREDICTIONS = [r if i % 3 else s for i, (s, r) in enumerate(zip(SOURCES, REFERENCES, strict=True))]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("pairs.tsv", [f"{s}\t{r}" for s, r in zip(SOURCES, REFERENCES, strict=True)])
    write("outputs.txt", PREDICTIONS)
    write("copy.txt", SOURCES)
    return tmp_path


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> str:
    config = bg.GenerationConfig(max_new_tokens=7, num_beams=2, num_return_sequences=2)
    folder = str(tmp_path_factory.mktemp("presets") / "random")
    make_small_model(generation_config=config).save_to_preset(folder)
    return folder


def write(name: str, lines: list[str]) -> None:
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def rows(out: str) -> dict[str, list[str]]:
    """The table: the words of a row by its metric."""
    return {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:]}


def test_outputs_against_references_and_a_baseline(folder, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    files = ["--predictions", "outputs.txt", "--references", "pairs.tsv", "--baseline", "copy.txt"]
    report = ["--json", "scores.json", "--plot", "scores.png", "--resamples", "200"]
    Path("scores.json").write_text("older")
    assert cli.main(["evaluate", *files, *report]) == 0
    out = capsys.readouterr().out
    assert out.startswith("40 examples\nmetric ")
    results = metrics.compute(
        ["exact", "sari", "bleu", "chrf", "rouge"], SOURCES, PREDICTIONS, REFERENCES
    )
    table = rows(out)
    assert list(table) == list(results)
    found = json.loads(Path("scores.json").read_text())
    others = metrics.compute(list(results), SOURCES, SOURCES, REFERENCES)
    intervals = significance.bootstrap(results, resamples=200)
    comparisons = significance.paired_bootstrap(results, others, resamples=200)
    for name, result in results.items():
        interval, other = intervals[name], comparisons[name]
        assert table[name] == [
            f"{result.value:.2f}",
            f"{interval.low:.2f}",
            "to",
            f"{interval.high:.2f}",
            f"{other.baseline:.2f}",
            f"{other.difference:+.2f}",
            f"{other.interval.low:+.2f}",
            "to",
            f"{other.interval.high:+.2f}",
            f"{other.p_value:.3f}",
        ]
        scores = found["metrics"][name]
        assert scores["value"] == result.value
        assert scores["signature"] == result.signature
        assert scores["baseline"]["p_value"] == other.p_value
    assert found["examples"] == 40
    assert found["settings"]["tokenize"] == "13a"
    assert found["settings"]["resamples"] == 200
    assert found["files"]["baseline"] == "copy.txt"
    assert found["versions"]["sacrebleu"]
    assert Path("scores.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == [
        "copy.txt",
        "outputs.txt",
        "pairs.tsv",
        "scores.json",
        "scores.png",
    ]


def test_several_references_and_outputs_as_json(folder, capsys):
    write(
        "refs.jsonl", ['{"source": "a", "target": ["X y", "x z"]}', '{"source": "", "target": ""}']
    )
    write("refs.tsv", ["a\tX y\tx z", "b\t"])
    write("out.jsonl", ['{"source": "a", "output": ["x z", "x"]}', '{"output": ""}', ""])
    write("out.txt", ["X Z\tx", "", ""])
    for outputs, references, flags, value in (
        ("out.jsonl", "refs.jsonl", [], 100),
        ("out.txt", "refs.tsv", [], 50),
        ("out.txt", "refs.jsonl", ["--lowercase"], 100),
    ):
        files = ["--predictions", outputs, "--references", references]
        assert cli.main(["evaluate", *files, "--metrics", "exact", *flags]) == 0
        assert rows(capsys.readouterr().out)["exact"][0] == f"{value:.2f}"


def test_tables_with_names(folder, capsys):
    write("refs.csv", ["id;in;out", '1;a;"x; y"', "2;b;z"])
    write("out.csv", ["output", '"x; y"', "z"])
    command = ["evaluate", "--predictions", "out.csv", "--references", "refs.csv"]
    columns = ["--source-column", "in", "--target-column", "out"]
    assert cli.main([*command, *columns, "--metrics", "exact"]) == 0
    captured = capsys.readouterr()
    assert (rows(captured.out)["exact"][0], captured.err) == ("100.00", "")
    message = fails(capsys, *command)
    assert "its columns are 'id, in, out': choose one with --source-column" in message
    data = ["--data", "wmt14", "--data-folder", "."]
    message = fails(capsys, *command[:3], *data, "--source-column", "x")
    assert "--source-column applies to --references only" in message
    write("refs.tsv", ["source\ttarget", "a\tx; y", "b\tz"])
    command[4] = "refs.tsv"
    assert cli.main([*command, "--metrics", "exact"]) == 0
    told = "the first line, 'source target', is read as the names of columns"
    assert capsys.readouterr().err == f"bertgen-tf: refs.tsv: {told}\n"


def test_rouge_of_other_scripts(folder, capsys):
    write("refs.tsv", ["x\tКошка сидит"])
    write("out.txt", ["кошка сидит"])
    command = ["evaluate", "--predictions", "out.txt", "--references", "refs.tsv", "--json", "s"]
    for flags, value in (([], "100.00"), (["--rouge-tokenize", "rouge-score"], "0.00")):
        assert cli.main([*command, "--metrics", "rouge1", *flags]) == 0
        assert rows(capsys.readouterr().out)["rouge1"][0] == value
    found = json.loads(Path("s").read_text())
    assert found["settings"]["rouge_tokenize"] == "rouge-score"
    assert found["metrics"]["rouge1"]["signature"].startswith("tok:rouge-score|")


def test_tokens_between_spaces(folder, capsys):
    write("refs.tsv", ["x\ta b c d . e"])
    write("out.txt", ["a b c d. e"])
    for tokenize, exact in (("13a", True), ("none", False)):
        files = ["--predictions", "out.txt", "--references", "refs.tsv", "--tokenize", tokenize]
        assert cli.main(["evaluate", *files, "--metrics", "bleu,sari"]) == 0
        assert (rows(capsys.readouterr().out)["bleu"][0] == "100.00") == exact


def test_a_data_set_of_the_paper(folder, capsys):
    write("test.en", ["a house", "a Fox ran off"])
    write("test.de", ["Ein Haus ist da.", "Ein Fuchs lief weg."])
    write("out.txt", ["ein haus ist da.", "Ein Fuchs lief weg."])
    write("reversed.jsonl", [json.dumps({"source": "Ein Haus ist da.", "output": "a house"})] * 2)
    data = ["--data", "wmt14", "--data-folder", "."]
    command = ["evaluate", "--predictions", "out.txt", *data, "--json", "s.json"]
    assert cli.main(command) == 0
    assert rows(capsys.readouterr().out) == {"bleu": ["100.00", "100.00", "to", "100.00"]}
    found = json.loads(Path("s.json").read_text())
    assert found["metrics"]["bleu"]["signature"].startswith("nrefs:1|case:lc|eff:no|tok:intl|")
    assert found["files"] == {"predictions": "out.txt", "data": "wmt14"}
    # Flags go before what the paper has.
    assert cli.main([*command, "--tokenize", "none", "--metrics", "chrf,bleu"]) == 0
    assert list(rows(capsys.readouterr().out)) == ["chrf", "bleu"]
    command[2] = "reversed.jsonl"
    message = fails(capsys, *command, "--reverse")
    assert "reversed.jsonl: the source of example 2 is not that of example 2 of the spl" in message
    message = fails(capsys, *command, "--split", "dev")
    assert ". should hold the split dev of wmt14, as one of dev_balanced.tsv, dev.tsv, " in message
    write("train.tsv", ["\tx"])
    message = fails(capsys, *command, "--split", "train")
    assert "the split train of wmt14 should hold pairs of texts, but is empty" in message


@pytest.mark.slow
def test_a_model_generates(folder, preset, capsys):
    write("few.tsv", [f"{source}\tA Bird  sang" for source in SOURCES[:3]])
    command = ["evaluate", "--preset", preset, "--references", "few.tsv", "--metrics", "exact,chrf"]
    flags = ["--no-xla", "--max-new-tokens", "5", "--output", "new.jsonl", "--json", "s.json"]
    assert cli.main([*command, *flags]) == 0
    model = bg.EncoderDecoderModel.from_preset(preset)
    expected = model.generate(
        SOURCES[:3], max_new_tokens=5, num_return_sequences=1, jit_compile=False
    )
    lines = [json.loads(line) for line in Path("new.jsonl").read_text().splitlines()]
    assert [line["output"] for line in lines] == expected
    assert [line["source"] for line in lines] == SOURCES[:3]
    found = json.loads(Path("s.json").read_text())
    value = metrics.chrf(expected, ["A Bird  sang"] * 3).value
    assert found["metrics"]["chrf"]["value"] == pytest.approx(value)
    assert found["generation"]["max_new_tokens"] == 5
    assert found["files"]["preset"] == preset

    # What was kept scores the same; as the tokenizer has it, "A Bird  sang" is "a bird sang".
    capsys.readouterr()
    again = ["evaluate", "--predictions", "new.jsonl", "--references", "few.tsv"]
    assert cli.main([*again, "--metrics", "chrf"]) == 0
    assert rows(capsys.readouterr().out)["chrf"][0] == f"{value:.2f}"
    write("out.txt", ["a bird sang"] * 3)
    again[2] = "out.txt"
    for normalise, exact in ([], "0.00"), (["--normalize-with", preset], "100.00"):
        assert cli.main([*again, "--metrics", "exact", *normalise]) == 0
        assert rows(capsys.readouterr().out)["exact"][0] == exact


@pytest.mark.slow
def test_an_export_generates(folder, shared_export, capsys):
    model, path = shared_export
    Path("exports").symlink_to(path.parent)
    texts = sorted(set(SOURCES))
    write("few.tsv", [f"{source}\tx" for source in texts])
    command = ["evaluate", "--export", "exports/1", "--references", "few.tsv", "--batch-size", "2"]
    assert cli.main([*command, "--no-xla", "--metrics", "exact", "--output", "new.txt"]) == 0
    with eagerly():
        expected = model.generate(texts, jit_compile=False, **EXPORT_OPTIONS)
    assert len(set(expected)) > 1
    assert Path("new.txt").read_text().splitlines() == expected
    capsys.readouterr()
    message = fails(capsys, *command, "--num-beams", "2")
    assert "--num-beams applies to --preset only" in message
    command[2] = "exports"
    assert "there is no exports/saved_model.pb" in fails(capsys, *command)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--predictions", "short.txt"], "short.txt has 2 outputs, but pairs.tsv has 40 examples"),
        (["--baseline", "short.txt"], "short.txt has 2 outputs, but pairs.tsv has 40 examples"),
        (["--predictions", "empty.txt"], "empty.txt should hold outputs, but is empty"),
        (["--predictions", "none.txt"], "none.txt: No such file or directory"),
        (["--predictions", "bad.jsonl"], 'bad.jsonl, line 2: expected {"output": "..." or'),
        (["--predictions", "half.jsonl"], 'half.jsonl, line 1: expected {"output": "..." or'),
        (
            ["--predictions", "other.jsonl"],
            "the source of example 2 is not that of example 2 of pairs.tsv",
        ),
        (["--references", "one.tsv"], "one.tsv, line 2: expected source<TAB>reference, found no"),
        (["--references", "bad.jsonl"], 'bad.jsonl, line 1: expected {"source": "...", "target"'),
        (["--references", "nothing.jsonl"], 'nothing.jsonl, line 1: expected {"source": "...", '),
        (["--references", "empty.txt"], "empty.txt should hold pairs of texts, but is empty"),
        (["--references", "pairs.xml"], "pairs.xml should have one of the extensions"),
        (["--output", "new.csv"], "--output applies to --preset and --export only"),
        (["--metrics", "exact,meteor"], "--metrics: metrics must be among exact, "),
        (["--metrics", ","], "--metrics: metrics must be some of exact, "),
        (["--tokenize", "moses"], "--tokenize: invalid choice: 'moses'"),
        (["--resamples", "0"], "--resamples: expected an integer of at least 1, received '0'"),
        (["--json", "no/scores.json"], "--json must lie in a folder that can be written, but no "),
        (["--json", "."], "--json must be a file, but . is not one"),
        (["--plot", "scores.jpeg2"], "--plot must end in .png, .pdf or .svg, received scores.jpeg"),
        (["--output", "new.txt"], "--output applies to --preset and --export only"),
        (["--num-beams", "2"], "--num-beams applies to --preset only"),
        (["--quantize", "int8"], "--quantize applies to --preset only"),
        (["--num-return-sequences", "2"], "unrecognized arguments: --num-return-sequences"),
        (["--preset", "x"], "--preset: not allowed with argument --predictions"),
        (["--split", "test", "--reverse"], "--split, --reverse applies to --data only"),
        (["--data", "c4"], "--data: invalid choice: 'c4' (choose from"),
        (["--data", "xsum"], "--data: not allowed with argument --references"),
        (["--normalize-with", "x"], "x should be a preset that save_to_preset wrote"),
    ],
)
def test_errors_before_anything_slow(flags, message, folder, capsys):
    write("short.txt", ["a", "b"])
    write("empty.txt", [])
    write("pairs.xml", ["a"])
    write("bad.jsonl", ['{"output": "a"}', '{"output": 3}'])
    write("half.jsonl", ['{"output": "\\ud800"}'])
    write("other.jsonl", [json.dumps({"output": "x", "source": SOURCES[0]})] * 40)
    write("one.tsv", ["a\tb", "c"])
    write("nothing.jsonl", ['{"source": "a", "target": []}'])
    before = sorted(folder.iterdir())
    common = ["--predictions", "outputs.txt", "--references", "pairs.tsv"]
    assert message in fails(capsys, "evaluate", *common, *flags)
    assert sorted(folder.iterdir()) == before


def test_missing_packages_are_known_before_generating(folder, preset, monkeypatch, capsys):
    monkeypatch.setattr(presets, "load", lambda folder: pytest.fail("too late"))
    command = ["evaluate", "--preset", preset, "--references", "pairs.tsv"]
    for package, flags, message in (
        ("matplotlib", ["--plot", "x.png"], "matplotlib: pip install 'bertgen_tf[plot]'"),
        ("sacrebleu", [], "sacrebleu: pip install 'bertgen_tf[metrics]'"),
    ):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, package, None)
            assert message in fails(capsys, *command, *flags)


def test_a_report_that_fails_leaves_the_older_one(folder, monkeypatch):
    monkeypatch.setattr(json, "dump", lambda *args, **kwargs: 1 / 0)
    Path("scores.json").write_text("older")
    command = ["evaluate", "--predictions", "outputs.txt", "--references", "pairs.tsv"]
    with pytest.raises(ZeroDivisionError):
        cli.main([*command, "--json", "scores.json", "--metrics", "exact"])
    assert Path("scores.json").read_text() == "older"
    assert len(list(folder.iterdir())) == 4


# ---------------------------------------------------------------------------------------- plot


@given(st.lists(st.integers(0, 30), min_size=1, max_size=300))
def test_bins_of_lengths(lengths):
    bins = metrics_plot.length_bins(lengths)
    assert sorted(np.concatenate(bins)) == list(range(len(lengths)))
    assert 1 <= len(bins) <= metrics_plot.MAX_BINS
    values = [{lengths[i] for i in examples} for examples in bins]
    for shorter, longer in zip(values, values[1:], strict=False):
        assert max(shorter) < min(longer)


@pytest.mark.parametrize(
    ("count", "bins"), [(1, 1), (9, 1), (10, 2), (20, 4), (30, 4), (64, 4), (90, 6), (1003, 8)]
)
def test_bins_are_about_equal(count, bins):
    sizes = [len(examples) for examples in metrics_plot.length_bins(range(count))]
    assert len(sizes) == bins
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("names", [["exact"], ["exact", "sari", "bleu", "chrf"]])
def test_a_plot_has_a_point_for_each_bin(names, tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="needs the extra plot")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, **_: drawn.append(self))
    sources = ["a " * n for n in range(1, 61)]
    results = [
        metrics.compute(names, sources, texts, sources)
        for texts in (sources, ["a"] * 30 + sources[30:])
    ]
    metrics_plot.plot_by_length(results, ["ours", "theirs"], sources, tmp_path / "x.png")
    axes = [axis for axis in drawn[0].axes if axis.get_visible()]
    assert len(axes) == len(names)
    values = [f"{result['exact'].value:.1f}" for result in results]
    assert axes[0].get_title(loc="left") == f"exact match: {' / '.join(values)}"
    assert values == ["100.0", "51.7"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["ours", "theirs"]
    ours, theirs = (box.lines[0].get_ydata() for box in axes[0].containers)
    assert ours.tolist() == [100] * 4
    assert theirs.tolist() == pytest.approx([100 / 15, 0, 100, 100])
    lengths = [box.lines[0].get_xdata().mean() for box in axes[0].containers]
    assert np.mean(lengths) == pytest.approx(30.5)


def test_a_plot_of_twenty_examples_shows_each(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="needs the extra plot")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, **_: drawn.append(self))
    sources = ["a " * n for n in range(5, 25)]
    predictions = ["a"] * 10 + sources[10:]
    results = metrics.compute(["exact", "bleu"], sources, predictions, sources)
    metrics_plot.plot_by_length([results], ["ours"], sources, tmp_path / "x.png")
    exact, bleu = (axis for axis in drawn[0].axes if axis.get_visible())
    curve = exact.containers[0].lines[0]
    assert curve.get_xdata() == pytest.approx([7, 12, 17, 22])
    assert curve.get_ydata() == pytest.approx([0, 0, 100, 100])
    dots = [line for line in exact.lines if line.get_linestyle() == "None"]
    assert any(
        line.get_xdata() == pytest.approx(range(5, 25))
        and line.get_ydata() == pytest.approx([0] * 10 + [100] * 10)
        for line in dots
        if len(line.get_xdata()) == 20
    )
    assert len(bleu.containers[0].lines[0].get_xdata()) == 4  # it has no values of examples
    assert (exact.get_xlim()[0] < 5, exact.get_xlim()[1] > 24) == (True, True)
    assert bleu.get_xlabel() == "words of the source"
    footer = drawn[0].get_supxlabel()
    assert footer.startswith("20 examples, 5 per point; ") and footer.endswith("one example each")

    # One example, all values 0, no spaces between words: the axes have a width all the same.
    results = metrics.compute(["exact"], ["我爱北京" * 6], ["x"], ["y"])
    metrics_plot.plot_by_length([results], ["ours"], ["我爱北京" * 6], tmp_path / "x.png")
    axis = drawn[1].axes[0]
    assert axis.get_xlabel() == "characters of the source"
    assert np.ptp(axis.get_xlim()) >= 0.1 and axis.get_ylim()[1] >= 5
    assert axis.containers[0].lines[0].get_xdata() == pytest.approx([24])
