"""tools/notebooks.py: what it refuses, how it names a failed cell, what it leaves in a notebook, and what it ends."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from support import ROOT, gone, processes, wait_until

from tools import notebooks
from tools.commands import Refused

SETUP = (
    f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tools.launch import launch\n%load_ext tools.launch"
)


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executed copies go into the test's own folder."""
    monkeypatch.setattr(notebooks, "COPIES", tmp_path / "out")


def make_notebook(path: Path, *cells: tuple[str, str, str], **parameters: object) -> Path:
    """A notebook of (id, tags, source); a parameters cell comes first."""
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    for cell_id, tags, text in [("parameters", "parameters", source), *cells]:
        kind = nbformat.v4.new_markdown_cell if tags == "text" else nbformat.v4.new_code_cell
        notebook.cells.append(
            kind(text, id=cell_id, metadata={} if tags == "text" else {"tags": tags.split()})
        )
    nbformat.write(notebook, path)
    return path


def run(*arguments: object) -> int:
    return notebooks.main([str(argument) for argument in arguments])


def one_line(text: str) -> str:
    """The only line on stderr, which must be ours."""
    assert text.count("\n") == 1 and text.startswith("error: "), text
    return text


# ------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: object, **_: object) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(notebooks, "execute", start)


def test_unknown_parameters_are_refused_before_anything_starts(tmp_path, nothing_starts, capsys):
    first = make_notebook(tmp_path / "a.ipynb", ranks=2, steps=3)
    second = make_notebook(tmp_path / "b.ipynb", ranks=2)
    assert run(first, second, "-p", "steps", "4") == 2
    assert f"{second} has no parameter steps; it has ranks" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{folder}/missing.ipynb"], "missing.ipynb is not a notebook"),
        (["{folder}/text.ipynb", "-p", "x", "1"], "text.ipynb is not a notebook: NotJSONError"),
        (["{folder}/a.ipynb", "{folder}/a.ipynb"], "a.ipynb is given twice"),
        (
            ["{folder}/a.ipynb", "--in-place", "-p", "ranks", "1"],
            "what is committed has the notebooks' own parameters",
        ),
        (["{folder}/a.ipynb", "-p", "ranks", "-1e-3"], "argument -p/--parameter: expected 2 arguments"),
        (["{folder}/a.ipynb", "--inplace"], "unrecognized arguments: --inplace"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path, nothing_starts, capsys):
    make_notebook(tmp_path / "a.ipynb", ranks=2)
    (tmp_path / "text.ipynb").write_text("no notebook")
    assert run(*(argument.format(folder=tmp_path) for argument in arguments)) == 2
    assert says in one_line(capsys.readouterr().err)


def test_values_of_parameters():
    given = ["2", "0.5", "true", "None", "[1, 2]", "all_to_all", "'2'"]
    assert [notebooks.read_value(text) for text in given] == [2, 0.5, True, None, [1, 2], "all_to_all", "2"]
    words = ["notebooks/01_parallelism.ipynb", "-p", "a", "-0.001", "-p", "b", "-.5", "-p", "c", " x"]
    assert notebooks.arguments(words).parameters == {"a": -0.001, "b": -0.5, "c": " x"}


def test_a_full_disk_is_one_line_and_leaves_no_part(tmp_path):
    path = make_notebook(tmp_path / "a.ipynb", ranks=2)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        with pytest.raises(Refused, match="^error: cannot write .*a.ipynb: File too large"):
            notebooks.write(nbformat.read(path, 4), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------- running


def test_executes_with_parameters_from_any_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "books").mkdir()
    monkeypatch.chdir(tmp_path)
    cell = ("where", "demo", "import os\nprint(ranks + 1, os.path.basename(os.getcwd()))")
    path = make_notebook(tmp_path / "books" / "a.ipynb", cell, ranks=2)
    before = path.read_bytes()
    assert run("books/a.ipynb", "-p", "ranks", "40") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{path}: 3 cells, ") and err == ""
    executed = nbformat.read(tmp_path / "out" / "a.ipynb", 4)
    assert executed.cells[-1].id == "where" and executed.cells[-1].outputs[0].text == "41 books\n"
    assert path.read_bytes() == before


def test_a_failed_cell_is_named_with_the_ranks_own_error(tmp_path, capsys):
    broken = "%%ranks 2 --device cpu\nif rank:\n    raise ValueError('no good')"
    cells = [
        ("setup", "setup", SETUP),
        ("broken", "demo", broken),
    ]
    path = make_notebook(tmp_path / "a.ipynb", *cells, ("after", "demo", "print('never')"))
    before = path.read_bytes()
    assert run(path, "--in-place") == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first == f"error: {path} #broken: RanksError: rank 1, line 3 of the cell: ValueError: no good"
    assert last == f"  executed copy: {tmp_path / 'out' / 'a.ipynb'}"
    assert path.read_bytes() == before
    assert "never" not in [joined for joined in (tmp_path / "out" / "a.ipynb").read_text().split('"')]
    assert gone(str(tmp_path))


def test_the_line_of_a_plain_failure():
    trace = "the source\n\x1b[32m----> \x1b[39m\x1b[32m3\x1b[39m assert x"
    error = notebooks.CellExecutionError(trace, "AssertionError", "")
    assert notebooks.failure_lines("notebooks/x.ipynb #check", error) == [
        "error: notebooks/x.ipynb #check: AssertionError", "  line 3 of the cell: assert x",
    ]  # fmt: skip


def test_a_dead_kernel_is_named_with_its_cell(tmp_path, capsys):
    path = make_notebook(tmp_path / "{a}.ipynb", ("deadly", "demo", "import os\nos._exit(3)"), ranks=2)
    assert run(path, "-p", "ranks", "(1, 2)") == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {path} #deadly: the kernel died") and last.startswith(
        "  executed copy: "
    )
    assert "ranks = (1, 2)" in (tmp_path / "out" / "{a}.ipynb").read_text()


def test_a_time_out_leaves_no_process(tmp_path, capsys):
    # Like a rank: a process in a session of its own, below the kernel.
    cell = f"""import subprocess, sys, time
command = [sys.executable, "-c", "import time; time.sleep(600)", {str(tmp_path)!r}]
subprocess.Popen(command, start_new_session=True)
open({str(tmp_path / "started")!r}, "w").close()
time.sleep(600)"""
    path = make_notebook(tmp_path / "a.ipynb", ("stuck", "demo", cell))
    assert run(path, "--timeout", "8") == 1
    assert (tmp_path / "started").exists()
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"error: {path} #stuck: did not end within 8 s; it was ended"
    assert gone(str(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_or_a_kill_leaves_no_process(number, tmp_path):
    cell = f"""launch(2, steps=10**6, log_interval=10, hidden_dim=16, ffn_dim=16, device="cpu",
       log_dir={str(tmp_path / "run")!r})"""
    path = make_notebook(tmp_path / "a.ipynb", ("setup", "setup", SETUP), ("train", "launch", cell))
    program = subprocess.Popen(
        [sys.executable, "tools/notebooks.py", str(path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "run" / "train.log"
    try:
        wait_until(lambda: log.exists() and "[step 00010]" in log.read_text())
    finally:
        program.send_signal(number)
    _, err = program.communicate(timeout=30)
    wait_until(lambda: not processes(str(tmp_path)))
    if number == signal.SIGINT:
        assert program.returncode == 130
        assert err == "interrupted: every kernel and rank has ended\n"


# ------------------------------------------------------------------------------------------- cleaning


def test_in_place_leaves_a_clean_notebook(tmp_path, capsys):
    loud = """import sys
print("one"); print("two", flush=True)
print("three"); print("0%\\r100%")
print("to stderr", file=sys.stderr)
from IPython.display import display
display({"text/plain": ""}, raw=True)
"é" """
    cells = [("text", "text", "Some *prose*."), ("empty", "demo", ""), ("loud", "solution", loud)]
    path = make_notebook(tmp_path / "a.ipynb", *cells, ranks=2)
    stored = json.loads(path.read_text())
    stored["cells"][3] |= {"execution_count": 17}
    stored["cells"][3]["metadata"] |= {
        "execution": {"iopub.execute_input": "2026"},
        "papermill": {"duration": 1},
    }
    stored["metadata"] = {
        "papermill": {},
        "language_info": {"name": "python", "version": "3.9"},
        "title": "T",
    }
    path.write_text(json.dumps(stored))
    path.chmod(0o640)
    assert run(path, "--in-place") == 0
    text = path.read_text("utf-8")
    assert json.loads(text)["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}, "title": "T",
    }  # fmt: skip
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.nbformat_minor == 5 and [cell.id for cell in notebook.cells] == [
        "parameters", "text", "empty", "loud",
    ]  # fmt: skip
    assert {cell.get("execution_count") for cell in notebook.cells} == {None}
    loud_cell = notebook.cells[3]
    assert (
        loud_cell.metadata
        == {"tags": ["solution"], "jupyter": {"source_hidden": True, "outputs_hidden": True}}
        and "papermill" not in text
    )
    assert [output.get("text") or output.data["text/plain"] for output in loud_cell.outputs] == [
        "one\ntwo\nthree\n100%\n", "to stderr\n", "'é'",
    ]  # fmt: skip
    assert (
        text == json.dumps(json.loads(text), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        and "é" in text
    )
    assert path.stat().st_mode & 0o777 == 0o640
    assert run(path, "--in-place") == 0
    assert path.read_text("utf-8") == text  # nothing changed, so nothing differs
    assert not list(tmp_path.glob(".*"))


def test_a_figure_that_stands_in_images_is_shown_by_its_name(tmp_path, monkeypatch):
    """Also from a notebook elsewhere, with the picture's own title; a picture that stands nowhere stays."""
    (tmp_path / "images").mkdir()
    dublin = '<dc:title xmlns:dc="http://purl.org/dc/elements/1.1/">Two bars</dc:title>'
    (tmp_path / "images" / "a.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg">{dublin}</svg>')
    (tmp_path / "images" / "b_c.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    png = {
        "output_type": "display_data",
        "metadata": {},
        "data": {"image/png": "AAAA", "text/plain": "<Figure>"},
    }
    svg = {**png, "data": {"image/svg+xml": "<svg/>"}, "output_type": "execute_result", "execution_count": 3}
    cell = nbformat.v4.new_code_cell('save_figure(fig, "a.svg")\nshow("b_c.svg", "d.svg")')
    cell.outputs = [nbformat.from_dict(output) for output in (png, svg, png)]
    shown = notebooks.clean_outputs(cell, tmp_path / "notebooks" / "x.ipynb")
    assert [output.data.get("text/markdown") for output in shown] == [
        "![Two bars](../images/a.svg)", "![b c](../images/b_c.svg)", None,
    ]  # fmt: skip
    assert {output.output_type for output in shown} == {"display_data"}


def test_a_notebook_saved_meanwhile_is_not_overwritten(tmp_path, capsys, monkeypatch):
    path = make_notebook(tmp_path / "a.ipynb", ("x", "demo", "1"))
    monkeypatch.setattr(notebooks, "execute", lambda *_: path.write_text(path.read_text() + " "))
    assert run(path, "--in-place") == 1
    assert "was changed while it ran; run it again" in one_line(capsys.readouterr().err)
    assert path.read_text().endswith(" ")
