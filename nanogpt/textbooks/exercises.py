"""Exercises: a function's signature and docstring, its body, and calls with their expected values.

Seven levels, each a product of components. A component has words for the docstring, source for the body, and a Python
function that says independently what is right. Which components go together is the composition of an exercise; a fifth
of all compositions, chosen by a digest, is held out: exercises on them are only for the evaluation. A solution is
admitted if it returns, when executed, what the functions of its components say.

The components are from elementary programming. Neither HumanEval nor MBPP was consulted for them.
"""

import ast
import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from common.run import UserError

from textbooks import sandbox

LEVELS = ("operation", "loop", "condition", "string", "list", "dictionary", "composition")
HELD_OUT = 5  # 1 composition in HELD_OUT is kept for tests
CALLS = 6  # of each exercise


class Part(NamedTuple):
    """A component: its name, words for the docstring, source with {x} for the value and {k} for a number, and what it
    computes, function(x, k)."""

    name: str
    words: str
    source: str
    function: Callable


class Exercise(NamedTuple):
    """prompt and completion are the row to train on; calls are [(arguments, expected value), ...]."""

    level: str
    composition: str
    name: str
    prompt: str
    completion: str
    calls: list


PREDICATES = [
    Part("even", "even", "{x} % 2 == 0", lambda x, k: not x & 1),
    Part("odd", "odd", "{x} % 2 == 1", lambda x, k: bool(x & 1)),
    Part("above", "greater than {k}", "{x} > {k}", lambda x, k: x - k > 0),
    Part("below", "less than {k}", "{x} < {k}", lambda x, k: k - x > 0),
    Part("multiple", "divisible by {k}", "{x} % {k} == 0", lambda x, k: x // k * k == x),
    Part("negative", "negative", "{x} < 0", lambda x, k: abs(x) == -x and x != 0),
    Part("different", "different from {k}", "{x} != {k}", lambda x, k: bool(x - k)),
]
MAPS = [
    Part("plus", "plus {k}", "{x} + {k}", lambda x, k: x - -k),
    Part("minus", "minus {k}", "{x} - {k}", lambda x, k: x + -k),
    Part("times", "times {k}", "{x} * {k}", lambda x, k: k * x),
    Part("squared", "squared", "{x} * {x}", lambda x, k: x**2),
    Part("negated", "with the opposite sign", "-{x}", lambda x, k: 0 - x),
    Part("halved", "divided by 2 and rounded down", "{x} // 2", lambda x, k: (x - x % 2) // 2),
    Part("modulo", "modulo {k}", "{x} % {k}", lambda x, k: x - x // k * k),
]
PAIRS = [
    Part("sum", "the sum of {a} and {b}", "{a} + {b}", lambda a, b: sum((a, b))),
    Part("difference", "{a} minus {b}", "{a} - {b}", lambda a, b: -(b - a)),
    Part("product", "the product of {a} and {b}", "{a} * {b}", lambda a, b: b * a),
    Part("larger", "the larger of {a} and {b}", "max({a}, {b})", lambda a, b: sorted((a, b))[1]),
    Part("smaller", "the smaller of {a} and {b}", "min({a}, {b})", lambda a, b: sorted((a, b))[0]),
    Part("distance", "the distance between {a} and {b}", "abs({a} - {b})", lambda a, b: max(a - b, b - a)),
]
RANGES = [
    Part("upto", "from 1 to {n}", "range(1, {n} + 1)", lambda n, k: [i + 1 for i in range(n)]),
    Part("below", "from 0 to {n} - 1", "range({n})", lambda n, k: list(range(0, n, 1))),
    Part("from", "from {k} to {n}", "range({k}, {n} + 1)", lambda n, k: [i for i in range(n + 1) if i >= k]),
    Part(
        "steps",
        "from 0 to {n} in steps of 2",
        "range(0, {n} + 1, 2)",
        lambda n, k: [i for i in range(n + 1) if not i & 1],
    ),
]
LETTERS = [
    Part("vowels", "vowels", '{x} in "aeiou"', lambda c, k: c in {"a", "e", "i", "o", "u"}),
    Part("consonants", "characters that are not vowels", '{x} not in "aeiou"', lambda c, k: "aeiou".find(c) < 0),
    Part("digits", "digits", "{x}.isdigit()", lambda c, k: "0" <= c <= "9"),
    Part("capitals", "capital letters", "{x}.isupper()", lambda c, k: "A" <= c <= "Z"),
    Part("nonspace", "characters that are not spaces", '{x} != " "', lambda c, k: not c.isspace()),
    Part("letters", "letters", "{x}.isalpha()", lambda c, k: c.lower() != c.upper()),
]
STRINGS = [
    Part("count", "the number of {p} in {x}", "len({s})", lambda s, k: sum(1 for _ in s)),
    Part("only", "{x} with only its {p}", "{s}", lambda s, k: s),
    Part("reversed", "the {p} of {x} in reverse order", "{s}[::-1]", lambda s, k: "".join(reversed(s))),
    Part("upper", "the {p} of {x} in upper case", "{s}.upper()", lambda s, k: "".join(c.upper() for c in s)),
    Part("first", "the first {k} {p} of {x}", "{s}[:{k}]", lambda s, k: "".join(c for i, c in enumerate(s) if i < k)),
    Part("dashed", "the {p} of {x} separated by dashes", '"-".join({s})', lambda s, k: "".join(f"-{c}" for c in s)[1:]),
]
TEXTS = [
    Part("text", "{x}", "{x}", lambda s, k: s),
    Part("lower", "{x} in lower case", "{x}.lower()", lambda s, k: "".join(c.lower() for c in s)),
    Part("tail", "{x} without its first {k} characters", "{x}[{k}:]", lambda s, k: "".join(list(s)[k:])),
    Part("start", "the first {k} characters of {x}", "{x}[:{k}]", lambda s, k: "".join(list(s)[:k])),
    Part("repeated", "{x} repeated {k} times", "({x} * {k})", lambda s, k: "".join(s for _ in range(k))),
    Part("backward", "{x} read backward", "{x}[::-1]", lambda s, k: "".join(reversed(s))),
]
STEPS = [  # from a list of numbers to a list
    *(
        Part(
            f"keep_{p.name}",
            f"keep the numbers that are {p.words}",
            f"[x for x in {{x}} if {p.source.format(x='x', k='{k}')}]",
            lambda v, k, f=p.function: list(filter(lambda x: f(x, k), v)),
        )
        for p in PREDICATES[:5]
    ),
    *(
        Part(
            f"each_{m.name}",
            f"take every number {m.words}",
            f"[{m.source.format(x='x', k='{k}')} for x in {{x}}]",
            lambda v, k, f=m.function: list(map(lambda x: f(x, k), v)),
        )
        for m in MAPS[:4]
    ),
    Part("reverse", "reverse the order", "{x}[::-1]", lambda v, k: list(reversed(v))),
    Part(
        "sort", "sort the numbers", "sorted({x})", lambda v, k: [v[i] for i in sorted(range(len(v)), key=v.__getitem__)]
    ),
    Part("skip", "leave out the first {k} numbers", "{x}[{k}:]", lambda v, k: [x for i, x in enumerate(v) if i >= k]),
    Part("head", "take the first {k} numbers", "{x}[:{k}]", lambda v, k: [x for i, x in enumerate(v) if i < k]),
]
ENDS = [  # from a list of numbers to a value
    Part("total", "return their sum", "sum({x})", lambda v, k: v and v[0] + ENDS[0].function(v[1:], k) or 0),
    Part("number", "return how many there are", "len({x})", lambda v, k: sum(1 for _ in v)),
    Part(
        "largest",
        "return the largest one, or 0 if there is none",
        "max({x}, default=0)",
        lambda v, k: sorted(v)[-1] if v else 0,
    ),
    Part(
        "smallest",
        "return the smallest one, or 0 if there is none",
        "min({x}, default=0)",
        lambda v, k: sorted(v)[0] if v else 0,
    ),
    Part("texts", "return them as texts", "[str(x) for x in {x}]", lambda v, k: [f"{x}" for x in v]),
    Part("distinct", "return how many different ones there are", "len(set({x}))", lambda v, k: len(dict.fromkeys(v))),
]
DICTIONARIES = [
    Part(
        "pairs",
        "a dictionary of the entries of {d} whose value is {p}",
        "{{key: {d}[key] for key in {d} if {q}}}",
        dict,
    ),
    Part("names", "the sorted keys of {d} whose value is {p}", "sorted(key for key in {d} if {q})", sorted),
    Part(
        "values",
        "the sum of the values of {d} that are {p}",
        "sum({d}[key] for key in {d} if {q})",
        lambda d: sum(d.values()),
    ),
    Part("size", "the number of values of {d} that are {p}", "len([key for key in {d} if {q}])", len),
    Part("found", "whether {d} has a value that is {p}", "any({q} for key in {d})", bool),
]
NAMES = {
    "number": ["x", "n", "number", "value"],
    "numbers": ["numbers", "values", "xs", "items"],
    "text": ["text", "s", "word", "sentence"],
    "table": ["d", "table", "scores", "counts"],
    "pair": [("a", "b"), ("x", "y"), ("first", "second"), ("left", "right")],
}
OPENINGS = ["Return {}.", "Compute {}.", "Find and return {}."]
WORDS = "red Blue sky tree 42 Moon river7 stone CAT lamp o 3 green Under salt".split()


def is_held_out(level: str, composition: str) -> bool:
    """Is this composition only for the evaluation?"""
    return hashlib.blake2b(f"{level}/{composition}".encode()).digest()[0] % HELD_OUT == 0


def compositions(level: str) -> list[tuple]:
    """All compositions of a level, tuples of components."""
    products = {
        "operation": (PAIRS, MAPS),
        "loop": (RANGES, PREDICATES[:5], MAPS),
        "condition": (PREDICATES, MAPS, MAPS),
        "string": (TEXTS, LETTERS, STRINGS),
        "list": (PREDICATES, MAPS),
        "dictionary": (PREDICATES, DICTIONARIES),
        "composition": (STEPS, ENDS + STEPS),
    }[level]
    found = [()]
    for parts in products:
        found = [(*left, right) for left in found for right in parts if not left or left[-1] is not right]
    return found


def integers(rng: random.Random) -> list[int]:
    return [rng.randint(-20, 30) for _ in range(rng.randint(0, 9))]


def build(level: str, parts: tuple, rng: random.Random) -> Exercise:
    """An exercise on a composition, with wording, names, numbers and calls drawn from `rng`."""
    k = rng.randint(2, 9)
    j = rng.randint(2, 9)
    i = rng.randint(2, 9)
    style = rng.random() < 0.5
    many, one, text, table = (rng.choice(NAMES[kind]) for kind in ("numbers", "number", "text", "table"))
    a, b = rng.choice(NAMES["pair"])
    say = rng.choice(OPENINGS).format
    if level == "operation":
        pair, step = parts
        value, arguments = pair.source.format(a=a, b=b), f"{a}, {b}"
        doc = say(f"{pair.words.format(a=a, b=b)}, {step.words.format(k=k)}")
        body = [f"result = {value}", f"return {step.source.format(x='result', k=k)}"]
        if style and "{x} * {x}" != step.source:
            body = [f"return {step.source.format(x=f'({value})', k=k)}"]
        inputs = [(rng.randint(-20, 30), rng.randint(-20, 30)) for _ in range(CALLS)]
        truth = [step.function(pair.function(*given), k) for given in inputs]
    elif level == "loop":
        over, test, step = parts
        arguments = top = rng.choice(["n", "limit", "top"])
        words, chosen = over.words.format(n=top, k=j), test.words.format(k=i)
        doc = say(f"the sum of the numbers {words} that are {chosen}, each {step.words.format(k=k)}")
        where, condition = over.source.format(n=top, k=j), test.source.format(x="i", k=i)
        term = step.source.format(x="i", k=k)
        body = ["total = 0", f"for i in {where}:", f"    if {condition}:", f"        total += {term}", "return total"]
        inputs = [(rng.randint(0, 20),) for _ in range(CALLS)]
        truth = [sum(step.function(x, k) for x in over.function(n, j) if test.function(x, i)) for (n,) in inputs]
    elif level == "condition":
        test, yes, no = parts
        arguments = one
        doc = say(
            f"{one} {yes.words.format(k=k)} if {one} is {test.words.format(k=j)}, else {one} {no.words.format(k=k)}"
        )
        condition, left, right = (p.source.format(x=one, k=n) for p, n in ((test, j), (yes, k), (no, k)))
        body = [f"if {condition}:", f"    return {left}", f"return {right}"]
        if style:
            body = [f"if {condition}:", f"    return {left}", "else:", f"    return {right}"]
        inputs = [(rng.choice([j, j * rng.randint(-3, 3), rng.randint(-20, 30)]),) for _ in range(CALLS)]
        truth = [(yes if test.function(x, j) else no).function(x, k) for (x,) in inputs]
    elif level == "string":
        whole, letter, end = parts
        arguments = text
        doc = say(end.words.format(p=letter.words, x=whole.words.format(x=text, k=j), k=k))
        source = whole.source.format(x=text, k=j)
        chosen = f'"".join(c for c in {source} if {letter.source.format(x="c")})'
        body = [f"kept = {chosen}", f"return {end.source.format(s='kept', k=k)}"]
        if style:
            body = [
                'kept = ""',
                f"for c in {source}:",
                f"    if {letter.source.format(x='c')}:",
                "        kept += c",
                body[1],
            ]
        inputs = [(" ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 4))),) for _ in range(CALLS)]
        kept = ("".join(c for c in whole.function(s, j) if letter.function(c, k)) for (s,) in inputs)
        truth = [end.function(s, k) for s in kept]
    elif level == "list":
        test, step = parts
        arguments = many
        doc = say(f"a list of the numbers in {many} that are {test.words.format(k=j)}, each {step.words.format(k=k)}")
        condition, term = test.source.format(x="x", k=j), step.source.format(x="x", k=k)
        body = [f"return [{term} for x in {many} if {condition}]"]
        if style:
            body = [
                "result = []",
                f"for x in {many}:",
                f"    if {condition}:",
                f"        result.append({term})",
                "return result",
            ]
        inputs = [(integers(rng),) for _ in range(CALLS)]
        truth = [[step.function(x, k) for x in v if test.function(x, j)] for (v,) in inputs]
    elif level == "dictionary":
        test, end = parts
        arguments = table
        doc = say(end.words.format(d=table, p=test.words.format(k=j)))
        condition = test.source.format(x=f"{table}[key]", k=j)
        body = [f"return {end.source.format(d=table, q=condition)}"]
        inputs = [
            ({rng.choice(WORDS): rng.choice([j, rng.randint(-20, 30)]) for _ in range(rng.randint(0, 5))},)
            for _ in range(CALLS)
        ]
        truth = [end.function({key: v for key, v in d.items() if test.function(v, j)}) for (d,) in inputs]
    else:
        step, end = parts
        arguments = many
        last = end.words if end in ENDS else f"{end.words} and return them"
        doc = f"{step.words.format(k=k).capitalize()} in {many}, then {last.format(k=j)}."
        first, second = step.source.format(x=many, k=k), end.source.format(x="result", k=j)
        body = [f"result = {first}", f"return {second}"]
        if style:
            body = [f"{many} = {first}", f"return {end.source.format(x=many, k=j)}"]
        inputs = [(integers(rng),) for _ in range(CALLS)]
        truth = [end.function(step.function(v, k), j) for (v,) in inputs]
    name = "_".join(part.name for part in parts)
    prompt = f'def {name}({arguments}):\n    """{doc}"""\n'
    completion = "".join(f"    {line}\n" for line in body)
    return Exercise(level, name, name, prompt, completion, list(zip(inputs, truth)))


def admit(exercises: list[Exercise]) -> tuple[list[Exercise], list[str]]:
    """(the exercises whose solutions, executed, return the expected values, a reason for each of the others)."""
    jobs = [(e.prompt + e.completion, [(e.name, given) for given, _ in e.calls]) for e in exercises]
    good, reasons = [], []
    for exercise, found in zip(exercises, sandbox.work(jobs), strict=True):
        if reason := verdict(exercise.calls, found):
            reasons.append(f"{exercise.name}: {reason}")
        else:
            good.append(exercise)
    return good, reasons


def short(value, form: Callable = repr, length: int = 60) -> str:
    """A value, or an exception, for a message. Python writes no integer of more than some thousand digits."""
    try:
        text = form(value)
    except (ValueError, RecursionError):
        text = f"<{type(value).__name__} that cannot be written>"
    return text if len(text) <= length else text[: length - 3] + "..."


def verdict(calls: list, found: list) -> str:
    """The reason why these are not the expected values; an empty text if they are."""
    for (given, expected), got in zip(calls, found, strict=True):
        if isinstance(got, sandbox.Failure):
            return str(got) or "no value"
        if not sandbox.same(expected, got):
            return f"returns {short(got)} for {short(given)}, not {short(expected)}"
    return ""


def generate(n: int, seed: int, held_out: bool = False, exclude: set[str] = frozenset()) -> list[Exercise]:
    """`n` admitted exercises, as many of each level as possible, with prompts that differ from each other and from
    `exclude`. held_out: on the compositions that training never sees. Raises UserError if a solution is wrong, or
    if fewer than `n` can be made."""
    rng = random.Random(f"{seed} {held_out}")
    seen = set(exclude)
    drawn = []
    for i, level in enumerate(LEVELS):
        wanted = n // len(LEVELS) + (i < n % len(LEVELS))
        parts = [p for p in compositions(level) if is_held_out(level, "_".join(q.name for q in p)) == held_out]
        for attempt in range(50 * wanted):
            if not wanted:
                break
            exercise = build(level, parts[attempt % len(parts)], rng)
            varied = len({repr(expected) for _, expected in exercise.calls}) > 1  # else a constant would pass
            if varied and exercise.prompt not in seen:
                seen.add(exercise.prompt)
                drawn.append(exercise)
                wanted -= 1
        if wanted:
            raise UserError(f"there are {wanted} exercises too few of the level {level}; ask for fewer")
    good, reasons = admit(drawn)
    if reasons:
        raise UserError(f"{len(reasons)} solutions of the generator are wrong: {reasons[0]}")
    rng.shuffle(good)
    return good


def parse_calls(source: str, name: str) -> list:
    """[(arguments, expected value), ...] of the lines `assert name(...) == VALUE` in `source`, with literals only."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        test = node.test if isinstance(node, ast.Assert) else None
        if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
            continue
        call = test.left
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id == name
            and not call.keywords
        ):
            try:
                given = tuple(ast.literal_eval(one) for one in call.args)
                calls.append((given, ast.literal_eval(test.comparators[0])))
            except ValueError:
                continue
    return calls
