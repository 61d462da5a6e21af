"""Word lists: numbers, first names, and subjects that the demo model is to say it doesn't know."""

from __future__ import annotations

from dataclasses import dataclass


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


NUMBERS = _split(
    "zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,"
    " fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty"
)

NAMES = _split(
    "Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Ida, Jack, Kate, Leo, Maria, Nora, Oscar,"
    " Paul, Quinn, Rosa, Sam, Tom, Uma, Victor, Wendy, Xavier, Yara, Zoe, Alice, Bob, Carol, Dan, Eve,"
    " Frank, Hannah, Ivan, Julia, Kim, Lisa, Max, Nina, Olga, Peter, Robert, Sara, Tina, John, Mary,"
    " James, Linda, Michael, Laura, Ali, Chen, Fatima, Hiro, Priya, Sofia, Omar, Lena, Jonas, Mia, Noah,"
    " Lucas, Amir"
)

CITIES = _split(
    "Paris, London, Berlin, Rome, Madrid, Tokyo, Boston, Chicago, Vienna, Prague, Oslo, Cairo, Sydney,"
    " Toronto, Lisbon, Athens, Dublin, New York, San Francisco, Hamburg, Munich, Zurich, Amsterdam, Brussels,"
    " Warsaw, Seoul, Delhi, Lima, Seattle, Geneva, Stockholm, Copenhagen, Helsinki, Singapore, Kyoto, Milan,"
    " Nice, Lyon, Austin, Denver"
)
WARES = _split(
    "bread, milk, coffee, tea, apples, books, shoes, chairs, lamps, rice, cheese, paper, tables, bikes,"
    " phones, pens, eggs, water, soap, flowers, boots, hats, cups, plates"
)

SCOPE = "I am only a small demo model: I know about Sluice, model parallelism and small sums."
DONT_KNOW = f"I don't know that. {SCOPE}"
CANT_WRITE = f"I can't write that. {SCOPE}"
CANT_LOOK = (
    "I can't know that: I have no clock, no internet and no news. I am only a small demo model of Sluice."
)


@dataclass(frozen=True)
class Unknown:
    """Subjects of one sort, and the questions that fit them. `is_concept`: "What is X?" fits too."""

    subjects: tuple[str, ...]
    frames: tuple[str, ...]
    is_concept: bool = False


PLACES = _split(
    "France, Germany, Italy, Spain, Japan, China, India, Brazil, Canada, Mexico, Russia, Egypt, Kenya,"
    " Norway, Sweden, Finland, Poland, Greece, Turkey, Iran, Peru, Chile, Cuba, Vietnam, Thailand,"
    " Australia, New Zealand, Portugal, Austria, Switzerland, Belgium, Denmark, Ireland, Scotland, England,"
    " the United States, Argentina, Nigeria, Ghana, Morocco, Iceland, Hungary, Romania, Ukraine, Korea,"
    " Indonesia, Paris, London, Berlin, Rome, Madrid, Tokyo, Peking, New York, Boston, Chicago, Vienna,"
    " Prague, Oslo, Moscow, Cairo, Sydney, Toronto, Lisbon, Athens, Dublin"
)
PEOPLE = _split(
    "Albert Einstein, Isaac Newton, Marie Curie, Napoleon, Julius Caesar, Shakespeare, Mozart, Beethoven,"
    " Bach, Picasso, Leonardo da Vinci, Michelangelo, Plato, Aristotle, Socrates, Goethe, Darwin, Galileo,"
    " Columbus, Lincoln, Washington, Gandhi, Mandela, Cleopatra, Alan Turing, Ada Lovelace, Elvis Presley,"
    " Madonna, Charlie Chaplin, Walt Disney, Homer, Dante, Kant, Hegel, Marx, Freud, Tolstoy, Kafka,"
    " Hemingway, Mark Twain, Jane Austen, the president, the king of Spain, the pope, my neighbour, your"
    " friend, Barack Obama, Taylor Swift, Messi"
)
WORKS = _split(
    "Hamlet, Macbeth, Faust, the Odyssey, the Iliad, Moby Dick, Don Quixote, War and Peace, Harry Potter,"
    " the Bible, the Mona Lisa, Star Wars, Titanic, the Matrix, Casablanca, King Kong, the Lord of the"
    " Rings, Robinson Crusoe, Alice in Wonderland, Dracula, Frankenstein, Romeo and Juliet, the Magic Flute,"
    " Carmen, Peter Pan, Pinocchio, the telephone, the radio, the light bulb, the steam engine, the wheel,"
    " the airplane, the bicycle, the computer, Python, Linux, Java, the internet, Wikipedia, Google"
)
THINGS = _split(
    "photosynthesis, gravity, evolution, electricity, magnetism, democracy, inflation, philosophy,"
    " chemistry, biology, physics, geometry, algebra, history, music, art, football, tennis, chess,"
    " basketball, baseball, golf, swimming, love, happiness, freedom, truth, beauty, justice, the moon, the"
    " sun, Mars, Venus, Jupiter, a black hole, a star, a galaxy, the universe, an atom, a molecule, an"
    " electron, water, iron, gold, silver, oxygen, hydrogen, salt, sugar, bread, cheese, pizza, pasta, rice,"
    " coffee, tea, beer, wine, milk, an apple, a banana, an orange, a lemon, a potato, a tomato, a carrot,"
    " an onion, a dog, a cat, a horse, a cow, a sheep, a pig, a lion, a tiger, a bear, an elephant, a whale,"
    " a shark, a snake, a frog, a bird, an eagle, a penguin, a spider, a bee, a butterfly, a tree, an oak, a"
    " rose, grass, a mountain, a river, the ocean, a volcano, an earthquake, a storm, snow, rain, ice, fire,"
    " a car, a train, a bus, a ship, a boat, a bicycle, a house, a castle, a bridge, a tower, a church, a"
    " school, a hospital, a bank, a shop, a book, a newspaper, a film, a song, a piano, a guitar, a violin,"
    " a drum, a camera, a phone, a television, a watch, a lamp, a chair, a table, a bed, a door, a window, a"
    " knife, a fork, a spoon, the heart, the brain, the liver, blood, a bone, a muscle, DNA, a virus, a"
    " vaccine, cancer, a cold, a headache, medicine, law, money, a tax, a contract, the economy, war, peace,"
    " religion, a king, a queen, a knight, a dragon, a ghost, a unicorn, blockchain, bitcoin, JavaScript,"
    " HTML, a database, SQL, Excel, Photoshop, Windows, an iPhone, Kubernetes, a compiler, a web browser, a"
    " spreadsheet, email, quantum mechanics, relativity, the stock market, calculus, trigonometry, poetry,"
    " grammar, opera, ballet, yoga, climate change, a parallel universe, a water pipeline, an oil pipeline,"
    " a parallel line, a car engine, a steam engine, a garden, a kitchen, a recipe, a holiday, a party"
)
DEEDS = _split(
    "bake a cake, cook rice, make pizza, make tea, lose weight, learn French, learn to swim, play the piano,"
    " fix my car, repair a bicycle, plant a tree, build a house, paint a wall, tie a tie, write a book, find"
    " a job, buy a house, invest money, earn money, make friends, sleep better, stop smoking, run faster,"
    " train a dog, feed a cat, boil an egg, grow tomatoes, clean the windows, wash clothes, knit a scarf,"
    " draw a face, sing better, dance, ski, drive a car, fly a plane, sail a boat, travel to Rome, get to"
    " the airport, book a flight, find a hotel, open a bank account, pay taxes, win at chess, become rich,"
    " become a doctor, cure a cold, study law, install Windows, delete my browser history, make a website,"
    " unlock my phone, learn guitar, cut my hair, lose my fear, meet people"
)
UNKNOWN = (
    Unknown(
        PLACES,
        (
            "What is the capital of {}?",
            "Where is {}?",
            "How many people live in {}?",
            "How large is {}?",
            "What is the weather like in {}?",
            "Which language is spoken in {}?",
            "What is the population of {}?",
            "Have you ever been to {}?",
            "How do I get to {}?",
            "What can I do in {}?",
            "Who is the president of {}?",
            "What is the history of {}?",
            "Which river flows through {}?",
            "What do people eat in {}?",
            "Is {} a nice place?",
            "How far is {} from here?",
            "Where is {} located?",
        ),
        is_concept=True,
    ),
    Unknown(
        PEOPLE,
        (
            "Who is {}?",
            "Who was {}?",
            "When was {} born?",
            "When did {} die?",
            "What did {} do?",
            "Where did {} live?",
            "How old is {}?",
            "Tell me about {}.",
            "What is {} famous for?",
            "Why is {} famous?",
            "Do you know {}?",
            "What did {} say?",
            "Where was {} born?",
            "How old was {}?",
        ),
    ),
    Unknown(
        WORKS,
        (
            "Who wrote {}?",
            "Who invented {}?",
            "Who made {}?",
            "When was {} made?",
            "Who painted {}?",
            "What is {} about?",
            "Who discovered {}?",
            "When was {} invented?",
            "How old is {}?",
            "Who directed {}?",
            "Who created {}?",
        ),
        is_concept=True,
    ),
    Unknown(
        THINGS,
        (
            "What is {}?",
            "What is {} made of?",
            "How big is {}?",
            "How much does {} cost?",
            "Why is {} important?",
            "What colour is {}?",
            "What color is {}?",
            "Where does {} come from?",
            "How old is {}?",
            "Who invented {}?",
            "How does {} work?",
            "Where can I buy {}?",
            "How many kinds of {} are there?",
            "How heavy is {}?",
            "What is the history of {}?",
            "How long does {} live?",
            "Is {} dangerous?",
            "What is your opinion about {}?",
            "How fast is {}?",
        ),
        is_concept=True,
    ),
    Unknown(
        DEEDS,
        (
            "How do I {}?",
            "How can I {}?",
            "How to {}?",
            "Tell me how to {}.",
            "What is the best way to {}?",
            "Can you {}?",
            "Help me {}.",
            "I want to {}.",
            "Show me how to {}.",
            "Should I {}?",
            "Can you teach me to {}?",
            "Explain how to {}.",
            "Can I {}?",
            "What do I need to {}?",
        ),
    ),
)

THEMES = _split(
    "cats, dogs, the sea, love, the moon, winter, summer, a dragon, a princess, my boss, football, the rain,"
    " Paris, a robot, trees, time, the stars, coffee, my mother, friendship, a lost key, birds, music,"
    " autumn, the city, hope, a king, a train, an island, a garden, flowers, a river, snow, the night, the"
    " future, a pirate, a horse, sleep, a wizard, school, work, holidays, food, money, art, space"
)
REFUSALS = (
    (
        (
            "Write a poem about {}.",
            "Write a story about {}.",
            "Tell me a story about {}.",
            "Write a song about {}.",
            "Write an essay about {}.",
            "Compose a haiku about {}.",
            "Can you write a poem about {}?",
            "Write a letter about {}.",
            "Write me a short text about {}.",
            "Make up a story about {}.",
            "Write a novel about {}.",
            "Write an email about {}.",
            "Write a blog post about {}.",
            "Please write a limerick about {}.",
            "Write some code about {}.",
            "Write a program about {}.",
            "Write a function in Python for {}.",
            "Draw a picture of {}.",
            "Translate {} into French.",
            "Translate {} to German.",
            "Sing a song about {}.",
            "Give me a recipe for {}.",
        ),
        CANT_WRITE,
    ),
    (
        (
            "What time is it?",
            "What is the time?",
            "What day is it today?",
            "What is the date?",
            "What is the date today?",
            "What is the weather today?",
            "How is the weather?",
            "Will it rain tomorrow?",
            "What is in the news?",
            "What is the news today?",
            "What year is it?",
            "Is it raining?",
            "Who won the game yesterday?",
            "What happened today?",
            "What is the price of gold?",
            "What is the temperature outside?",
            "Search the internet for {}.",
            "Look up {} on the web.",
            "What is the latest news about {}?",
            "Google {} for me.",
            "Can you browse the web?",
            "What month is it?",
            "Where am I?",
            "Where are you?",
            "What will happen tomorrow?",
        ),
        CANT_LOOK,
    ),
    (
        (
            "Should I quit my job?",
            "What should I eat tonight?",
            "What should I wear today?",
            "Am I sick?",
            "I feel sad.",
            "I am tired.",
            "My head hurts.",
            "Which film should I watch?",
            "Which book should I read about {}?",
            "What should I give my friend?",
            "What do you think about {}?",
            "What is the meaning of life?",
            "Does she love me?",
            "I am hungry.",
            "I am bored.",
            "What do you recommend about {}?",
            "Should I learn about {}?",
            "Give me advice about {}.",
            "How can I be happy?",
            "What is your favourite colour?",
            "What is your favorite food?",
        ),
        DONT_KNOW,
    ),
)
