"""What the twelve subjects ask, and the same facts as plain statements, in the three languages."""

from raymerge.demo.words import Words

# Question and statement of each subject. {0}, {1}: what is asked about; {answer}: the right option; {a}-{d}: all four.
TEMPLATES: dict[str, tuple[Words, Words]] = {
    "elementary_addition": (
        ("What is {0} + {1}?", "¿Cuánto es {0} + {1}?", "Combien font {0} + {1} ?"),
        (
            "The sum of {0} and {1} is {answer}.",
            "La suma de {0} y {1} es {answer}.",
            "La somme de {0} et {1} est {answer}.",
        ),
    ),
    "elementary_subtraction": (
        ("What is {0} - {1}?", "¿Cuánto es {0} - {1}?", "Combien font {0} - {1} ?"),
        (
            "Taking {1} from {0} leaves {answer}.",
            "Quitar {1} de {0} deja {answer}.",
            "Retirer {1} de {0} laisse {answer}.",
        ),
    ),
    "number_comparison": (
        ("Which number is the {0}?", "¿Qué número es el {0}?", "Quel nombre est le {0} ?"),
        (
            "The {0} of {a}, {b}, {c} and {d} is {answer}.",
            "El {0} de {a}, {b}, {c} y {d} es {answer}.",
            "Le {0} de {a}, {b}, {c} et {d} est {answer}.",
        ),
    ),
    "number_words": (
        ("Which number is {0}?", "¿Qué número es {0}?", "Quel nombre est {0} ?"),
        (
            "The number {0} is written {answer}.",
            "El número {0} se escribe {answer}.",
            "Le nombre {0} est écrit {answer}.",
        ),
    ),
    "alphabetical_order": (
        ("Which letter comes after {0}?", "¿Qué letra va después de {0}?", "Quelle lettre vient après {0} ?"),
        (
            "The letter {answer} comes after {0}.",
            "La letra {answer} va después de {0}.",
            "La lettre {answer} vient après {0}.",
        ),
    ),
    "days_of_the_week": (
        ("Which day comes after {0}?", "¿Qué día va después de {0}?", "Quel jour vient après {0} ?"),
        (
            "The day {answer} comes after {0}.",
            "El día {answer} va después de {0}.",
            "Le jour {answer} vient après {0}.",
        ),
    ),
    "months_of_the_year": (
        ("Which month comes after {0}?", "¿Qué mes va después de {0}?", "Quel mois vient après {0} ?"),
        (
            "The month {answer} comes after {0}.",
            "El mes {answer} va después de {0}.",
            "Le mois {answer} vient après {0}.",
        ),
    ),
    "word_opposites": (
        ("What is the opposite of {0}?", "¿Cuál es el contrario de {0}?", "Quel est le contraire de {0} ?"),
        ("The opposite of {0} is {answer}.", "El contrario de {0} es {answer}.", "Le contraire de {0} est {answer}."),
    ),
    "word_categories": (
        ("Which of these is {0}?", "¿Cuál de estos es {0}?", "Lequel est {0} ?"),
        ("The word {answer} names {0}.", "La palabra {answer} nombra {0}.", "Le mot {answer} nomme {0}."),
    ),
    "letter_membership": (
        ("Which letter is in {0}?", "¿Qué letra está en {0}?", "Quelle lettre est dans {0} ?"),
        (
            "The letters {0} contain {answer}.",
            "Las letras {0} contienen {answer}.",
            "Les lettres {0} contiennent {answer}.",
        ),
    ),
    "country_capitals": (
        ("What is the capital of {0}?", "¿Cuál es la capital de {0}?", "Quelle est la capitale de {0} ?"),
        ("The capital of {0} is {answer}.", "La capital de {0} es {answer}.", "La capitale de {0} est {answer}."),
    ),
    "colour_mixing": (
        ("What colour do {0} and {1} make?", "¿Qué color forman {0} y {1}?", "Quelle couleur donnent {0} et {1} ?"),
        (
            "The colours {0} and {1} make {answer}.",
            "Los colores {0} y {1} forman {answer}.",
            "Les couleurs {0} et {1} donnent {answer}.",
        ),
    ),
}

SUBJECTS = tuple(TEMPLATES)
