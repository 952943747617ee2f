"""Start from word vectors in GloVe's text format, or from a language model that pretrain.py trained."""

from pathlib import Path

from common import run
from common.terminal import UserError

import numpy as np
import torch

import data


def initialize(net, vocabulary: data.Vocabulary, args, r) -> dict:
    """Overwrite initial weights of `net` as --vectors and --init ask. Returns facts for a record. Raises UserError."""
    facts, folder = {}, run.data_dir(args.data_dir)
    if args.init:
        facts["init"] = load_language_model(net, vocabulary, folder / args.init)
        r.print(f"the embedding and {facts['init']['lstms']} LSTMs start from the language model {args.init}")
    if args.vectors:
        size = net.embedding.embedding_dim
        rows, counts = read_vectors(folder / args.vectors, vocabulary.index, size)
        with torch.no_grad():
            for word, vector in rows.items():
                net.embedding.weight[vocabulary.index[word]] = torch.from_numpy(vector)
        words = len(vocabulary) - 2
        facts["vectors"] = counts | {"words": words, "covered": len(rows)}
        r.print(
            f"vectors for {len(rows):,} of {words:,} words ({len(rows) / max(words, 1):.1%}); skipped "
            f"{counts['skipped']:,} of {counts['lines']:,} lines without a word and {size} numbers"
        )
    return facts


def read_vectors(path: Path, wanted, size: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """({word: float32 (size,)} for the words in `wanted`, {"lines", "skipped"}) of a file "word x1 ... xN" a line.

    A line that is not a word and `size` finite numbers is skipped and counted: headers, and tokens with spaces, which
    glove.840B has. Of a word that comes twice the first line counts. Raises UserError.
    """
    found = {}
    lines = 0
    skipped = 0
    try:
        if not path.is_file():
            raise OSError(0, "is missing" if not path.exists() else "not a regular file")
        with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
            for line in file:
                lines += 1
                word, *numbers = line.rstrip("\r\n ").split(" ")
                if len(numbers) != size or not word:
                    skipped += 1
                    continue
                if word not in wanted or word in found:
                    continue
                try:
                    vector = np.array(numbers, dtype=np.float32)
                except ValueError:
                    vector = np.array([np.nan])
                if np.isfinite(vector).all():
                    found[word] = vector
                else:
                    skipped += 1
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not found:
        raise UserError(
            f"{path}: has no vector of {size} numbers for any word of the vocabulary; --embed N sets "
            "the length of the vectors"
        )
    return found, {"lines": lines, "skipped": skipped}


def load_language_model(net, vocabulary: data.Vocabulary, path: Path) -> dict:
    """Copy the embedding and the LSTMs of a language model into `net`. Raises UserError if its vocabulary or shapes
    differ, or if it was trained on other reviews."""
    state = run.read_checkpoint(path)
    if state["words"] != vocabulary.words:
        raise UserError(f"{path}: has another vocabulary; pretrain with the same data, split and vocabulary")
    own = net.state_dict()
    names = [name for name in own if name.startswith(("embedding.", "layers."))]
    try:
        net.load_state_dict({name: state["model"][name] for name in names}, strict=False)
    except (KeyError, RuntimeError, TypeError) as error:
        detail = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: is the language model of another network ({detail})") from error
    return {"lstms": sum(name.endswith("weight_hh_l0") for name in names), "epoch": state["epoch"]}
