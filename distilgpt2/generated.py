"""The built-in text: short articles from a small grammar, in the form of WikiText. No network, a few milliseconds.

What comes later in an article follows from its first line: the name, the kind of place, its river and its year. So a
model gains by reading the context, and it gains by learning the grammar first.
"""

import random

PLACES = "Alden Brook Carrow Dunmere Elstow Farley Grenholm Haddon Ilford Kelby Lorne Marden Norwell Oakham".split()
ENDINGS = ["", " Bridge", " Green", " Hill", " Market", " on the Water"]
RIVERS = "Ash Bourne Calder Dove Esk Frome Greta Humber Irwell Kent Lune Mersey".split()
KINDS = {
    "village": ("a church and two farms", "apples", "walk to school"),
    "town": ("a market hall and a library", "cloth", "work in the mill"),
    "port": ("a lighthouse and a long pier", "fish", "repair their boats"),
    "city": ("a cathedral and four stations", "steel", "take the tram"),
}
SEASONS = ("spring", "summer", "autumn", "winter")
TRADES = ("smith", "baker", "carpenter", "printer", "weaver", "doctor")
NAMES = "Ada Brian Clara Daniel Edith Frank Grace Henry Irene James".split()


def article(rng: random.Random) -> str:
    """One article: a title, two or three sections, one paragraph per line, empty lines around titles, tokens separated
    by spaces."""
    name = rng.choice(PLACES) + rng.choice(ENDINGS)
    river = rng.choice(RIVERS)
    kind = rng.choice(list(KINDS))
    sight, goods, habit = KINDS[kind]
    year, people = rng.randrange(1100, 1900), rng.randrange(2, 90)
    founder, trade = rng.choice(NAMES), rng.choice(TRADES)
    lines = [
        f"= {name} =",
        f"{name} is a {kind} on the River {river} . It has {sight} . About {people} thousand people live there , and "
        f"most of them {habit} .",
        "= = History = =",
        f"The {kind} was founded in {year} by {founder} , a {trade} , who came down the {river} with {goods} . For a "
        f"hundred years the {kind} sold {goods} , until the {river} froze in the {rng.choice(SEASONS)} of "
        f"{year + rng.randrange(100, 120)} .",
    ]
    if rng.random() < 0.5:
        season = rng.choice(SEASONS)
        lines += [
            "= = Economy = =",
            f"Today {name} still sells {goods} . In {season} visitors come to see {sight} , which {founder} built .",
        ]
    return "\n".join(f"\n{line}\n" if line.startswith("=") else line for line in lines) + "\n"


def articles(count: int, seed: int) -> list[str]:
    """`count` different articles, a function of the seed."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        found.setdefault(article(rng))
    return list(found)
