"""Documents: WikiText in several forms, the built-in text, and CSV or text files of one's own.

WikiText (Merity et al. 2016) is one file per part, one paragraph per line, tokens separated by spaces. Two forms of it:
"detokenized", one document per article, with the spaces of ordinary English; and "lines", all lines in one document, as
in Hugging Face's page on perplexity. The token files have <unk> for rare words (form "unk"), the hub's raw files do not
(form "raw").
"""

import hashlib
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common import run
from common.files import csv_reader
from common.terminal import UserError

import generated
import hub

PARTS = ("train", "validation", "test")
FILES = {"train": "train", "validation": "valid", "test": "test"}  # wiki.NAME.tokens
WIKITEXT = {  # name here: (folder on disk, file pattern, configuration on the hub, form of rare words)
    "wikitext2": ("wikitext-2", "wiki.{}.tokens", "wikitext-2-v1", "unk"),
    "wikitext103": ("wikitext-103", "wiki.{}.tokens", "wikitext-103-v1", "unk"),
    "wikitext2-raw": ("wikitext-2-raw", "wiki.{}.raw", "wikitext-2-raw-v1", "raw"),
    "wikitext103-raw": ("wikitext-103-raw", "wiki.{}.raw", "wikitext-103-raw-v1", "raw"),
}
FORMS = ("detokenized", "lines")
DATASETS = ("auto", "builtin", *WIKITEXT)
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass
class Document:
    """A text, and the number of words that it counts as in a perplexity per word."""

    text: str
    words: int

    def key(self) -> str:
        return hashlib.sha256(self.text.encode(errors="backslashreplace")).hexdigest()

    def normalized(self) -> str:
        """The text with single spaces: the same for copies."""
        return " ".join(self.text.split())


@dataclass
class Corpus:
    """name; form of the text; the documents of each part; {reason: rows left out}."""

    name: str
    form: str
    parts: dict[str, list[Document]]
    dropped: dict[str, int] = field(default_factory=dict)

    def digest(self) -> str:
        """The MD5 of all texts with their parts. It is the same for every copy of the same corpus."""
        lines = sorted(f"{part} {document.key()}" for part, documents in self.parts.items() for document in documents)
        return hashlib.md5("\n".join(lines).encode()).hexdigest()

    def copies(self) -> int:
        """How many documents of validation and test are in the training part, too."""
        trained = {document.normalized() for document in self.parts["train"]}
        count = 0
        for part, documents in self.parts.items():
            if part != "train":
                count += sum(document.normalized() in trained for document in documents)
        return count


def load(name: str, data_dir: str | None = None, form: str = "detokenized") -> Corpus:
    """The corpus `name`: one of DATASETS, or the path of a CSV or text file, or of a folder of text files.

    "auto" is wikitext2 if it is there, or if the hub answers within 5 seconds and delivers it; else the built-in text,
    with a warning on standard error. Raises UserError.
    """
    if name == "builtin":
        found = generated.articles(460, seed=0)
        articles = {"train": found[:400], "validation": found[400:430], "test": found[430:]}
        parts = {part: wikitext(lines_of("\n".join(texts)), form) for part, texts in articles.items()}
        return Corpus("builtin", f"unk, {form}", parts)
    if name in ("auto", *WIKITEXT):
        try:
            return load_wikitext("wikitext2" if name == "auto" else name, run.data_dir(data_dir), form)
        except UserError as error:
            if name != "auto" or (run.data_dir(data_dir) / WIKITEXT["wikitext2"][0]).exists():
                raise  # a damaged file of the user's is no reason to take another text
            print(
                f"*** {error}\n*** USING THE BUILT-IN TEXT INSTEAD: its numbers say nothing of WikiText.",
                file=sys.stderr,
            )
            return load("builtin", data_dir, form)
    path = Path(name)
    if path.suffix.lower() == ".csv":
        return read_csv(path)
    return read_texts([path])


# ------------------------------------------------------------------------------------------------------------ WikiText


def load_wikitext(name: str, folder: Path, form: str) -> Corpus:
    """WikiText from its files in `folder`, else from the hub. Raises UserError."""
    place, pattern, configuration, rare = WIKITEXT[name]
    files = {part: folder / place / pattern.format(FILES[part]) for part in PARTS}
    if (folder / place).is_dir():
        parts = {part: lines_of(read_text(file)) for part, file in files.items()}
    else:
        missing = f"{name}: {run.display_path(folder)} has no {place}/"
        parts = hub.dataset_lines("Salesforce/wikitext", configuration, PARTS, missing)
    return Corpus(name, f"{rare}, {form}", {part: wikitext(lines, form) for part, lines in parts.items()})


def wikitext(lines: list[str], form: str) -> list[Document]:
    """The documents of a file of WikiText. The words are the file's, plus one end of line each, as in the published
    perplexities per word. In the form "lines", the text is the rows of the hub's dataset, joined by blank lines: a row
    keeps its newline, and a blank row is empty. In the form "detokenized", blank lines are dropped; titles are kept."""
    words = [len(line.split()) + 1 for line in lines]
    if form == "lines":
        rows = [line + "\n" if line.strip() else "" for line in lines]
        return [Document("\n\n".join(rows), sum(words))]
    articles = []
    for i, (line, count) in enumerate(zip(lines, words)):
        around = lines[max(i - 1, 0)] + "".join(lines[i + 1 : i + 2])  # a title stands between empty lines
        if not articles or is_title(line) and not around.strip():
            articles.append([[], 0])
        articles[-1][0].append(line)
        articles[-1][1] += count
    texts = []
    for article, count in articles:
        text = "\n".join(detokenize(line) for line in article if line.strip())
        texts.append((text, count))
    empty = sum(count for text, count in texts if not text)  # ends of empty lines before the first title
    documents = [Document(text, count) for text, count in texts if text]
    if documents:
        documents[0].words += empty
    return documents


def is_title(line: str) -> bool:
    """Is it the title of an article, = Title =, and not the title of a section, = = Section = = ?"""
    return re.fullmatch(r"= (?!= )[^=].*(?<! =) =", line.strip()) is not None


REPLACEMENTS = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r" @([-,.])@ ", r"\1"),  # numbers and compounds: 1 @,@ 000, well @-@ known
        (r" ([.,:;!?%)\]}])(?= |$)", r"\1"),
        (r"(?<!\S)([(\[{$£]) ", r"\1"),
        (r" (n?'(?:s|t|re|ve|ll|m|d|S))(?= |$|[.,:;!?)])", r"\1"),
        (r"(\w) n't", r"\1n't"),
        (r"s ' ", "s' "),
    )
]


def detokenize(line: str) -> str:
    """A line of WikiText with the spaces of ordinary English. Titles keep their marks."""
    line = line.strip()
    if line.startswith("= ") and line.endswith(" ="):
        return line
    for pattern, by in REPLACEMENTS:
        line = pattern.sub(by, line)
    return re.sub(r'" ([^"]*) "', r'"\1"', line)


def take_fraction(documents: list[Document], fraction: float) -> list[Document]:
    """Documents in the order of their digests until they hold `fraction` of all characters; returned in their own
    order. The same documents for every copy of a corpus."""
    if fraction >= 1:
        return documents
    missing = fraction * sum(len(document.text) for document in documents)  # characters
    chosen = set()
    for i in sorted(range(len(documents)), key=lambda i: documents[i].key()):
        if missing <= 0:
            break
        chosen.add(i)
        missing -= len(documents[i].text)
    return [d for i, d in enumerate(documents) if i in chosen]


# --------------------------------------------------------------------------------------------------- files of one's own


def lines_of(text: str) -> list[str]:
    """The lines of a text. They end at newlines alone: `splitlines` would cut at U+2028, too."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with a newline at the end of each line whatever the file has there, and without a byte
    order mark. Raises UserError that names the line."""
    try:
        if not path.is_file():
            raise OSError(0, "not a regular file" if path.exists() else "no such file")
        content = path.read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from error


def split_by_digest(documents: list[Document]) -> dict[str, list[Document]]:
    """A tenth of the documents, those with the lowest digests of their text, to validation. Copies stay together."""
    groups = {}  # {text: documents}, which differ in white space alone
    for document in documents:
        groups.setdefault(document.normalized(), []).append(document)
    order = sorted(groups, key=lambda text: min(document.key() for document in groups[text]))
    chosen = set(order[: max(1, round(len(order) / 10))])
    parts = {"train": [], "validation": []}
    for document in documents:
        parts["validation" if document.normalized() in chosen else "train"].append(document)
    return parts


def read_texts(paths: list[Path]) -> Corpus:
    """Text files (.txt, .md, .tokens, .raw), one document each; of a folder, all its .txt and .md files."""
    files = []
    for path in paths:
        if path.is_dir():
            files += [file for file in sorted(path.rglob("*")) if file.suffix.lower() in (".txt", ".md")]
        else:
            files.append(path)
    texts = [read_text(file) for file in files]
    found = [Document(text, len(text.split())) for text in texts if text.strip()]
    if len(found) == 1:  # a single file: its paragraphs are the documents
        pieces = [piece.strip() for piece in re.split(r"\n\s*\n", found[0].text)]
        found = [Document(piece, len(piece.split())) for piece in pieces if piece]
    where = ", ".join(map(str, paths))
    different = len({document.normalized() for document in found})
    if different < 2:
        raise UserError(f"{where}: holds {different} different texts; two or more are needed (files, or paragraphs)")
    empty = sum(not text.strip() for text in texts)
    dropped = {"files without text": empty} if empty else {}
    return Corpus(paths[0].stem, "own", split_by_digest(found), dropped)


def read_csv(path: Path) -> Corpus:
    """A CSV file with a header, a column `text` (one document per row) and perhaps `split` (train, validation,
    test). Rows without text are dropped and counted. Without `split`, a tenth of the rows validates. Raises UserError.
    """
    with csv_reader(path, read_text(path)) as rows:
        return parse_csv(path, rows)


def parse_csv(path, rows):
    header = [name.strip().lower() for name in next(rows, [])]
    if "text" not in header:
        raise UserError(f"{path}: has no column `text`; its columns: {', '.join(header)[:80] or 'none'}")
    columns = {name: header.index(name) for name in ("text", "split") if name in header}
    found = []
    parts = {}
    dropped = Counter()
    for row in rows:
        if not row:
            continue  # a blank line
        if len(row) > len(header):
            raise UserError(
                f"{path}: line {rows.line_num} has {len(row)} fields, the header {len(header)}; quote text "
                "that contains commas"
            )
        values = {name: row[i] if i < len(row) else "" for name, i in columns.items()}
        if not is_text(values["text"]):
            reason = "rows whose text has no letter" if values["text"].strip() else "rows without text"
            dropped[reason] += 1
            continue
        document = Document(values["text"], len(values["text"].split()))
        found.append(document)
        if "split" in columns:
            word = values["split"].strip().lower()
            if word not in SPLIT_NAMES:
                raise UserError(
                    f"{path}: line {rows.line_num}: split {values['split'][:40]!r} is none of {', '.join(PARTS)}"
                )
            parts.setdefault(SPLIT_NAMES[word], []).append(document)
    if "split" not in columns or len(parts) == 1 and "train" in parts:
        if len({document.normalized() for document in found}) < 2:
            raise UserError(f"{path}: holds {len(found)} rows with text; two different ones or more are needed")
        parts = split_by_digest(found)
    if missing := [part for part in ("train", "validation") if not parts.get(part)]:
        raise UserError(f"{path}: holds no rows for {' and '.join(missing)}")
    return Corpus(path.stem, "own", {part: parts[part] for part in PARTS if part in parts}, dict(dropped))


def is_text(value: str) -> bool:
    """Has it a letter, in any script? Numbers, `nan` and empty cells of a spreadsheet are not text."""
    return any(character.isalpha() for character in value) and value.strip().lower() not in ("nan", "null", "none")
