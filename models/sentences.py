"""English sentences for calibrating text models, written for this package.

They are on many subjects and 3 to 33 words long. Every fifth sentence is kept for verification, so
both parts have the same mixture. Short questions, headlines, lists, numbers, names and informal
lines are there because their tokens meet other activations than plain prose does.
"""

from __future__ import annotations

from collections.abc import Sequence


def calibration_texts() -> tuple[str, ...]:
    """The 128 sentences for calibration."""
    return tuple(text for index, text in enumerate(SENTENCES) if index % 5 != 4)


def held_out_texts() -> tuple[str, ...]:
    """The 32 sentences for verification; none of them is in the calibration part."""
    return SENTENCES[4::5]


def paragraphs(texts: Sequence[str], words: int = 90) -> tuple[str, ...]:
    """Neighbouring sentences joined to at least `words` words each; a short rest is left out."""
    joined: list[str] = []
    current: list[str] = []
    for text in texts:
        current.append(text)
        if sum(len(part.split()) for part in current) >= words:
            joined.append(" ".join(current))
            current = []
    return tuple(joined)


def grouped_by_length(texts: Sequence[str], size: int) -> list[list[str]]:
    """Batches of at most `size` texts of similar length, short ones first."""
    ordered = sorted(texts, key=len)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


# A line that begins with two spaces goes on with the sentence above it.
SENTENCES: tuple[str, ...] = tuple(
    """\
The kettle clicked off.
Who left the garage door open?
Rain is expected along the coast from early afternoon, turning to sleet above six hundred metres.
A violinist tuned her instrument while the hall slowly filled with people.
The committee postponed its vote until Thursday because two members were stuck at the airport.
Please restart the router and wait two minutes before trying again.
My grandmother kept every letter she received between 1951 and 1978 in a blue biscuit tin under
  the stairs.
Shares of the shipping company fell 4.3 percent after it cut its forecast for the second quarter.
Can this printer handle A3 paper?
Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.
lol no way, he actually said that??
The recipe calls for two eggs, 250 g of flour, a pinch of salt, half a litre of milk and a little
  butter for the pan.
Goats climbed the ruined wall.
The night train to Vienna leaves from platform nine at 22:47 and arrives shortly after breakfast.
Despite three months of negotiations, the two unions could not agree on how the overtime of
  part-time drivers should be counted, so the old contract stays in force.
Doctors advise adults to sleep between seven and nine hours a night.
What is the difference between a virus and a bacterium?
Local bakery wins national prize for sourdough
She folded the map, checked the sky once more and started down the ridge before the fog could
  close in.
Water boils at a lower temperature on high mountains.
The library's new opening hours are Monday to Friday, nine to seven, and Saturday, ten to four.
An octopus has three hearts, and two of them stop beating when it swims.
I forgot my password again.
The museum bought the painting at auction for 1.2 million euros, about twice what its curators had
  expected to pay when the catalogue appeared in spring.
Two children are building a sandcastle near the edge of the water.
The algorithm sorts the list in place and needs no memory beyond a handful of counters.
Turn left at the church, cross the bridge, and you will see the post office on your right.
New tunnel cuts journey by forty minutes
If the patient develops a rash or has trouble breathing, stop the medicine at once and call the
  emergency number printed on the box.
Is it safe to eat mushrooms that grew on a dead birch?
The referee showed a red card in the ninetieth minute, and the stadium erupted.
Copper conducts electricity better than iron but costs far more.
Nobody had told Amara that the meeting was moved to the fourth floor, so she spent ten minutes
  talking to an empty room before someone from the kitchen noticed.
Thanks a bunch, you saved my day!
The lease ends on 30 June unless either party gives written notice three months earlier.
A heron stood motionless in the shallows.
Prices for lithium carbonate have dropped by nearly two thirds since their peak, which makes
  several planned mines in the region hard to finance.
How many moons does Neptune have?
Hand-knitted socks, size 42, never worn, collection only.
The novel opens with a storm at sea and ends, six hundred pages later, with the same ship being
  broken up for firewood.
Most of the workshop was taken up by an enormous loom that nobody under sixty knew how to use.
The server returned status 503 for eleven minutes.
Scientists recorded the deepest fish ever seen on camera, a pale snailfish gliding through the
  dark more than eight kilometres below the surface.
You can pay by card, in cash or with a voucher.
Why does bread go stale faster in the fridge than on the kitchen table?
In 1903 the village had four hundred inhabitants, two inns, a mill and no school.
Mr. Okafor, who had driven the number 12 bus for thirty-one years, waved to every passenger on his
  last day.
Mind the step.
The judge ruled that the photographs could not be used as evidence, since the officer had opened
  the locker without a warrant.
Volcanic soil makes the island unusually good for growing tomatoes and grapes.
Battery at 12%, screen dimmed, still forty kilometres to go.
The orchestra rehearsed the slow movement three times, and still the conductor shook his head.
Do penguins ever meet polar bears in the wild?
Central bank leaves interest rates unchanged
He apologised for the delay and offered everyone in the waiting room a cup of tea.
Take one tablet with water after meals, morning and evening, for seven days, even if you feel
  better before the course is finished.
The bicycle needs a new chain, brake pads and probably a rear wheel.
Sea levels rose by about twenty centimetres during the last century, and the rate has roughly
  doubled since satellites began to measure it in 1993.
The actor declined to comment.
A loaf, some cheese, olives and a bottle of cold lemonade were all we needed.
What time does the pharmacy on Mill Lane close on Sundays?
The compiler reports an error in line 88, but the actual mistake is a missing bracket forty lines
  earlier.
Elephants can recognise themselves in a mirror.
Our flight was cancelled, the hotel had no record of the booking, and the only restaurant still
  open served nothing except soup; it was nevertheless one of the best weekends of the year.
Remove the cover by loosening the four screws at the back.
gonna be late, start without me
The bridge was closed for repairs after divers found cracks in two of its pillars.
Early maps of the coast show a harbour where there are now only fields and a row of poplars.
Is there a train from Lyon to Turin that carries bicycles?
Farmers in the valley harvest saffron for just two weeks in October, before sunrise, because the
  flowers wilt as soon as the day grows warm.
The gallery is free for students.
A good hammer should feel slightly too heavy at first.
Unemployment among people under twenty-five fell to 9.8 percent in March, its lowest level since
  records began, though most of the new jobs are temporary.
Put the lid back on.
The detective noticed that the clock in the study was exactly one hour slow.
Quantum computers will not replace ordinary ones; they are suited to a narrow set of problems.
Dear all, the fire drill planned for this morning will take place tomorrow at eleven instead.
Which of these three plants needs the least light?
The dog barked twice, sniffed the parcel and lost interest.
Under the new rules, landlords must fix heating faults within forty-eight hours during the winter
  or reduce the rent for every further day.
A marathon is 42.195 kilometres long.
The comet will next be visible from Earth in about four thousand years.
She speaks Portuguese, Dutch and a little Wolof.
Engineers tested the valve at pressures of up to 350 bar and found no leak, yet they asked for
  another month because the seal had only been tried at room temperature.
Three stars out of five: decent coffee, terrible chairs.
Where can I return a rental car after midnight?
The old lighthouse keeper wrote down the weather every day for fifty years, and climate
  researchers now treat his notebooks like treasure.
Honey never really spoils.
The mayor promised more trees, fewer cars and a playground in every district.
Goalkeeper Lena Hartwig saved two penalties as the visitors won the final 3-1.
Cats sleep for most of the day and hunt at dawn and dusk.
The contract covers parts and labour but not damage caused by water, frost or improper use.
What happens to my data if I delete the account?
A thin layer of ice had formed on the inside of the windows.
Mix the paint thoroughly, apply a thin first coat, let it dry overnight, sand it lightly and only
  then apply the second coat.
The spacecraft sent its last picture before it plunged into the clouds of Saturn.
Ask Priya, she knows.
Enzymes speed up chemical reactions in the body without being used up themselves.
The survey of 2,140 households found that families with a garden spend less on holidays, but more
  on tools, seeds and, surprisingly, books.
Two men in orange vests are repairing the traffic light at the crossing.
The exhibition runs until 14 January.
Whoever designed this menu clearly never had to read it on a phone.
How do I convert a PDF to plain text?
The minister resigned on Tuesday evening, hours after a newspaper published messages in which she
  joked about the very audit she had been asked to supervise.
Wolves returned to the forest without anyone's help, following the deer down from the mountains.
The soup was cold, the waiter was not.
In the third act the two brothers finally meet, and neither recognises the other.
Tax returns are due by 31 July; those who use an adviser have until the end of February.
Why is the sky blue at noon and red at sunset?
Strong winds toppled a crane at the harbour on Friday night; nobody was hurt, but two warehouses
  were damaged and ferries stayed in port until morning.
Her first company sold umbrellas, her second one software, and her third, the only one that
  lasted, repaired pianos.
The earthquake measured 5.9 and was felt as far away as the capital.
Cool, see you at 8 then :)
An empty glass stood on the piano.
The proof works by contradiction: assume there are only finitely many primes, multiply them all
  together and add one.
Is a tomato a fruit or a vegetable?
The festival attracts some thirty thousand visitors to a town of nine hundred people, which is why
  every barn, attic and caravan for miles around is rented out a year ahead.
The filter should be cleaned once a month.
A woman in a yellow raincoat is walking three small dogs along the canal.
Children under six travel free.
After the war the factory made bicycles instead of engines.
The old operating system no longer receives security updates, so machines that still run it should
  be taken off the network.
What a goal!
Whales sing differently from one ocean to the next, and new songs spread eastward like fashion.
Two thirds of the members voted in favour, well above the share that the statutes require.
Order number 7730-B has been shipped and should reach you within three working days.
Snow leopards are so hard to spot that the team waited nine weeks for a single photograph, taken
  at last by a camera they had forgotten to collect.
Does anyone have a spare charger?
The ceramic bowl cracked in the oven.
Mountain huts must be booked in advance, and guests are asked to bring a light sleeping bag and to
  leave their boots by the door.
The speed of light is 299,792 kilometres per second.
Police are looking for witnesses to the accident on Ring Road.
Old habits die hard.
The poet crossed out every adjective on the page, read the result aloud and, after a long pause,
  put half of them back.
Where is the nearest charging station?
The battery of a modern electric car loses roughly two percent of its capacity a year, less if it
  is rarely charged to the very top.
We grew beans, peas, carrots and far too many courgettes.
The surgeon explained the operation with a pencil sketch on the back of an envelope.
Startup raises $14m to turn seaweed into packaging
A child is pointing at a plane.
Archaeologists found a comb, two coins and a child's shoe in the filled-in well.
Could you send me the minutes of last week's call?
The judge, a former swimmer herself, disqualified the winner for a false start that the cameras
  confirmed only on the third replay.
Bees tell one another where to find food by dancing.
If it rains we will meet in the old gym, otherwise on the lawn behind it.
The phone fell into the lake; the phone, against all odds, still works.
Cut the fabric along the dotted line.
Budget talks enter their fourth day
The violin, which was believed to have been lost in a fire in 1894, turned up in the attic of a
  retired dentist who had been using its case to store fishing lines.
Nitrogen makes up about 78 percent of the air.
How long should I boil an egg if I want the yolk to stay soft?
Nobody in the office admitted to having eaten the last slice of cake.
The tide turned.
Researchers followed 812 twins for twenty years and concluded that early music lessons had little
  effect on later income, but a lasting one on how well they slept.
You have three unread messages and one missed call from Tom.
The garden wall keeps the wind out and the warmth in.
They married in Lisbon, lived in Montreal, and retired to a farmhouse that neither of them had
  seen before buying it.
Are these headphones compatible with older laptops?
Seventeen ducks crossed the motorway under police escort on Sunday.
The play is short, loud and very funny.
""".replace("\n  ", " ").splitlines()
)
