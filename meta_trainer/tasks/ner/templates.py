"""Sentences of the embedded corpus, with slots for names and for fillers.

The Finnish sentences keep every name in the nominative, so that names stay as they are looked up: no case
ending and no consonant gradation. Several sentences of both languages fit more than one entity type, and some
have no entity.
"""

ENTITY_SLOTS = ("PER", "LOC", "ORG")

ENGLISH = (
    "{PER} won the {EVENT} on {DAY} .",
    "{PER} declined to comment on {DAY} .",
    "{ORG} declined to comment on {DAY} .",
    "Shares of {ORG} fell {NUM} percent after the announcement .",
    "{ORG} said on {DAY} that it would hire {NUM} people in {LOC} .",
    "The mayor of {LOC} , {PER} , opened the {EVENT} .",
    "{PER} , who was born in {LOC} , now works for {ORG} .",
    "Analysts at {ORG} expect prices to rise .",
    "{ORG} and {ORG} are to merge next year .",
    "Police in {LOC} arrested {NUM} people on {DAY} .",
    "The train from {LOC} to {LOC} was late again .",
    "Chief executive {PER} will leave {ORG} in May .",
    "Minister {PER} met {PER} in {LOC} on {DAY} .",
    "{LOC} , {DAY}",
    "Results : {PER} , {LOC} , {NUM} points ; {PER} , {LOC} , {NUM} points .",
    "The winner of the {EVENT} is {PER} .",
    "The new owner is {ORG} .",
    "The next stop is {LOC} .",
    "{ORG} beat {ORG} {NUM} - {NUM} .",
    "Heavy rain is expected in {LOC} and {LOC} .",
    "Who is {PER} ?",
    "Where is {LOC} ?",
    "The bridge was built by {ORG} and designed by {PER} .",
    "Speakers : {PER} ( {ORG} ) , {PER} ( {LOC} ) .",
    "{NUM} fans travelled to {LOC} to see {PER} play .",
    "A spokesman for {ORG} denied the report .",
    "For more information , call {PER} , {ORG} .",
    "Among the sponsors are {ORG} , {ORG} and {ORG} .",
    "{PER} and {PER} shared the first prize .",
    "Route : {LOC} - {LOC} - {LOC}",
    "The book was written by {PER} .",
    "{ORG} opened a second factory near {LOC} .",
    "The government agreed on a new law on {DAY} .",
    "Prices rose {NUM} percent last year .",
    "The Team lost the {EVENT} in the last minute .",
    "The Company will publish its results on {DAY} .",
    "Snow and strong winds are expected next week .",
    "About {NUM} people watched the {EVENT} .",
)

FINNISH = (
    "{PER} voitti {DAY} tärkeän kilpailun .",
    "{PER} ei kommentoinut asiaa {DAY} .",
    "{ORG} ei kommentoinut asiaa {DAY} .",
    "{ORG} palkkaa {NUM} uutta työntekijää .",
    "{ORG} ja {ORG} yhdistyvät ensi vuonna .",
    "{LOC} on alueen suurin kaupunki .",
    "Toimitusjohtaja {PER} , {ORG} , vastasi kysymyksiin {DAY} .",
    "Vuoden urheilija on {PER} .",
    "Yhtiön uusi omistaja on {ORG} .",
    "Seuraava pysäkki on {LOC} .",
    "Tulokset : {PER} , {LOC} , {NUM} pistettä ; {PER} , {LOC} , {NUM} pistettä .",
    "Kaupunginjohtaja {PER} avasi uuden kirjaston {DAY} .",
    "Myös {LOC} sai uuden koulun .",
    "Ostaja on {ORG} , myyjä {PER} .",
    "Kilpailun järjestää {ORG} .",
    "{LOC} , {DAY}",
    "Reitti : {LOC} - {LOC} - {LOC}",
    "Talon rakensi {ORG} , ja sen suunnitteli {PER} .",
    "Mukana ovat muun muassa {ORG} , {ORG} ja {ORG} .",
    "{ORG} voitti ottelun {NUM} - {NUM} .",
    "Kuka on {PER} ?",
    "Missä on {LOC} ?",
    "Kirjan on kirjoittanut {PER} .",
    "Junat {LOC} - {LOC} on peruttu {DAY} .",
    "Lisätietoja antaa {PER} , {ORG} .",
    "{PER} vaihtaa seuraa , ja uusi seura on {ORG} .",
    "Uusi tehdas : {ORG} , {LOC} .",
    "Puhujat : {PER} ( {ORG} ) , {PER} ( {LOC} ) .",
    "Hallitus sopi uudesta laista {DAY} .",
    "Hinnat nousivat viime vuonna {NUM} prosenttia .",
    "Yhtiö julkaisee tuloksensa {DAY} .",
    "Ensi viikolla sataa lunta ja tuulee .",
)

TEMPLATES = {"en": ENGLISH, "fi": FINNISH}

FILLERS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "DAY": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        "EVENT": ("race", "match", "final", "Open", "Cup", "festival", "Grand Prix", "tournament"),
    },
    "fi": {
        "DAY": (
            "maanantaina",
            "tiistaina",
            "keskiviikkona",
            "torstaina",
            "perjantaina",
            "lauantaina",
            "sunnuntaina",
        ),
    },
}
