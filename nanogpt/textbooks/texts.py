"""Texts to pretrain on: Python's standard library, its documentation, and generated textbook pages."""

import hashlib
import random
import sysconfig
from pathlib import Path

from common import run
from common.run import UserError

from corpora.prepared import read_json_lines
from textbooks import sandbox

DOCUMENTATION = ("tutorial_howto_faq", "library")


def in_random_order(documents: list[str]) -> list[str]:
    """Documents in the order of their digests: random, and the same for everyone who has the same ones."""
    return sorted(set(documents), key=lambda text: hashlib.blake2b(text.encode()).digest())


def standard_library(folder: Path | None = None) -> list[str]:
    """The modules of Python's standard library as they lie on this machine, its tests among them.

    pydoc_data holds documentation, which is the other arm; site-packages is not the library. Raises UserError.
    """
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    found = []
    skipped = 0
    for file in sorted(folder.rglob("*.py")):
        if {"site-packages", "dist-packages", "pydoc_data", "__pycache__"} & set(file.relative_to(folder).parts):
            continue
        if not file.is_file():  # a FIFO would wait for ever
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError):  # some tests of the library are files in other encodings
            skipped += 1
            continue
        if len(text) > 200:
            found.append(text)
    if not found:
        raise UserError(f"{folder}: holds no Python source; install the standard library's .py files")
    if skipped:
        print(f"standard library: {skipped} files that are not in UTF-8 left out, of {len(found) + skipped}")
    return in_random_order(found)


def parse_page(value: dict) -> str:
    """The text of a page. Raises ValueError, KeyError or TypeError."""
    value["text"].encode()
    return value["text"]


def documentation(data_dir: Path) -> list[str]:
    """The pages of Python's tutorial and library reference, from python_docs/ in the data folder. Raises
    UserError."""
    pages = []
    for name in DOCUMENTATION:
        file = data_dir / "python_docs" / f"{name}.jsonl"
        if not file.exists():
            what = 'it has a line {"text": PAGE} for each page of the documentation, as in Debian\'s python3-doc'
            raise UserError(f"{run.display_path(file)}: is missing; {what}")
        pages += read_json_lines(file, parse_page, 'a page, {"text": PAGE}')
    return in_random_order(pages)


# ------------------------------------------------------------------------------------------------ generated textbook

PEOPLE = "Ada Bruno Chen Dalia Emil Farah Goran Hana Ivan Jun Kira Luis Mei Nora Omar Petra".split()
THINGS = "apple bread candle drum envelope flute ginger hammer ink jar kettle lemon map needle orange pen".split()
PLACES = "Lima Oslo Cairo Kyoto Quito Turin Accra Delhi Perth Dakar Minsk Hanoi".split()


def variables(r):
    thing = r.choice(THINGS)
    count = r.randint(2, 40)
    price = r.randint(2, 90)
    return (
        "Variables",
        f"A variable gives a name to a value, and the name can be used wherever the value could stand. Suppose "
        f"that one {thing} costs {price} cents. If the price is kept in a variable, a change of price is one "
        f"change in one place.",
        f"price = {price}\ncount = {count}\ncost = price * count\nprint('cost of', count, '{thing}s:', cost)\n"
        f"price = {price + 1}\nprint('cost before:', cost, 'cost now:', price * count)\n",
        "The variable cost keeps its old value: it was computed once and does not follow the price.",
    )


def formatting(r):
    person = r.choice(PEOPLE)
    place = r.choice(PLACES)
    share = r.randint(1, 999) / 1000
    return (
        "Formatted strings",
        f"A string with the letter f before its opening quote may contain expressions in braces. After a colon "
        f"comes the form: .2f means two digits after the point, and {r.randint(8, 14)} would be a width.",
        f"name = '{person}'\ncity = '{place}'\nshare = {share}\nprint(f'{{name}} lives in {{city}}.')\n"
        f"print(f'{{share:.2f}} or {{share:.0%}}')\nprint(f'|{{city:>10}}|{{name:<8}}|')\n",
        "Alignment to the right is written with the sign >, to the left with the sign <.",
    )


def while_loops(r):
    start = r.randint(100, 900)
    rate = r.randint(3, 20)
    goal = r.randint(2, 4)
    return (
        "The while statement",
        f"A while statement repeats its block as long as a condition holds. It suits questions that begin with "
        f"how long: after how many years has a deposit of {start} grown {goal} times as large at {rate} percent?",
        f"deposit = {start}\nyears = 0\nwhile deposit < {goal} * {start}:\n"
        f"    deposit += deposit * {rate} / 100\n    years += 1\nprint(years, 'years')\n",
        "If the rate were zero the loop would never end; a program that runs for ever must be interrupted.",
    )


def tuples(r):
    points = [(r.randint(-9, 9), r.randint(-9, 9)) for _ in range(3)]
    return (
        "Tuples",
        "A tuple is a fixed sequence of values. Several names on the left of an equals sign take it apart, "
        "which is called unpacking. Two variables can change places without a third one.",
        f"corner = {points[0]}\nwide, high = corner\nprint('wide', wide, 'high', high)\nwide, high = high, wide\n"
        f"print((wide, high))\nfor east, north in {points[1:]}:\n    print(east, north)\n",
        "A function that returns two values in truth returns one tuple.",
    )


def set_of(words: list[str]) -> str:
    """The source of a set. The order of repr() depends on the hashes of a process."""
    return "{" + ", ".join(map(repr, words)) + "}"


def sets(r):
    one, two = sorted(r.sample(THINGS, 4)), sorted(r.sample(THINGS, 5))
    a, b = r.sample(PEOPLE, 2)
    return (
        "Sets",
        f"A set has each element once and in no order. {a} and {b} write down what they bought at the market; "
        f"the operators & | and - say what both have, what either has, and what only one has.",
        f"{a.lower()} = {set_of(one)}\n{b.lower()} = {set_of(two)}\nprint(sorted({a.lower()} & {b.lower()}))\n"
        f"print(sorted({a.lower()} | {b.lower()}))\nprint(sorted({a.lower()} - {b.lower()}))\n",
        "Sets are printed in sorted order here, because the order of a set itself means nothing.",
    )


def exceptions(r):
    words = [str(r.randint(1, 99)), r.choice(THINGS), str(r.randint(1, 99) / 4)]
    return (
        "Exceptions",
        "An operation that cannot be carried out raises an exception. The statement try with a clause except "
        "says what to do then, and the program continues after it.",
        f"for word in {words}:\n    try:\n        print(word, 'becomes', int(word))\n"
        "    except ValueError as error:\n        print('not a whole number:', error)\n",
        "A clause should name the exception that is expected. A bare except would hide spelling mistakes as well.",
    )


def classes(r):
    owner = r.choice(PEOPLE)
    first = r.randint(10, 500)
    second = r.randint(10, 500)
    return (
        "Classes",
        f"A class describes what objects of one kind know and can do. An account knows its owner, {owner} for "
        f"instance, and its balance; it can take a deposit and refuse a withdrawal.",
        "class Account:\n    def __init__(self, owner):\n        self.owner = owner\n        self.balance = 0\n\n"
        "    def deposit(self, amount):\n        self.balance += amount\n\n    def withdraw(self, amount):\n"
        "        if amount > self.balance:\n            print('refused:', amount)\n        else:\n"
        f"            self.balance -= amount\n\naccount = Account('{owner}')\naccount.deposit({first})\n"
        f"account.withdraw({second})\nprint(account.owner, account.balance)\n",
        "The first parameter, self, is the object itself; it is given automatically.",
    )


def sorting(r):
    rows = [(r.choice(PLACES), r.randint(-10, 38)) for _ in range(4)]
    return (
        "Sorting with a key",
        "The function sorted returns a new list. With the argument key it compares what a function returns "
        "for each element: here the temperature of a city and not its name.",
        f"cities = {rows}\n\ndef temperature(city):\n    return city[1]\n\nfor name, degrees in sorted(cities, "
        "key=temperature):\n    print(name, degrees)\nprint('warmest:', max(cities, key=temperature)[0])\n",
        "The order of equal elements does not change: sorting is stable.",
    )


def recursion(r):
    a, b = r.randint(20, 900), r.randint(20, 900)
    return (
        "Recursion",
        f"A function may call itself with a simpler question. Euclid found that the greatest common divisor of "
        f"two numbers, such as {a} and {b}, is also that of the smaller one and the remainder.",
        f"def divisor(large, small):\n    print('divisor of', large, small)\n    if small == 0:\n"
        f"        return large\n    return divisor(small, large % small)\n\nprint(divisor({a}, {b}))\n",
        "Every recursion needs a case that is answered at once; here it is a remainder of zero.",
    )


def splitting(r):
    fields = [r.choice(PEOPLE), r.choice(PLACES), str(r.randint(1900, 2020))]
    return (
        "Splitting and joining",
        "Data often come as lines of text with a sign between the fields. The method split makes a list of "
        "such a line, strip removes blanks at its ends, and join is the way back.",
        f"line = '  {';'.join(fields)}  '\nfields = line.strip().split(';')\nprint(fields)\n"
        "print(' / '.join(fields))\nname, city, year = fields\nprint(name.center(12, '.'), int(year) + 1)\n",
        "What split returns are always strings: a year has to be converted before one can calculate with it.",
    )


def enumerating(r):
    some, prices = r.sample(THINGS, 3), [r.randint(1, 30) for _ in range(3)]
    return (
        "Loops over two lists",
        "The function enumerate counts along while a loop runs, and zip goes through two lists side by side. "
        "Neither needs an index that one increases by hand.",
        f"things = {some}\nprices = {prices}\nfor place, thing in enumerate(things, start=1):\n"
        "    print(f'{place}. {thing}')\nfor thing, price in zip(things, prices):\n    print(thing, 'costs', "
        "price)\n",
        "If the lists have different lengths, zip stops at the end of the shorter one.",
    )


def grouping(r):
    pairs = [(r.choice(PLACES[:4]), r.choice(PEOPLE)) for _ in range(5)]
    return (
        "Dictionaries of lists",
        "To collect what belongs together, a dictionary can have lists as its values. The method setdefault "
        "returns the list of a key, and puts an empty one there the first time.",
        f"visits = {pairs}\nguests = {{}}\nfor city, person in visits:\n    "
        "guests.setdefault(city, []).append(person)\n"
        "for city, people in guests.items():\n    print(city, 'was visited by', ' and '.join(people))\n",
        "Keys come in the order in which they were first inserted.",
    )


def dates(r):
    minutes = r.randint(70, 5000)
    return (
        "Quotient and remainder",
        f"Whole division // and the remainder % belong together. How many days, hours and minutes are {minutes} "
        f"minutes? The function divmod answers both questions at once.",
        f"hours, minutes = divmod({minutes}, 60)\ndays, hours = divmod(hours, 24)\n"
        "print(days, 'days,', hours, 'hours and', minutes, 'minutes')\n",
        "The remainder has the sign of the divisor, so clocks also work backwards: -1 % 24 is 23.",
    )


def booleans(r):
    age, limit = r.randint(5, 80), r.choice([12, 16, 18, 21, 65])
    return (
        "Truth values",
        "A comparison is itself a value, True or False, and can be given a name. The words and, or and not "
        "combine truth values; comparisons may be chained as in mathematics.",
        f"age = {age}\nadult = age >= {limit}\nprint('adult:', adult)\nprint('teenager:', 13 <= age <= 19)\n"
        "print('pays full price:', adult and not age > 65)\n",
        "The second part of an and is not looked at when the first one is already False.",
    )


def slicing(r):
    word = r.choice(THINGS) + r.choice(THINGS)
    a = r.randint(1, 3)
    b = r.randint(4, 6)
    return (
        "Slices",
        "A slice is a part of a sequence, from one position up to and without another. Positions count from "
        "zero, and negative ones from the end.",
        f"label = '{word}'\nprint(label[{a}:{b}])\nprint(label[-3:], label[::2])\nmiddle = len(label) // 2\n"
        "print(label[:middle] + '|' + label[middle:])\n",
        "Two slices that meet at one position make up the whole, which is why the end is left out.",
    )


TOPICS = [
    variables,
    formatting,
    while_loops,
    tuples,
    sets,
    exceptions,
    classes,
    sorting,
    recursion,
    splitting,
    enumerating,
    grouping,
    dates,
    booleans,
    slicing,
]
RUNNER = """
import contextlib, io
def output():
    buffer = io.StringIO()
    with contextlib.redirect_stdout(buffer):
        exec({code!r}, {{"__name__": "example"}})
    return buffer.getvalue()
"""


def generated(characters: int, seed: int = 0) -> list[str]:
    """Textbook pages, at least `characters` in all: a topic, an explanation, a worked example, and what it prints when
    it is executed. Deterministic. They share no component with the exercises. Raises UserError."""
    rng = random.Random(f"textbook {seed}")
    drafts = {}
    length = 0
    for attempt in range(characters // 50 + 100):
        page = TOPICS[attempt % len(TOPICS)](rng)
        if page not in drafts:
            drafts[page] = None
            length += sum(map(len, page)) + 100
            if length >= characters:
                break
    found = sandbox.work([(RUNNER.format(code=code), [("output", ())]) for _, _, code, _ in drafts])
    pages = []
    for (topic, text, code, remark), (printed,) in zip(drafts, found, strict=True):
        if isinstance(printed, sandbox.Failure):
            raise UserError(f"an example of the generated textbook fails: {topic}: {printed}")
        pages.append(f"{topic}\n{'=' * len(topic)}\n\n{text}\n\n{code}\nThis prints:\n\n{printed}\n{remark}\n")
    return in_random_order(pages)
