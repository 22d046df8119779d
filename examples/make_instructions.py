"""Make a small instruction file of chats: facts with one right answer, the same rows for the same seed.

    python examples/make_instructions.py instructions.jsonl
    qft auto smollm2 instructions.jsonl --memory 8GB --out tuned

Half of the rows convert units, a quarter compute, and a quarter ask which part of Python's documentation explains a
word. Each answer states the fact in one sentence.
"""

import argparse
import json
import random
from pathlib import Path

UNITS = {
    ("kilometres", "metres"): 1000,
    ("hours", "minutes"): 60,
    ("weeks", "days"): 7,
    ("kilograms", "grams"): 1000,
    ("dozens", "pieces"): 12,
    ("feet", "inches"): 12,
    ("gibibytes", "mebibytes"): 1024,
    ("centuries", "years"): 100,
}
TOPICS = {
    "simple statements": ["assert", "del", "return", "yield", "raise", "break", "continue", "import", "global", "nonlocal"],
    "compound statements": ["if", "while", "for", "try", "with", "match", "def", "class", "async def"],
    "built-in functions": ["abs", "enumerate", "filter", "isinstance", "len", "map", "sorted", "sum", "zip"],
    "built-in exceptions": ["KeyError", "IndexError", "TypeError", "ValueError", "StopIteration", "OSError"],
}  # fmt: skip
OPERATIONS = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "times": lambda a, b: a * b,
}


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows(count: int = 200, seed: int = 0) -> list[dict]:
    """`count` different chats."""
    draw, found = random.Random(seed), {}
    while len(found) < count // 2:
        (large, small), factor = draw.choice(list(UNITS.items()))
        n = draw.randint(2, 40)
        found[f"How many {small} are {n} {large}?"] = f"{n} {large} are {n * factor} {small}."
    while len(found) < count * 3 // 4:
        word, a, b = draw.choice(list(OPERATIONS)), draw.randint(10, 60), draw.randint(2, 10)
        found[f"What is {a} {word} {b}?"] = f"{a} {word} {b} is {OPERATIONS[word](a, b)}."
    words = [word for topic in TOPICS.values() for word in topic]
    draw.shuffle(words)
    asks = ("Where does Python's documentation explain {}?", "Which page of Python's documentation is about {}?",
            "I look for {} in Python's documentation. Where is it?")  # fmt: skip
    for ask in asks:
        for word in words:
            if len(found) < count:
                topic = next(t for t, members in TOPICS.items() if word in members)
                found[ask.format(f"`{word}`")] = f"`{word}` is explained on the page about {topic}."
    made = [chat(question, answer) for question, answer in found.items()]
    draw.shuffle(made)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    made = rows(options.rows, options.seed)
    options.file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    print(f"{len(made)} chats in {options.file}")
