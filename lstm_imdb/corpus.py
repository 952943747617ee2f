"""Reviews and their labels: sources, dropped rows, and the split.

IMDB (Maas et al. 2011) is read from the folder aclImdb, its archive, the CSV file "IMDB Dataset.csv" or the Parquet
files of the Hugging Face hub. A CSV file of one's own needs a text column (review or text) and a label column
(sentiment or label). The split is a function of the texts alone: rows are sorted by the SHA-256 of their text.
"""

import hashlib
import math
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import fetch, run
from common.files import csv_reader
from common.terminal import UserError

import generated

SPLITS = ("7:1:2", "official")
ARCHIVE, MD5 = "aclImdb_v1.tar.gz", "md5:7c2ac02c03563afcf9b574c7e56c153a"
ORIGIN = f"https://ai.stanford.edu/~amaas/data/sentiment/{ARCHIVE}"
HUB = "https://huggingface.co/datasets/stanfordnlp/imdb/resolve/main/plain_text/{}-00000-of-00001.parquet"
ROWS, DISTINCT = 50_000, 49_582  # of IMDB: half of the rows are positive; 406 texts occur more than once
DIGEST = "533fa91514e13569d23b394639f6f2cd"
TEXT_COLUMNS, LABEL_COLUMNS = ("review", "text"), ("sentiment", "label")
CLASSES = ["negative", "positive"]
MIN_PER_CLASS = 10  # so that 7:1:2 leaves each class in every part


@dataclass
class Corpus:
    """Labelled texts.

    texts; labels: index into `classes`, 1 positive and 0 negative for IMDB; ratings: 1 to 10 stars, or None if the
    source has none; official: "train" or "test" for each row, or None; dropped: {reason: rows that were left out}.
    """

    name: str
    texts: list[str]
    labels: list[int]
    classes: list[str]
    ratings: list[int] | None = None
    official: list[str] | None = None
    dropped: dict[str, int] | None = None


def load(name: str, data_dir: str | None = None, split: str = "7:1:2") -> tuple[Corpus, dict[str, list[int]], dict]:
    """(corpus, {"train", "val", "test": rows of the corpus}, facts for a record) of the dataset `name`.

    name: imdb, builtin, the path of a CSV file or of a folder like aclImdb, or "auto": imdb if it is there or a mirror
    delivers it, else builtin, with a warning on standard error. Raises UserError.
    """
    corpus = read(name, run.data_dir(data_dir))
    corpus.dropped = corpus.dropped or {}
    rows = len(corpus.texts) + sum(corpus.dropped.values())
    keys = [hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest() for text in corpus.texts]
    labelled = "".join(sorted(f"{key} {label}\n" for key, label in zip(keys, corpus.labels)))
    digest = hashlib.md5(labelled.encode()).hexdigest()
    kept, contradictory = distinct(corpus, keys)
    if corpus.name == "imdb" and name in ("auto", "imdb"):
        check_imdb(corpus, len(kept), digest)
    if split == "official":
        parts = split_official(corpus, keys)
    else:
        corpus.dropped["rows of texts with two labels"] = contradictory
        corpus.dropped["duplicate texts"] = len(keys) - len(kept) - contradictory
        parts = split_712(kept, keys, corpus)
    facts = {
        "name": corpus.name,
        "digest": digest,
        "builtin": corpus.name == "builtin" and name in ("auto", "builtin"),
        "split": split,
        "rows": rows,
        "dropped": {reason: count for reason, count in corpus.dropped.items() if count},
        "classes": corpus.classes,
    }
    return corpus, parts, facts | {part: len(index) for part, index in parts.items()}


def distinct(corpus: Corpus, keys: list[str]) -> tuple[list[int], int]:
    """(the first row of each text, number of rows dropped because their text occurs with both labels)"""
    labels = {}
    for key, label in zip(keys, corpus.labels):
        labels.setdefault(key, set()).add(label)
    first = {}
    for i, key in enumerate(keys):
        if len(labels[key]) == 1:
            first.setdefault(key, i)
    return list(first.values()), sum(len(labels[key]) > 1 for key in keys)


def check_imdb(corpus: Corpus, kept: int, digest: str):
    """Raise UserError unless labels and counts are IMDB's. Changed copies are in circulation: one with a single
    label has given other projects an accuracy of 100%."""
    positive = sum(corpus.labels)
    if (len(corpus.texts), positive, kept) != (ROWS, ROWS // 2, DISTINCT):
        raise UserError(
            f"this is not IMDB: {len(corpus.texts):,} reviews, {positive:,} positive, {kept:,} different texts; "
            f"expected {ROWS:,}, {ROWS // 2:,} and {DISTINCT:,}; remove the file to fetch it again"
        )
    if digest != DIGEST:
        print(
            f"*** the texts differ from the texts of the records (digest {digest}, not {DIGEST}): so does the split",
            file=sys.stderr,
        )


def split_712(rows: list[int], keys: list[str], corpus: Corpus) -> dict[str, list[int]]:
    """Seven tenths of each class to train, one to validate, two to test, in the order of the texts' digests."""
    parts = {"train": [], "val": [], "test": []}
    for label, name in enumerate(corpus.classes):
        of_class = sorted((i for i in rows if corpus.labels[i] == label), key=keys.__getitem__)
        n = len(of_class)
        if n < MIN_PER_CLASS:
            raise UserError(f"{corpus.name}: only {n} different texts of {name!r}; {MIN_PER_CLASS} are needed")
        val = round(0.7 * n)  # where the rows of each part begin
        test = round(0.8 * n)
        parts["train"] += of_class[:val]
        parts["val"] += of_class[val:test]
        parts["test"] += of_class[test:]
    return {name: sorted(index, key=keys.__getitem__) for name, index in parts.items()}


def split_official(corpus: Corpus, keys: list[str]) -> dict[str, list[int]]:
    """The published halves with all their rows; a tenth of the training half validates. Prints the overlap."""
    if corpus.official is None:
        raise UserError("--split official: this source does not say which reviews are the test set; aclImdb does")
    half = {part: [i for i, where in enumerate(corpus.official) if where == part] for part in ("train", "test")}
    train_texts = {keys[i] for i in half["train"]}
    overlap = sum(keys[i] in train_texts for i in half["test"])
    print(f"official split: {overlap} test reviews have a text that is also in the training half; all rows are kept")
    parts = {"train": [], "val": [], "test": sorted(half["test"], key=keys.__getitem__)}
    for label, name in enumerate(corpus.classes):
        of_class = sorted((i for i in half["train"] if corpus.labels[i] == label), key=keys.__getitem__)
        n = len(of_class)
        if n < MIN_PER_CLASS:
            raise UserError(f"{corpus.name}: only {n} training reviews of {name!r}; {MIN_PER_CLASS} are needed")
        cut = round(0.9 * n)
        while 0 < cut < n and keys[of_class[cut]] == keys[of_class[cut - 1]]:  # copies of a text stay together
            cut -= 1
        parts["train"] += of_class[:cut]
        parts["val"] += of_class[cut:]
    return {name: sorted(index, key=keys.__getitem__) for name, index in parts.items()}


# ------------------------------------------------------------------------------------------------------------- sources


def read(name: str, folder: Path) -> Corpus:
    """All rows of the dataset `name`; `folder` holds the datasets. Raises UserError."""
    if name == "builtin":
        texts, labels = generated.generate()
        return Corpus("builtin", list(texts), list(labels), CLASSES)
    if name in ("auto", "imdb"):
        try:
            path = prepare(folder, patient=name == "imdb")
        except fetch.Unreachable as error:
            if name == "imdb":
                raise
            print(
                f"*** {error}\n*** TRAINING ON GENERATED REVIEWS INSTEAD: their numbers say nothing of imdb.\n"
                "*** To wait for the slow original host: --data imdb",
                file=sys.stderr,
            )
            return read("builtin", folder)
        corpus = read_parquet(path) if path.suffix == ".parquet" else read_path(path)
        corpus.name = "imdb"
        return corpus
    return read_path(Path(name))


def read_path(path: Path) -> Corpus:
    """A CSV file, or a folder like aclImdb. Raises UserError."""
    return read_folder(path) if path.is_dir() else read_csv(path)


def prepare(folder: Path, patient: bool = True) -> Path:
    """The place of IMDB in the folder of datasets, fetched if it is not there: the hub's Parquet files first; the
    original host, which is slow, only if `patient`. Raises fetch.Unreachable, UserError."""
    extracted, parquet = folder / "aclImdb", folder / "imdb" / "train.parquet"
    for place in (extracted, folder / "imdb" / "aclImdb"):
        if place.is_dir():
            return place
    for archive in (folder / ARCHIVE, folder / "imdb" / ARCHIVE):
        if archive.exists():
            fetch.download([], archive, MD5)
            return fetch.extract(archive, archive.with_name("aclImdb"))
    for place in (folder / "imdb" / "IMDB Dataset.csv", folder / "IMDB Dataset.csv"):
        if place.exists():
            return place
    if parquet.exists() and parquet.with_name("test.parquet").exists():
        return parquet
    reasons = [f"{run.display_path(folder)} has no aclImdb/, {ARCHIVE} or imdb/IMDB Dataset.csv"]
    try:
        for part in ("train", "test"):
            fetch.download([HUB.format(part)], parquet.with_name(f"{part}.parquet"))
        return parquet
    except fetch.Unreachable as error:
        reasons += error.reasons
    if patient:
        try:
            return fetch.extract(fetch.download([ORIGIN], folder / ARCHIVE, MD5, 60, 0), extracted)
        except fetch.Unreachable as error:
            reasons += error.reasons
    raise fetch.Unreachable("imdb", reasons)


def read_folder(folder: Path) -> Corpus:
    """A folder in the shape of aclImdb: train/pos, train/neg, test/pos and test/neg with files ID_RATING.txt."""
    texts = []
    labels = []
    ratings = []
    official = []
    for part in ("train", "test"):
        for label, kind in enumerate(("neg", "pos")):
            files = sorted((folder / part / kind).glob("*.txt"))
            if not files:
                raise UserError(f"{folder}: is not a folder like aclImdb ({part}/{kind}/ has no .txt file)")
            for file in files:
                stars = file.stem.rpartition("_")[2]
                texts.append(decode(file))
                labels.append(label)
                ratings.append(int(stars) if stars.isascii() and stars.isdigit() else 0)
                official.append(part)
    return Corpus(folder.name, texts, labels, CLASSES, ratings if all(ratings) else None, official)


def read_parquet(train: Path) -> Corpus:
    """The hub's train.parquet and test.parquet with the columns text and label. Raises UserError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{train}: needs pyarrow: pip install -r requirements.txt") from None
    texts = []
    labels = []
    official = []
    for part in ("train", "test"):
        file = train.with_name(f"{part}.parquet")
        try:
            if not file.is_file():  # a FIFO would wait for ever
                raise OSError(0, "not a regular file")
            table = parquet.read_table(file, columns=["text", "label"]).to_pydict()
        except (ArrowException, OSError, KeyError) as error:
            detail = " ".join(str(error).split())[:80]
            raise UserError(f"{file}: is not a Parquet file of reviews ({detail})") from error
        texts, labels = texts + table["text"], labels + table["label"]
        official += [part] * len(table["text"])
    if not all(isinstance(text, str) for text in texts) or not set(labels) <= {0, 1}:
        raise UserError(f"{train}: is not the Parquet file of IMDB (its labels are not 0 and 1)")
    return Corpus("imdb", texts, labels, CLASSES, official=official)


def decode(path: Path) -> str:
    """The text of a UTF-8 file. Raises UserError that names the line."""
    try:
        if not path.is_file():
            raise OSError(0, "not a regular file")
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from error


def read_csv(path: Path) -> Corpus:
    """A CSV file with a header: a text column (review or text) and a label column (sentiment or label).

    Rows without a label or without text are dropped and counted. Classes are the labels in the order of their names,
    or of their values if all are numbers. Raises UserError.
    """
    with csv_reader(path, decode(path)) as rows:
        return parse_csv(path, rows)


def parse_csv(path, rows):
    header = [name.strip().lower() for name in next(rows, [])]
    text_column = find_column(path, header, "text", TEXT_COLUMNS)
    label_column = find_column(path, header, "label", LABEL_COLUMNS)
    texts = []
    names = []
    dropped = Counter()
    for row in rows:
        if len(row) > len(header):
            raise UserError(
                f"{path}: line {rows.line_num} has {len(row)} fields, the header {len(header)}; quote text "
                "that contains commas"
            )
        if not row:
            continue  # a blank line
        row += [""] * (len(header) - len(row))
        label = row[label_column].strip()
        if not row[text_column].strip():
            dropped["rows without text"] += 1
        elif not label:
            dropped["rows without a label"] += 1
        else:
            texts.append(row[text_column])
            names.append(label)
    names = merge_spellings(path, names)
    classes = sort_classes(set(names))
    if len(classes) < 2:
        found = f"only the label {classes[0]!r}" if classes else "no labelled text"
        raise UserError(f"{path}: holds {found}; two classes or more are needed")
    index = {name: i for i, name in enumerate(classes)}
    return Corpus(path.stem, texts, [index[name] for name in names], classes, dropped=dict(dropped))


def find_column(path, header: list[str], kind: str, names: tuple[str, ...]) -> int:
    """The index of the one column of a CSV file that has one of the `names`. Raises UserError."""
    columns = [i for i, name in enumerate(header) if name in names]
    if not columns:
        columns_there = ", ".join(header)[:80] or "none"
        raise UserError(f"{path}: has no {kind} column ({' or '.join(names)}); its columns: {columns_there}")
    if len(columns) > 1:
        columns_there = ", ".join(header[i] for i in columns)
        raise UserError(f"{path}: has {len(columns)} {kind} columns ({columns_there}); keep one")
    return columns[0]


def label_key(label: str) -> float | str:
    """What the spellings of a label have in common: the value of a number, else the text without regard to case."""
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    return number if math.isfinite(number) else unicodedata.normalize("NFC", label).casefold()


def merge_spellings(path, labels: list[str]) -> list[str]:
    """The labels, each in the commonest of its spellings, as of 1 and 1.0 or Pos and pos; merged ones are printed."""
    spellings = {}
    for label in sorted(labels):
        spellings.setdefault(label_key(label), Counter())[label] += 1
    for counts in spellings.values():
        if len(counts) > 1:
            names = ", ".join(map(repr, counts))
            print(f"{path}: reads the labels {names} as one class", file=sys.stderr)
    return [spellings[label_key(label)].most_common(1)[0][0] for label in labels]


def sort_classes(classes: set[str]) -> list[str]:
    """The classes in the order of their values if all are numbers, else of their names."""
    if all(isinstance(label_key(name), float) for name in classes):
        return sorted(classes, key=label_key)
    return sorted(classes)
