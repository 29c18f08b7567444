"""The files of a comparison, what names may do to them, and the command lines and folders that are refused."""

from __future__ import annotations

import html
import io
import re
import struct
from pathlib import Path

import pytest
from rich.console import Console

from experiments.compare import __main__ as compare
from experiments.compare.load import load
from experiments.grid import Grid, Row, latex, markdown, print_grid, tex_text
from tests.evaluations import drawn, run_with, write_run
from upge.errors import DataError, UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Two runs of two benchmarks with several samples and one with levels."""
    root, actual = tmp_path_factory.mktemp("evals"), []
    for seed, (name, ability) in enumerate({"good": 0.4, "bad": 0.1}.items()):
        samples = {
            "aime": drawn("aime", 12, 8, ability - 0.2, seed=seed),
            "amc": drawn("amc", 10, 4, ability, seed=seed),
            "math": drawn("math", 30, 1, ability + 0.4, ("1", "2", "3"), seed=seed),
        }
        actual.append(str(write_run(root / name, samples)))
    return actual


# The files.


def test_all_files_are_written_and_repeatable(folders, tmp_path, capsys):
    outputs = [tmp_path / "a", tmp_path / "deep" / "b"]
    for output in outputs:
        assert compare.main([*folders, f"output={output}"]) == 0
    names = ["compare.csv", "compare.md", "compare.tex", "passk.png", "passk.svg"]
    for name in names:
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()
    assert sorted(path.name for path in outputs[0].iterdir()) == names
    png = (outputs[0] / "passk.png").read_bytes()
    assert png.startswith(b"\x89PNG") and min(struct.unpack(">II", png[16:24])) > 500
    svg = (outputs[0] / "passk.svg").read_text("utf-8")
    assert all(f">{text}<" in svg for text in ("aime", "amc", "average math, n &gt; 1", "good", "bad", "pass@k in %"))
    page = (outputs[0] / "compare.md").read_text("utf-8")
    assert "![pass@k curves](passk.png)" in page and "wrote" in capsys.readouterr().out


def tables_are_whole(folder: Path, tables: int) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", (folder / "compare.md").read_text("utf-8"), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    text = (folder / "compare.tex").read_text("utf-8")
    actual = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(actual) == text.count(r"\begin{table}") == text.count(r"\end{table}") == tables
    for columns, body in actual:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert lines and all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in lines)
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == len(labels)
    assert text.isascii(), sorted({letter for letter in text if not letter.isascii()})


def test_markdown_and_latex_tables_are_whole(folders, tmp_path):
    assert compare.main([*folders, f"output={tmp_path}"]) == 0
    tables_are_whole(tmp_path, tables=7)


def test_without_several_samples_there_is_no_figure(tmp_path, capsys):
    folder = run_with(tmp_path / "x", {"a": [True], "b": [False]})
    assert compare.main([str(folder), f"output={tmp_path / 'out'}"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.csv", "compare.md", "compare.tex"]
    assert "no pass@k curves" in capsys.readouterr().out


def test_names_cannot_break_a_table(tmp_path, capsys):
    folders = [str(run_with(tmp_path / n, {"a": [right] * 2})) for n, right in (("x", True), ("y", False))]
    names = [r"_[red]50%_&|\x{}", "$`<b>*$#~^"]
    assert compare.main([*folders, f"names={','.join(names)}", f"output={tmp_path / 'out'}"]) == 0
    assert "_[red]50%_&" in capsys.readouterr().out
    svg = html.unescape((tmp_path / "out" / "passk.svg").read_text("utf-8"))
    assert all(name in svg for name in names)
    tables_are_whole(tmp_path / "out", tables=6)


def test_escapes():
    assert tex_text(r"a_b & 5% {x} \y $1 #2 ~^ <0.001 -3.2 to -1.0 a-1 (-4–5) −") == (
        r"a\_b \& 5\% \{x\} \textbackslash{}y \$1 \#2 \textasciitilde{}\textasciicircum{} $<$0.001 "
        r"$-$3.2 to $-$1.0 a-1 ($-$4--5) $-$"
    )
    grid = Grid("g", "t", ("a|b", "*c*"), (Row(("x_y", "1"), frozenset({1})), Row(("", "2"), rule=True)))
    assert markdown(grid) == "| a\\|b | \\*c\\* |\n| --- | ---: |\n| x\\_y | **1** |\n|  | 2 |"
    assert r"x\_y & \textbf{1} \\" in latex(grid) and latex(grid).count(r"\midrule") == 2


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [50, 80, 200])
def test_wide_tables_are_split_not_cut(width, encoding):
    header = ("benchmark", "measure", *(f"run {i}" for i in range(9)))
    values = tuple(f"{i}1.0 ({i}0.0–{i}2.5)" for i in range(9))
    grid = Grid("g", "A title", header, (Row(("olympiad_bench", "avg@32", *values)),) * 2, labels=2)
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_grid(grid, Console(file=stream, width=width, highlight=False))
    stream.seek(0)
    text = stream.read()
    assert max(map(len, text.splitlines())) <= width and "…" not in text and "?" not in text
    dash = "–" if encoding == "utf-8" else "-"
    for i in range(9):
        assert text.count(f"{i}1.0") == 2 and text.count(f"({i}0.0{dash}{i}2.5)") == 2
    assert (text.count("A title") == 1) == (width == 200)


# The command line.


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    paths = [str(run_with(tmp_path / part, {"a": [True]})) for part in ("lr=1e-4/eval", "lr=1e-5/eval")]
    assert [run.name for run in load(paths)] == ["lr=1e-4/eval", "lr=1e-5/eval"]
    assert [run.name for run in load(paths, ["a", " b"])] == ["a", "b"]
    assert compare.read([*paths, "solved=any"]).runs == tuple(paths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least one evaluation"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["x", "outptu=y"], "outptu: neither a key nor a folder .* did you mean 'output'"),
        (["x", "solved=all"], "solved: found 'all'; give one of most, first, any"),
        (["x", "output="], "output: empty"),
    ],
)
def test_a_bad_command_line_is_named(arguments, message, capsys):
    assert compare.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_help_names_every_key(capsys):
    assert compare.main(["--help"]) == 0
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "compare.md").read_text("utf-8")
    assert all(key in printed and f"`{key}`" in page for key in compare.KEYS)


def test_runs_given_badly_are_named(folders, tmp_path):
    with pytest.raises(UserError, match="given twice"):
        load([folders[0], folders[0] + "/."])
    with pytest.raises(UserError, match="names: found 1 for 2 runs"):
        load(folders, ["a"])
    with pytest.raises(UserError, match="'a', 'a'; give every run a name of its own"):
        load(folders, ["a", "a"])


def test_a_folder_that_is_no_finished_evaluation_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no scores\.json in it; give the folder that was output="):
        load([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(DataError, match="a training run; evaluate its policy first: python -m experiments.evaluate"):
        load([str(tmp_path)])
    (tmp_path / "samples").mkdir()
    with pytest.raises(DataError, match="evaluation is not finished: the same command"):
        load([str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not the scores of an evaluation"),
        ("[]", "not the scores of an evaluation"),
        ('{"benchmarks": {"b": {"group": "math"}}}', "not the scores of an evaluation .KeyError.'samples'"),
        ('{"benchmarks": {}}', "no benchmark in it"),
    ],
)
def test_scores_that_cannot_be_read_are_named(tmp_path, content, message):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(DataError, match=rf"scores\.json: .*{message}"):
        load([str(tmp_path)])


def test_samples_that_do_not_fit_are_named(tmp_path):
    folder = run_with(tmp_path / "x", {"a": [True, False], "b": [False, False]})
    path = folder / "samples" / "b.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(DataError, match=r"b\.jsonl: b: 1 of 2 problems have fewer than 2 samples"):
        load([str(folder)])
    path.write_bytes(b"".join([*lines, b"{}\n"]))
    with pytest.raises(DataError, match=r"^\S*b\.jsonl:5: no field"):
        load([str(folder)])
    path.unlink()
    with pytest.raises(DataError, match=r"b\.jsonl is missing, but scores\.json has scores of b"):
        load([str(folder)])


def test_a_folder_that_cannot_be_written_is_named(folders, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert compare.main([*folders, f"output={tmp_path / 'file'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err
