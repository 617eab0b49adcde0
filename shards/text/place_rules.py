"""Patterns of the privacy gate for hospitals and postal addresses, in six languages, each behind a word that says so.

    for rule in PLACE_RULES:
        rule.name, rule.patterns, rule.tokens       # "hospital", ..., the words without which no pattern can match

English, Spanish, German, French, Portuguese and Vietnamese. All rules look at every text, because reports quote each
other and cite colleagues in other languages. A place is a run of words with capitals beside a word such as
Hospital, CHU or Rua.
"""

import re

from shards.text.identifier_rules import UPPER, Rule, case_rule
from shards.text.name_rules import LETTER, PARTICLE, SYLLABLE

# Hospitals and wards.
_NO_PLACE = (
    r"(?!(?i:the|this|our|an?|at|in|to|outside|local|referring|another|other|previous|prior|same|community"
    r"|general|university|memorial|regional"
    r"|children['’]?s|veterans?|heart|pulmonary|lung|cancer|orthop\w+|vascular|pain|chest|thoracic|pa?ediatric"
    r"|urgent|walk|outpatient"
    r"|follow|cardiac|coumadin|main|emergency|department|\w+ology|primary|course|day|admission|stay|discharge"
    r"|problem|acquired|number|bed|room|unit|service|medicine|medical|d[ií]a|jour|and"
    r"|from|with|sleep|wound|breast|transplant|asthma|dialysis|field|failure|care|surgery|disease|function"
    r"|rhythm|device|specialty|universitari[oa]|universitário|geral|comarcal|clínico|provincial|municipal"
    r"|estadual|federal|central|infantil"
    r"|universitaires?|r[ée]gional|civils|center|centre|clinic|hospital|home|living|trauma|level|stroke|spine"
    r"|monday|tuesday|wednesday|thursday|friday|saturday|sunday"
    r"|dose|housefield|hounsfield)\b)"
)
_P = rf"(?:(?=[{UPPER}]){_NO_PLACE}\w{LETTER}*(?:['’.-]{LETTER}+)*\b\.?)"
_PLACE = rf"(?:{PARTICLE}|d['’]|l['’])?{_P}(?:[ \t]+{PARTICLE}?{_P}){{0,3}}"
_NAMED_HOSPITALS = (
    # Massachusetts General Hospital, St. Mary's Medical Center
    rf"(?<!\w)(?P<id>{_P}(?:[ \t]+(?:of[ \t]+|the[ \t]+|and[ \t]+)?[{UPPER}]{LETTER}+"
    rf"(?:['’-]{LETTER}+)*){{0,4}}?)[ \t]+"
    r"(?=(?:Hospital|Medical Cent(?:er|re)|Clinic|Infirmary|Hospice|(?:Nursing|Care) Home|Assisted Living"
    r"|Urgent Care|Health System|Health Cent(?:er|re)|Rehabilitation Cent(?:er|re))\b)",
    # Helios Klinikum, but not Neurologische Klinik
    rf"(?<!\w)(?!(?:Die|Der|Das|In|Im|Zur|Aus|Von|Unsere?r?|Eine?r?|Keine|Städtische[ns]?|\w+(?:isch|lich)e[nrs]?)\b)"
    rf"(?P<id>[{UPPER}]{LETTER}{{2,}}(?:[ \t][{UPPER}]{LETTER}+)?)[ \t]+(?=(?:Klinik|Klinikum|Krankenhaus"
    rf"|Kliniken)\b)",
    rf"(?<!\w)(?P<id>(?:St\.-|Sankt-)?[{UPPER}]{LETTER}+(?:-[{UPPER}]{LETTER}+)*)-(?:Krankenhaus|Klinik|Klinikum"
    rf"|Hospital|Spital|Stift)\b",
)
_NAMED_HOSPITAL_TOKENS = (
    "hospital medical clinic infirmary hospice nursing care assisted urgent health rehabilitation kliniken"
    " krankenhaus klinik klinikum spital stift"
)
_HOSPITALS = (
    rf"\b(?:Hospital|Cent(?:er|re)|Clinic|Infirmary)\s+(?:in|of|at|for)\s+(?:the\s+)?(?:University\s+of\s+)?"
    rf"(?P<id>{_PLACE})",
    rf"\b(?:[Ff]rom|[Aa]t)\s+(?P<id>(?:St\.?|Saint)\s{_P}['’]s)\b",
    # Homes and institutes of all kinds: the word that says so, then a name with a small letter in it
    r"\b(?:[Hh]ospital|[Cc]l[ií]nica|[Cc]omple[jx]o\s[Hh]ospitala(?:rio|r)|[Ss]anatorio|[Aa]mbulatorio|[Cc]onsultorio"
    r"|[Cc]entro\s(?:de\s[Ss]a(?:lud|úde)|[Mm]édico)|[Rr]esidencia(?:\sde\s(?:ancianos|mayores))?|[Ff]undaci[óo]n"
    r"|[Ff]undação|[Ii]nstituto|[Uu]nidade\s[Bb]ásica\s(?:de\s[Ss]aúde)?|[Cc]asa\sde\s[Rr]epouso"
    r"|[Ll]ar\sde\s[Ii]dosos|[Mm]aternidade|H\.\s?U\.|HU|HC|[Cc]línico|[Ii]nstitut|[Cc]abinet|CH|EHPAD"
    r"|[Mm]aison\sde\s(?:retraite|santé|repos)|[Rr]ésidence)\s+"
    r"(?:(?:Universitari[oa]|Universitário|General|Geral|Comarcal|Clínico|Regional|Provincial|Municipal|Estadual"
    r"|Federal|Central|Infantil|Nacional|U\.|e|y|et|Maternidade|de|del|da|do|des|du|la|el)\s+)*(?:d['’]|l['’])?"
    rf"(?P<id>(?=[{UPPER}]['’]?{LETTER}*[^\W\d_{UPPER}]){_PLACE})",
    rf"\bCentre\s+(?P<id>{_P}(?:[ \t-]{_P}){{1,3}})",
    r"\b(?:Pflege|Alten|Alters|Senioren)(?:heim|residenz|zentrum|stift)\s+(?:(?:am|im|an\s+der|der|zum|zur)\s+)?"
    rf"(?P<id>(?:(?:Am|Im|Haus|An\s+der|Zum|Zur)\s+)?{_PLACE})",
    rf"\b(?:MVZ|Universitätsmedizin|Charité|Hospiz|(?:[Aa]us|[Vv]on)(?:\s+der)?\s+Klinik)\s+(?P<id>{_PLACE})",
    # Hospital Universitario La Paz, Clínica Santa Brígida, Santa Casa de Ribeira
    r"\b(?:Hospital|Clínica|Clinica|Sanatorio|Policlínic[ao]|Santa Casa|Maternidade|Maternidad|Ambulatorio"
    r"|Centro\s+(?:de\s+Salud|Médico|Hospitalar))\s+"
    r"(?:(?:Universitari[oa]|Universitário|General|Geral|Comarcal|Clínico|Regional|Provincial|Municipal|Estadual"
    r"|Federal|Central|Infantil|de|del|da|do|la|el)\s+)*"
    rf"(?P<id>{_PLACE})",
    r"\b(?:[Hh]ôpital|[Hh]ôpitaux|[Cc]linique|Polyclinique|CHU|CHRU|CHR|Centre\s+[Hh]ospitalier|Hospices)\s+"
    rf"(?:(?:[Uu]niversitaires?|[Rr]égional|[Cc]ivils|de|du|des|la|les)\s+)*(?:d['’]|l['’])?(?P<id>{_PLACE})",
    r"\b(?:(?:Universitäts|Kreis|Stadt|Uni|Kantons|Landes)?(?:[Kk]linikum|[Kk]rankenhaus|[Ss]pital)|(?:Uni"
    r"|Universitäts|Lungen|Tages|Thorax|Reha)-?klinik"
    rf"|Herzzentrum|(?:der|die|einer)\s+(?:Klinik|Praxis))\s+(?:(?:am|im|in|an\s+der|rechts\s+der|der|zum"
    rf"|zur)\s+)?(?P<id>{_PLACE})",
    r"\b(?:[Bb]ệnh viện|[Pp]hòng khám|[Tt]rung tâm [Yy] tế|[Tt]rạm [Yy] tế|(?<!ệnh )Viện|TTYT|BV)\s+"
    r"(?:(?:[ĐđD]a khoa|[Tt]rung ương|[Qq]uốc tế|[Tt]ỉnh|[Hh]uyện|[Qq]uận|[Tt]hành phố|[Đđ]ại học|Nhi|Phổi)\s+)*"
    rf"(?P<id>{SYLLABLE}(?:\s{SYLLABLE}){{1,3}})",
    # from Massachusetts General; Pronto Socorro and health posts of Brazil
    rf"\b(?:[Ff]rom|[Aa]t|[Tt]o)\s+(?P<id>{_P}(?:[ \t]+{_P}){{0,2}})[ \t]+(?=(?:Memorial|General|Regional)\s*[,.;)])",
    rf"\b(?:UPA|UBS|AMA|ESF|Pronto[ -]Socorro|Posto\s+de\s+Saúde|CAP)\s+(?:(?:Municipal|de|do|da)\s+)*"
    rf"(?P<id>{_PLACE}(?<=\w\w\w))",
    # Ward Ellison 7
    rf"\b(?:[Ww]ard|[Uu]nit|Station|[Ww]ing|[Pp]avilion|Pabellón|[Ff]loor|[Pp]lanta|[Aa]la)\s+(?P<id>{_P}"
    rf"(?<=\w\w\w)\s\d{{1,3}})(?!\w|[.,]\d)",
)
_HOSPITAL_TOKENS = (
    "complejo complexo consultorio residencia fundación fundacion fundação instituto unidade lar h hu hc clínico"
    " institut cabinet"
    " ch ehpad maison résidence pflegeheim altenheim altersheim seniorenheim seniorenresidenz pflegezentrum"
    " seniorenzentrum"
    " altenzentrum pflegeresidenz altenstift seniorenstift mvz universitätsmedizin charité hospiz aus von trạm viện"
    " from at to der die einer universitäts uni kantons landes kreis stadt lungen tages thorax reha santa"
    " polyclinique clinique upa ubs ama esf pronto posto cap hospital center centre clinic infirmary hospice"
    " nursing health clínica clinica sanatorio policlínica policlínico casa maternidade"
    " maternidad ambulatorio centro hôpital hôpitaux clinique polyclinique chu chru chr hospices klinikum"
    " krankenhaus spital"
    " universitätsklinikum universitätskrankenhaus universitätsspital kreisklinikum kreiskrankenhaus kreisspital"
    " stadtklinikum"
    " stadtkrankenhaus stadtspital uniklinikum unikrankenhaus unispital kantonsklinikum kantonskrankenhaus"
    " kantonsspital landesklinikum"
    " landeskrankenhaus landesspital uniklinik universitätsklinik lungenklinik tagesklinik thoraxklinik"
    " rehaklinik klinik"
    " herzzentrum praxis stift bệnh phòng trung ttyt bv ward unit station wing pavilion pabellón floor planta ala"
)

# Postal addresses.
_NUMBERED_STREETS = (
    rf"(?<![\w.,/-])(?P<id>\d{{1,5}}[A-Z]?[ \t](?:[NSEW]\.?[ \t])?(?:[{UPPER}]{LETTER}+[ \t]){{1,3}}(?:Street|St"
    rf"|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Boulevard|Blvd"
    r"|Way|Court|Terrace|Circle|Highway|Hwy|Parkway|Square)\b\.?(?:,?[ \t](?:Apt|Unit|Suite)\.?[ \t]\w+)?)",
    rf"(?<!\w)(?P<id>(?:\d{{1,4}}(?:\s?(?:bis|ter))?,?\s+)?(?:rue|avenue|boulevard|impasse|quai|allée)\s+(?:"
    rf"(?:de|du|des|la|les)\s+|de\s+l['’]|d['’]|l['’])*"
    rf"[{UPPER}]{LETTER}+(?:[\s-]{PARTICLE}?[{UPPER}]{LETTER}+){{0,3}})",
    rf"(?<!\w)(?P<id>\d{{1,4}},?\s+(?:place|chemin|route)\s+(?:(?:de|du|des|la|les)\s+|d['’]"
    rf"|l['’])*[{UPPER}]{LETTER}+(?:[\s-][{UPPER}]{LETTER}+){{0,2}})",
    rf"(?<!\w)(?P<id>(?:[Ss]ố\s+)?\d{{1,4}}(?:/\d+)*[A-Z]?\s+(?:đường|phố|ngõ)\s+{SYLLABLE}(?:\s{SYLLABLE}){{0,3}})",
)
_NUMBERED_STREET_TOKENS = (
    "street st avenue ave road rd lane ln drive boulevard blvd way court terrace circle highway hwy parkway square"
    " rue impasse quai allée place chemin route đường phố ngõ"
)
_STREETS = (
    r"\b(?i:(?:home\s+|mailing\s+)?address|domicilio|dirección|endereço|adresse|anschrift|địa chỉ)\s*:\s*"
    r"(?:___\W+)?(?P<id>[^\W_](?:\b\w{1,4}\.(?=\s[^\W_])|[^.;\n]){2,100})",
    r"\b(?:[Cc]alle|C/|[Aa]venida|[Aa]vda\.?|[Pp]laza|[Pp]aseo|[Cc]arretera|[Rr]ua|[Tt]ravessa|[Pp]raça"
    r"|[Aa]lameda|[Ee]strada)\s+(?:(?:de|del|la|las|los|el|da|do|dos|das)\s+)*"
    rf"(?P<id>[{UPPER}]{LETTER}+(?:\s{PARTICLE}?[{UPPER}]{LETTER}+){{0,3}}(?:,?\s+(?:n\.?[ºo°]\s*)?\d{{1,5}})?)",
    r"\b(?:[Ww]ohnt|[Ww]ohnhaft|Adresse|Anschrift)\s*:?\s+(?:in\s+)?"
    rf"(?P<id>(?:(?:Am|An|Im|Zum|Zur|Auf|In|Hinter|Vor|Bei|Unter|Ober|Neben)\s(?:de[rnm]\s)?)?[{UPPER}]{LETTER}+"
    rf"(?:[\s-][{UPPER}]{LETTER}+){{0,2}}\s\d{{1,4}}\s?[a-z]?)\b",
    rf"\b(?:[Pp]hường|[Qq]uận|[Hh]uyện|[Tt]hôn|[Tt]hị trấn|[Tt]hành phố|TP\.)\s+(?P<id>{SYLLABLE}"
    rf"(?:\s{SYLLABLE}){{1,2}})",
    r"\b(?:CEP|ZIP|[Zz]ip(?:\scode)?|PLZ|CP|C\.P\.)\s*:?\s*(?P<id>\d{5}(?:-?\d{3,4})?)(?!\d)",
    rf"\b(?:lives|living|resides|residing)\s+(?:in|at)\s+(?P<id>\d{{1,5}}[A-Za-z]?\s+{_PLACE}|{_PLACE})",
    # the town behind a street that was replaced
    rf"\b(?:[Rr]esides?|[Ll]ives|[Aa]ddress|[Ww]ohnhaft|[Rr]esidente|[Dd]omicili\w+|[Hh]abite|[Rr]eside|[Vv]ive"
    rf"|[Mm]ora)\b[^.;\n]{{0,30}}___,\s+(?P<id>{_PLACE})(?=\s*(?:$|[.;)\n]|___|,\s*(?:\d|___|CEP)))",
)
_STREET_TOKENS = (
    "calle c avenida avda plaza paseo carretera rua travessa praça alameda estrada wohnt wohnhaft adresse"
    " anschrift home mailing phường quận huyện thôn thị thành tp address domicilio dirección endereço địa cep"
    " zip plz cp p lives"
    " living resides residing resident reside residente domicilio habite vive mora domiciliado domiciliada"
    " domicilié domiciliée"
)
_GERMAN_STREETS = (
    rf"(?<!\w)(?!Atem|Zugang|Harn|Gallen|Luft|Blut)(?P<id>[{UPPER}](?:{LETTER}|-){{0,40}}(?:straße|strasse|str\."
    rf"|weg|gasse|platz|allee|damm)\s\d{{1,4}}\s?[a-h]?)(?!\w|[.,]\d|\s?[mc]m\b)",
)
_GERMAN_ENDINGS = ("straße ", "strasse ", "str. ", "weg ", "gasse ", "platz ", "allee ", "damm ")
_POSTCODES = (
    # Leeds LS6 3QW
    rf"(?:___,?\s|\b{_P}\s)(?P<id>(?![CTLS]\d\s)[A-Z]{{1,2}}\d[A-Z\d]?\s\d[ABD-HJLNP-UW-Z]{{2}})(?!\w)",
)
_TOWNS = (
    # Springfield, MA 01103
    rf"(?<!\w)(?P<id>[{UPPER}]{LETTER}+(?:[ \t][{UPPER}]{LETTER}+){{0,2}},\s(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI"
    rf"|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI"
    r"|S[CD]|T[NX]|UT|V[AT]|W[AIVY])\s+\d{5}(?:-\d{4})?)(?!\d)",
    # behind a street that was replaced: 28013 Madrid; or the number of the house
    rf"___,?(?:\s*\d{{1,2}}\s?[ºª°](?:\s?[A-Z]\b)?,?)?\s+(?P<id>(?:[DAF]-)?\d{{4,5}}\s+{_PLACE})",
    rf"(?:___|\w),\s+(?P<id>\d{{5}}\s+{_P})(?=[\s,]*(?:$|[.;,)]))",
    r"\b(?:[Rr]ua|[Aa]venida|[Tt]ravessa|[Pp]raça|[Cc]alle)\s+(?:\w+\s+)?___,\s*(?P<id>\d{1,5})\b",
)

PLACE_RULES = (
    case_rule("hospital", _NAMED_HOSPITAL_TOKENS, _NAMED_HOSPITALS, before=100),
    case_rule("hospital", _HOSPITAL_TOKENS, _HOSPITALS, before=0),
    case_rule("address", _NUMBERED_STREET_TOKENS, _NUMBERED_STREETS, before=60),
    case_rule("address", _STREET_TOKENS, _STREETS, before=0),
    Rule("address", tuple(map(re.compile, _GERMAN_STREETS)), _GERMAN_ENDINGS, re.compile(r"\d")),
    case_rule("address", "", _POSTCODES, r"\d\s\d[A-Z]{2}"),
    case_rule("address", "", _TOWNS, r", ?[A-Z]{2} {1,2}\d{5}|___\W[^_\n]{0,12}\d|, \d{5} "),
)
