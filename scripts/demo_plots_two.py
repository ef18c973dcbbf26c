"""The second half of the plots of the demo stories (see `demo_plots`)."""

from __future__ import annotations

from demo_plots import GARDEN, GIFT, LOST, NOISE, RACE, STORM, STUCK, Plot, table
from demo_world import Thing

# fmt: off
QUARREL = Plot(
    "quarrel", "a quarrel",
    table("thing reason event rule",
          (Thing("red sledge"), "both wanted to sit in front",
           "the sledge got stuck and one alone could not move it",
           "each of them sat in front on every second ride"),
          (Thing("swing"), "neither wanted to wait", "nobody was there to push the swing",
           "one sat on the swing while the other pushed"),
          (Thing("big drum"), "both wanted to play at the same time",
           "a drum without a song sounded dull", "one played the drum while the other sang"),
          (Thing("little boat"), "both wanted to steer",
           "the boat only went round in circles with one oar",
           "one steered there and the other steered back"),
          (Thing("fishing rod"), "neither wanted to hold the net",
           "a fish was too heavy for one alone", "they took turns after every fish"),
          (Thing("picture puzzle"), "both wanted to put in the last piece",
           "one half of the pieces was missing", "they put in the last piece together")),
    ("{A} and {B.intro} were good friends, and they owned {thing.a} [together|that belonged to "
     "both of them].",
     "But [that day|one day] they began to quarrel, because {reason}.",
     "\"[You are never fair|You always want everything|It is always the same with you],\" shouted "
     "{A}. \"[Then play alone|I do not need you|Go away],\" shouted {B}.",
     "{A} went [home|away|off] and slammed the door, and {B} [sat down behind a hedge|went the "
     "other way|did not look back].",
     "[The whole afternoon|For two days|All evening] {A} was alone. {A.They} felt [angry at first, "
     "and then lonely|lonely|worse and worse]. [Then|And] {A.they} found out that {event}.",
     "{C.intro} saw {A.their} long face and said, \"[A quarrel is like a stone in a shoe. Take it "
     "out|Somebody must be the first to say sorry|It takes courage to say sorry].\"",
     "So {A} [took a deep breath|swallowed {A.their} pride] and went to find {B}. \"I am sorry,\" "
     "said {A}. \"I am sorry too,\" said {B}, [and both had to smile|and {B.their} eyes were wet|"
     "and {B.they} sounded very relieved].",
     "From then on {rule}, and [there was no more quarrel|both of them were content|they had twice "
     "as much fun]."),
    (("Why did {A} and {B} quarrel?|What was the quarrel about?",
      "They quarrelled about the {thing} because {reason}."),
     ("Who gave {A} advice?|What did {C} do?", "{C} gave {A} good advice."),
     ("How did {A} feel?|Was {A} lonely?", "{A} felt lonely after the quarrel."),
     ("How did the story end?|What happened in the end?",
      "They said sorry, and from then on {rule}."),
     ("Who said sorry first?", "{A} said sorry first.")))

DELIVERY = Plot(
    "delivery", "a long walk",
    table("load why obstacle way",
          (Thing("bottle of medicine"), "{C} had a bad cough", "the river had flooded the path",
           "crossed on a raft of logs"),
          (Thing("letter"), "{C} had been waiting for news from a sister", "the fog hid the path",
           "followed the sound of the bells"),
          (Thing("basket of bread"), "{C} had nothing left to eat",
           "a fallen tree lay across the road", "climbed over the trunk, one after the other"),
          (Thing("warm coat"), "{C} was freezing", "the snow was too deep to walk",
           "made snow shoes out of branches"),
          (Thing("new lantern"), "{C}'s old lamp had gone out", "it was getting too dark to see",
           "followed the glow-worms along the hedge"),
          (Thing("sack of seeds"), "{C} wanted to sow before the rain", "the sack was too heavy",
           "put the sack on an old sledge"),
          (Thing("pair of glasses"), "{C} could not read without them",
           "an angry bull stood in the field", "walked around the field behind the hedge")),
    ("{A} [had to bring|wanted to bring|promised to bring] {load.a} to {C.intro}, because {why}.",
     "It was a long way [past|by] {w1} and {w2}, so {A} [put on {A.their} boots|packed some bread|"
     "set off at once].",
     "[Half way|After an hour|Not far from {w2}] {A.they} had to stop, because {obstacle}.",
     "\"[What now|How shall I go on|I cannot turn back],\" said {A}. \"{C} is waiting for me.\"",
     "[By good luck|Just then|At that moment] {B.intro} came along. \"[Let me think|I know a trick|"
     "There is always a way],\" {B.they} said, [scratching {B.their} head|with a wink|after a "
     "moment].",
     "Together they {way}, and [soon|before long] the worst was behind them.",
     "[It was nearly evening|The stars were out|The sun was low] when they knocked at {C}'s door. "
     "{C} [opened at once|was sitting by the window] and [could hardly believe it|beamed with "
     "joy].",
     "\"You came all this way for me,\" said {C}, [and gave them tea and cake|and put two more "
     "bowls on the table|and made them sit by the fire].",
     "{A} was [tired but happy|tired, but it was a good kind of tired], because {C} now had the "
     "{load}."),
    (("What did {A} bring?|What did {A} carry?", "{A} brought {load.a} to {C}."),
     ("Why did {C} need the {load}?|Why did {A} bring the {load}?",
      "{C} needed the {load} because {why}."),
     ("Why did {A} stop?|What was the problem?", "{A} had to stop because {obstacle}."),
     ("How did they get on?|How did they solve the problem?", "They {way}."),
     ("Who helped {A}?|Who came along?", "{B.intro} helped {A}.")))

BROKEN = Plot(
    "broken", "telling the truth",
    table("thing cause hide mend",
          (Thing("blue teapot"), "{A} had been dancing in the kitchen", "behind the curtain",
           "glued the pieces together"),
          (Thing("garden chair"), "{A} had jumped on it", "in the bushes",
           "carved a new leg for it"),
          (Thing("umbrella"), "{A} had used it as a sword", "under the bed",
           "sewed a colourful patch on it"),
          (Thing("mirror"), "{A} had thrown a ball in the house", "in the shed",
           "put in a new glass"),
          (Thing("paper lantern"), "{A} had held it too close to the candle",
           "under a pile of leaves", "made a new one with golden stars"),
          (Thing("music box"), "{A} had turned the handle too far", "at the bottom of a drawer",
           "put in a new spring"),
          (Thing("flower pot"), "{A} had played with a stick", "behind the wall",
           "painted a new pot")),
    ("{A} was visiting {B.intro}. [While {B} was out|When {B} was not looking], {A.they} broke "
     "{B}'s {thing}, because {cause}.",
     "{A} was so [frightened|ashamed] that {A.they} hid the {thing} {hide} and [said nothing|told "
     "nobody].",
     "[In the evening|The next day] {B} [looked everywhere for|could not find|missed] the {thing}. "
     "\"[Have you seen it|Do you know where it is], {A}?\" {B.they} asked.",
     "\"No,\" said {A}, [and looked at the floor|and {A.their} ears grew hot|but {A.their} voice "
     "was shaking].",
     "That night {A.they} could not sleep. The lie [lay on {A.their} chest like a stone|felt "
     "heavier than a sack of stones|would not let {A.them} rest].",
     "{A} went to {C.intro} for advice. \"[The truth is heavy only until you say it|Tell {B} "
     "everything|A friend can forgive a broken thing, but not a lie],\" said {C}.",
     "So {A} went to {B} and told {B.them} everything. {B} was [quiet for a while|silent for a "
     "moment]. Then {B.they} said, \"[I am glad that you told me|Thank you for telling me the "
     "truth|Things can break, but you were honest].\"",
     "Together they {mend}, and {A} felt [light as a feather|so much better|happy again]."),
    (("What did {A} break?|What was broken?", "{A} broke {B}'s {thing}."),
     ("How did the {thing} break?|Why did the {thing} break?", "It broke because {cause}."),
     ("Where did {A} hide the {thing}?", "{A} hid it {hide}."),
     ("Why could {A} not sleep?|Why did {A} feel bad?",
      "{A} felt bad because {A.they} had told a lie."),
     ("What did they do in the end?|How did they mend it?", "Together they {mend}.")))

NEWCOMER = Plot(
    "newcomer", "somebody new in the valley",
    table("shy party skill need",
          ("{A} did not know anybody", "the picnic by the lake", "play the violin",
           "the musicians had not come"),
          ("{A} spoke very quietly", "the dance in the square", "cook for fifty people",
           "the cook was ill"),
          ("{A} had never seen so many people", "the harvest feast", "repair wheels",
           "the cart with the food broke down"),
          ("{A} thought that nobody would like {A.them}", "Lantern Night", "fold paper lanterns",
           "the rain had spoiled the lanterns"),
          ("{A} was afraid to say something wrong", "the school play", "remember every word",
           "one of the players had lost {C}'s book"),
          ("{A} missed {A.their} old home", "the winter market", "light a fire in the snow",
           "everybody was freezing")),
    ("{A} was new in Lantern Valley, and {A.they} stayed away from the others, because {shy}.",
     "Every [evening|day] {A.they} [sat at the window|watched from behind the hedge|listened from "
     "far away] while the others [laughed|talked|played].",
     "{B.intro} [noticed it|saw {A.them} there] and [knocked at the door|came over|brought a piece "
     "of cake]. \"[Come with us|Will you come|You must come] to {party},\" said {B}.",
     "At first {A} [shook {A.their} head|said no|did not dare], but {B} [would not give up|smiled "
     "so kindly|asked again], and so {A.they} went.",
     "[But when they arrived|Everything was ready, but then] there was trouble: {need}. \"[What "
     "shall we do|Now the day is spoiled],\" said {C.intro}.",
     "Then {A} said in a small voice, \"I can {skill}.\" Everybody [turned around|looked at "
     "{A.them}|was quiet].",
     "And {A} could really {skill}! It was [wonderful|the best evening of the year|a great "
     "success], and everybody [clapped|cheered].",
     "[Since that day|From then on] {A} was never alone again, and {B} was {A.their} best friend."),
    (("Why was {A} shy?|Why did {A} stay away?", "{A} stayed away because {shy}."),
     ("Who invited {A}?|Where did they go?", "{B} invited {A} to {party}."),
     ("What can {A} do?|What was {A} good at?", "{A} can {skill}."),
     ("What was the trouble?|What was the problem?", "There was trouble because {need}."),
     ("Who is {A}'s best friend?", "{B} is {A}'s best friend.")),
    newcomer=True)

SKILL = Plot(
    "skill", "learning something new",
    table("skill try1 try2 trick",
          ("swim", "swallowed a lot of water", "sank like a stone",
           "Breathe slowly and kick with your legs"),
          ("skate", "fell on {A.their} nose", "slid into a snowman",
           "Bend your knees and look ahead"),
          ("whistle", "only blew air", "made a sound like a wet frog",
           "Wet your lips and think of a kiss"),
          ("juggle", "dropped all the apples", "hit {A.self_} on the head",
           "Begin with two and count aloud"),
          ("bake bread", "forgot the yeast", "burned the crust",
           "Be patient and let the dough sleep"),
          ("fly a kite", "ran in the wrong direction", "tangled the string",
           "Turn your back to the wind"),
          ("knit", "dropped every stitch", "knitted a knot", "Hold the wool loosely"),
          ("walk on a rope", "fell into the hay", "lost a shoe",
           "Stretch out your arms and do not look down")),
    ("More than anything, {A} wanted to learn to {skill}. [All the others could do it.|{A.They} "
     "dreamed of it at night.|It looked so easy.]",
     "The first time {A.they} {try1}. [Somebody laughed.|That was not a good start.|{A.They} "
     "blushed.]",
     "The second time {A.they} {try2}. \"[I will never learn it|I give up|I am just too clumsy],\" "
     "said {A}, and {A.they} was close to tears.",
     "{B.intro} [sat down beside {A.them}|had seen it all|put an arm around {A.them}]. \"[I needed "
     "a whole year to learn it|Everybody starts that way|Nobody is born knowing how to {skill}],\" "
     "said {B}. \"{trick}.\"",
     "{A} [nodded|dried {A.their} tears|got up again] and practised [every day|every morning "
     "before breakfast|from morning to evening].",
     "And the third time it worked! {A} could {skill}, [and {A.they} did not want to stop|and "
     "{A.they} shouted for joy|and {A.they} could hardly believe it].",
     "{C.intro} [saw it and clapped|came by and was amazed]. \"[How did you do that|Who taught you "
     "that]?\" asked {C}. \"[I tried once more than I failed|I had a good teacher|{B} helped "
     "me],\" said {A}, and {A.they} was very proud."),
    (("What did {A} want to learn?|What did {A} learn?", "{A} wanted to learn to {skill}."),
     ("What happened the first time?", "The first time {A} {try1}."),
     ("What happened the second time?", "The second time {A} {try2}."),
     ("Who helped {A}?|Who taught {A}?", "{B.intro} helped {A}."),
     ("What did {B} say?", "{B} said, \"{trick}.\""),
     ("How did {A} feel at the end?", "{A} felt proud because {A.they} could {skill}.")))

THIEF = Plot(
    "thief", "a mystery",
    table("food clue thief reason end",
          ("pies", "tiny footprints in the flour", Thing("hungry shrew"),
           "it had six children to feed", "a pie every Sunday"),
          ("carrots", "a trail of green leaves", Thing("young rabbit"),
           "its own garden was under water", "a row of carrots of its own"),
          ("eggs", "a little red feather", Thing("lonely hen"), "it wanted to hatch some chicks",
           "a nest with six eggs"),
          ("biscuits", "a line of crumbs", Thing("family of ants"), "winter was coming",
           "a bowl of crumbs every day"),
          ("apples", "marks of small teeth", Thing("baby porcupine"), "it had lost its mother",
           "a warm bed in the barn"),
          ("fish", "wet footprints on the step", Thing("thin cat"),
           "it had hurt its leg and could not hunt", "a place by the stove")),
    ("Something strange was going on. Every night some of {A}'s {food} [disappeared|vanished|were "
     "gone in the morning].",
     "\"[There is a thief in the valley|Who would do such a thing|This cannot go on],\" said {A} "
     "[angrily|crossly|and stamped on the floor].",
     "{B.intro} [loved a mystery|had sharp eyes|wanted to help] and [looked at everything twice|"
     "searched the whole room]. \"Look here,\" {B.they} said. There was a clue: {clue}.",
     "[They followed it|The clue led them] past {w1} and as far as {w2}. There they [hid behind a "
     "bush|sat down in the dark|lay down in the grass] and [waited|kept watch].",
     "[At midnight|When the moon came up] they saw the thief. It was {thief.a}! It [began to cry|"
     "trembled|hung its head], because it had been caught.",
     "\"I am sorry,\" it said. [Then it told them|In a small voice it told them] that it had taken "
     "the {food} because {reason}.",
     "[At once|Now] {A} was not angry any more. {A.They} felt [sorry for it|pity]. \"[You should "
     "have asked|Why did you not just ask],\" {A.they} said [gently|kindly|softly].",
     "From then on the {thief} got {end}, and nothing was ever stolen again."),
    (("What was stolen?|What disappeared?", "Some of {A}'s {food} disappeared."),
     ("Who was the thief?|Who took the {food}?", "The thief was {thief.a}."),
     ("Why did the {thief} take the {food}?|Why did the thief do it?",
      "It took the {food} because {reason}."),
     ("What was the clue?", "The clue was {clue}."), ("Who helped {A}?|Who found the clue?",
                                                      "{B} helped {A}."),
     ("How did the story end?", "From then on the {thief} got {end}.")))

COLD = Plot(
    "cold", "a cold night",
    table("reason share later back",
          ("all the wood was wet", "a cart of dry logs",
           "the summer was so hot that {A}'s well dried up", "fresh water"),
          ("the stove was broken", "a place by the fire", "{A} was ill in spring",
           "hot broth and flowers"),
          ("the wind had blown out the fire", "burning coals in an iron pot",
           "{A}'s boat began to leak", "a new boat"),
          ("there were no blankets left", "two thick blankets",
           "{A} lost {A.their} shoes in the river", "a pair of felt shoes"),
          ("there was nothing in the cupboard", "half of the bread", "mice ate all of {A}'s corn",
           "a sack of corn")),
    ("[That night|When evening came] it was so cold that [the windows were covered with ice|the "
     "river stood still|even the stars seemed to shiver].",
     "{A} [saw|noticed] that there was no smoke above the house of {B.intro}. \"[Something is "
     "wrong|I must see what is the matter],\" {A.they} said.",
     "{B} was sitting in the dark and shaking with cold, because {reason}. \"[I did not want to "
     "trouble anybody|I am all right],\" said {B}, but {B.their} [teeth chattered|{B.hands} were "
     "blue].",
     "{A} did not have much {A.self_}, but {A.they} gave {B} {share}. \"[What is enough for one is "
     "enough for two|We will be warm together],\" said {A}.",
     "[They sat together until morning|All night long they told each other stories], and [neither "
     "of them was cold any more|the night did not seem so long].",
     "{B} never forgot that. And when, months later, {later}, it was {B} who came and brought "
     "{back}.",
     "\"[Kindness always finds the way home|You helped me first],\" said {B}, and {A} [smiled|was "
     "very happy]."),
    (("Why was {B} cold?", "{B} was cold because {reason}."), ("What did {A} give {B}?",
                                                               "{A} gave {B} {share}."),
     ("What did {B} bring later?|How did {B} thank {A}?", "{B} brought {A} {back}."),
     ("Why did {A} need help later?", "{A} needed help because {later}."),
     ("Who was cold?", "{B.intro} was cold.")),
    ("snowy",))
# fmt: on

_FIRST = (LOST, STORM, STUCK, GIFT, RACE, NOISE, GARDEN)
PLOTS = (*_FIRST, QUARREL, DELIVERY, BROKEN, NEWCOMER, SKILL, THIEF, COLD)
