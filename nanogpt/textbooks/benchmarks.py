"""Problems to solve: held-out exercises, HumanEval and MBPP; completions; pass@k.

A completion is scored by calling the program in the sandbox and comparing, out here, what it returns. HumanEval's and
MBPP's own asserts run out here too: their function is a stand-in that sends its arguments into the sandbox. So a
program cannot skip an assert, replace what an assert uses, or return an object that is equal to everything. What the
asserts themselves let pass, because they try too few arguments, passes here as well.
"""

import ast
import builtins
import copy
import gzip
import hashlib
import importlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from common import run
from common.run import UserError

import numpy as np

from corpora.prepared import read_json_lines
from textbooks import exercises
from textbooks.sandbox import Failure, Sandbox

SOURCES = {
    "humaneval": "https://github.com/openai/human-eval (data/)",
    "mbpp": "https://github.com/google-research/google-research (mbpp/)",
}
FILES = {  # in code/ of the data folder; their programs run outside the sandbox, so the content is verified
    "humaneval": ("HumanEval.jsonl.gz", "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"),
    "mbpp": ("mbpp.jsonl", "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"),
}
MBPP_TEST = range(11, 511)  # the ids of its test split
FUNCTION_STOPS = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\n#", "\n@", "\n\n\n", "<|endoftext|>")
MBPP_STOPS = ("\nclass ", "\nassert", '\n"""', "\nprint", "\nif ", "<|endoftext|>")
ALLOWED = {"math", "re", "collections", "sys"}  # modules that MBPP's asserts use


class Problem(NamedTuple):
    """check(sandbox, program) returns an empty text if the program passes, else the reason."""

    task_id: str
    level: str
    prompt: str
    check: Callable
    canonical: str
    stops: tuple = FUNCTION_STOPS


class Candidate:
    """The function of a program that is in the sandbox, as a function out here."""

    def __init__(self, sandbox: Sandbox, program: str, name: str):
        self.sandbox = sandbox
        self.program = program
        self.name = name
        self.started = [False]

    def named(self, name: str) -> "Candidate":
        """Another function of the same program."""
        other = copy.copy(self)  # they share `started`
        other.name = name
        return other

    def __call__(self, *arguments):
        ask = self.sandbox.again if self.started[0] else lambda calls: self.sandbox.call(self.program, calls)
        self.started[0] = True
        (found,) = ask([(self.name, arguments)])
        if isinstance(found, Failure):
            raise found
        return found


def held_out(items: Iterable[exercises.Exercise]) -> list[Problem]:
    """Held-out exercises as problems."""
    problems = []
    for i, item in enumerate(items):

        def check(sandbox, program, item=item):
            return exercises.verdict(item.calls, sandbox.call(program, [(item.name, given) for given, _ in item.calls]))

        problems.append(Problem(f"ladder/{i}", item.level, item.prompt, check, item.completion))
    return problems


def read(name: str, data_dir: Path) -> list[dict]:
    """The lines of a published evaluation set, verified. Raises UserError."""
    file, digest = data_dir / "code" / FILES[name][0], FILES[name][1]
    try:
        if file.exists() and not file.is_file():  # a FIFO would wait for ever
            raise OSError(0, "not a regular file")
        content = file.read_bytes()
    except OSError as error:
        what = f"download it from {SOURCES[name]}"
        raise UserError(f"{run.display_path(file)}: cannot be read ({error.strerror}); {what}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{run.display_path(file)}: is not the published file (sha256 {digest[:12]}...)")
    content = gzip.decompress(content) if file.suffix == ".gz" else content
    return [json.loads(line) for line in content.decode().split("\n") if line]


def humaneval(data_dir: Path) -> list[Problem]:
    """HumanEval's 164 problems (Chen et al. 2021). Raises UserError."""
    problems = []
    for item in read("humaneval", data_dir):

        def check(sandbox, program, item=item):
            names = {}
            exec(item["prompt"], names)  # what its asserts need of it: helper functions and imports
            exec(item["test"], names)
            names[item["entry_point"]] = candidate = Candidate(sandbox, program, item["entry_point"])
            return attempt(lambda: names["check"](candidate))

        problems.append(Problem(item["task_id"], "HumanEval", item["prompt"], check, item["canonical_solution"]))
    return problems


def mbpp(data_dir: Path, ids: range = MBPP_TEST) -> list[Problem]:
    """MBPP's problems (Austin et al. 2021) with these ids; the default is its test split. Raises UserError."""
    problems = []
    for item in read("mbpp", data_dir):

        def check(sandbox, program, item=item):
            names = {name: importlib.import_module(name) for name in ALLOWED}
            candidate = Candidate(sandbox, program, "")
            for test in item["test_list"]:
                for name in sorted(functions(test, item["code"]) - names.keys()):
                    names[name] = candidate.named(name)
            return attempt(lambda: [exec(test, names) for test in item["test_list"]])

        if item["task_id"] in ids:
            tests = "\n".join(item["test_list"])
            prompt = f'"""\n{item["text"]}\n{tests}\n"""\n'
            canonical = item["code"].replace("\r", "") + "\n"
            problems.append(Problem(f"MBPP/{item['task_id']}", "MBPP", prompt, check, canonical, MBPP_STOPS))
    return problems


def functions(test: str, code: str) -> set[str]:
    """The names in an assert that are not built in, or that the solution `code` defines all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # MBPP has strings like "\s"
        trees = [ast.parse(test), ast.parse(code)]
    names = {node.id for node in ast.walk(trees[0]) if isinstance(node, ast.Name)}
    own = {node.name for node in ast.walk(trees[1]) if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name in own or not hasattr(builtins, name)}


def attempt(check: Callable) -> str:
    """The reason why a check fails; an empty text if it passes."""
    try:
        check()
        return ""
    except AssertionError:
        return "wrong value"
    except Exception as error:  # a failure in the sandbox, or a value that the assert cannot handle
        return f"{type(error).__name__}: {exercises.short(error, str, 200)}"


def truncate(completion: str, stops: Iterable[str]) -> str:
    """A completion up to the first of `stops`, where the function ends."""
    end = min((at for at in (completion.find(stop) for stop in stops) if at >= 0), default=len(completion))
    return completion[:end].rstrip() + "\n"


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that one of k of n completions, of which c pass, passes: the unbiased estimator of Chen et al.
    2021, section 2.1. Raises ValueError if k > n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} in {n}")
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1))) if n - c >= k else 1.0


def execute(problems: list[Problem], completions: list[dict], seconds: int = 10) -> list[dict]:
    """The completions with "passed" and "result" added. Equal programs run once, all of them in one sandbox.

    seconds: of CPU time for a program. MBPP/123 needs five on a core of 2 GHz.
    """
    by_id = {problem.task_id: problem for problem in problems}
    seen = {}
    scored = []
    with Sandbox(seconds) as sandbox:
        for line in completions:
            problem, completion = by_id[line["task_id"]], line["completion"]
            key = (problem.task_id, completion)
            if key not in seen:
                seen[key] = problem.check(sandbox, problem.prompt + completion)
            scored.append(line | {"passed": not seen[key], "result": seen[key] or "passed"})
    return scored


def read_completions(file: Path, problems: list[Problem]) -> list[dict]:
    """The lines {"task_id": ..., "completion": ...} that any engine wrote, as human-eval has them. Raises UserError."""
    known = {problem.task_id for problem in problems}

    def parse(line):
        line["completion"].encode()
        if line["task_id"] not in known:
            raise UserError(f"{run.display_path(file)}: there is no problem {str(line['task_id'])[:60]!r}")
        return {name: line[name] for name in ("task_id", "completion", "too_long") if name in line}

    lines = read_json_lines(file, parse, "a JSON object with the texts task_id and completion")
    if not lines:
        raise UserError(f"{run.display_path(file)}: holds no completion")
    return lines


def scores(problems: list[Problem], scored: list[dict], ks: Iterable[int]) -> dict:
    """{"all" or a level: {"problems", "pass@k" for each k that all problems have completions for}}, and counts."""
    counts = {problem.task_id: [0, 0] for problem in problems}
    for line in scored:
        counts[line["task_id"]][0] += 1
        counts[line["task_id"]][1] += line["passed"]
    table, answered = {}, [problem for problem in problems if counts[problem.task_id][0]]
    for level in ["all", *dict.fromkeys(problem.level for problem in answered)]:
        of_level = [counts[p.task_id] for p in answered if level in ("all", p.level)]
        table[level] = {"problems": len(of_level)}
        for k in ks:
            if all(n >= k for n, _ in of_level):
                rates = [pass_at_k(n, c, k) for n, c in of_level]
                table[level][f"pass@{k}"] = float(np.mean(rates)) if rates else 0.0
    return table


def nearest(train: list[dict], problems: list[Problem]) -> list[dict]:
    """The baseline that answers with the solution of the nearest training docstring, under the asked name.

    Nearest: the largest cosine similarity of tf-idf vectors of words and pairs of words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"[A-Za-z_]+|\d+")
    known = vectorizer.fit_transform(docstring(item["prompt"]) for item in train)
    asked = vectorizer.transform(docstring(problem.prompt) for problem in problems)
    best = np.asarray((asked @ known.T).argmax(axis=1)).ravel()
    answers = []
    for problem, i in zip(problems, best):
        theirs, ours = signature(train[i]["prompt"]), signature(problem.prompt)
        body = train[i]["completion"]
        if theirs and ours and len(theirs) == len(ours):  # the same arguments under the names that are asked for
            body = rename(body, dict(zip(theirs, ours)))
        answers.append({"task_id": problem.task_id, "completion": body})
    return answers


def docstring(prompt: str) -> str:
    """The docstring of a prompt, or the whole prompt if there is none."""
    parts = prompt.split('"""')
    return parts[1] if len(parts) > 2 else prompt


def signature(prompt: str) -> list[str]:
    """The names of the arguments of a prompt's last function."""
    head = prompt[prompt.rfind("def ") :].partition("(")[2].partition(")")[0]
    return [part.split(":")[0].strip() for part in head.split(",") if part.strip()]


def rename(body: str, names: dict[str, str]) -> str:
    """The body of a function with other names of arguments."""

    class Renamer(ast.NodeTransformer):
        def visit_Name(self, node):
            node.id = names.get(node.id, node.id)
            return node

    try:
        tree = Renamer().visit(ast.parse("def f():\n" + body))
    except SyntaxError:
        return body
    return ast.unparse(tree).partition("\n")[2] + "\n"
