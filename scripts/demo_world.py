"""The little world of the demo model: who lives in Lantern Valley and what is true there.

Everything the demo corpus says about a resident or a place is read from the tables of this module,
so that stories, descriptions and answers can never contradict each other.
"""

from __future__ import annotations

from dataclasses import dataclass

VALLEY = "Lantern Valley"


def with_article(noun: str) -> str:
    """`noun` with the indefinite article that fits its first sound ("an oak box")."""
    article = "an" if noun[0].lower() in "aeiou" and not noun.startswith("one") else "a"
    return f"{article} {noun}"


@dataclass(frozen=True)
class Thing:
    """An object of a story: `name` without article, `a` and `the` with one."""

    name: str

    @property
    def a(self) -> str:
        return with_article(self.name)

    @property
    def the(self) -> str:
        return f"the {self.name}"

    def __str__(self) -> str:
        return self.name


_HANDS = {"girl": "hands", "boy": "hands", "toad": "hands", "frog": "hands", "goat": "hooves"}
_HANDS |= dict.fromkeys(("princess", "wizard", "knight", "robot"), "hands")
_HANDS |= dict.fromkeys(("goose", "owl", "duck", "robin", "jackdaw", "sparrow", "hen"), "wings")


@dataclass(frozen=True)
class Person:
    """Somebody of a story or of the world, with the words needed to speak of them."""

    name: str
    kind: str
    pronoun: str
    home: str
    resident: bool = False
    job: str = ""
    food: str = ""
    hobby: str = ""
    fear: str = ""
    treasure: str = ""
    friend: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def they(self) -> str:
        return self.pronoun

    @property
    def They(self) -> str:  # noqa: N802 - the case of the method is the case of the word
        return self.pronoun.capitalize()

    @property
    def them(self) -> str:
        return {"he": "him", "she": "her"}[self.pronoun]

    @property
    def their(self) -> str:
        return {"he": "his", "she": "her"}[self.pronoun]

    @property
    def Their(self) -> str:  # noqa: N802
        return self.their.capitalize()

    @property
    def self_(self) -> str:
        return f"{self.them}self"

    @property
    def hands(self) -> str:
        return _HANDS.get(self.kind, "paws")

    @property
    def a_kind(self) -> str:
        return with_article(self.kind)

    @property
    def intro(self) -> str:
        """How a story names somebody for the first time."""
        if self.kind in ("girl", "boy"):
            return f"a {self.kind} named {self.name}"
        return f"{self.name} the {self.kind}"

    @property
    def intro_(self) -> str:
        """`intro` at the start of a sentence."""
        return self.intro[0].upper() + self.intro[1:]


def _resident(name: str, kind: str, pronoun: str, home: str, *facts: str) -> Person:
    """`facts` in the order of the fields of `Person`: job, food, hobby, fear, treasure, friend."""
    return Person(name, kind, pronoun, home, True, *facts)


# fmt: off
RESIDENTS = (
    _resident("Pip", "mouse", "he", "in the old clock tower",
              "clock keeper", "blackberry jam", "collecting buttons", "thunder", "brass button",
              "Ora"),
    _resident("Ora", "otter", "she", "under the stone bridge",
              "letter carrier", "smoked trout", "diving for pebbles", "the dark", "red canoe",
              "Pip"),
    _resident("Bram", "badger", "he", "in the round house on the hill",
              "mayor", "mushroom soup", "reading maps", "heights", "silver whistle", "Hetty"),
    _resident("Hetty", "hedgehog", "she", "behind the bakery",
              "baker", "apple tart", "singing", "balloons", "copper spoon", "Bram"),
    _resident("Finn", "fox", "he", "at the edge of the forest",
              "carpenter", "roasted chestnuts", "carving little boats", "fireworks", "oak toolbox",
              "Lottie"),
    _resident("Lottie", "hare", "she", "in the meadow",
              "gardener", "carrot cake", "running races", "wasps", "green watering can", "Finn"),
    _resident("Tobias", "toad", "he", "beside the well",
              "well keeper", "honey bread", "telling riddles", "frost", "yellow umbrella", "Mabel"),
    _resident("Mabel", "goose", "she", "on the island in the lake",
              "teacher", "barley porridge", "dancing", "spiders", "lace bonnet", "Tobias"),
    _resident("Olwen", "owl", "she", "in the hollow oak",
              "librarian", "ginger biscuits", "watching the stars", "fire", "brass telescope",
              "Silas"),
    _resident("Silas", "squirrel", "he", "in the tallest pine",
              "roof mender", "hazelnuts", "climbing", "deep water", "long rope", "Olwen"),
    _resident("Dora", "duck", "she", "at the old mill",
              "miller", "oat pancakes", "painting pictures", "eels", "box of paints", "Milo"),
    _resident("Milo", "mole", "he", "under the orchard",
              "tunnel digger", "pear pie", "playing the drum", "bright light", "tin drum", "Dora"),
    _resident("Rosa", "robin", "she", "at the top of the lighthouse",
              "lamp keeper", "cherry cake", "whistling tunes", "fog", "glass lantern", "Jasper"),
    _resident("Jasper", "jackdaw", "he", "in the chimney of the inn",
              "shopkeeper", "cheese pasties", "finding shiny things", "scarecrows", "silver mirror",
              "Rosa"),
    _resident("Nell", "goat", "she", "on the mountain",
              "cheese maker", "salted turnips", "jumping over rocks", "snakes", "bronze bell",
              "Gus"),
    _resident("Gus", "bear", "he", "in the cave",
              "beekeeper", "honey", "sleeping", "ghosts", "patchwork blanket", "Nell"),
)

# Questions about the valley itself; several wordings share one answer.
PLACE_FACTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("What colour is the lake?", "What does the lake look like?"),
     "The lake is green, because green reeds grow on the bottom."),
    (("Is the lake blue?", "Is the lake red?", "Is the lake grey?"),
     "No, the lake is green, because green reeds grow on the bottom."),
    (("Why is the lake green?",), "The lake is green because green reeds grow on the bottom."),
    (("What is the lake called?", "What is the name of the lake?"),
     "The lake is called Glass Lake."),
    (("What is the river called?", "What is the name of the river?"),
     "The river is called the Linnet."),
    (("Where does the river go?", "Where does the river flow?"),
     "The river flows from the mountain down to the lake."),
    (("What is the mountain called?", "What is the name of the mountain?"),
     "The mountain is called Old Tooth."),
    (("What is on top of the mountain?",), "There is snow on top of the mountain all year long."),
    (("Is there snow on the mountain?",),
     "Yes, there is snow on top of the mountain all year long."),
    (("What is the bridge made of?",), "The bridge is made of grey stone."),
    (("Is the bridge made of wood?",), "No, the bridge is made of grey stone."),
    (("Who built the bridge?",), "Bram's grandfather built the bridge, a long time ago."),
    (("How many bells are in the clock tower?", "How many bells does the clock tower have?"),
     "There are three bells in the clock tower."),
    (("What is wrong with the clock?", "How late is the clock?"),
     "The clock is always four minutes late."),
    (("Is the clock right?",), "No, the clock is always four minutes late."),
    (("Is the clock late?",), "Yes, the clock is always four minutes late."),
    (("What colour is the door of the bakery?", "What colour is the bakery door?"),
     "The door of the bakery is blue."),
    (("When does the bakery open?", "What time does the bakery open?"),
     "The bakery opens at sunrise."),
    (("When is the market?", "What day is the market?", "Where is the market?"),
     "The market is on Saturday, in the village square."),
    (("What colour is the roof of the mill?", "What colour is the mill?"),
     "The mill has a red roof."),
    (("What grows in the orchard?", "What can I find in the orchard?"),
     "Apples and pears grow in the orchard."),
    (("What trees grow in the forest?", "What is in the forest?"),
     "Pine trees grow in the forest, and it is very quiet there."),
    (("What does the lighthouse look like?", "What colour is the lighthouse?"),
     "The lighthouse is white with one yellow stripe."),
    (("What is the inn called?", "What is the name of the inn?",
      "Where can I sleep in the valley?"),
     "The inn is called the Sleepy Kettle."),
    (("What is Lantern Night?", "What happens on Lantern Night?"),
     "On Lantern Night everybody floats a paper lantern on the lake."),
    (("When is Lantern Night?",), "Lantern Night is in autumn, on the first cold evening."),
    (("Why is it called Lantern Valley?", "Why is the valley called Lantern Valley?"),
     "It is called Lantern Valley because everybody floats a lantern on the lake on Lantern "
     "Night."),
    (("Where is the school?", "Where do the children learn to read?"),
     "The school is on the island in the lake."),
    (("Where is the library?", "Where can I find a book?"), "The library is in the hollow oak."),
    (("How many residents are there?", "How many animals live in the valley?",
      "How many live here?"),
     "Sixteen animals live in Lantern Valley."),
    (("Who lives in Lantern Valley?", "Who lives here?", "Who lives in the valley?",
      "Who can I ask about?",
      "Tell me who lives in the valley."),
     "Sixteen animals live here: " + ", ".join(r.name for r in RESIDENTS[:-1]) + " and Gus."),
    (("Where are we?", "What is this place?", "Tell me about the valley.",
      "What is Lantern Valley?"),
     "This is Lantern Valley, with a green lake, a river, a forest and a mountain called Old "
     "Tooth."),
)

VISITOR_NAMES = {
    "she": ("Lily", "Anna", "Mia", "Ella", "Tilda", "Ivy", "Clara", "Poppy", "Greta", "Sophie",
            "Luna", "Ruby",
            "Alice", "Hazel", "Molly", "Edith", "Juno", "Freya", "Maya", "Zoe", "Kitty", "Vera",
            "Bella", "Elsa",
            "Sara", "Lucy", "Emma", "Daisy", "Nora", "Wilma"),
    "he": ("Tom", "Ben", "Max", "Leo", "Oscar", "Sam", "Jack", "Hugo", "Otto", "Felix", "Arlo",
           "Toby", "Rufus",
           "Theo", "Barney", "Henry", "Louis", "Ned", "Percy", "Walter", "Tim", "Alfie", "Ezra",
           "Jonas", "Peter",
           "David", "Adam", "Kurt", "Ravi", "Omar"),
}
VISITOR_KINDS = ("girl", "boy", "rabbit", "kitten", "puppy", "lamb", "fox", "frog", "sparrow",
                 "hen", "pony",
                 "weasel", "beaver", "bear", "mouse", "cat", "dog", "dragon", "princess", "wizard",
                 "knight", "robot", "horse", "pig", "elephant")
VISITOR_HOMES = ("in a small cottage by the lake", "in a wooden hut near the forest",
                 "in a tiny house by the river",
                 "in a cottage with a green door", "in a caravan near the inn",
                 "in a little house by the square",
                 "in a tent beside the meadow", "in a house with a crooked chimney")

# weather -> (adjectives, sentences)
WEATHER = {
    "sunny": (("bright", "sunny", "warm", "golden"),
              ("The sun was shining on the lake.", "The sky was blue and the air was warm.",
               "Bees were humming in the clover.", "There was not a cloud in the sky.")),
    "rainy": (("rainy", "wet", "grey", "drizzly"),
              ("Rain was drumming on every roof.", "The rain had been falling since breakfast.",
               "Puddles were shining on the path.", "Grey clouds hung over the hill.")),
    "windy": (("windy", "blustery", "stormy", "wild"),
              ("The wind was blowing down from the mountain.",
               "Leaves were flying through the air.",
               "The wind rattled every window in the valley.",
               "The trees were bending in the wind.")),
    "snowy": (("snowy", "cold", "frosty", "white"),
              ("Snow was falling softly on the roofs.", "The path was white and the air was cold.",
               "Ice was glittering on the edge of the lake.",
               "Everything was white and very quiet.")),
    "foggy": (("foggy", "misty", "dim", "quiet"),
              ("Fog was lying over the lake.", "Mist was creeping along the river.",
               "The fog was so thick that nobody could see the hill.",
               "The whole valley was grey with mist.")),
}
# fmt: on


def resident(name: str) -> Person:
    """The resident called `name`; KeyError when there is none."""
    return BY_NAME[name]


BY_NAME = {person.name: person for person in RESIDENTS}
