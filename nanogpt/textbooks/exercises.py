"""Exercises: a function's signature and docstring, its body, and calls with their expected values.

Seven levels, each a product of components. A component has words for the docstring, source for the body, and a Python
function that says independently what is right. Which components go together is the composition of an exercise; a fifth
of all compositions, chosen by a digest, is held out: exercises on them are only for the evaluation. A solution is
admitted if it returns, when executed, what the functions of its components say.

The components are from elementary programming. Neither HumanEval nor MBPP was consulted for them.
"""

import ast
import hashlib
import itertools
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


def keep(predicate: Part) -> Part:
    """The step that keeps the numbers for which a predicate holds."""

    def function(values, k):
        kept = []
        for x in values:
            if predicate.function(x, k):
                kept.append(x)
        return kept

    test = predicate.source.format(x="x", k="{k}")
    words = f"keep the numbers that are {predicate.words}"
    return Part(f"keep_{predicate.name}", words, f"[x for x in {{x}} if {test}]", function)


def each(change: Part) -> Part:
    """The step that changes every number."""

    def function(values, k):
        return list(map(change.function, values, [k] * len(values)))

    term = change.source.format(x="x", k="{k}")
    return Part(f"each_{change.name}", f"take every number {change.words}", f"[{term} for x in {{x}}]", function)


def insertion_sort(values, k):
    result = []
    for x in values:
        place = sum(1 for other in result if other <= x)
        result.insert(place, x)
    return result


def total(values, k):
    result = 0
    for x in values:
        result += x
    return result


STEPS = [  # from a list of numbers to a list
    *map(keep, PREDICATES[:5]),
    *map(each, MAPS[:4]),
    Part("reverse", "reverse the order", "{x}[::-1]", lambda v, k: list(reversed(v))),
    Part("sort", "sort the numbers", "sorted({x})", insertion_sort),
    Part("skip", "leave out the first {k} numbers", "{x}[{k}:]", lambda v, k: [x for i, x in enumerate(v) if i >= k]),
    Part("head", "take the first {k} numbers", "{x}[:{k}]", lambda v, k: [x for i, x in enumerate(v) if i < k]),
]
ENDS = [  # from a list of numbers to a value
    Part("total", "return their sum", "sum({x})", total),
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
    tuples = itertools.product(*products)
    return [parts for parts in tuples if all(left is not right for left, right in itertools.pairwise(parts))]


class Words(NamedTuple):
    """What is drawn for an exercise of any level: numbers, names of variables, the beginning of the docstring, and
    which of two styles the body has."""

    k: int
    j: int
    i: int
    style: bool
    numbers: str
    number: str
    text: str
    table: str
    pair: tuple[str, str]
    opening: str


class Draft(NamedTuple):
    """A function without its name, the arguments of its calls, and the values that are right."""

    arguments: str
    docstring: str
    body: list[str]
    inputs: list[tuple]
    expected: list


def draw_words(rng: random.Random) -> Words:
    k = rng.randint(2, 9)
    j = rng.randint(2, 9)
    i = rng.randint(2, 9)
    style = rng.random() < 0.5
    names = [rng.choice(NAMES[kind]) for kind in ("numbers", "number", "text", "table", "pair")]
    return Words(k, j, i, style, *names, rng.choice(OPENINGS))


def integers(rng: random.Random) -> list[int]:
    return [rng.randint(-20, 30) for _ in range(rng.randint(0, 9))]


def operation(parts: tuple, words: Words, rng: random.Random) -> Draft:
    """A pair of numbers is combined, then the result is changed."""
    pair, step = parts
    a, b = words.pair
    value = pair.source.format(a=a, b=b)
    docstring = words.opening.format(f"{pair.words.format(a=a, b=b)}, {step.words.format(k=words.k)}")
    body = [f"result = {value}", f"return {step.source.format(x='result', k=words.k)}"]
    uses_value_once = step.source != "{x} * {x}"
    if words.style and uses_value_once:
        body = [f"return {step.source.format(x=f'({value})', k=words.k)}"]
    inputs = [(rng.randint(-20, 30), rng.randint(-20, 30)) for _ in range(CALLS)]
    expected = [step.function(pair.function(*given), words.k) for given in inputs]
    return Draft(f"{a}, {b}", docstring, body, inputs, expected)


def loop(parts: tuple, words: Words, rng: random.Random) -> Draft:
    """A sum over the numbers of a range for which a condition holds."""
    numbers, test, step = parts
    top = rng.choice(["n", "limit", "top"])
    which = f"{numbers.words.format(n=top, k=words.j)} that are {test.words.format(k=words.i)}"
    docstring = words.opening.format(f"the sum of the numbers {which}, each {step.words.format(k=words.k)}")
    body = [
        "total = 0",
        f"for i in {numbers.source.format(n=top, k=words.j)}:",
        f"    if {test.source.format(x='i', k=words.i)}:",
        f"        total += {step.source.format(x='i', k=words.k)}",
        "return total",
    ]
    inputs = [(rng.randint(0, 20),) for _ in range(CALLS)]
    expected = []
    for (n,) in inputs:
        chosen = [x for x in numbers.function(n, words.j) if test.function(x, words.i)]
        expected.append(sum(step.function(x, words.k) for x in chosen))
    return Draft(top, docstring, body, inputs, expected)


def condition(parts: tuple, words: Words, rng: random.Random) -> Draft:
    """A number is changed in one way if a condition holds, else in another."""
    test, yes, no = parts
    x = words.number
    j = words.j
    k = words.k
    choice = f"{x} {yes.words.format(k=k)} if {x} is {test.words.format(k=j)}, else {x} {no.words.format(k=k)}"
    test_source = test.source.format(x=x, k=j)
    yes_source = yes.source.format(x=x, k=k)
    no_source = no.source.format(x=x, k=k)
    body = [f"if {test_source}:", f"    return {yes_source}", f"return {no_source}"]
    if words.style:
        body = [f"if {test_source}:", f"    return {yes_source}", "else:", f"    return {no_source}"]
    inputs = [(rng.choice([j, j * rng.randint(-3, 3), rng.randint(-20, 30)]),) for _ in range(CALLS)]
    expected = [(yes if test.function(value, j) else no).function(value, k) for (value,) in inputs]
    return Draft(x, words.opening.format(choice), body, inputs, expected)


def string(parts: tuple, words: Words, rng: random.Random) -> Draft:
    """The characters of one kind in a text."""
    whole, letter, end = parts
    docstring = end.words.format(p=letter.words, x=whole.words.format(x=words.text, k=words.j), k=words.k)
    source = whole.source.format(x=words.text, k=words.j)
    test = letter.source.format(x="c")
    result = f"return {end.source.format(s='kept', k=words.k)}"
    body = [f'kept = "".join(c for c in {source} if {test})', result]
    if words.style:
        body = ['kept = ""', f"for c in {source}:", f"    if {test}:", "        kept += c", result]
    inputs = [(" ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 4))),) for _ in range(CALLS)]
    expected = []
    for (text,) in inputs:
        kept = "".join(c for c in whole.function(text, words.j) if letter.function(c, words.k))
        expected.append(end.function(kept, words.k))
    return Draft(words.text, words.opening.format(docstring), body, inputs, expected)


def numbers(parts: tuple, words: Words, rng: random.Random) -> Draft:
    """A list of changed numbers."""
    test, step = parts
    name = words.numbers
    j = words.j
    k = words.k
    which = f"a list of the numbers in {name} that are {test.words.format(k=j)}, each {step.words.format(k=k)}"
    test_source = test.source.format(x="x", k=j)
    term = step.source.format(x="x", k=k)
    body = [f"return [{term} for x in {name} if {test_source}]"]
    if words.style:
        body = [
            "result = []",
            f"for x in {name}:",
            f"    if {test_source}:",
            f"        result.append({term})",
            "return result",
        ]
    inputs = [(integers(rng),) for _ in range(CALLS)]
    expected = [[step.function(x, k) for x in values if test.function(x, j)] for (values,) in inputs]
    return Draft(name, words.opening.format(which), body, inputs, expected)


def dictionary(parts: tuple, words: Words, rng: random.Random) -> Draft:
    """The entries of a dictionary for whose values a condition holds."""
    test, end = parts
    docstring = end.words.format(d=words.table, p=test.words.format(k=words.j))
    test_source = test.source.format(x=f"{words.table}[key]", k=words.j)
    body = [f"return {end.source.format(d=words.table, q=test_source)}"]
    inputs = []
    for _ in range(CALLS):
        size = rng.randint(0, 5)
        table = {}
        for _ in range(size):
            key = rng.choice(WORDS)
            table[key] = rng.choice([words.j, rng.randint(-20, 30)])
        inputs.append((table,))
    expected = []
    for (table,) in inputs:
        chosen = {key: value for key, value in table.items() if test.function(value, words.j)}
        expected.append(end.function(chosen))
    return Draft(words.table, words.opening.format(docstring), body, inputs, expected)


def composition(parts: tuple, words: Words, rng: random.Random) -> Draft:
    """Two steps, one after the other, on a list of numbers."""
    step, end = parts
    name = words.numbers
    j = words.j
    k = words.k
    last = end.words if end in ENDS else f"{end.words} and return them"
    docstring = f"{step.words.format(k=k).capitalize()} in {name}, then {last.format(k=j)}."
    first = step.source.format(x=name, k=k)
    body = [f"result = {first}", f"return {end.source.format(x='result', k=j)}"]
    if words.style:
        body = [f"{name} = {first}", f"return {end.source.format(x=name, k=j)}"]
    inputs = [(integers(rng),) for _ in range(CALLS)]
    expected = [end.function(step.function(values, k), j) for (values,) in inputs]
    return Draft(name, docstring, body, inputs, expected)


BUILDERS = {
    "operation": operation,
    "loop": loop,
    "condition": condition,
    "string": string,
    "list": numbers,
    "dictionary": dictionary,
    "composition": composition,
}


def build(level: str, parts: tuple, rng: random.Random) -> Exercise:
    """An exercise on a composition, with wording, names, numbers and calls drawn from `rng`."""
    draft = BUILDERS[level](parts, draw_words(rng), rng)
    name = "_".join(part.name for part in parts)
    prompt = f'def {name}({draft.arguments}):\n    """{draft.docstring}"""\n'
    completion = "".join(f"    {line}\n" for line in draft.body)
    return Exercise(level, name, name, prompt, completion, list(zip(draft.inputs, draft.expected)))


def admit(exercises: list[Exercise]) -> tuple[list[Exercise], list[str]]:
    """(the exercises whose solutions, executed, return the expected values, a reason for each of the others)."""
    jobs = [(e.prompt + e.completion, [(e.name, given) for given, _ in e.calls]) for e in exercises]
    good = []
    reasons = []
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
        missing = n // len(LEVELS) + (i < n % len(LEVELS))
        parts = [p for p in compositions(level) if is_held_out(level, "_".join(q.name for q in p)) == held_out]
        for attempt in range(50 * missing):
            if not missing:
                break
            exercise = build(level, parts[attempt % len(parts)], rng)
            varied = len({repr(expected) for _, expected in exercise.calls}) > 1  # else a constant would pass
            if varied and exercise.prompt not in seen:
                seen.add(exercise.prompt)
                drawn.append(exercise)
                missing -= 1
        if missing:
            raise UserError(f"there are {missing} exercises too few of the level {level}; ask for fewer")
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
                given = tuple(ast.literal_eval(argument) for argument in call.args)
                calls.append((given, ast.literal_eval(test.comparators[0])))
            except ValueError:
                continue
    return calls
