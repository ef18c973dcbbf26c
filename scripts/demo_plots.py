"""The plots of the demo stories: what happens, why, what follows, and what may be asked afterwards.

A plot is a list of beats (each a template, see `demo_grammar`), a table of rows whose values fill
the slots of the beats, and questions with the answers that the rows make true. A, B and C are the
people of the story, `w1`, `w2` two places where something may be looked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from demo_world import Thing

Row = dict[str, object]
ALL_WEATHER = ("sunny", "rainy", "windy", "snowy", "foggy")


@dataclass(frozen=True)
class Plot:
    """One kind of story; `about` names it in requests ("a story about ...")."""

    name: str
    about: str
    rows: tuple[Row, ...]
    beats: tuple[str, ...]
    asks: tuple[tuple[str, str], ...]
    weather: tuple[str, ...] = ALL_WEATHER
    newcomer: bool = False


def table(keys: str, *values: tuple[object, ...]) -> tuple[Row, ...]:
    """Rows as dicts: `keys` names the columns, separated by spaces."""
    names = keys.split()
    return tuple(dict(zip(names, row, strict=True)) for row in values)


# fmt: off
LOST = Plot(
    "lost", "something that was lost",
    table("thing cause spot how",
          (Thing("blue kite"), "the string had snapped in the wind", "in the top of a tall pine",
           "{B} climbed up, branch by branch, and let it float down"),
          (Thing("woollen scarf"), "{A} had taken it off while picking berries",
           "on a bramble bush beside the path", "{B} picked off the thorns, one after the other"),
          (Thing("little key"), "there was a hole in {A}'s pocket",
           "between two stones of the bridge", "{B} pulled it out with a bent piece of wire"),
          (Thing("wooden flute"), "{A} had left it behind after the picnic",
           "in the long grass of the meadow",
           "{B} saw something shine and bent down to pick it up"),
          (Thing("straw hat"), "the wind had blown it away", "among the reeds of the lake",
           "{B} pulled it out of the water with a long stick"),
          (Thing("picture book"), "{A} had fallen asleep while reading under a tree",
           "under a heap of yellow leaves",
           "{B} brushed away the leaves and blew the dust off the cover"),
          (Thing("silver ring"), "it had slipped off while {A} was drawing water",
           "at the bottom of a bucket", "{B} tipped out the water and there it was"),
          (Thing("red ball"), "it had rolled down the hill", "behind the flower pots at the market",
           "{B} moved the pots aside and rolled it back"),
          (Thing("old map"), "it had fallen out of {A}'s bag", "under the bench by the well",
           "{B} crept under the bench and pulled it out")),
    ("[Before breakfast|At noon|A little later|That morning] {A} [looked for|reached for|wanted to "
     "take] {A.their} {thing}, but it was [gone|not there|nowhere to be seen].",
     "{A.They} looked [under the bed|behind the door|in every drawer|under the table] and [in the "
     "cupboard|on every shelf|in the basket|behind the stove], but [found nothing|there was no "
     "{thing}|it was not there].",
     "{A} was [very sad|close to tears|sad], because the {thing} had been a present from {A.their} "
     "[grandmother|mother|uncle|oldest friend].",
     "[Just then|After a while|Soon] {B.intro} came [by|along the path|past] and asked, \"[What is "
     "the matter|Why do you look so sad|What has happened], {A}?\"",
     "\"I have lost my {thing},\" said {A}. \"[I have looked everywhere|I cannot find it anywhere|"
     "I do not know where to look].\"",
     "\"[Do not worry|Cheer up|Do not cry],\" said {B}. \"[Two pairs of eyes see more than one|I "
     "will help you look|We will find it together].\"",
     "[First|So] they searched [near|around] {w1}, and then [they went to|they looked around|they "
     "tried] {w2}.",
     "At last they found the {thing} {spot}. It was there because {cause}.",
     "{how}.",
     "{A} was so [happy|glad] that {A.they} [danced on the spot|hugged {B}|laughed out loud]. "
     "\"Thank you, {B},\" {A.they} said. \"[I will take better care of it|Without you I would "
     "never have found it|You are a true friend].\""),
    (("What did {A} lose?|What was lost?", "{A} lost {A.their} {thing}."),
     ("Who helped {A}?|Who helped to find the {thing}?", "{B.intro} helped {A}."),
     ("Where was the {thing}?|Where did they find the {thing}?", "The {thing} was {spot}."),
     ("Why was the {thing} there?|How did the {thing} get there?", "It was there because {cause}."),
     ("Why was {A} sad?", "{A} was sad because {A.they} had lost {A.their} {thing}.")))

STORM = Plot(
    "storm", "a storm",
    table("damage broken cannot part1 part2",
          ("the storm tore the roof off {A}'s house", "the roof", "had nowhere dry to sleep",
           "planks", "a box of nails"),
          ("the water carried away the little footbridge", "the footbridge",
           "could not cross the stream", "ropes", "two strong beams"),
          ("a heavy branch fell on {A}'s fence", "the fence",
           "could not keep the sheep out of the garden", "new posts", "a hammer"),
          ("the wind broke the window of {A}'s kitchen", "the window",
           "could not keep the room warm", "a new pane", "a pot of glue"),
          ("the storm pushed {A}'s boat against the rocks", "the boat", "could not go fishing",
           "boards", "a bucket of tar"),
          ("a pine fell across {A}'s shed", "the shed", "had no place for the firewood", "a saw",
           "a cart"),
          ("the wind knocked over {A}'s chimney", "the chimney", "could not light a fire", "bricks",
           "a bucket of mortar")),
    ("[In the night|Towards evening|All of a sudden] the weather [grew worse|turned wild|changed], "
     "and {damage}.",
     "[In the morning|When it was over] {A} {cannot}. {A.They} [sat down on a stone and sighed|did "
     "not know what to do|shook {A.their} head and felt very small].",
     "\"[I cannot mend {broken} alone|This is too much work for one|How shall I ever mend "
     "{broken}],\" {A.they} [said|thought|whispered].",
     "But {B.intro} had [heard the crash|seen what had happened|heard the news], and {B.they} came "
     "with {part1}.",
     "[Not long after|A little later|Soon] {C.intro} came [too|as well] and brought {part2}.",
     "\"[Many {A.hands} make light work|When one of us has trouble, all of us help|That is what "
     "neighbours are for],\" said {C}.",
     "They worked [until the sun went down|all day long|for hours], and [nobody stopped to rest|"
     "they sang while they worked|they told each other jokes].",
     "In the evening {broken} was [as good as new|mended|better than before]. {A} was [so grateful|"
     "happy and tired|glad], and {A.they} cooked [a big pot of soup|pancakes for everybody|"
     "potatoes and beans] for {A.their} friends.",
     "[Since that day|From then on] {A} was the first to come when somebody needed help."),
    (("What did the storm do?|What happened in the storm?|What broke?", "{damage}."),
     ("Who helped {A}?|Who helped to mend {broken}?", "{B} and {C} helped {A}."),
     ("What did {B} bring?", "{B} brought {part1}."), ("What did {C} bring?",
                                                       "{C} brought {part2}."),
     ("Why was {A} in trouble?|Why did {A} need help?", "{A} needed help because {damage}.")),
    ("rainy", "windy"))

STUCK = Plot(
    "stuck", "a rescue",
    table("baby place cause tool act",
          (Thing("young duckling"), "in a fishing net", "it had followed a shiny fish",
           "a pair of scissors", "cut the threads"),
          (Thing("small lamb"), "in the mud by the river", "it had wanted to drink", "a long rope",
           "pulled it out with all {A.their} strength"),
          (Thing("grey kitten"), "on the roof of the inn", "a dog had chased it", "a ladder",
           "climbed up and carried it down"),
          (Thing("tiny beetle"), "in a jar of jam", "it had smelled the sugar", "a spoon",
           "lifted it out"),
          (Thing("little rabbit"), "in a bramble bush", "it had run away from the thunder",
           "a pair of thick gloves", "bent the thorns aside"),
          (Thing("baby goat"), "on a narrow ledge", "it had climbed too high", "a basket on a rope",
           "lifted it up slowly"),
          (Thing("young hedgehog"), "in an empty pot", "it had looked for something to eat",
           "a wooden stick", "tipped the pot over")),
    ("{A.They} was [walking|strolling|on {A.their} way] [past|near] {w1} when {A.they} heard a "
     "[thin|small|sad|weak] [voice|cry].",
     "[There, {place}, sat|{place} sat] {baby.a}. It was stuck, because {cause}.",
     "\"[Please help me|Help|I cannot get out],\" cried the {baby}. [It was shaking with fear.|It "
     "looked very frightened.|Its eyes were big with fear.]",
     "\"[Hold on|Do not move|Stay calm],\" said {A}. \"[I will be back at once|I know what we need|"
     "I will not leave you alone].\"",
     "{A.They} ran to {B.intro} and asked for {tool}. {B} [did not ask why|came along at once|"
     "understood at once and hurried after {A.them}].",
     "[Together they went back|They ran back as fast as they could], and with {tool} {A} {act}.",
     "[A moment later|At last] the {baby} was free. It [shook itself|jumped for joy|took a deep "
     "breath] and said, \"[Thank you|You saved my life|I will never forget this].\"",
     "{A} was [proud and happy|happy|glad], and {B} [carried the little one home to its mother|"
     "gave the {baby} some warm milk|stayed until its mother came].",
     "[Every spring|Since then] the {baby} [comes to visit|brings {A} a flower|waves to {A} from "
     "far away]."),
    (("Who was stuck?|What did {A} find?", "The {baby} was stuck {place}."),
     ("Why was the {baby} stuck?", "It was stuck because {cause}."),
     ("How did {A} free the {baby}?|How was the {baby} saved?", "With {tool}, {A} {act}."),
     ("Who helped {A}?|Where did {A} get {tool}?", "{B} helped {A} and brought {tool}."),
     ("How did {A} feel at the end?|How did {A} feel?",
      "{A} felt happy because the {baby} was free.")))

GIFT = Plot(
    "gift", "a birthday",
    table("dish missing price done",
          (Thing("plum cake"), "sugar", "sweep the floor", "swept every corner of the floor"),
          (Thing("cherry pie"), "flour", "carry some wood", "carried the wood into the shed"),
          (Thing("walnut cake"), "butter", "feed the hens", "fed the hens and counted the eggs"),
          (Thing("pot of pumpkin soup"), "salt", "tell a story", "told a long story about a whale"),
          (Thing("bowl of rice pudding"), "milk", "sing a song", "sang a song with seven verses"),
          (Thing("lemon tart"), "eggs", "wash the windows",
           "washed the windows until they sparkled"),
          (Thing("honey bun"), "honey", "mend a shirt", "mended the shirt with tiny stitches")),
    ("It was the birthday of {B.intro}, and {A} wanted to [make|bake and cook|prepare] {dish.a} "
     "for {B.them}.",
     "But when {A.they} opened the cupboard, there was no {missing}. \"[Oh dear|What a pity|How "
     "silly of me],\" said {A}. \"Without {missing} I cannot make {dish.a}.\"",
     "So {A.they} [walked|hurried|went] to {C.intro}, who [always had plenty of everything|had a "
     "big kitchen|never said no to a friend].",
     "\"[You can have all the {missing} you need|Of course I have {missing}|I have some {missing} "
     "left],\" said {C}, \"[but first you must|if you] {price}.\"",
     "{A} [laughed|agreed] and {done}. [It took an hour, but it was worth it.|{C} was very "
     "pleased.|That was easy.]",
     "Then {A.they} ran home with the {missing} and [worked until the evening|set to work|made the "
     "best {dish} of {A.their} life].",
     "When {B} [came in|opened the door] and saw the {dish}, {B.their} eyes [grew wide|began to "
     "shine]. \"[Is that for me|You made this for me]?\" {B.they} asked.",
     "\"Happy birthday,\" said {A}. [They ate until nothing was left.|They lit the candles and "
     "sang.|They invited {C} too, and everybody had a piece.]",
     "{B} was [so happy|touched], because {A} had [worked so hard|taken so much trouble] for "
     "{B.them}."),
    (("Whose birthday was it?|Who had a birthday?", "It was the birthday of {B.intro}."),
     ("What did {A} make?|What was the present?", "{A} made {dish.a} for {B}."),
     ("What was missing?|What did {A} need?", "There was no {missing}, so {A} went to {C}."),
     ("What did {C} want?|What did {A} do for {C}?", "{C} wanted {A} to {price}, so {A} {done}."),
     ("Why was {B} happy?", "{B} was happy because {A} made {dish.a} for {B.them}.")))

RACE = Plot(
    "race", "a race",
    table("race prize accident help",
          ("the running race around the lake", Thing("gold medal"), "stumbled over a root",
           "tied a handkerchief around {B}'s knee"),
          ("the boat race on the river", Thing("silver cup"), "lost both oars",
           "threw {B} a rope and pulled {B.them} to the bank"),
          ("the sack race on the meadow", Thing("basket of pears"), "fell into a ditch",
           "pulled {B} out of the ditch"),
          ("the race up the hill", Thing("blue ribbon"), "slipped on a wet stone",
           "helped {B} to stand up"),
          ("the cart race through the village", Thing("big cheese"), "lost a wheel",
           "found the wheel and put it back"),
          ("the sledge race down the mountain", Thing("warm blanket"),
           "drove into a deep heap of snow", "dug {B} out of the snow")),
    ("It was the day of {race}, and the prize was {prize.a}.",
     "{A} had [practised for weeks|been looking forward to it for a long time|hardly slept], "
     "because {A.they} wanted to win [more than anything|so much].",
     "\"[Ready, steady, go|One, two, three, go]!\" [called|cried] the starter, and [off they went|"
     "everybody set off].",
     "{A} was [in front|the fastest of all|far ahead] when {B.intro} {accident} [right behind "
     "{A.them}|and cried out].",
     "{A} [looked back|stopped for a moment]. [If {A.they} stopped now, {A.they} would lose.|The "
     "finish was not far away.] But {B} [was hurt|needed help|looked so unhappy].",
     "\"[A friend is worth more than a prize|I cannot leave you here|The race can wait],\" said "
     "{A}, and {A.they} {help}.",
     "So it was {C.intro} who won the {prize}, and {A} and {B} came in last, side by side.",
     "But the crowd cheered [loudest|most] for {A}, because {A.they} had [stopped to help|helped a "
     "friend].",
     "[In the end|That evening] {C} [smiled|came over] and said, \"[You should have this|We will "
     "share it],\" and gave {A} half of the prize.|{A} did not have the {prize}, but {A.they} had "
     "a true friend, and that was [better|worth more]."),
    (("Who won the race?|Who won?", "{C} won the race."), ("What was the prize?",
                                                           "The prize was {prize.a}."),
     ("Why did {A} stop?|Why did {A} not win?", "{A} stopped because {B} {accident}."),
     ("What happened to {B}?", "{B} {accident}, and {A} stopped to help."),
     ("Why did the crowd cheer for {A}?", "They cheered because {A} stopped to help {B}.")))

NOISE = Plot(
    "noise", "a strange noise",
    table("noise guess truth fix",
          (Thing("tapping at the window"), "a ghost", "a branch that knocked against the glass",
           "cut off the branch"),
          (Thing("long howl"), "a wolf", "an empty bottle with the wind blowing over it",
           "put a cork into the bottle"),
          (Thing("scratching under the floor"), "a monster",
           "a small beetle that was building a nest", "carried the beetle into the garden"),
          (Thing("deep groan"), "a giant", "the old door that had no oil",
           "put some oil on the door"),
          (Thing("splash in the kitchen"), "a water spirit", "a drop that fell into the bucket",
           "mended the roof"),
          (Thing("soft humming"), "a witch", "a bee that had lost its way in the curtain",
           "opened the window for it"),
          (Thing("rattling on the roof"), "a dragon", "a loose tile in the wind",
           "nailed down the tile")),
    ("In the middle of the night {A} [woke up|sat up in bed], because there was {noise.a}.",
     "{A.They} [pulled the blanket over {A.their} head|held {A.their} breath|did not dare to "
     "move]. \"[That must be|It can only be] {guess},\" {A.they} thought, and {A.their} heart beat "
     "fast.",
     "[At last|After a long time] {A.they} [crept out of the house|climbed out of the back window|"
     "took all {A.their} courage] and ran to {B.intro}.",
     "\"There is {guess} in my house,\" [whispered|cried] {A}. {B} [lit a lantern|took {B.their} "
     "lantern|put on {B.their} coat] and said, \"[Let us have a look|I do not believe in such "
     "things|Show me].\"",
     "They [tiptoed|crept|went] from room to room, and {A} [held on to {B}'s {B.hands}|stayed "
     "close behind {B}]. [There it was again.|The noise grew louder.]",
     "{B} [held up the light|lifted the lantern], and [then they saw it|what did they see]. It was "
     "only {truth}!",
     "First {A} [blushed|stared], and then {A.they} began to laugh. {B} laughed too, and they "
     "laughed until [their sides hurt|they had to sit down].",
     "They {fix}, and [then they drank a cup of hot milk|then it was quiet|the night was still "
     "again].",
     "[Now {A} knows that|Since that night {A} knows that|{A} slept well, for now {A.they} knew "
     "that] a lantern and a friend are the best cure for fear."),
    (("What did {A} hear?|What was the noise?", "{A} heard {noise.a}, but it was only {truth}."),
     ("What did {A} think it was?", "{A} thought it was {guess}."),
     ("What was it really?|What made the noise?", "It was only {truth}."),
     ("Who helped {A}?|Who came with a lantern?", "{B.intro} helped {A}."),
     ("Why was {A} afraid?", "{A} was afraid because there was {noise.a} in the night.")))

GARDEN = Plot(
    "garden", "a garden",
    table("plants trouble effect cure dish",
          ("pumpkins", "it did not rain for three weeks", "the leaves turned yellow",
           "carried water from the river", "pumpkin soup"),
          ("strawberries", "snails came in the night", "there were holes in every leaf",
           "put a ring of sand around the bed", "strawberry jam"),
          ("beans", "the wind blew too hard", "the stalks lay on the ground",
           "tied every stalk to a stick", "bean stew"),
          ("sunflowers", "weeds grew everywhere", "the young plants had no light",
           "pulled out the weeds by the root", "bread with sunflower seeds"),
          ("potatoes", "a hungry boar dug up the ground", "half of the plants were gone",
           "built a low fence", "potato pancakes"),
          ("tomatoes", "a cold night was coming", "the fruit was in danger",
           "covered the plants with blankets", "tomato soup"),
          ("peas", "birds picked at the seeds", "only a few plants came up",
           "made a scarecrow out of old clothes", "pea soup")),
    ("In spring {A} [planted|had planted] {plants} [behind the house|in the garden|near the gate], "
     "and every day {A.they} [went to look at them|watered them].",
     "[All went well|They grew and grew], until {trouble}. Soon {effect}.",
     "\"[All my work was for nothing|My poor {plants}|I will have nothing to eat in winter],\" "
     "said {A} [sadly|with a sigh].",
     "{B.intro}, who [knew a lot about plants|lived nearby|was walking past the gate], [looked "
     "over the fence|stopped]. \"[It is not too late|There is still hope|I know what to do],\" "
     "{B.they} said.",
     "{B} told {A} what to do, and so they {cure}. [It was hard work.|It took them a whole day.|"
     "They worked until their backs hurt.]",
     "[Day after day|Week after week] they looked after the {plants}, and [slowly|little by "
     "little] everything became green again.",
     "In [summer|autumn|late summer] there were more {plants} than {A} could carry. {A.They} was "
     "so [proud|happy|pleased] that {A.they} [danced around the garden|called all the neighbours].",
     "{A} made {dish}, and {B} got the first and biggest [plate|piece|share]. \"[Without you|If "
     "you had not helped me],\" said {A}, \"there would be nothing on this table.\""),
    (("What did {A} plant?|What grew in the garden?", "{A} planted {plants}."),
     ("What went wrong?|Why was {A} sad?", "{A} was sad because {trouble}, and {effect}."),
     ("How did they save the {plants}?|What did they do?", "They {cure}."),
     ("What did {A} make?|What did they eat?", "{A} made {dish}."),
     ("Who helped {A}?|Who told {A} what to do?", "{B.intro} helped {A}.")),
    ("sunny", "windy", "rainy"))
# fmt: on
