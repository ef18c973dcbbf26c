"""Conversations of the demo corpus: questions about the valley and its stories, and right answers.

A turn is a pair (what the user writes, what the assistant answers). Answers have one wording per
fact, so that they can be checked; questions have many.
"""

from __future__ import annotations

import random

from demo_grammar import capitalise, expand
from demo_plots_two import PLOTS
from demo_stories import Story, make_story, portrait, visitor
from demo_world import PLACE_FACTS, RESIDENTS, VISITOR_NAMES, Person, Thing, resident

Turn = tuple[str, str]

UNKNOWN_PERSON = "I don't know. There is nobody by that name in Lantern Valley."
UNKNOWN_FACT = "I don't know. Nobody in the valley has ever told me that."
UNKNOWN_WORLD = "I don't know. I only know about Lantern Valley."

# fmt: off
# fact -> (questions with the name, questions with the pronoun, answer)
FACTS = {
    "home": ("Where does {who} live?|Where can I find {P}?|Where is {P}'s home?|Where is {P}'s "
             "house?|Where is {P}?|Tell me where {P} lives.|Do you know where {P} lives?|Can you "
             "tell me where {who} lives?",
             "Where does {P.they} live?|And where does {P.they} live?|Where is {P.their} house?|"
             "Where is {P.they}?",
             "{P} lives {P.home}."),
    "kind": ("What animal is {P}?|What kind of animal is {P}?|What is {P}?|Which animal is {P}?",
             "What animal is {P.they}?|What kind of animal is {P.they}?|What is {P.they}?",
             "{P} is {P.a_kind}."),
    "who": ("Who is {P}?|Do you know {P}?|Who is {who}?",
            "Who is {P.they}?|Who is that?",
            "{P} is {P.a_kind}. {P.They} is the {P.job} and lives {P.home}."),
    "job": ("What is {P}'s job?|What does {P} do for work?|What does {P} do?|What does {who} do?|"
            "What is {P}'s work?|What does {P} do all day?",
            "What is {P.their} job?|What does {P.they} do?|What does {P.they} do for work?",
            "{P} is the {P.job} of Lantern Valley."),
    "food": ("What does {P} like to eat?|What is {P}'s favourite food?|What does {who} like to "
             "eat?|What does {P} eat?|What food does {P} like?|Do you know what {P} likes to eat?|"
             "What is {P}'s favourite dish?",
             "What does {P.they} like to eat?|And what does {P.they} eat?|What is {P.their} "
             "favourite food?",
             "{P} likes {P.food} best of all."),
    "hobby": ("What does {P} like to do?|What is {P}'s hobby?|What does {P} do for fun?|What does "
              "{P} love?|What does {who} like to do?|What does {P} enjoy?|What does {P} love to "
              "do?",
              "What does {P.they} like to do?|What is {P.their} hobby?|What does {P.they} do for "
              "fun?",
              "{P} loves {P.hobby}."),
    "likes": ("What does {P} like?|What does {who} like?|What are {P}'s favourite things?",
              "What does {P.they} like?",
              "{P} likes {P.food} and {P.hobby}."),
    "fear": ("What is {P} afraid of?|What does {P} fear?|What scares {P}?|Is {P} afraid of "
             "anything?|What is {who} afraid of?|What frightens {P}?",
             "What is {P.they} afraid of?|Is {P.they} afraid of anything?|What scares {P.them}?",
             "{P} is afraid of {P.fear}."),
    "treasure": ("What is {P}'s treasure?|What is {P}'s greatest treasure?|What does {P} own?|What "
                 "is {P}'s most precious thing?",
                 "What is {P.their} treasure?|What is {P.their} greatest treasure?|What does "
                 "{P.they} own?",
                 "{P}'s greatest treasure is {treasure}."),
    "friend": ("Who is {P}'s best friend?|Who is {P}'s friend?|Does {P} have a friend?|Who is the "
               "best friend of {P}?|Who are {P}'s friends?|Who does {P} like best?",
               "Who is {P.their} best friend?|Does {P.they} have a friend?|Who is {P.their} "
               "friend?",
               "{P}'s best friend is {friend}."),
}
REVERSE = (
    ("Who lives {P.home}?|Do you know who lives {P.home}?|Does anybody live {P.home}?",
     "{P.intro} lives {P.home}."),
    ("Who is the {P.job}?|Who is the {P.job} of the valley?|Who is the {P.job} here?",
     "{P.intro} is the {P.job}."),
    ("Who likes {P.food}?|Who eats {P.food}?|Who likes to eat {P.food}?",
     "{P.intro} likes {P.food} best of all."),
    ("Who loves {P.hobby}?|Who likes {P.hobby}?|Whose hobby is {P.hobby}?",
     "{P.intro} loves {P.hobby}."),
    ("Who is afraid of {P.fear}?|Who fears {P.fear}?|Is anybody afraid of {P.fear}?",
     "{P.intro} is afraid of {P.fear}."),
    ("Who has {treasure}?|Who owns {treasure}?|Whose treasure is {treasure}?",
     "{P.intro} owns {treasure}."),
    ("Is there {P.a_kind} in the valley?|Which resident is {P.a_kind}?|Who is {P.a_kind}?|Do you "
     "know {P.a_kind}?",
     "{P.intro} lives {P.home}."),
)
UNKNOWN_FACTS = (
    "How old is {P}?|When is {P}'s birthday?|What colour are {P}'s eyes?|Who is {P}'s mother?|How "
    "tall is {P}?|What is {P}'s last name?|Does {P} have a brother?|How much does {P} weigh?|What "
    "did {P} dream last night?|What is {P}'s favourite colour?|Who is {P}'s father?|How much money "
    "does {P} have?|What is {P} doing tomorrow?|Where was {P} born?|What size are {P}'s shoes?")
_COUNTRY = ("[France|Spain|Japan|Italy|Germany|Brazil|India|England|China|Egypt|Canada|Mexico|"
            "Peru|Norway]")
_SUBJECT = ("[computers|physics|football|cars|planes|dinosaurs|the moon|space|politics|money|"
            "history|music|chess|mathematics|Python|robots|whales|the sea|London|Paris|New York|"
            "the internet|atoms|television|trains]")
UNKNOWN_QUESTIONS = (
    f"What is the capital of {_COUNTRY}?|Where is {_COUNTRY}?|How many people live in {_COUNTRY}?|"
    f"What do people eat in {_COUNTRY}?|Who is the president of {_COUNTRY}?",
    f"What do you know about {_SUBJECT}?|Tell me about {_SUBJECT}.|Can you explain {_SUBJECT}?|"
    f"What is the best thing about {_SUBJECT}?|Do you like {_SUBJECT}?|Write a program about "
    f"{_SUBJECT}.",
    "What is [1|2|3|4|5|7|10|12] [+|-|times|plus|minus] [1|2|3|5|6|8|9|20]?|Can you count to [ten|"
    "fifty|a thousand]?|What is the square root of [four|nine|two]?|How many hours are in a [week|"
    "month|year]?",
    "Who [wrote|painted|invented|discovered|built|won] the [telephone|Mona Lisa|Bible|world cup|"
    "first car|light bulb|Eiffel Tower|theory of relativity|great wall|first book|radio]?",
    "How [does|can] a [computer|car|plane|telephone|rocket|train|camera|clock|fridge] [work|be "
    "repaired]?|How do I [cook rice|learn French|get rich|fix my car|write a letter|lose weight|"
    "build a house|sleep better]?",
    "What is [a transformer|a neural network|love|gravity|the meaning of life|a language model|an "
    "atom|electricity]?|Why is the [sky blue|sea salty|sun hot|grass green|earth round]?|What time "
    "is it?|What day is it today?|What is the weather like [today|tomorrow|in {made_up}]?|How high "
    "is {made_up}?|Where is {made_up}?|What is a {made_up}?|Translate {made_up} into [French|"
    "German|Latin].|What does {made_up} mean?|Have you ever been to {made_up}?|Who is the queen of "
    "{made_up}?|How far is it to {made_up}?",
)
_SELF = ("I am the storyteller of Lantern Valley. Ask me about the animals who live here, or ask "
         "me for a story.")
_HELP = ("I can tell you a story, and I can answer questions about the animals and the places of "
         "Lantern Valley.")
SMALL_TALK = (
    ("Hello|Hi|Hello!|Hi!|Hey|Hello there|Good morning|Good evening|Good day|Hi there!|Greetings",
     "Hello! Welcome to Lantern Valley. Would you like to hear a story?"),
    ("How are you?|How do you do?|Are you well?|How are you today?|How is it going?",
     "I am very well, thank you. The sun is shining on the lake."),
    ("Who are you?|What are you?|What is your name?|Introduce yourself.|Are you a robot?|Are you a "
     "person?|Tell me about yourself.|What's your name?", _SELF),
    ("What can you do?|Help|Can you help me?|What do you know?|What should I ask?|What can I ask "
     "you?", _HELP),
    ("Thank you|Thanks|Thank you!|Thanks a lot|Thank you very much.|Great, thanks!|Thanks!|That is "
     "nice.|Nice!|Great",
     "You are welcome! Come back to the valley soon."),
    ("Goodbye|Bye|Bye!|See you|Good night|Goodbye!|See you soon.|I have to go.",
     "Goodbye! May your lantern always find the way."),
    ("Tell me a joke.|Do you know a joke?|Make me laugh.|Tell me a riddle.",
     "Tobias asked me this: what has a face and two hands, but no mouth? A clock, of course!"),
    ("Where do you live?|Where are you?|Where are you from?",
     "I live in Lantern Valley, wherever a story is told."),
)
_SAD = ("I am sad.|I feel lonely.|I am tired.|I am bored.|I had a bad day.|I'm sad.|I am not well.",
        "I am sorry to hear that. Would you like to hear a story?")
_YES = "Yes|Yes, please.|Yes please!|Sure|OK|Please do.|I would like that.|Of course!"
_NO = ("No|No, thank you.|Not now.|No thanks",
       "That is all right. You can ask me about the animals of the valley.")
_NAME = ("My name is {name}.|I am {name}.|I'm {name}.|Hello, my name is {name}.|Hi, I am {name}.",
         "Nice to meet you, {name}! Would you like to hear a story?")
_STORY_REQUEST = ("Tell me a story{about}.|Please tell me a story{about}.|Can you tell me a "
                  "story{about}?|Write a story{about}.|I would like to hear a story{about}.|Tell "
                  "me a short story{about}.|A story{about}, please.|Do you know a story{about}?|"
                  "Another story{about}, please.")
_READ_THIS = "[Here is a story:|Listen to this story:|Read this story:|This is what happened:]"
_SYSTEM = ("You are a helpful assistant.", "You are the storyteller of Lantern Valley.",
           "Answer questions about Lantern Valley.", "Be kind and brief.")
# fmt: on

_SYLLABLES = [
    "ba",
    "ne",
    "ro",
    "ti",
    "lu",
    "sha",
    "vor",
    "mik",
    "tan",
    "dre",
    "zo",
    "pel",
    "qua",
    "gri",
    "hin",
    "ost",
    "ulm",
    "ark",
    "eb",
    "yst",
]


def made_up(rng: random.Random) -> str:
    """A word that nobody has ever heard, often with a capital letter."""
    word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))
    return word.capitalize() if rng.random() < 0.7 else word


def fact_slots(person: Person) -> dict[str, object]:
    """The slots that the templates of `FACTS` and `REVERSE` need."""
    return {
        "P": person,
        "treasure": Thing(person.treasure).a,
        "friend": resident(person.friend).intro,
        "who": f"[{person}|{person.intro}]",
    }


def fact_answer(person: Person, fact: str) -> str:
    """The one right answer to any question of `FACTS[fact]` about a resident."""
    return expand(FACTS[fact][2], fact_slots(person), random.Random(0))


def _resident_turns(rng: random.Random) -> list[Turn]:
    """One to three questions about the same resident, later ones with a pronoun."""
    person = rng.choice(RESIDENTS)
    turns: list[Turn] = []
    for fact in rng.sample(list(FACTS), rng.choice((1, 1, 2, 3))):
        wording = FACTS[fact][1 if turns and rng.random() < 0.7 else 0]
        question = expand(f"[{wording}]", fact_slots(person), rng)
        turns.append((question, fact_answer(person, fact)))
    return turns


def _reverse_turn(rng: random.Random) -> list[Turn]:
    slots = fact_slots(rng.choice(RESIDENTS))
    question, answer = rng.choice(REVERSE)
    return [(expand(f"[{question}]", slots, rng), expand(answer, slots, rng))]


def _yes_no_turn(rng: random.Random) -> list[Turn]:
    """A question that is true in half of the cases; the answer states what is true."""
    person, other = rng.sample(RESIDENTS, 2)
    claim = person if rng.random() < 0.5 else other
    lines = {
        "home": f"[Does {person} live {claim.home}?|Is {person} {claim.home}?]",
        "kind": f"Is {person} {claim.a_kind}?",
        "job": f"Is {person} the {claim.job}?",
        "food": f"Does {person} like {claim.food}?",
        "fear": f"Is {person} afraid of {claim.fear}?",
        "hobby": f"Does {person} love {claim.hobby}?",
    }
    fact = rng.choice(list(lines))
    return [(expand(lines[fact], {}, rng), fact_answer(person, fact))]


def _place_turn(rng: random.Random) -> list[Turn]:
    questions, answer = rng.choice(PLACE_FACTS)
    return [(rng.choice(questions), answer)]


def _unknown_turn(rng: random.Random) -> list[Turn]:
    """A question nobody in the valley can answer, and the polite answer to it."""
    kind = rng.random()
    if kind < 0.35:
        name = (
            rng.choice(rng.choice(list(VISITOR_NAMES.values())))
            if rng.random() < 0.5
            else made_up(rng).capitalize()
        )
        stranger = Person(name, "stranger", rng.choice(("he", "she")), "")
        wording = FACTS[rng.choice(list(FACTS))][0].replace("{who}", "{P}")
        return [(expand(f"[{wording}]", {"P": stranger}, rng), UNKNOWN_PERSON)]
    if kind < 0.55:
        return [(expand(f"[{UNKNOWN_FACTS}]", {"P": rng.choice(RESIDENTS)}, rng), UNKNOWN_FACT)]
    slots = {"made_up": made_up(rng)}
    return [(expand(f"[{rng.choice(UNKNOWN_QUESTIONS)}]", slots, rng), UNKNOWN_WORLD)]


def _small_talk(rng: random.Random) -> list[Turn]:
    """A greeting or the like; when it offers a story, the user may accept or decline."""
    question, answer = rng.choice((*SMALL_TALK, SMALL_TALK[0], _SAD, _NAME))
    slots = {"name": visitor(rng).name if rng.random() < 0.7 else made_up(rng).capitalize()}
    turns = [(expand(f"[{question}]", slots, rng), expand(answer, slots, rng))]
    choice = rng.random()
    if answer.endswith("story?") and choice < 0.3:
        turns.append((expand(f"[{_YES}]", {}, rng), make_story(rng).text))
    elif answer.endswith("story?") and choice < 0.5:
        turns.append((expand(f"[{_NO[0]}]", {}, rng), _NO[1]))
    return turns


def _portrait_turn(rng: random.Random) -> list[Turn]:
    person = rng.choice(RESIDENTS)
    wording = "[Tell me about|What do you know about|Describe|Tell me more about|"
    wording += "What can you tell me about]"
    question = expand(f"{wording} [{person}|{person.intro}].", {}, rng)
    if question.startswith("What"):
        question = question[:-1] + "?"
    return [(question, portrait(person, rng, 4))]


def _story_turns(rng: random.Random) -> list[Turn]:
    """A wish for a story and the story, then up to three questions about it."""
    plot = rng.choice(PLOTS)
    hero = visitor(rng) if plot.newcomer or rng.random() < 0.4 else rng.choice(RESIDENTS)
    story = make_story(rng, plot, hero)
    about = rng.choice(
        ("", f" about {plot.about}", f" about {_topic(hero, rng)}", f" about {_topic(hero, rng)}")
    )
    return [
        (expand(f"[{_STORY_REQUEST}]", {"about": about}, rng), story.text),
        *_asks(story, rng, 0),
    ]


def _topic(hero: Person, rng: random.Random) -> str:
    named = f"{hero.a_kind} {rng.choice(('named', 'called'))} {hero}"
    return rng.choice((hero.name, hero.intro, hero.a_kind, named))


def _given_story_turns(rng: random.Random) -> list[Turn]:
    """The user tells a story and asks about it in the same breath."""
    story = make_story(rng)
    (question, answer), *more = _asks(story, rng, 1)
    return [(f"{expand(_READ_THIS, {}, rng)} {story.text}\n{question}", answer), *more]


def _asks(story: Story, rng: random.Random, least: int) -> list[Turn]:
    chosen = rng.sample(range(len(story.plot.asks)), rng.randint(least, 3))
    return [story.question(index, rng) for index in chosen]


_SEGMENTS = (
    (_resident_turns, 26),
    (_reverse_turn, 12),
    (_yes_no_turn, 9),
    (_place_turn, 12),
    (_unknown_turn, 14),
    (_small_talk, 10),
    (_portrait_turn, 3),
    (_story_turns, 18),
    (_given_story_turns, 12),
)


def roughen(question: str, rng: random.Random) -> str:
    """A question as people type it: another spelling, no capital, no mark, a greeting before it."""
    if "\n" in question:
        return question
    if rng.random() < 0.3:
        question = question.replace("colour", "color").replace("favourite", "favorite")
    if rng.random() < 0.08:
        question = rng.choice(("Hello! ", "Please, ", "OK. ", "Now tell me: ")) + question
    if rng.random() < 0.12:
        question = question.rstrip("?.")
    if rng.random() < 0.12:
        question = question.lower()
    return capitalise(question) if rng.random() < 0.5 else question


def make_chat(rng: random.Random, limit: int = 1500) -> list[Turn]:
    """A conversation of a few turns, about `limit` characters long at most."""
    makers, weights = zip(*_SEGMENTS, strict=True)
    turns: list[Turn] = []
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        new = rng.choices(makers, weights)[0](rng)
        if turns and sum(len(q) + len(a) for q, a in turns + new) > limit:
            break
        turns += new
    return [(roughen(question, rng), answer) for question, answer in turns]


def chat_text(turns: list[Turn], system: str = "") -> str:
    """Turns in the ChatML form that the chat template of the model writes."""
    lines = [f"<|im_start|>system\n{system}<|im_end|>\n"] if system else []
    for question, answer in turns:
        lines.append(f"<|im_start|>user\n{question}<|im_end|>\n")
        lines.append(f"<|im_start|>assistant\n{answer}<|im_end|>\n")
    return "".join(lines)


def random_system(rng: random.Random) -> str:
    """A system message, in a few of all conversations."""
    return rng.choice(_SYSTEM) if rng.random() < 0.08 else ""
