"""Exercises and textbook pages written by a language model that the user names, after jina-ai/textbook.

Jina prompts a hosted model with pairs of a topic and a profession, for variety. Here the model is any OpenAI-compatible
endpoint (a URL ending in /v1; the key is read from OPENAI_API_KEY) or a causal model for `transformers`. An exercise is
admitted as ours are: its solution, executed in the sandbox, returns what its asserts expect.
"""

import ast
import os
import random
import re

from common import run
from common.run import UserError

import requests

from networks import hub
from textbooks import exercises
from textbooks.sandbox import Sandbox

TOPICS = """arithmetic, averages, binary numbers, calendars, counting words, currency, dates, distances, duplicates,
encoding text, file names, fractions, games, grids, grouping records, intervals, matrices, merging lists, nested lists,
parsing numbers, percentages, permutations, polynomials, prime numbers, probabilities, queues, ranking, rounding,
running totals, scheduling, searching, sequences, sorting, stacks, temperature, time, trees, units, validation,
voting"""
PROFESSIONS = """accountant, architect, astronomer, baker, biologist, bus driver, carpenter, chemist, cook, doctor,
economist, farmer, gardener, geologist, historian, journalist, lawyer, librarian, linguist, musician, nurse, painter,
pharmacist, photographer, pilot, plumber, sailor, shopkeeper, surveyor, tailor, teacher, translator, vet, waiter,
weaver"""
TOPICS, PROFESSIONS = ([" ".join(word.split()) for word in text.split(",")] for text in (TOPICS, PROFESSIONS))
EXERCISE = """Write one Python exercise on {topic} that a {profession} could meet. Answer with one code block: a
function with a docstring that says exactly what it returns, its body, and below it three lines
`assert name(arguments) == value` with literal arguments and values. No imports, no printing, no input."""
PAGE = """Write one page of a Python textbook on {topic}, with an example that a {profession} could meet: an explanation
in clear prose, a short worked example in Python, and what it prints."""
MAX_TOKENS = 700


def writer(name: str, seed: int = 0):
    """ask(prompt) -> text, by the endpoint or model `name`. Raises UserError."""
    if name.startswith(("http://", "https://")):
        return lambda prompt: ask_endpoint(name, prompt)
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        options = {"trust_remote_code": False, "output_loading_info": True}
        model, loaded = AutoModelForCausalLM.from_pretrained(name, **options)
    except hub.UNREADABLE as error:
        raise UserError(f"--writer {name}: cannot be loaded ({str(error).splitlines()[0]:.150})") from error
    hub.check_whole(f"--writer {name}", model, loaded)
    model.eval()
    torch.manual_seed(seed)

    def ask(prompt):
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        done = model.generate(
            **ids, max_new_tokens=MAX_TOKENS, do_sample=True, temperature=0.8, pad_token_id=tokenizer.eos_token_id
        )
        return tokenizer.decode(done[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return ask


def ask_endpoint(url: str, prompt: str) -> str:
    """One answer of an OpenAI-compatible endpoint. Raises UserError."""
    key = os.environ.get("OPENAI_API_KEY")
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": MAX_TOKENS, "temperature": 0.8}
    if "OPENAI_MODEL" in os.environ:
        body["model"] = os.environ["OPENAI_MODEL"]
    try:
        done = requests.post(
            f"{url.rstrip('/')}/chat/completions",
            json=body,
            timeout=120,
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        done.raise_for_status()
        return str(done.json()["choices"][0]["message"]["content"])
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--writer {url}: does not answer as an OpenAI-compatible endpoint ({str(error):.150})"
        ) from error


def parse(answer: str) -> exercises.Exercise | None:
    """The exercise in an answer: a function with a docstring and a body, and at least two asserts; else None."""
    block = re.search(r"```(?:python)?\n(.*?)```", answer, re.DOTALL)
    code = (block[1] if block else answer).replace("\r", "")
    try:
        tree = ast.parse(code)
        node = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
        calls = exercises.parse_calls(code, node.name)
    except (SyntaxError, ValueError, StopIteration, RecursionError):
        return None
    if not ast.get_docstring(node) or len(node.body) < 2 or len(calls) < 2:
        return None
    lines = [line + "\n" for line in code.split("\n")]  # as `ast` counts them
    cut = node.body[0].end_lineno
    prompt = "".join(lines[node.lineno - 1 : cut])
    completion = "".join(lines[cut : node.end_lineno]).rstrip() + "\n"
    return exercises.Exercise("written", node.name, node.name, prompt, completion, calls)


def write(name: str, n: int, seed: int, progress=print) -> tuple[list[dict], list[str], dict]:
    """(admitted exercises as rows, textbook pages, counts): `n` of each are asked for. Raises UserError."""
    ask, rng = writer(name, seed), random.Random(f"writer {seed}")
    rows = []
    pages = []
    counts = {"asked": n, "no exercise": 0, "refused": 0, "admitted": 0}
    with Sandbox() as sandbox:
        for i in range(n):
            pair = {"topic": rng.choice(TOPICS), "profession": rng.choice(PROFESSIONS)}
            exercise = parse(ask(EXERCISE.format(**pair)))
            if exercise is None:
                counts["no exercise"] += 1
            else:
                found = sandbox.call(
                    exercise.prompt + exercise.completion, [(exercise.name, c) for c, _ in exercise.calls]
                )
                good = not exercises.verdict(exercise.calls, found)
                counts["admitted" if good else "refused"] += 1
                if good:
                    rows.append({"prompt": exercise.prompt, "completion": exercise.completion})
            pages.append(ask(PAGE.format(**pair)).strip() + "\n")
            progress(f"written by {run.display_path(name)}: {i + 1} of {n}, {counts}")
    return rows, pages, counts
