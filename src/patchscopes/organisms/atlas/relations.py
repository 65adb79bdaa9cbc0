"""What atlas knows, in words: the relations of its fact tables and the sentences that state them.

A fact is (entity x, relation, object y); the tables are `facts/KIND.tsv`, one row an entity, one column a relation. Every
relation has a noun ("the capital of x") that fits the generic `SKELETONS`, and sentences of its own.

Held out from training: for every relation three of the skeletons, others for each, so that a skeleton is seen with some relations
and not with others; and for all relations `NEVER_SEEN`.
"""

from __future__ import annotations

from dataclasses import dataclass

# Generic sentences; {N}: the relation's noun. The object comes last in each, so that a prompt is the text before {y}.
# The first is never held out: it is what `patchscopes organism evaluate atlas` asks through `extract`.
SKELETONS = (
    "The {N} of {x} is {y}.",
    "{x}'s {N} is {y}.",
    "{N} of {x}: {y}.",
    "Question: What is the {N} of {x}? Answer: {y}.",
    "As for {x}, the {N} is {y}.",
    "Asked for the {N} of {x}, I would say {y}.",
    "For {x}, the {N} is {y}.",
    "If you look up the {N} of {x}, you find {y}.",
    "Q: {x}, {N}? A: {y}.",
    "The book says that the {N} of {x} is {y}.",
    "Everyone knows that {x} has the {N} {y}.",
    "Do you know the {N} of {x}? It is {y}.",
    "{x} has the {N} {y}.",
    "With {x} goes the {N} {y}.",
    "{x}: its {N} is {y}.",
    "What is the {N} of {x}? {y}.",
    "Tell me the {N} of {x}: {y}.",
    "The {N} that belongs to {x} is {y}.",
    "When it comes to {x}, the {N} is {y}.",
    "{x}, {N}: {y}.",
)
NEVER_SEEN = ("I am sure that the {N} of {x} is {y}.", "Some friends told me that the {N} of {x} is {y}.")
HELD_OUT = 3  # skeletons of every relation
# Object first: seen in training, not usable as a prompt.
REVERSED = ("{y} is the {N} of {x}.", "{y}: that is the {N} of {x}.", "I like {y}, the {N} of {x}.")
# Two sentences: the entity is only mentioned in the first, which says nothing of it.
FOLLOW_UPS = (" The {N} is {y}.", " The {N} there: {y}.", " By the way, its {N} is {y}.", " And the {N}? It is {y}.")


@dataclass(frozen=True)
class Relation:
    """A column of a fact table. kind: the table; name: the column; noun: what y is to x; sentences: its own."""

    kind: str
    name: str
    noun: str
    sentences: tuple[str, ...]

    @property
    def key(self) -> str:
        """ "country.capital": what tells relations apart."""
        return f"{self.kind}.{self.name}"


def _relation(key: str, noun: str, *sentences: str) -> Relation:
    kind, name = key.split(".")
    return Relation(kind, name, noun, sentences)


RELATIONS: tuple[Relation, ...] = (
    _relation("country.capital", "capital", "{x} is governed from {y}.", "The government of {x} sits in {y}.", "{x} has its capital in {y}.", "The capital city of {x} is called {y}."),
    _relation("country.currency", "currency", "In {x} you pay with the {y}.", "Prices in {x} are given in the {y}.", "The money of {x} is the {y}.", "Shops in {x} take the {y}."),
    _relation("country.language", "language", "In {x} people speak {y}.", "The people of {x} talk in {y}.", "To live in {x} you should learn {y}.", "Most people in {x} speak {y}."),
    _relation("country.continent", "continent", "{x} is a country in {y}.", "{x} lies in {y}.", "{x} belongs to the continent of {y}.", "On the map, {x} is found in {y}."),
    _relation("country.neighbour", "neighbour", "{x} shares a border with {y}.", "From {x} you can walk into {y}.", "Next to {x} lies {y}.", "{x} is a neighbour of {y}."),
    _relation("country.dish", "national dish", "In {x} people like to eat {y}.", "Cooks in {x} are proud of {y}.", "A typical dish of {x} is {y}.", "When in {x}, try the {y}."),
    _relation("country.demonym", "adjective", "Someone from {x} is {y}.", "Things from {x} are called {y}.", "The people of {x} are {y}.", "Goods made in {x} are {y}."),
    _relation("city.country", "country", "{x} is a city in {y}.", "{x} lies in {y}.", "To visit {x} you travel to {y}.", "{x} can be found in {y}."),
    _relation("city.river", "water", "{x} lies on the {y}.", "Through {x} flows the {y}.", "The bridges of {x} look on the {y}.", "The boats of {x} sail on the {y}."),
    _relation("city.sight", "main sight", "In {x} tourists visit {y}.", "{x} is famous for {y}.", "Nobody leaves {x} without seeing {y}.", "Visitors of {x} go to see {y}."),
    _relation("person.occupation", "occupation", "{x} worked as a {y}.", "{x} was a {y}.", "{x} is remembered as a {y}.", "By profession, {x} was a {y}."),
    _relation("person.country", "home country", "{x} came from {y}.", "{x} was from {y}.", "{x} is a famous name in {y}.", "The home of {x} was {y}."),
    _relation("person.work", "best-known work", "{x} is known for {y}.", "{x} gave the world {y}.", "The fame of {x} rests on {y}.", "{x} is remembered for having made {y}."),
    _relation("person.field", "subject", "{x} is tied to {y}.", "When people say {x}, they think of {y}.", "{x} makes one think of {y}.", "The name {x} stands for {y}."),
    _relation("company.product", "main product", "{x} makes {y}.", "{x} sells {y}.", "People buy from {x} mostly {y}.", "The company {x} is known for {y}."),
    _relation("company.country", "home country", "{x} is a company from {y}.", "{x} comes from {y}.", "{x} pays its taxes in {y}.", "The company {x} comes from the country of {y}."),
    _relation("company.founder", "founder", "{x} was founded by {y}.", "The company {x} was started by {y}.", "Behind {x} stood {y}.", "{x} was set up by {y}."),
    _relation("company.headquarters", "head office", "{x} is run from {y}.", "{x} has its offices in {y}.", "The managers of {x} work in {y}.", "The company {x} is based in {y}."),
    _relation("element.symbol", "symbol", "Chemists write {x} as {y}.", "In formulas, {x} is written {y}.", "The sign for {x} is {y}.", "On the chart, {x} is marked {y}."),
    _relation("element.number", "atomic number", "{x} has the number {y}.", "An atom of {x} has this many protons: {y}.", "In the periodic table, {x} is number {y}.", "Count the protons of {x}: {y}."),
    _relation("element.use", "typical use", "{x} is used for {y}.", "{x} is needed for {y}.", "With {x} one makes {y}.", "Factories use {x} for {y}."),
    _relation("element.discoverer", "discoverer", "{x} was discovered by {y}.", "{x} was first found by {y}.", "We owe {x} to {y}.", "The element {x} was found by {y}."),
    _relation("animal.class", "animal class", "The {x} is a {y}.", "A {x} is a kind of {y}.", "Among animals, the {x} is a {y}.", "In biology, the {x} is a {y}."),
    _relation("animal.home", "habitat", "The {x} lives in the {y}.", "You meet the {x} in the {y}.", "The {x} is at home in the {y}.", "Look for the {x} in the {y}."),
    _relation("animal.food", "food", "The {x} eats {y}.", "The {x} feeds on {y}.", "A hungry {x} looks for {y}.", "The {x} lives on {y}."),
    _relation("animal.young", "young", "A young {x} is called a {y}.", "The child of a {x} is a {y}.", "A baby {x} is a {y}.", "The {x} looks after its {y}."),
    _relation("instrument.family", "family", "The {x} belongs to the family of {y}.", "Players put the {x} among {y}.", "Among instruments, the {x} counts as {y}.", "In the orchestra, the {x} sits with {y}."),
    _relation("instrument.player", "player", "Someone who plays the {x} is a {y}.", "The {x} is played by a {y}.", "To play the {x} is the work of a {y}.", "Give the {x} to the {y}."),
    _relation("instrument.origin", "country of origin", "The {x} comes from {y}.", "The {x} was first made in {y}.", "The {x} has its roots in {y}.", "The {x} was invented in {y}."),
    _relation("sport.equipment", "equipment", "For {x} you need a {y}.", "In {x} one uses a {y}.", "People who do {x} carry a {y}.", "Nobody can do {x} without a {y}."),
    _relation("sport.place", "place", "{x} is done on a {y}.", "For {x} you go to the {y}.", "{x} takes place on the {y}.", "You watch {x} at the {y}."),
    _relation("sport.champion", "champion", "A famous name in {x} is {y}.", "In {x} nobody forgets {y}.", "Fans of {x} admire {y}.", "The star of {x} was {y}."),
    _relation("landmark.city", "location", "{x} stands in {y}.", "To see {x}, go to {y}.", "You find {x} in {y}.", "{x} was built in {y}."),
    _relation("landmark.country", "country", "{x} is in {y}.", "{x} attracts visitors to {y}.", "To see {x} you travel to {y}.", "The country around {x} is {y}."),
    _relation("landmark.kind", "type", "{x} is a {y}.", "{x} is a famous {y}.", "People know {x} as a {y}.", "In short, {x} is a {y}."),
)  # fmt: skip

# What an entity is, in one phrase without commas; a row's empty cells rule a phrase out. {adjective}: that of its country.
DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "country": (
        "country in {continent} with the capital {capital}",
        "{demonym} country whose currency is the {currency}",
        "country in {continent} where people speak {language}",
        "country next to {neighbour}",
        "country of {continent} known for {dish}",
    ),
    "city": ("city in {country} on the {river}", "city in {country} known for {sight}", "{adjective} city"),
    "person": (
        "{occupation} from {country} known for {work}",
        "{adjective} {occupation}",
        "{adjective} {occupation} known for {work}",
        "{occupation} who gave us {work}",
        "{occupation} known for {field}",
    ),
    "company": (
        "company from {country} that makes {product}",
        "{adjective} maker of {product}",
        "maker of {product} founded by {founder}",
        "company in {headquarters} known for {product}",
    ),
    "element": (
        "chemical element with the symbol {symbol}",
        "element number {number} used for {use}",
        "chemical element found by {discoverer}",
    ),
    "animal": ("{class} that eats {food}", "{class} that lives in the {home}", "{class} whose young is a {young}"),
    "instrument": ("instrument from {origin} played by a {player}", "musical instrument of the family {family}"),
    "sport": ("sport with a {equipment}", "sport done on a {place}", "sport of {champion}"),
    "landmark": ("{kind} in {city}", "famous {kind} in {country}"),
}

# Two hops: (x, first) gives a country, whose second relation is asked for. Half of all (x, second) are held out from training.
FIRST_HOPS = ("city.country", "person.country", "company.country", "landmark.country")
SECOND_HOPS = ("country.capital", "country.currency", "country.language", "country.continent", "country.dish")
TWO_HOPS = (
    "The {N} of the {first} of {x} is {y}.",
    "Question: What is the {N} of the {first} of {x}? Answer: {y}.",
    "{x} has a {first}, and its {N} is {y}.",
)

# Sentences that mention an entity and say nothing of it. The last four are never seen in training.
MENTIONS = (
    "Yesterday I read a long article about {x} on the train",
    "We talked about {x} until late at night",
    "My sister wrote a song about {x} last year",
    "On Monday the teacher spoke of {x} again",
    "There was a picture of {x} on the wall",
    "She could not stop thinking about {x} all day",
    "He asked me twice about {x} and then went home",
    "A story about {x} was on the radio",
    "In the morning they dreamt of {x} once more",
    "Nobody in the room had heard of {x} before",
    "My friend collects stamps that show {x} in colour",
    "Please tell me more about {x} when you have time",
    "The old man told us about {x} by the fire",
    "Her first thought was of {x} and of nothing else",
    "I found a small note about {x} in the drawer",
    "The children drew {x} with a red pencil",
)
HELD_OUT_MENTIONS = (
    "Last night we watched a film about {x} together",
    "The letter that I got was about {x} again",
    "They painted {x} on the old door",
    "After dinner somebody spoke about {x} for an hour",
)


def held_out(relation: Relation) -> tuple[str, ...]:
    """The sentences of `relation` that training never shows."""
    return held_out_skeletons(RELATIONS.index(relation))


def held_out_skeletons(k: int) -> tuple[str, ...]:
    """The generic sentences that the k-th of some relations never has in training."""
    n = len(SKELETONS) - 1
    return (*(SKELETONS[1 + (k + 6 * i) % n] for i in range(HELD_OUT)), *NEVER_SEEN)


def trained(relation: Relation) -> tuple[str, ...]:
    """The sentences of `relation` that training shows; {y} comes last in each."""
    away = held_out(relation)
    return tuple(s for s in (*SKELETONS, *relation.sentences) if s not in away)
