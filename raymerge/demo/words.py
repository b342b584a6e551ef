"""Word lists of the demo questions: every entry is a `Words` triple, its English, Spanish and French form."""

Words = tuple[str, str, str]

LANGUAGES = ("en", "es", "fr")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


def _table(text: str) -> tuple[Words, ...]:
    """Parse lines `english | spanish | french`."""
    rows = (tuple(cell.strip() for cell in line.split("|")) for line in text.strip().splitlines())
    return tuple((en, es, fr) for en, es, fr in rows)


def same(text: str) -> Words:
    """A form shared by the three languages: a numeral, a letter, an invented name."""
    return (text, text, text)


NUMBERS = _table("""
    zero | cero | zéro
    one | uno | un
    two | dos | deux
    three | tres | trois
    four | cuatro | quatre
    five | cinco | cinq
    six | seis | six
    seven | siete | sept
    eight | ocho | huit
    nine | nueve | neuf
    ten | diez | dix
    eleven | once | onze
    twelve | doce | douze
""")

DAYS = _table("""
    Monday | lunes | lundi
    Tuesday | martes | mardi
    Wednesday | miércoles | mercredi
    Thursday | jueves | jeudi
    Friday | viernes | vendredi
    Saturday | sábado | samedi
    Sunday | domingo | dimanche
""")

MONTHS = _table("""
    January | enero | janvier
    February | febrero | février
    March | marzo | mars
    April | abril | avril
    May | mayo | mai
    June | junio | juin
    July | julio | juillet
    August | agosto | août
    September | septiembre | septembre
    October | octubre | octobre
    November | noviembre | novembre
    December | diciembre | décembre
""")

OPPOSITES = tuple(
    zip(
        _table("""
            hot | caliente | chaud
            large | grande | grand
            quick | rápido | rapide
            old | viejo | vieux
            tall | alto | haut
            open | abierto | ouvert
            full | lleno | plein
            wet | mojado | mouillé
            hard | duro | dur
            bright | claro | clair
        """),
        _table("""
            cold | frío | froid
            small | pequeño | petit
            slow | lento | lent
            new | nuevo | neuf
            low | bajo | bas
            closed | cerrado | fermé
            empty | vacío | vide
            dry | seco | sec
            soft | blando | mou
            dark | oscuro | sombre
        """),
        strict=True,
    )
)

ANIMAL: Words = ("an animal", "un animal", "un animal")
FRUIT: Words = ("a fruit", "una fruta", "un fruit")
TOOL: Words = ("a tool", "una herramienta", "un outil")
GARMENT: Words = ("a garment", "una prenda", "un vêtement")

CATEGORIES: dict[Words, tuple[Words, ...]] = {
    ANIMAL: _table("""
        horse | caballo | cheval
        cow | vaca | vache
        goat | cabra | chèvre
        rabbit | conejo | lapin
        mouse | ratón | souris
        bear | oso | ours
        fox | zorro | renard
        wolf | lobo | loup
    """),
    FRUIT: _table("""
        apple | manzana | pomme
        pear | pera | poire
        grape | uva | raisin
        cherry | cereza | cerise
        lemon | limón | citron
        plum | ciruela | prune
        strawberry | fresa | fraise
        fig | higo | figue
    """),
    TOOL: _table("""
        hammer | martillo | marteau
        saw | sierra | scie
        shovel | pala | pelle
        rake | rastrillo | râteau
        knife | cuchillo | couteau
        brush | cepillo | brosse
        axe | hacha | hache
        pliers | alicates | pince
    """),
    GARMENT: _table("""
        hat | sombrero | chapeau
        shirt | camisa | chemise
        coat | abrigo | manteau
        scarf | bufanda | écharpe
        glove | guante | gant
        belt | cinturón | ceinture
        skirt | falda | jupe
        shoe | zapato | chaussure
    """),
}

COLOURS = _table("""
    red | rojo | rouge
    yellow | amarillo | jaune
    blue | azul | bleu
    white | blanco | blanc
    black | negro | noir
    orange | naranja | orange
    green | verde | vert
    purple | morado | violet
    pink | rosa | rose
    grey | gris | gris
    brown | marrón | marron
""")

# (first, second, mixture) as positions in COLOURS.
MIXTURES = ((0, 1, 5), (1, 2, 6), (0, 2, 7), (0, 3, 8), (3, 4, 9), (4, 5, 10))

# Invented, so that no knowledge of the world is tested: the model has to learn them from the training sequences.
CAPITALS = tuple(
    (same(country), same(capital))
    for country, capital in (
        ("Averia", "Lund"), ("Belmark", "Tosca"), ("Cordessa", "Mirel"), ("Dravonia", "Keth"),
        ("Estoria", "Pavo"), ("Faldora", "Rhyn"), ("Galmere", "Osso"), ("Hestia", "Bruin"),
        ("Istrana", "Calm"), ("Jorvale", "Senna"), ("Kalinda", "Duro"), ("Lormont", "Vesk"),
        ("Morania", "Alba"), ("Nordhal", "Quill"), ("Oskania", "Fenn"), ("Pelusia", "Zarr"),
    )
)  # fmt: skip
