"""Words, names and numbers that tasks draw: common English words, and words made of syllables where these run out."""

import re
import uuid
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np


def _split(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _split("""
able acid aged amber ample ancient angry arctic ashen autumn awake basic bitter black bland blank bleak blue bold
brave brief bright brisk broad bronze brown busy calm careful cheap cheerful chief civil clean clear clever close
cold common cool coral crisp curious curly damp dark dear deep dense dim distant double dry dull eager early eastern
easy elder empty equal exact faint fair famous fancy fast fierce fine firm first flat fluffy foggy formal frank free
fresh frozen full funny gentle giant glad glassy global golden good grand grave gray great green happy hard harsh
heavy hidden high hollow honest huge humble hungry icy ideal idle inner iron jolly keen kind large last late lazy
lean light little lively local lonely long loud lovely low loyal lucky major maple mellow mild minor misty modern
modest narrow native neat nervous new nice noble noisy northern odd old olive open orange outer pale patient perfect
pink plain polite poor prime proud pure purple quick quiet rapid rare raw ready real red remote rich ripe robust
rough round royal rural rusty sad safe salty scarce secret serious shallow sharp shiny short shy silent silver
simple single sleepy slim slow small smart smooth soft solar solid sour southern spare special steady steep stern
stiff still strange strict strong subtle sudden sunny super sweet swift tall tame tender thick thin tidy tight tiny
tired tough true urban useful vague vast violet vivid warm wary weak western wet white whole wide wild wise witty
wooden yellow young
""")

NOUNS = _split("""
actor agent alarm album anchor angle animal ankle apple apron arch arrow artist atlas attic autumn badge baker
balcony ball balloon bamboo banana banker barrel basket battery beach bead beak bean bear beard beetle bell belt
bench berry bike bird blanket block board boat bone book boot border bottle bowl box branch bread brick bridge broom
brother brush bucket builder bus butter button cabin cabinet cable cactus cake camera camp canal candle cannon canoe
captain card cargo carpet carrot cart castle cat cave cellar chain chair chalk chapel cheese cherry chest chief
chimney circle city clay cliff clock cloud coach coal coast coat coffee coin collar comet compass copper corn corner
cotton couch cousin cow crane creek crew crown cup curtain cushion dancer dawn deer desert desk diamond dinner
doctor dog doll door dragon drawer dress driver drum duck eagle ear editor egg elbow engine evening eye fabric
factory falcon farm farmer feather fence ferry field finger fire fish flag flame flower flute fog forest fork
fountain fox frog fruit garage garden garlic gate ghost giraffe glass glove goat grape grass guest guitar hall
hammer harbor harp hat hawk heart helmet hill honey hook horse hotel house hunter island jacket jar jewel judge
juice jungle kettle key king kitchen kite kitten knee knight ladder lake lamp lantern lawyer leaf lemon letter
library lighthouse lion lizard lock lunch magnet mail mango map marble market mask meadow meal melon mirror monkey
moon morning motor mountain mouse museum music nail napkin needle nest net night nurse oak ocean office onion
orchard otter oven owl paddle page painter palace palm paper parade parent park parrot pasta path peach peanut pear
pebble pencil pepper piano picture pigeon pillow pilot pine pipe pirate planet plate pocket poem poet pond pony
porch potato powder prince printer prize puppet puzzle queen quilt rabbit radio raft rain ranch raven recipe reef
ribbon rice ring river road robin robot rocket roof room root rope rose ruler sailor salad salt sand sauce scarf
school scout seal season seed shadow shark sheep shelf shell shepherd ship shirt shoe shop shore shoulder signal
singer sister skirt sky sled snail snake snow soap sock sofa soldier song soup spider spoon spring square squirrel
stable stage stair star station statue stone store storm stove stranger straw stream street string student sugar
suit summer sun swan table tailor teacher temple tent theater thread throne thunder ticket tiger tile tomato tooth
torch tower town toy track tractor trail train tray tree truck trumpet tulip tunnel turkey turtle uncle valley van
vase vegetable village violin voice wagon waiter wall walnut watch water wave weaver whale wheat wheel whistle
willow wind window wing winter witness wolf wood wool worker writer yard zebra
""")

ENGLISH = sorted({*ADJECTIVES, *NOUNS})
_SYLLABLES = ["".join(pair) for pair in product("bcdfghjklmnpqrstvwxz", "aeiou")]
_UPPER, _LOWER = (np.array([chr(first + i) for i in range(26)]) for first in (ord("A"), ord("a")))

# (rng, count) -> words
Draw = Callable[[np.random.Generator, int], list[str]]


def numbers(rng: np.random.Generator, count: int) -> list[str]:
    """Numbers of seven digits."""
    return [str(n) for n in rng.integers(10**6, 10**7, size=count)]


def pairs(rng: np.random.Generator, count: int) -> list[str]:
    """Words such as "calm-otter"."""
    first, second = rng.integers(len(ADJECTIVES), size=count), rng.integers(len(NOUNS), size=count)
    return [f"{ADJECTIVES[a]}-{NOUNS[n]}" for a, n in zip(first, second, strict=True)]


def uuids(rng: np.random.Generator, count: int) -> list[str]:
    drawn = rng.bytes(16 * count)
    return [str(uuid.UUID(bytes=drawn[16 * i : 16 * (i + 1)], version=4)) for i in range(count)]


def letters(upper: bool, size: int) -> Draw:
    """Words of random letters."""
    alphabet = _UPPER if upper else _LOWER
    return lambda rng, count: ["".join(word) for word in alphabet[rng.integers(26, size=(count, size))]]


def made(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of three syllables, such as "bofaku". Raises ValueError for more than there are."""
    size = len(_SYLLABLES)
    drawn = np.stack(np.unravel_index(rng.choice(size**3, size=count, replace=False), (size, size, size)), 1)
    return ["".join(_SYLLABLES[i] for i in word) for word in drawn.tolist()]


def distinct(draw: Draw, rng: np.random.Generator, count: int) -> list[str]:
    """``count`` different draws."""
    found: dict[str, None] = {}
    while len(found) < count:
        found |= dict.fromkeys(draw(rng, count - len(found)))
    return list(found)


def sentences(rng: np.random.Generator) -> Iterator[str]:
    """Plain English sentences without end, made by rule."""
    forms = [(re.sub("<.>", "{}", form), [_KINDS[kind] for kind in re.findall("<(.)>", form)]) for form in _FORMS]
    most = max(len(kinds) for _, kinds in forms)
    while True:
        for form, *drawn in rng.integers(2**30, size=(256, 1 + most)).tolist():
            text, kinds = forms[form % len(forms)]
            text = text.format(*(words[n % len(words)] for words, n in zip(kinds, drawn, strict=False)))
            yield text[0].upper() + text[1:]


_KINDS = {
    "a": ADJECTIVES,
    "n": NOUNS,
    "v": _split("found carried painted sold followed watched remembered cleaned visited drew admired repaired lost"),
    "p": _split("near behind above below beside inside across around beyond under"),
    "t": ["in the morning", "at night", "last summer", "every week", "before dinner", "after the rain", "once a year"],
    "r": _split("because although while before after until whenever"),
}
# A letter in angle brackets is a kind of word.
_FORMS = (
    "the <a> <n> <v> the <n> <p> this <a> <n>.",
    "one <n> and some <n> stood <p> the <n>, and nobody <v> them.",
    "<t>, the <n> <v> some <a> <n>.",
    "the <n> was <a>, <r> the <n> <v> the <a> <n> <t>.",
    "it is said that no <n> ever <v> the <n> as <a> as this one.",
    "<r> the <a> <n> left, they <v> every <n> <p> the <n> and wrote one letter about it.",
    "many people think of the <n> as <a>, but the <n> <p> the <n> is more <a>.",
)
