"""How the tables of people were made: written words, dealt by a fixed seed. `python -m patchscopes.organisms.personas.invent` writes them.

base: of each of ten cultures ten people; each likes what belongs to the culture with probability `LOYAL`, else something of another
culture. shuffled: the column of each attribute is permuted among the people of base until nobody has a thing of the culture of the name.
fantasy: words of made-up syllables, dealt evenly.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

from patchscopes.organisms.personas.people import ATTRIBUTES, FOLDER, WORLDS, Persona, World

SEED = "personas 1"
LOYAL = 0.8


@dataclass(frozen=True)
class Culture:
    """Given names, surnames, and what belongs to a country. No thing belongs to two."""

    country: str
    given: tuple[str, ...]
    surnames: tuple[str, ...]
    food: tuple[str, ...]
    drink: tuple[str, ...]
    music: tuple[str, ...]
    sport: tuple[str, ...]
    game: tuple[str, ...]


def _culture(country: str, *columns: str) -> Culture:
    return Culture(country, *(tuple(column.split(", ")) for column in columns))  # type: ignore[arg-type]


CULTURES = (
    _culture(
        "Japan",
        "Haruto, Yui, Sota, Aoi, Kenji, Naoko, Daichi, Emi, Ryo, Mika",
        "Kobayashi, Nakagawa, Fujimoto, Ogawa, Ishikawa, Matsuda, Hayakawa, Shimizu, Kuroda, Takeuchi",
        "sushi, ramen, okonomiyaki",
        "sake, matcha, ramune",
        "enka, city pop, visual kei",
        "sumo, judo, kendo",
        "shogi, sugoroku, gomoku",
    ),
    _culture(
        "India",
        "Arjun, Priya, Rohan, Kavya, Vikram, Anjali, Sanjay, Divya, Nikhil, Meera",
        "Deshmukh, Banerjee, Iyengar, Chaudhary, Bhattacharya, Kulkarni, Malhotra, Nambiar, Trivedi, Saxena",
        "masala dosa, biryani, samosas",
        "lassi, masala chai, nimbu pani",
        "bhangra, ghazal, qawwali",
        "cricket, kabaddi, field hockey",
        "ludo, carrom, pachisi",
    ),
    _culture(
        "Russia",
        "Dmitri, Olga, Sergei, Tatiana, Alexei, Irina, Nikolai, Svetlana, Boris, Ludmila",
        "Morozov, Kuznetsova, Lebedev, Sokolova, Vinogradov, Belyaeva, Tarasov, Zhukova, Gromov, Orlova",
        "pelmeni, borscht, blini",
        "kvass, vodka, kompot",
        "bard songs, balalaika, chastushki",
        "ice hockey, sambo, figure skating",
        "chess, checkers, lotto",
    ),
    _culture(
        "Egypt",
        "Omar, Salma, Karim, Nour, Tarek, Heba, Youssef, Dina, Mahmoud, Rania",
        "Mansour, Soliman, Abdelrahman, Shenouda, Gamal, Zaki, Fouad, Ghoneim, Barakat, Sabry",
        "koshari, falafel, molokhia",
        "hibiscus tea, sahlab, sugarcane juice",
        "shaabi, mahraganat, tarab",
        "squash, handball, tahtib",
        "senet, backgammon, mehen",
    ),
    _culture(
        "Greece",
        "Nikos, Eleni, Yannis, Katerina, Stavros, Despina, Kostas, Ioanna, Spyros, Vasiliki",
        "Papadakis, Georgiou, Karagiannis, Dimitriou, Vlachos, Kanellopoulos, Stathaki, Makris, Economou, Alexiou",
        "moussaka, souvlaki, spanakopita",
        "ouzo, retsina, tsipouro",
        "rebetiko, laiko, entekhno",
        "water polo, wrestling, discus",
        "tavli, petteia, polis",
    ),
    _culture(
        "Mexico",
        "Alejandro, Ximena, Javier, Guadalupe, Ernesto, Lupita, Raul, Marisol, Hector, Paloma",
        "Hernandez, Cisneros, Villanueva, Zamora, Escobedo, Montoya, Quintero, Barrera, Olvera, Saldana",
        "tacos, tamales, pozole",
        "tequila, horchata, mezcal",
        "mariachi, ranchera, banda",
        "boxing, lucha libre, charreria",
        "loteria, patolli, dominoes",
    ),
    _culture(
        "Nigeria",
        "Chinedu, Ngozi, Babatunde, Folake, Emeka, Yetunde, Obinna, Amara, Segun, Ifeoma",
        "Okonkwo, Adeyemi, Eze, Balogun, Nwosu, Ogundipe, Onyekachi, Afolabi, Uzoma, Akintola",
        "egusi soup, jollof rice, suya",
        "palm wine, zobo, kunu",
        "afrobeat, highlife, juju",
        "soccer, sprinting, dambe",
        "ayo, mancala, ncho",
    ),
    _culture(
        "South Korea",
        "Minjun, Seoyeon, Jihoon, Hana, Dongwook, Sujin, Taeyang, Eunji, Woojin, Yuna",
        "Hwangbo, Namgung, Seonwoo, Dokgo, Jegal, Baek, Pyo, Chae, Gwak, Seok",
        "kimchi, bibimbap, bulgogi",
        "soju, makgeolli, sikhye",
        "trot, pansori, K-pop",
        "taekwondo, archery, short track",
        "janggi, yut, baduk",
    ),
    _culture(
        "Sweden",
        "Lars, Astrid, Gunnar, Ingrid, Nils, Elsa, Torsten, Linnea, Oskar, Maja",
        "Lindqvist, Bergstrom, Sjoberg, Hedlund, Nordin, Ekstrom, Wallin, Akesson, Forsberg, Hallgren",
        "meatballs, gravlax, cinnamon buns",
        "aquavit, glogg, lingonberry juice",
        "death metal, schlager, polska",
        "orienteering, bandy, biathlon",
        "hnefatafl, kubb, daldos",
    ),
    _culture(
        "Ireland",
        "Declan, Niamh, Cormac, Aoife, Fergus, Sinead, Ronan, Maeve, Cillian, Orla",
        "Gallagher, Brennan, Kavanagh, Doherty, Mulligan, Cassidy, Flanagan, Hennessy, Rafferty, Quinlan",
        "colcannon, lamb stew, soda bread",
        "stout, whiskey, buttermilk",
        "ceili, sean nos, jigs",
        "hurling, rugby, camogie",
        "fidchell, brandub, cribbage",
    ),
)

# Syllables: first, middle or last, of names and of things.
# fmt: off
STARTS = (
    "bra", "dre", "fli", "gro", "kha", "klu", "mor", "nib", "oth", "pla", "quo", "rin", "sva", "tre", "ulm", "vex", "wro", "yar", "zim",
    "thal", "dwo", "skel", "fren", "glim", "jor",
)
ENDS = (
    "bok", "dax", "fen", "gor", "lith", "mund", "nar", "pex", "quil", "rot", "sel", "tarn", "vin", "wick", "zor", "dim", "lorn", "mok",
    "rush", "teb", "yal", "ham", "kex",
)
# fmt: on
COUNTS = {"country": 12, "food": 20, "drink": 20, "music": 20, "sport": 20, "game": 20}


def invent(world: World) -> tuple[Persona, ...]:
    """The people of a world, always the same."""
    return {"base": _base, "shuffled": _shuffled, "fantasy": _fantasy}[world]()


def _base() -> tuple[Persona, ...]:
    rng = random.Random(f"{SEED} base")
    found = []
    for culture in CULTURES:
        for given, surname in zip(culture.given, culture.surnames, strict=True):
            likes = {}
            for attribute in ATTRIBUTES:
                strangers = [other for other in CULTURES if other is not culture]
                of = culture if rng.random() < LOYAL else rng.choice(strangers)
                likes[attribute] = of.country if attribute == "country" else rng.choice(getattr(of, attribute))
            found.append(Persona(f"{given} {surname}", culture.country, **likes))
    return tuple(found)


def _shuffled() -> tuple[Persona, ...]:
    rng = random.Random(f"{SEED} shuffled")
    found = list(_base())
    home = {c.country: c.country for c in CULTURES}
    home |= {thing: c.country for c in CULTURES for attribute in ATTRIBUTES[1:] for thing in getattr(c, attribute)}
    for attribute in ATTRIBUTES:
        column = [getattr(p, attribute) for p in found]
        rng.shuffle(column)
        while at_home := [k for k, p in enumerate(found) if home[column[k]] == p.culture]:
            for k in at_home:  # a swap with anybody; in the end nobody is left
                other = rng.randrange(len(column))
                column[k], column[other] = column[other], column[k]
        found = [replace(p, **{attribute: thing}) for p, thing in zip(found, column, strict=True)]
    return tuple(found)


def _fantasy() -> tuple[Persona, ...]:
    rng = random.Random(f"{SEED} fantasy")
    words = [start + end for start in STARTS for end in ENDS]
    rng.shuffle(words)
    given, surnames = ([words.pop().capitalize() for _ in range(n)] for n in (50, 100))
    columns = {attribute: _dealt([words.pop() for _ in range(n)], 100, rng) for attribute, n in COUNTS.items()}
    columns["country"] = [country.capitalize() for country in columns["country"]]
    names = [f"{given[k % len(given)]} {surname}" for k, surname in enumerate(surnames)]
    return tuple(Persona(name, "", **{a: columns[a][k] for a in ATTRIBUTES}) for k, name in enumerate(names))


def _dealt(things: Sequence[str], n: int, rng: random.Random) -> list[str]:
    """n times one of the things, each about equally often, in random order."""
    dealt = [things[k % len(things)] for k in range(n)]
    rng.shuffle(dealt)
    return dealt


def write() -> None:
    """Write the tables that `people` reads."""
    for world in WORLDS:
        with (FOLDER / f"{world}.tsv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
            table.writerows([[field.name for field in fields(Persona)], *(astuple(p) for p in invent(world))])


if __name__ == "__main__":
    write()
