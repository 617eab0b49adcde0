"""The patterns of the privacy gate: what identifies a person in English and Spanish reports, rule by rule.

    for rule in RULES:
        rule.name, rule.patterns            # "date", regular expressions whose group `id` is what must go

They follow the identifiers of the HIPAA safe harbour (45 CFR 164.514(b)(2)): every element of a date but the year,
ages above 89, numbers of records, telephones, mail and web addresses, and names. A name is recognised by its context:
a title, a degree, a header, "dictated by". Terms of radiology in the same letters stay: T4, C7-T1, 2.5 x 3.1 cm,
3/6 murmur, 1/2, PA and lateral, Kerley B. shards/text/deidentification.py applies the rules.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One rule: the matches of the patterns' group `id` are replaced by a mark, and counted as `name`.

    Each match removes a letter or a digit, so repeated passes come to an end. Most texts hold nothing to remove, and
    checking `tokens`, `words` and `near` first costs a tenth of trying the patterns. With `before`, the patterns are
    tried at the tokens alone.
    """

    name: str
    patterns: tuple[re.Pattern[str], ...]
    words: tuple[str, ...]  # every text that can match contains one of them, in small letters with single spaces
    near: re.Pattern[str] | None  # every such text matches this, too; it begins or ends at a digit
    tokens: frozenset[str] = frozenset()  # every such text holds one of them: whole runs of letters, in small letters
    before: int | None = None  # characters: a match starts at most so far before one of the tokens; None: anywhere


def _rule(
    name: str,
    patterns: tuple[str, ...],
    words: tuple[str, ...] = (),
    near: str | None = None,
    tokens: str = "",
    before: int | None = None,
) -> Rule:
    compiled = tuple(re.compile(pattern, re.IGNORECASE) for pattern in patterns)
    return Rule(name, compiled, words, re.compile(near) if near else None, frozenset(tokens.split()), before)


def case_rule(
    name: str, tokens: str, patterns: tuple[str, ...], near: str | None = None, before: int | None = None
) -> Rule:
    """Compile a rule whose patterns tell capital letters from small ones; `tokens` are separated by spaces."""
    compiled = tuple(re.compile(pattern) for pattern in patterns)
    return Rule(name, compiled, (), re.compile(near) if near else None, frozenset(tokens.split()), before)


def word_rule(name: str, words: tuple[str, ...], patterns: tuple[str, ...]) -> Rule:
    """Compile a rule that is tried where one of the `words` is anywhere in the text, inside another word, too."""
    return Rule(name, tuple(re.compile(pattern, re.IGNORECASE) for pattern in patterns), words, None)


# Dates. Day and month stand in either order, so both are a number up to 31.
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_YEAR = r"(?:19|20)\d\d"
_ORDINAL = r"(?:st|nd|rd|th|[ºª°])?"
# Months as written in full, abbreviated, and as the stemmed reports of PadChest have them.
_SURE = (
    r"(?:january|february|april|june|july|august|september|october|november|december|jan|feb|apr|jun|jul|aug"
    r"|sept|oct|nov"
    r"|enero?|febrero?|marzo?|abril|mayo|junio?|julio?|agosto?|sep?tiembre?|octubre?|noviembre?|diciembre?|ene"
    r"|abr|dic)"
)
_OTHER = r"march|may|mar|sep|dec"  # are words of other meanings, too: "5 may be", "march fracture", "dec."
_ANY = rf"(?:{_SURE}|{_OTHER}|ago)"
_MONTHS = (
    "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec", "ene", "abr", "ago", "set",
    "dic",
)  # fmt: skip
_UNIT = r"(?!\s?(?:mm|cm|ml|cc|mci|%|x\s?\d|french|images?|views?|fractures?)\b)"
_DATES = (
    # 12/03/2019, 12.03.2019, 12 03 2019, 02 . 09 . 2008
    rf"(?<!\w)(?<!\d[.,/-])(?P<id>{_DAY}[\s./-]{{1,3}}{_DAY}[\s./-]{{1,3}}{_YEAR})(?!\d)",
    # 12/3/19, 12-3-19, 12.03.19
    rf"(?<!\w)(?<!\d[.,/-])(?P<id>{_DAY}(?P<slash>[/-]){_DAY}(?P=slash)\d\d|{_DAY}//?{_DAY}/(?:xxxx|___)"
    r"|(?:0[1-9]|[12]\d|3[01])\.(?:0[1-9]|1[0-2])\.\d\d)(?![\w]|[.,/-]\d)",
    # 2019-03-12, with a time behind it or not; 20190312
    rf"(?<![\w.])(?P<id>{_YEAR}(?P<bar>[./-])(?:0?[1-9]|1[0-2])(?P=bar){_DAY}"
    r"(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?"
    rf"|{_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))(?!\d)",
    # 3/2019
    rf"(?<!\w)(?<![/.-])(?P<id>(?:0?[1-9]|1[0-2])\s?[/-]\s?{_YEAR})(?!\d)",
    # fecha 12 3 19, fecha 11 2008
    # with errors of typing, too: fecha 05 0972012
    rf"\bfech\w*\s*(?:de\s+)?:?\s*(?P<id>\d{{1,2}}[\s./-]{{1,3}}(?:\d{{1,2}}[\s./-]{{1,3}})?\d{{2,7}}"
    rf"|{_DAY}[/-]{_DAY})(?!\d)",
    # 3/14 behind a word that a date follows; behind a weaker one only where it is no half, third or quarter
    r"\b(?:dated?|since|until|comparison|compar\w+\s+(?:to|with|con)|d[ií]a"
    r"|(?:study|exam|examination|films?|radiographs?|ct|cxr|x-?rays?|prior|previous)\s+(?:of|from|on)"
    r"|(?:on|el|del)(?=\s+(?!(?:1/[234]|[23]/[34])\b)))"
    rf"\s*:?\s+(?P<id>(?:0?[1-9]|1[0-2])/{_DAY}|{_DAY}/(?:0?[1-9]|1[0-2]))(?![\w/]|[.,-]\d)"
    r"(?!\s?(?:of|de|mm|cm|murmur|images?|views?|slices?|ribs?|strength|pain)\b)",
)
_NAMED_DATES = (
    # 12 de marzo de 2019, 12-Mar-2019, 10-12 March '19
    rf"(?<!\w)(?P<id>(?:\d{{1,2}}\s?(?:-|–|to|al|y|and|&|,)?\s?)?(?<!\w)\d{{1,2}}{_ORDINAL}\s*(?:of\s|de\s"
    rf"|[-/.])?\s*{_ANY}"
    rf"\b\.?[\s,.'’/-]*(?:of\s|del?\s)?\s*(?:{_YEAR}|(?<=['’-])\d\d))(?!\d)",
    # March 3rd, 2011; May 09
    rf"\b(?P<id>(?:{_SURE}|{_OTHER})\b\.?[\s-]*(?:{_DAY}{_ORDINAL}\s*,?\s*(?:of\s)?\s*{_YEAR}|0[1-9]))(?![\w]"
    rf"|[.,]\d){_UNIT}",
    # March 2011, marzo de 2011, Mar '11
    rf"\b(?P<id>(?:{_SURE}|{_OTHER})\b\.?,?[\s/-]*(?:of\s|del?\s)?\s*(?:{_YEAR}|['’]\d\d))(?!\d)",
    # 12 de marzo, 3rd of March; but not "5 may", and not "1. May"
    rf"(?<!\w)(?<!\d[.,])(?P<id>\d{{1,2}}{_ORDINAL}[\s-]*(?:of\s|de\s)?\s*(?:{_SURE}|(?-i:March|May|Mar|Sep|Dec)))\b"
    r"(?!\s?fracture)",
    # March 3rd; "may 3" in small letters is none
    rf"\b(?P<id>(?:{_SURE}|(?-i:March|May|Mar|Sep|Dec|MARCH|MAR|SEP|DEC))\b\.?[\s-]*{_DAY}{_ORDINAL})(?![\w]"
    rf"|[.,]\d){_UNIT}",
    # dia 5 may
    r"\b(?:fech\w*|d[ií]a|estudi\w*|previ\w*|anterior\w*)\s+(?P<id>\d{1,2}\s+may)\b",
)

_NEAR_MONTH = (
    rf"(?i:(?<![^\W\d_]){_ANY}\W{{0,4}}(?:of\s|del?\s)?\s*\d|\d\W{{0,4}}(?:[a-z]{{2}}\W)?(?:of\s|de\s)?\s*{_ANY}\b"
    r"|\d(?:st|nd|rd|th|[ºª°]))"
)

# Times of day; "24 hours" is a duration.
_CLOCK = r"(?:[01]?\d|2[0-3])"
_TIMES = (
    rf"(?<![\w:.])(?P<id>{_CLOCK}(?:\s?[:.]?\s?[0-5]\d)?(?::[0-5]\d)?\s?[ap]\.?\s?m)(?!\w)",
    rf"(?<![\w:.])(?P<id>{_CLOCK}\s?[:.]\s?[0-5]\d\s?(?:hours|horas|hrs?|hs?)\b|{_CLOCK}:[0-5]\d:[0-5]\d"
    rf"|{_CLOCK}h[0-5]\d"
    rf"|(?:[01]\d|2[0-3]):?[0-5]\d\s?(?:hours|hrs?|h)\b|{_CLOCK}\s[0-5]\dh\b)(?!\w)",
    rf"(?:\b(?:at|time|hora|a las?|las)\s*:?\s+|(?:___|xxxx)[\s,]*(?:at\s+)?)(?P<id>{_CLOCK}:[0-5]\d)(?![\w:])",
    rf"\b(?:a las?|las|guardia?|hoy|ayer)\s+(?P<id>{_CLOCK}\s?(?:h|hrs?|horas))\b",
)

# Births and ages.
_BIRTHS = (
    r"\b(?:date\s+of\s+birth|birth\s?date|year\s+of\s+birth|birth\s+year|(?:dob|d\.o\.b)\b\.?|yob"
    r"|fecha\s+de\s+nacimiento"
    r"|f\.?\s?nac\b\.?)\s*[:.=-]?\s*(?P<id>\d[\d./-]*(?:\s\d{1,2}\s\d{4})?)(?!\w)",
    rf"\b(?:born|nacid[oa]s?)\s+(?:in|en|on|el)?\s*(?:{_ANY}\s+)?(?P<id>(?:18|19|20)\d\d)(?!\w)",
)
_AGES = (
    r"(?<![\w.])(?P<id>9\d|1[0-3]\d)(?=[\s-]*(?:(?:years?|yrs?|yr|años?|anos?)\b(?!\s+ago)|y\.?/?o\.?[fm]?\b|y\s+old)"
    r"|\s?[mf]\s(?:with|who|presenting|status|s/p|h/o)\b)",
    r"\b(?:aged?|edad)\s*:?\s*(?:of\s)?(?P<id>9\d|1[0-3]\d)(?![\w%]|[.,]\d)",
)

# Numbers of people and records.
_LABEL = (
    r"(?:accession|acc|mrn|m\.r\.n\.?|nhc|n\.h\.c\.?|ssn|nhs|dni|nie|sip|cipa?|csn"
    r"|medical\s+record|(?:patient|study|exam|examination|case|order|visit|encounter|account|record|report"
    r"|requisition|insurance|policy"
    r"|paciente|estudio|petici[oó]n|episodio|p[oó]liza)(?=\s*(?:id|no|num|number|#|n[ºo°]|n[uú]mero)\b|\s*#)"
    r"|(?:n[ºo°]\.?\s*(?:de\s*)?)?historia(?:\s+cl[ií]nica)?)"
)
_RECORDS = (
    "accession acc mrn m nhc n nº no ssn nhs dni nie sip cip cipa csn medical patient study exam examination"
    " case order visit"
    " encounter account record report requisition insurance policy paciente estudio petición peticion episodio"
    " historia"
    " póliza poliza"
)
_LABELLED = (
    rf"\b{_LABEL}\s*(?:(?:id|no|num|number|n[ºo°]|n[uú]mero)\b\.?|\#)*[\s:#.=-]*"
    r"(?P<id>(?=[a-z]{0,4}-?\d)[a-z0-9][a-z0-9./-]*\d[a-z0-9]*(?:-[a-z]{1,3}(?![\w-]))?)(?:(?<=[a-z0-9]{3})|"
    r"(?<=-[a-z])|(?<=-[a-z]{2}))(?!\w)",
)
_RUNS = (
    r"(?<![\w])(?<!\d\.)(?P<id>(?:[XYZ]|[A-Z]{1,5}-)?\d{7,}(?:[A-Za-z]|-[\dA-Za-z]{1,2})?)(?!\w)",
    r"(?<![\w.-])(?P<id>\d{3}-\d\d-\d{4})(?![\w-])",
    r"(?<![\w.])(?P<id>[0-2](?:\.\d{1,39}){5,})(?!\w)",
)
_PHONE_WORDS = "tel telephone telefono teléfono tfno phone fax pager beeper ext extension mobile móvil movil cell"
_LABELLED_PHONES = (
    r"\b(?:tel(?:ephone)?|tel[eé]fono|tfno|phone|fax|pager|beeper|ext(?:ension)?|mobile|m[oó]vil|cell)\b"
    r"\.?\s*(?:(?:no|number|num)\b\.?|\#)?\s*[:#]?\s*(?P<id>\+?\(?\d(?:[\s()./-]{0,3}\d){3,14})(?!\w)",
)
_PHONES = (
    r"(?<![\w.-])(?P<id>(?:\+?1[\s.-]?)?(?:\(\d{3}\)\s?|\d{3}[\s.-])\d{3}[\s.-]\d{4}|\+\d{1,3}(?:[\s.-]?\d){7,12}"
    r"|[6789]\d\d\s\d{3}\s\d{3}|[89]\d\s\d{3}\s\d\d\s\d\d|[6789]\d\d\s\d\d\s\d\d\s\d\d)(?![\w-])",
)

# Names, known by what stands beside them. A word of a name begins with a capital, and is none of these.
NO_NAME = (
    r"(?!(?:dra?|drs|dres|mrs?|ms|srt?a?|prof|professor|doctora?|md|rn|pa|np|pgy"
    r"|radiology|cardiology|surgery|medicine|medical|emergency|department|dept|clinic|hospital|unit|service"
    r"|intensive|care"
    r"|nurse|nursing|practitioner|resident|attending|physician|radiologist|technologist|team|staff|office|oncology"
    r"|pulmonary|pulmonology|trauma|urgencias|radiolog[ií]a|radiodiagn[oó]stico|servicio|medicina|neumolog[ií]a"
    r"|cirug[ií]a|uci"
    r"|ordering|referring|requesting|interpreting|electronically|signed|dictated|transcribed|verified|final"
    r"|patient|paciente|name|nombre|date|fecha|age|sex|edad|sexo|male|female|var[oó]n|mujer|hombre|accession|mrn"
    r"|dob|nhc"
    r"|exam|examination|study|procedure|history|indication|comparison|technique|findings?|impression|conclusion|report"
    r"|pas|teleradiology|voice|speech|recognition|respiratory|infectious|second|jr|phone|chest|lungs?|ct|mri?|ed"
    r"|er|icu|or|xr|cxr|us|none|unknown|not|no|the|(?-i:a)|an|is|was|are|were|has|had|have|at|on|by|and|who|will|to"
    r"|in|for|of|with|from|via|per|this|that|these|as|regarding|about|immediately|today|yesterday|telephone"
    r"|phone|said|says|if|but"
    r"|favor|el|los|las|por|con|que|en|no|se|al|monday|tuesday|wednesday|thursday|friday|saturday|sunday|x{3,})\b)"
)
_LETTERS = r"[^\W\d_]"
UPPER = "".join(letter for letter in map(chr, (*range(0x250), *range(0x1E00, 0x1F00))) if letter.isupper())
_CAPITAL = rf"(?=(?-i:[{UPPER}])){NO_NAME}\w"
_WORD = rf"{_CAPITAL}(?:\.(?=\s?[A-Z])|{_LETTERS}*(?:['’-]{_LETTERS}+)*\b)"
_PARTICLE = r"(?:(?:de\s+las?|de\s+los|del?|las?|van\s+der|van|von|der|da|dos|di|bin|al|y|i|e)\s+)"
_NAME = rf"{_WORD}(?:[ \t]*\n?[ \t]*{_PARTICLE}?{_WORD}){{0,3}}"
_FULL = rf"{_WORD}(?:[ \t]+{_PARTICLE}?{_WORD}){{1,3}}"  # two words at least
_SMALL = rf"{NO_NAME}{_LETTERS}{{3,}}(?:['’-]{_LETTERS}+)?(?:\s{NO_NAME}(?!\w+(?:ed|ing)\b){_LETTERS}{{3,}}\b)?"
_NOT_THE = r"(?<!\bthe\s)(?<!\bhis\s)(?<!\bher\s)(?<!\btheir\s)"  # "by the Dr. Lungs are clear."
_TITLES = "dr dra drs dres mr mrs ms miss sr sra srta prof professor doctor doctora nurse"
_TITLED = (
    rf"{_NOT_THE}\b(?-i:Dra?|Mrs?|Ms|Miss|Sra?|Srta|Prof|Professor|Doctora?|Nurse)\b\.?\s{{1,3}}"
    rf"(?P<id>{_PARTICLE}?{_NAME})",
    rf"\b(?-i:Drs|DRS|Dres)\b\.?\s{{1,3}}(?P<id>{_NAME}(?:\s?(?:,|and|&|y|/)\s?{_NAME}){{0,4}})",
    # In capitals DR is digital radiography, and MR magnetic resonance.
    rf"{_NOT_THE}(?:\b(?-i:DRA?\.|MRS\.?|SRA\.?)|(?:with|by|to|from|called|paged|notified|informed|per)\s"
    rf"(?-i:DR)|(?:^|[.:]\s)(?-i:MR)\.)"
    rf"\s{{1,3}}(?P<id>{_WORD}(?:\s{_WORD})?)",
    rf"{_NOT_THE}(?:\b(?-i:drs?\.|dra\s?\.)|(?:with|by|to|from|called|paged|notified|informed|per)\s"
    rf"(?-i:dra?))\s+(?P<id>{_SMALL})",
)
_DEGREES = (
    rf"(?<![\w'’-])(?P<id>{_WORD}(?:[ \t]+{_WORD}){{0,3}}),\s?(?-i:M\.?D|MBBS|FRCR|Ph\.?D|R\.?N|D\.O)\b",
    rf"(?<![\w'’-])(?P<id>{_FULL})\s(?-i:M\.?D)\b",
)
_SIGNED = (
    r"\b(?:signed|dictated|transcribed|verified|approved|interpreted|authenticated|finalized|typed|attested|read"
    r"|reviewed"
    r"|performed|firmado|dictado|informado|validado|realizado|revisado|transcrito|solicitado)"
    rf"\s+(?:electronically\s+)?(?:by|por)\s*:?\s*(?P<id>{_NAME})",
)
_SIGNED_WORDS = (
    "signed dictated transcribed verified approved interpreted authenticated finalized typed attested read"
    " reviewed performed"
    " firmado dictado informado validado realizado revisado transcrito solicitado"
)
_HEADER_WORDS = (
    "patient name nombre apellidos dictated signed transcribed attending referring ordering requesting"
    " interpreting reading"
    " primary radiologist physician transcriptionist technologist médico medico facultativo radiólogo radiologo"
    " paciente"
)
_TOLD_WORDS = (
    "discussed communicated conveyed telephoned relayed called phoned paged reported spoke speaking notified informed"
)
_TOLD = (
    r"\b(?:discussed|communicated|conveyed|telephoned|relayed|called|phoned|paged|reported|spoke|speaking)"
    rf"\s+(?:\w+\s+)?(?:with|to)\s+(?P<id>(?-i:(?=[A-Z][a-z])){_FULL})",
    rf"\b(?:notified|informed|paged)\s+(?P<id>(?-i:(?=[A-Z][a-z])){_FULL})",
)
_ROLE = r"(?:physician|provider|doctor|clinician|radiologist|surgeon)"
_HEADERS = (
    # Behind these any word is a name, in small letters too.
    r"\b(?:patient(?:'s)?\s+name|name\s+of\s+(?:the\s+)?patient|nombre(?:\s+y\s+apellidos|\s+del\s+paciente)?"
    r"|apellidos"
    r"|dictated\s+by|signed\s+by|transcribed\s+by)\s*:\s*"
    rf"(?P<id>{NO_NAME}{_LETTERS}+(?:['’-]{_LETTERS}+)*"
    rf"(?:(?:,[ \t]*|\.?[ \t]+){NO_NAME}{_LETTERS}+(?!\s*:)){{0,3}})",
    rf"\b(?:name|attending(?:\s+{_ROLE})?|(?:referring|ordering|requesting|interpreting|reading"
    rf"|primary)\s+{_ROLE}|radiologist|physician"
    r"|transcriptionist|technologist|m[eé]dico(?:\s+(?:solicitante|responsable|peticionario))?|facultativo"
    r"|radi[oó]logo)"
    rf"\s*:\s*(?P<id>{_WORD}(?:,?[ \t]*{_PARTICLE}?{_WORD}(?!\s*:)){{0,4}})",
    rf"\b(?:patient|paciente)\s*:\s*(?P<id>{_WORD}(?:,?[ \t]+{_PARTICLE}?{_WORD}(?!\s*:)){{1,4}})",
)

RULES = (
    _rule("mark of another project", (r"(?P<id>\[\*\*.{0,200}?\*\*\])",), ("[**",)),
    _rule("mail address", (r"(?P<id>[\w.+%-]{1,64}@[a-z\d-]+(?:\.[a-z\d-]+)+)",), ("@",)),
    _rule(
        "web address",
        (r"(?P<id>(?:https?://|www\.)[^\s<>\"]*[^\W_][^\s<>\"]*?)(?=[.,;:)\]]*(?:\s|$|[<>\"]))",),
        ("http", "www."),
    ),
    _rule("birth", _BIRTHS, ("birth", "born", "dob", "d.o.b", "yob", "nac"), r"\d"),
    _rule("date", _DATES, (), r"\d[\s./-]{0,3}\d[\s./-]{0,3}\d|\d[/-]"),
    _rule("date", _NAMED_DATES, _MONTHS, _NEAR_MONTH),
    _rule("time", _TIMES, (), r"\d\s?(?:[:Hh]|[AaPp]\.?\s?[Mm])"),
    _rule("age above 89", _AGES, (), r"(?:9\d|1[0-3]\d)(?!\d)"),
    _rule("phone", _LABELLED_PHONES, (), r"\d[\s()./-]{0,3}\d", _PHONE_WORDS, 0),
    _rule("phone", _PHONES, (), r"(?:\d[\s().-]{0,2}){8}"),
    _rule("record number", _LABELLED, (), r"\d", _RECORDS, 0),
    _rule("record number", _RUNS, (), r"\d(?:\d{6}|\d\d-\d\d-\d|(?:\.\d+){5})"),
    _rule("name", _TITLED, tokens=_TITLES, before=12),
    _rule("name", _DEGREES, (" md", ",md", "m.d", "mbbs", "frcr", "phd", "ph.d", " rn", ",rn", "r.n", "d.o")),
    _rule("name", _SIGNED, (" by", " por"), tokens=_SIGNED_WORDS, before=0),
    _rule("name", _TOLD, tokens=_TOLD_WORDS, before=0),
    _rule("name", _HEADERS, (":",), tokens=_HEADER_WORDS, before=0),
)  # fmt: skip
