"""Write the address of this repository where readers need it: the notebooks, the README's badges, and CITATION.cff.

    python tools/address.py    # after ADDRESS below has changed

Without an address there are no badges, and the notebooks ask for it.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.files import write  # noqa: E402
from common.terminal import UserError, cli  # noqa: E402

ADDRESS = ""  # of the repository, as https://github.com/OWNER/NAME

NOTEBOOKS = [
    "colab.ipynb",
    "nanogpt/walkthrough.ipynb",
    "nanogpt/textbooks/walkthrough.ipynb",
    "resnet/walkthrough.ipynb",
]
BADGES = re.compile(r"<!-- badges -->\n.*?<!-- /badges -->\n", re.DOTALL)
IN_A_NOTEBOOK = re.compile(r'REPOSITORY = \\"[^"\\]*\\"')  # the line of the first cell, as JSON has it
IN_THE_CITATION = re.compile(r"^repository-code: .*\n", re.MULTILINE)


def badges(address: str) -> str:
    """The block of the README that has the badges: the state of the tests, and Colab."""
    lines = []
    if address:
        tests = f"{address}/actions/workflows/ci.yml"
        notebook = f"https://colab.research.google.com/github/{address.split('/', 3)[3]}/blob/main/colab.ipynb"
        lines.append(f"[![Tests]({tests}/badge.svg)]({tests})")
        lines.append(f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({notebook})")
    return "\n".join(["<!-- badges -->", *lines, "<!-- /badges -->", ""])


def replaced(file: Path, place: re.Pattern, text: str) -> str:
    """The text of a file with `text` at its one `place`. Raises UserError if it has none, or several."""
    new, places = place.subn(lambda found: text, file.read_text(encoding="utf-8"))
    if places != 1:
        raise UserError(f"{file}: has {places} places for the address; one has to match {place.pattern!r}")
    return new


def texts_with(address: str, root: Path = ROOT) -> dict[Path, str]:
    """{file: its text with this address}. Raises UserError if the address is none, or a file has no place for it."""
    if address and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        raise UserError(f"ADDRESS = {address!r} in tools/address.py: must be https://github.com/OWNER/NAME, or empty")
    citation = f"repository-code: {address}\n" if address else ""
    texts = {root / "README.md": replaced(root / "README.md", BADGES, badges(address))}
    for name in NOTEBOOKS:
        texts[root / name] = replaced(root / name, IN_A_NOTEBOOK, f'REPOSITORY = \\"{address}\\"')
    file = root / "CITATION.cff"
    texts[file] = IN_THE_CITATION.sub("", file.read_text(encoding="utf-8")).rstrip("\n") + "\n" + citation
    return texts


def main(argv=None):
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    for file, text in texts_with(ADDRESS).items():
        if text != file.read_text(encoding="utf-8"):
            write(file, text)
            print(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    cli(main)
