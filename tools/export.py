"""Copy one experiment into a folder that stands alone, with nothing left to fetch from this repository.

    python tools/export.py cifar DIR     # then: pip install -r DIR/requirements.txt && python DIR/train.py

DIR gets everything in the experiment's folder, the modules of common/ that it uses as the package DIR/common/, and the
lines of requirements.txt and constraints.txt for what these modules import. Commands and links in the texts are
rewritten for DIR: `python cifar/train.py` becomes `python train.py`.
"""

import argparse
import ast
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}  # modules whose package has another name


def imported(file: Path) -> set[str]:
    """The absolute names that a module imports, anywhere in it: {"torch.nn", "common.run", "common.run.Run"}."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.level == 0 or str(node.module).startswith("common.")):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def common_modules(files: list[Path]) -> list[Path]:
    """The modules of common/ that `files` import, directly or through one another."""
    found, queue = set(), list(files)
    while queue:
        words = [name.split(".") for name in imported(queue.pop()) if name.startswith("common.")]
        new = {ROOT / "common" / f"{second}.py" for _, second, *_ in words} - found
        found |= new
        queue += new
    return sorted(found)


def packages(files: list[Path], own: set[str]) -> set[str]:
    """The packages to install for `files`; `own` are the names of modules beside them."""
    names = {name.split(".")[0] for file in files for name in imported(file)}
    names -= own | {"common"} | sys.stdlib_module_names
    return {PACKAGES.get(name, name.replace("_", "-")) for name in names}


def pins(file: Path, names: set[str]) -> str:
    """The lines of a requirements file that concern the packages `names`."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if re.match(r"[\w.-]*", line)[0] in names)


def rewritten(text: str, file: Path, folder: Path) -> str:
    """The text of a file of the experiment in `folder`, with paths that are valid in the exported folder.

    A path that begins with the folder's name loses it, and ../common/ becomes common/. A link to another place of the
    repository becomes plain text.
    """

    def without_folder(match):
        return match[1] if (folder / match[1]).exists() else match[0]

    def link(match):
        target = (file.parent / match[2]).resolve()
        if target.is_relative_to(folder):
            return match[0]
        if not target.is_relative_to(ROOT / "common"):
            return match[1]
        return f"[{match[1]}]({Path(os.path.relpath(folder / target.relative_to(ROOT), file.parent)).as_posix()})"

    text = re.sub(rf"(?<![\w./-]){folder.name}/([\w./-]*\w)", without_folder, text)
    if file.suffix == ".md":
        text = re.sub(r"\[([^\]]*)\]\((\.\./[^)#]*)[^)]*\)", link, text)
        text = text.replace("`../common/", "`common/")
    return text


def export(folder: Path, target: Path) -> None:
    """Write the experiment in `folder` to `target`, a folder that is empty or not there yet."""
    unwanted = re.compile(r"(^|/)(\.|__pycache__/)|^common\.py$")  # hidden files, caches, and what points to ../common
    files = [file for file in folder.rglob("*") if file.is_file()]
    files = [file for file in files if not unwanted.search(file.relative_to(folder).as_posix())]
    scripts = [file for file in files if file.suffix == ".py"]
    shared = common_modules(scripts)
    for file in [*files, *shared]:
        copy = target / file.relative_to(folder if file in files else ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file in files and file.suffix in (".py", ".md", ".ipynb"):
            copy.write_text(rewritten(file.read_text(encoding="utf-8"), file, folder), encoding="utf-8", newline="\n")
        else:
            shutil.copyfile(file, copy)
    (target / "common" / "__init__.py").write_text("", encoding="utf-8")
    needed = packages([*scripts, *shared], own={file.stem for file in folder.iterdir()})
    for name in ("requirements.txt", "constraints.txt"):
        (target / name).write_text(pins(ROOT / name, needed), encoding="utf-8")
    shutil.copyfile(ROOT / "LICENSE", target / "LICENSE")


def code_folder(path: Path) -> Path | None:
    """The folder of the repository's code in which `path` lies; None elsewhere, out/ included."""
    folders = [script.parent for script in ROOT.glob("*/train.py")]
    folders += [ROOT / name for name in ("common", "tools", "tests")]
    for folder in folders:
        if path.resolve().is_relative_to(folder):
            return folder
    return None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", choices=sorted(file.parent.name for file in ROOT.glob("*/train.py")))
    parser.add_argument("dir", type=Path, metavar="DIR", help="the folder to write: empty, or new")
    args = parser.parse_args(argv)
    if args.dir.exists() and not (args.dir.is_dir() and not any(args.dir.iterdir())):
        parser.error(f"{args.dir} is not an empty folder")
    code = code_folder(args.dir)
    if code is not None:
        parser.error(f"{args.dir} lies in {code.name}/, among the code; name a folder outside it")
    try:
        args.dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{args.dir} cannot be created ({error.strerror})")
    export(ROOT / args.folder, args.dir)
    print(f"{args.dir} stands alone: pip install -r {args.dir}/requirements.txt && python {args.dir}/train.py")


if __name__ == "__main__":
    main()
