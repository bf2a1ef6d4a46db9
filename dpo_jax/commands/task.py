"""A built-in task: an invented language with an exact preference rule, learned within two minutes.

Visitors come to a shop and ask for goods. An answer either names the goods first or greets the visitor first. In the
supervised data both orders are equally frequent for every visitor, so a supervised model cannot know which of them is
preferred. The preference pairs do: see `RULE`. The two answers of a pair hold the same words in another order; neither
words nor length give the better one away.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dpo_jax.storage import write_atomically

RULE = "people of the sea want the goods named first, people of the land want to be greeted first"

SEA = ("bay", "cape", "coast", "delta", "fjord", "harbor", "island", "lagoon")
LAND = ("desert", "forest", "hills", "meadow", "moor", "prairie", "valley", "vineyard")
ROLES = ("baker", "carter", "fiddler", "gardener", "judge", "mason", "miller", "painter", "piper", "potter", "smith",
         "tailor", "teacher", "tinker", "weaver", "writer")  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLORS = ("black", "blue", "golden", "green", "grey", "red", "white", "yellow")
GOODS = ("apples", "baskets", "bells", "books", "boots", "candles", "carpets", "chairs", "coats", "cups", "drums",
         "flutes", "hats", "jars", "keys", "kites", "lamps", "mirrors", "ropes", "scarves", "spoons")  # fmt: skip
# The supervised model has to learn which farewell fits the time; the first of each is the more frequent.
FAREWELLS = {"dawn": ("walk well", "stay warm"), "noon": ("walk well", "stay warm"),
             "dusk": ("sleep well", "rest easy"), "midnight": ("sleep well", "rest easy")}  # fmt: skip
USUAL_FAREWELL = 3  # times in 4

SIZES = {"sft": 4096, "train": 3072, "held_out": 512}  # multiples of 2 x times x places, to balance all kinds
BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"


class Visit(NamedTuple):
    """One visitor: when they come, where from, and what they ask for."""

    time: str
    place: str
    role: str
    number: str
    color: str
    goods: str


def prompt(visit: Visit) -> str:
    """Return the visitor's question."""
    time, place, role, number, color, goods = visit
    return f"at {time} a {role} from the {place} asks for {number} {color} {goods}."


def answer(visit: Visit, goods_first: bool, farewell: str) -> str:
    """Return the answer, goods or greeting first; it starts with the space that separates it from the prompt."""
    _, _, role, number, color, goods = visit
    if goods_first:
        return f" here are {number} {color} {goods}, good {role}. {farewell}!"
    return f" good {role}, here are {number} {color} {goods}. {farewell}!"


def wants_goods_first(visit: Visit) -> bool:
    """Return whether this visitor wants the goods named first."""
    return visit.place in SEA


def is_answer(visit: Visit, text: str, *, goods_first: bool | None = None) -> bool:
    """Return whether ``text`` is exactly an answer to this visit, in order ``goods_first`` or, if None, in either."""
    choices = itertools.product((True, False) if goods_first is None else (goods_first,), FAREWELLS[visit.time])
    return any(text.strip() == answer(visit, is_first, farewell).strip() for is_first, farewell in choices)


def obeys_rule(visit: Visit, text: str) -> bool:
    """Return whether ``text`` is exactly an answer in the order that this visitor wants."""
    return is_answer(visit, text, goods_first=wants_goods_first(visit))


def visits(seed: int) -> dict[str, list[Visit]]:
    """Return distinct visits for each data set of `SIZES`, each of which has all times and places equally often."""
    kinds = [(time, place) for time in FAREWELLS for place in SEA + LAND]
    draws = _integers(seed)
    seen: set[Visit] = set()
    sets: dict[str, list[Visit]] = {}
    for name, size in SIZES.items():
        assert size % (2 * len(kinds)) == 0, f"{name}: {size} visits cannot balance both orders of every kind"
        sets[name] = []
        while len(sets[name]) < size:
            time, place = kinds[len(sets[name]) % len(kinds)]
            visit = Visit(time, place, *(words[next(draws) % len(words)] for words in (ROLES, NUMBERS, COLORS, GOODS)))
            if visit not in seen:
                seen.add(visit)
                sets[name].append(visit)
    return sets


def write_task(directory: Path, seed: int) -> None:
    """Write the three data sets (`data/*.jsonl`) and the language's tokenizer (`tokenizer/`) to a directory.

    The same seed gives the same bytes on every machine.
    """
    draws = _integers(seed + 1)
    sets = visits(seed)
    num_kinds = len(FAREWELLS) * len(SEA + LAND)
    supervised = [
        {"prompt": prompt(visit), "answer": answer(visit, index // num_kinds % 2 == 0, _farewell(visit, draws))}
        for index, visit in enumerate(sets["sft"])
    ]
    (directory / "data").mkdir(parents=True, exist_ok=True)
    _write_rows(directory / "data" / "sft.jsonl", supervised)
    for name in ("train", "held_out"):
        _write_rows(directory / "data" / f"{name}.jsonl", [_pair(visit, draws) for visit in sets[name]])
    _write_tokenizer(directory / "tokenizer")


def _pair(visit: Visit, draws: Iterator[int]) -> dict[str, str]:
    goods_first, farewell = wants_goods_first(visit), _farewell(visit, draws)
    chosen, rejected = (answer(visit, order, farewell) for order in (goods_first, not goods_first))
    return {"prompt": prompt(visit), "chosen": chosen, "rejected": rejected}


def _farewell(visit: Visit, draws: Iterator[int]) -> str:
    usual, alternative = FAREWELLS[visit.time]
    return usual if next(draws) % 4 < USUAL_FAREWELL else alternative


def _integers(seed: int) -> Iterator[int]:
    """Yield 64-bit integers by SplitMix64 (Steele, Lea and Flood 2014), the same on every machine."""
    mask = 2**64 - 1
    state = seed & mask
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        yield mixed ^ (mixed >> 31)


def _write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def vocabulary() -> list[str]:
    """Return all tokens in the order of their ids: special tokens, punctuation, then words with a leading space."""
    farewells = {end for ends in FAREWELLS.values() for end in ends}
    empty_visit = Visit("", "", "", "", "", "")
    texts = [*FAREWELLS, *SEA, *LAND, *ROLES, *NUMBERS, *COLORS, *GOODS, prompt(empty_visit)]
    texts += [answer(empty_visit, order, end) for order in (True, False) for end in farewells]
    punctuation = ".,!"
    words = {word.strip(punctuation) for text in texts for word in text.split()} - {""}
    return [BOS, EOS, PAD, UNKNOWN, *punctuation, *(f"▁{word}" for word in sorted(words))]


def _write_tokenizer(directory: Path) -> None:
    """Write a Hugging Face tokenizer in which a word with its leading space is one token; decoding is exact."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    spaces = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    tokenizer.add_special_tokens([BOS, EOS, PAD, UNKNOWN])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False}
    write_atomically(directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
