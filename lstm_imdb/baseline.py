"""The baseline to beat: TF-IDF with logistic regression, on the same split and tokens, in seconds.

    python lstm_imdb/baseline.py                   # unigrams, then unigrams and bigrams, on IMDB
    python lstm_imdb/baseline.py --data builtin    # word counts fail on the generated reviews

Validation chooses the strength of the L2 penalty (C in scikit-learn); the test set is read once for each row. Writes
baseline.json into --out.
"""

import time
from dataclasses import dataclass

from common import run
from common.options import option

import torch

import corpus
import data
import outcome

ROWS = {"unigrams": (1, 1), "bigrams": (1, 2)}
GRID = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def fit(loaded, tokens, ngrams):
    """(final metrics, C, features) of one row; tokens: {part: tokenized reviews joined by spaces}."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(
        tokenizer=str.split, token_pattern=None, lowercase=False, ngram_range=ngrams, min_df=2, sublinear_tf=True
    )
    if len(loaded.train.labels.unique()) < 2:
        raise run.UserError("the training reviews are all of one class; raise --limit")
    try:
        x = {"train": vectorizer.fit_transform(tokens["train"])}
    except ValueError as error:
        raise run.UserError("no word occurs in two of the training reviews; give more reviews") from error
    x |= {part: vectorizer.transform(tokens[part]) for part in ("val", "test")}
    y = {part: getattr(loaded, part).labels.numpy() for part in tokens}
    tried = []
    for c in GRID:
        classifier = LogisticRegression(C=c, max_iter=1000).fit(x["train"], y["train"])
        tried.append((float((classifier.predict(x["val"]) == y["val"]).mean()), -c, classifier))
    val_accuracy, c, classifier = max(tried, key=lambda entry: entry[:2])
    predicted = classifier.predict(x["test"])
    correct = predicted == y["test"]
    counts = outcome.confusion(y["test"], predicted, len(loaded.corpus.classes))
    final = {
        "val_accuracy": val_accuracy,
        "test_accuracy": float(correct.mean()),
        "test_f1": outcome.f1_score(counts),
        "confusion": counts.tolist(),
        "test_correct": outcome.pack(correct),
    }
    return final, -c, x["train"].shape[1]


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("auto", data.DATA_HELP, type=data.dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    split: str = option("7:1:2", "how the reviews are split", choices=corpus.SPLITS)
    limit: int | None = option(None, "only the first N examples of each part", above=0)
    out: str = option(
        str(run.ROOT / "out/lstm_imdb/baseline"), "folder of the record", type=run.path_arg, metavar="DIR"
    )


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    try:
        import sklearn
    except ImportError:
        raise run.UserError("baseline.py needs scikit-learn: pip install -r requirements.txt") from None
    out = run.make_folder(args.out)
    loaded = data.load(args.data, args.data_dir, args.limit, args.split)
    tokens = {
        part: [" ".join(data.tokenize(loaded.corpus.texts[i])) for i in getattr(loaded, part).rows.tolist()]
        for part in ("train", "val", "test")
    }
    machine, rows = run.environment(torch.device("cpu"), __file__, argv), []
    machine["versions"]["scikit-learn"] = sklearn.__version__
    for name, ngrams in ROWS.items():
        began = time.monotonic()
        final, c, features = fit(loaded, tokens, ngrams)
        seconds = round(time.monotonic() - began, 1)
        rows.append(
            {
                "study": "baseline",
                "setting": f"TF-IDF {name}, logistic regression",
                "seed": 0,
                "state": "done",
                "args": {"recipe": f"TF-IDF {name}", "c": c, "split": args.split},
                "parameters": features + 1,
                "final": final,
                "wall_s": seconds,
                "dataset": loaded.facts,
                **machine,
            }
        )
        print(
            f"TF-IDF {name:8} {features:>9,} features  C {c:g}  validation {final['val_accuracy']:.2%}  "
            f"test {final['test_accuracy']:.2%}  {seconds:.0f} s",
            flush=True,
        )
    run.write_json(out / "baseline.json", {"study": "baseline", "rows": rows})
    return rows


if __name__ == "__main__":
    run.cli(main)
