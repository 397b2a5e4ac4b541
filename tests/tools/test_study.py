"""The study's runner: what it compares has the same start, batches and optimizer."""

import json

import pytest
from study import study

from tests.helpers import write_checkpoint

LINE = "the old man saw a bird {}\tthe old man saw . <::::> a bird {} .\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setitem(study.LENGTHS, "wikisplit", 20)
    # Searching has tests of its own, and takes minutes to compile.
    monkeypatch.setattr(study.Runner, "_generate", lambda self, model: self.task.references)
    module = write_checkpoint(tmp_path / "module", num_hidden_layers=1)
    folder = tmp_path / "data" / "wikisplit"
    folder.mkdir(parents=True)
    lines = "".join(LINE.format(letter, letter) for letter in "abcdefghij" * 3)
    for split in ("tune", "validation"):
        (folder / f"{split}.tsv").write_text(lines)

    def run(output, *starts):
        path = tmp_path / output
        arguments = ["run", str(module), str(folder.parent), str(path), "--starts", *starts]
        sizes = "--tasks wikisplit --seeds 3 --steps 4 --points 4 --batch-size 7".split()
        monkeypatch.setattr("sys.argv", ["study.py", *arguments, *sizes])
        study.main()
        records = study.read_records(path / "wikisplit.jsonl")
        losses = {}
        for record in records:
            pair = (record["loss"], record["validation_loss"])
            losses.setdefault(record["start"], []).append(pair)
        return path, losses

    return run


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_one_before(run, monkeypatch, capsys):
    path, both = run("both", "RND2RND", "BERT2BERT")
    _, alone = run("alone", "BERT2BERT")
    assert alone["BERT2BERT"] == both["BERT2BERT"] != both["RND2RND"]
    # What is there is not run again.
    assert run("both", "RND2RND", "BERT2BERT")[1] == both

    pytest.importorskip("sacrebleu")
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["study.py", "report", str(path)])
    study.main()
    table = capsys.readouterr().out
    last, lowest = both["BERT2BERT"][-1], min(loss for _, loss in both["BERT2BERT"])
    row = f"| BERT2BERT | {last[0]:.2f} | {last[1]:.2f} | {lowest:.2f} | 100.0 | 100.0 |"
    assert row in table
    results = json.loads((path / "results.json").read_text())
    assert [r["step"] for r in results["wikisplit"] if "scores" in r] == [1, 2, 4, 1, 2, 4]
    assert (path / "curves.png").stat().st_size > 10_000
