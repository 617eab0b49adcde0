"""More patterns of the privacy gate: people, places and numbers in six languages, each behind a word that says so.

    for rule in MORE_RULES:
        rule.name, rule.patterns, rule.tokens       # "hospital", ..., the words without which no pattern can match

English, Spanish, German, French, Portuguese and Vietnamese. All rules look at every text, because reports quote each
other and cite colleagues in other languages. Unlike those of identifier_rules.py these patterns tell capital letters
from small ones: a name is a run of words with capitals behind a title, a role or a label.
"""

import re

from shards.text.identifier_rules import NO_NAME, UPPER, Rule

LANGUAGES = ("en", "es", "de", "fr", "pt", "vi")  # that have rules


def _rule(name: str, tokens: str, patterns: tuple[str, ...], near: str | None = None) -> Rule:
    compiled = tuple(re.compile(pattern) for pattern in patterns)
    return Rule(name, compiled, (), re.compile(near) if near else None, frozenset(tokens.split()))


# Words of names.
_L = r"[^\W\d_]"
_STOP = (
    rf"(?i:{NO_NAME})(?!(?i:patient(?:in|e)?|befund|thorax|röntgen|lunge|herz|klinik|beurteilung|untersuchung|verlauf|kein|der|die|das"
    r"|und|mit|im|ist|wurde|nach|bei|frau|herrn?|monsieur|madame|mme|docteur|professeur|radiographie|examen|pas|une?|et"
    r"|avec|pour|dans|est|poumons?|cœur|conclusion|doutor|senhora?|exame|tórax|sem|com|pulmões|coração|um|uma|não|bác|bệnh"
    r"|ông|bà|phổi|tim|không|ngày|stable|unchanged|clear|normal|heart|there|it|he|she|we|views?|portable|upright|supine|left"
    r"|right|bilateral|upper|lower|middle|new|prior|further|given|please|x-?ray|rx|tc|tac|rm|irm|mrt|lwk|bwk|hwk)\b)"
)
_CAP = rf"(?:[dDlL]['’])?{_STOP}[{UPPER}]"
_WORD = rf"(?:{_CAP}(?:\.(?=\s?[{UPPER}])|{_L}*(?:['’-]{_L}+)*\b))"
_MIXED = rf"(?:{_CAP}{_L}*[^\W\d_{UPPER}](?:['’-]{_L}+)*\b)"  # with a small letter: no abbreviation
_PART = r"(?:(?:de\s+las?|de\s+los|del?|das?|dos|du|des|la|le|van\s+der|van|von|vom|zu|zur|der|den|di|bin|al|e|y)\s+)"
_NAME = rf"{_PART}?{_WORD}(?:[ \t]+{_PART}?{_WORD}){{0,4}}"
_PERSON = rf"{_PART}?(?:{_WORD}[ \t]+{_PART}?){{0,3}}{_MIXED}"  # one word at least is no abbreviation
_FULL = rf"{_WORD}[ \t]+{_PART}?(?:{_WORD}[ \t]+{_PART}?){{0,3}}{_MIXED}"  # two words at least
_SYLLABLE = rf"[{UPPER}][^\W\d_{UPPER}]{{0,6}}\b"  # Vietnamese names are written by syllables
_VIETNAMESE = rf"{_STOP}{_SYLLABLE}(?:[ \t]+{_SYLLABLE}){{1,4}}"
_DR = (
    r"(?:(?:Dr|Dra|Prof|PD|Priv\.-Doz|med|Dipl|Doctora?|Doutora?|Docteure?|Professeure?|Pr|Mr|Mrs|Ms|Herrn?|Frau|Mme|M"
    r"|ThS|TS|PGS|GS|BS|BSCK[IV]*)\b\.?\s+){0,4}"
)

_TITLES = (
    rf"\b(?:Don|Doña|Dña|Señor(?:a|ita)?|Enfermer[oa]|[Dd]octora?|[Ss]eñor(?:a|ita)?|doña)\.?\s+(?P<id>{_PERSON})",
    rf"\b(?:Dona|[Dd]outora?|[Ss]enhora?|Enfermeir[oa]|Seu)\s+(?P<id>{_PERSON})",
    r"\b(?:Herrn?|Frau|Fr\.|Hr\.|Hrn\.|(?:Ober|Assistenz|Chef|Stations|Haus|Fach)(?:arzt|ärztin)|OA|OÄ|Kolleg(?:en|in)|Schwester|Pfleger"
    rf"|Privatdozent(?:in)?|PD)\s+{_DR}(?P<id>{_PERSON})",
    rf"\bMM?\.\s+(?!\w+(?:us|osis|ii|iae|um|eps|oides)\b)(?P<id>{_PERSON})",
    r"\b(?:Mmes?\.?|Mlles?\.?|Monsieur|Madame|Mademoiselle|[Dd]octeure?|[Pp]rofesseure?|Pr\.?|Infirmi(?:er|ère)|Dre)\s+"
    rf"{_DR}(?P<id>{_PERSON})",
    rf"\b(?:Dra?|Prof)\.?\s+(?P<id>{_PERSON})",
    rf"\b(?:Nurse|nurse|[Pp]ractitioner|[Tt]echnologist|[Rr]esident|[Ff]ellow|[Aa]ttending|[Ii]ntern)\s+(?P<id>{_FULL})",
    rf"\b(?:Bác sĩ|bác sĩ|BSCK[IV]+\.?|ĐD|Ông|Bà|[Aa]nh|[Cc]hị|ông|bà)\s+{_DR}(?P<id>{_VIETNAMESE})",
    r"\b(?:B[Ss]|T[hH][sS]|TS|P?GS|CK[IV]+|KTV)(?:\.|(?=\s+[\w\s]{0,20}[À-ÃÈ-ÊÌÍÒ-ÕÙÚÝà-ãè-êìíò-õùúýĂăĐđĨĩŨũƠơƯưẠ-ỹ]))\s+"
    rf"{_DR}(?P<id>{_VIETNAMESE})",
    # Behind what was replaced: "Mr. ___ An has".
    r"\b(?:Dra?|Mrs?|Ms|Miss|Frau|Herr)\.?\s+___\s(?P<id>An|To|Do|In|On|Or|By|No|Who|Will)(?=\s+(?:has|had|was|is|will|who|denies)\b|\s*[,;)])",
)
_TITLE_TOKENS = (
    "don doña dña señor señora señorita enfermero enfermera doctor doctora dr dra dona doutor doutora senhor senhora enfermeiro"
    " enfermeira seu herr herrn frau fr hr hrn oberarzt oberärztin assistenzarzt assistenzärztin chefarzt chefärztin stationsarzt"
    " stationsärztin hausarzt hausärztin facharzt fachärztin oa oä kollegen kollegin schwester pfleger privatdozent"
    " privatdozentin pd m mm mme mmes mlle mlles monsieur madame mademoiselle docteur docteure professeur professeure pr"
    " infirmier infirmière dre prof nurse practitioner technologist resident fellow attending intern bác bs ths ts pgs gs"
    " bscki bsckii ck cki ckii ktv đd ông bà anh chị mr mrs ms miss"
)

_ROLE_LABELS = (
    r"(?i:resident|fellow|intern|surgeon|technician|radiographer|reader|author|consultant|signed|co-?signed|(?:seen|over-?read|reported)\s+by"
    r"|m[eé]dic[oa](?:\s+\w+)?|radi[oó]log[oa]|residente|adjunt[oa]|firmado|firma|solicitante|t[eé]cnic[oa]|enfermer[oa]"
    r"|zuweiser(?:in)?|einweiser(?:in)?|überweiser(?:in)?|haus(?:arzt|ärztin)|ober(?:arzt|ärztin)|arzt|ärztin|radiologe|radiologin|untersucher(?:in)?"
    r"|befunder(?:in)?|unterschrift|gez\.|nachname|vorname|name"
    r"|nom|pr[eé]nom|m[eé]decin(?:\s+\w+)?|radiologue|interne|prescripteur|sign[eé]e?|manipulat(?:eur|rice)|correspondant"
    r"|nome|radiologista|assinado|assinatura|operador"
    r"|họ và tên|họ tên|người đọc|người bệnh|bệnh nhân|bác sĩ(?:\s+(?:đọc|chỉ định|điều trị))?|kỹ thuật viên)"
)
_CUES = (
    rf"\b{_ROLE_LABELS}\s*:\s*{_DR}(?P<id>{_PERSON})",
    rf"\b(?i:patient(?:in|e)?|paciente)\s*:\s*{_DR}(?P<id>{_FULL})",
    rf"\b(?:Paciente|Patient(?:in|e)?)\s+{_DR}(?P<id>{_FULL})(?=\s*[,;(])",
    rf"\b(?:[Bb]ệnh nhân|[Nn]gười bệnh|BN)\s*:?\s+(?P<id>{_VIETNAMESE})",
    # Kin, and who was spoken with.
    r"\b(?:wife|husband|daughter|son|mother|father|sister|brother|spouse)\b,?\s+"
    rf"(?P<id>{_MIXED}(?:\s{_MIXED})?)(?=,|\s+(?:states|reports|says|was|is|has)\b)",
    rf"\b(?:with|by|to)\s+(?P<id>{_MIXED}(?:\s{_MIXED})?)(?=,?\s+who\s)",
    rf"\b(?:[Cc]ontact|[Cc]all|[Nn]otify|[Pp]age)\s+(?P<id>{_FULL})(?=\s+(?:at|on|with)\b|\s*[,.;(])",
    rf"(?<!\w)(?P<id>{_MIXED}\s(?:{_WORD}\s)?{_MIXED})(?=,?\s+is\s+an?\s+(?:\d|___))",
)
_CUE_TOKENS = (
    "resident fellow intern surgeon technician radiographer reader author consultant signed cosigned by médico médica medico medica"
    " radiólogo radióloga radiologo radiologa residente adjunto adjunta firmado firma solicitante técnico técnica tecnico tecnica"
    " enfermero enfermera zuweiser zuweiserin einweiser einweiserin überweiser überweiserin hausarzt hausärztin oberarzt oberärztin"
    " arzt ärztin radiologe radiologin untersucher untersucherin befunder befunderin unterschrift gez nachname vorname name nom"
    " prénom prenom médecin medecin radiologue interne prescripteur signé signée signe signee manipulateur manipulatrice correspondant"
    " nome radiologista assinado assinatura operador họ người bệnh bác kỹ bn"
)
_PATIENT_TOKENS = (
    "paciente patient patientin patiente bệnh người bn wife husband daughter son mother father sister brother spouse who contact"
    " call notify page year"
)
_VIETNAMESE_NAMES = (rf"(?<!\w)(?P<id>{_SYLLABLE}\s(?:Thi|Thị|Văn)\s{_SYLLABLE}(?:\s{_SYLLABLE})?)",)

# Who signed, dictated or typed: a name, or initials.
_BY = r"(?:by|por|par|von|durch|bởi|pelo|pela)"
_DONE = (
    r"(?i:dictated|transcribed|typed|read|over-?read|reviewed|approved|verified|signed|reported|entered|scribed"
    r"|dictado|transcrito|informado|redactado|mecanografiado|validado|firmado|revisado|remitido|solicitado"
    r"|dict[eé]e?|saisie?|relue?|tapée?|transcrite?|frappée?|validée?|signée?|rédigée?|interprétée?|lue?"
    r"|diktiert|geschrieben|befundet|erfasst|vidiert|freigegeben|unterschrieben|gelesen"
    r"|ditado|digitado|laudado|assinado|conferido|liberado)"
)
_NO_INITIALS = (
    r"(?!(?i:the|an?|our|us|me|him|her|them|two|both|this|that|team|pacs|mri?|cta?|ed|er|icu|el|la|los|las|un|una|su|le|les|une|nos|der|die|das"
    r"|dem|den|uns|ihm|ihr|ein|eine|o|os|as|um|uma|ele|ela|tc|tac|rm|irm|mrt|eco|ai|cad|pet|all|one|it|you|fax|tel|web|hand|mail|x+)\b)"
)
_INITIALS = (
    rf"\b{_DONE}\s+(?:electronically\s+)?{_BY}\s*:?\s*(?P<id>{_NO_INITIALS}[{UPPER}a-z]{{2,4}})(?=\s*(?:[.,;/)\n]|(?:and|y|und|et|e)\b|$))",
    r"\b(?i:diktat|schreibkraft|schreiber(?:in)?|typist|dictation|dict|trans|secretar[iy]a?|secrétaire|mecanograf[oa])\s*[:.]?\s+"
    rf"(?P<id>{_NO_INITIALS}(?:[{UPPER}]{{2,4}}|[a-z]{{2,3}}))(?=\s*(?:[.,;/)\n]|$))",
    r"(?<!\w)(?P<id>(?!(?:AP|PA|CT|MR|US|LAT)\b)[A-Z]{2,4}[/:][a-z]{2,4})(?=\s*(?:\n|$))",
    rf"\b{_DONE}\s+{_BY}\s*:?\s*{_DR}(?P<id>{_PERSON})",
)
_INITIALS_TOKENS = (
    "by por par von durch bởi pelo pela diktat schreibkraft schreiber schreiberin typist dictation dict trans secretary secretaria"
    " secrétaire mecanografo mecanografa"
)

# Hospitals and wards.
_NO_PLACE = (
    r"(?!(?i:the|this|our|an?|at|in|to|outside|local|referring|another|other|previous|prior|same|community|general|university|memorial|regional"
    r"|children['’]?s|veterans?|heart|pulmonary|lung|cancer|orthop\w+|vascular|pain|chest|thoracic|pa?ediatric|urgent|walk|outpatient"
    r"|follow|primary|course|day|admission|stay|discharge|problem|acquired|number|bed|room|unit|service|medicine|medical|d[ií]a|jour|and"
    r"|from|with|sleep|wound|breast|transplant|asthma|dialysis|field|failure|care|surgery|disease|function|rhythm|device|specialty|universitari[oa]|universitário|geral|comarcal|clínico|provincial|municipal|estadual|federal|central|infantil"
    r"|universitaires?|r[ée]gional|civils|center|centre|clinic|hospital|dose|housefield|hounsfield)\b)"
)
_P = rf"(?:{_NO_PLACE}[{UPPER}]{_L}*(?:['’.-]{_L}+)*\b\.?)"
_PLACE = rf"(?:{_PART}|d['’]|l['’])?{_P}(?:[ \t]+{_PART}?{_P}){{0,3}}"
_HOSPITALS = (
    # Massachusetts General Hospital, St. Mary's Medical Center
    rf"(?<!\w)(?P<id>{_P}(?:[ \t]+(?:of[ \t]+|the[ \t]+|and[ \t]+)?[{UPPER}]{_L}+(?:['’-]{_L}+)*){{0,4}}?)[ \t]+"
    r"(?=(?:Hospital|Medical Cent(?:er|re)|Clinic|Infirmary|Hospice|Nursing Home|Health System|Health Cent(?:er|re)|Rehabilitation Cent(?:er|re))\b)",
    rf"\b(?:Hospital|Cent(?:er|re)|Clinic)\s+(?:in|of|at)\s+(?P<id>{_PLACE})",
    # Hospital Universitario La Paz, Clínica Santa Brígida, Santa Casa de Ribeira
    r"\b(?:Hospital|Clínica|Clinica|Sanatorio|Policlínic[ao]|Santa Casa|Maternidade|Maternidad|Ambulatorio|Centro\s+(?:de\s+Salud|Médico|Hospitalar))\s+"
    r"(?:(?:Universitari[oa]|Universitário|General|Geral|Comarcal|Clínico|Regional|Provincial|Municipal|Estadual|Federal|Central|Infantil|de|del|da|do|la|el)\s+)*"
    rf"(?P<id>{_PLACE})",
    r"\b(?:Hôpital|Hôpitaux|Clinique|Polyclinique|CHU|CHRU|CHR|Centre\s+[Hh]ospitalier|Hospices)\s+"
    rf"(?:(?:[Uu]niversitaires?|[Rr]égional|[Cc]ivils|de|du|des|la|les)\s+)*(?:d['’]|l['’])?(?P<id>{_PLACE})",
    r"\b(?:(?:Universitäts|Kreis|Stadt|Uni|Kantons|Landes)?(?:[Kk]linikum|[Kk]rankenhaus|[Ss]pital)|(?:Uni|Universitäts|Lungen|Tages|Thorax|Reha)-?klinik"
    rf"|Herzzentrum|(?:der|die|einer)\s+(?:Klinik|Praxis))\s+(?:(?:am|im|in|an\s+der|rechts\s+der|der|zum|zur)\s+)?(?P<id>{_PLACE})",
    rf"(?<!\w)(?P<id>(?:St\.-|Sankt-)?[{UPPER}]{_L}+(?:-[{UPPER}]{_L}+)*)-(?:Krankenhaus|Klinik|Klinikum|Hospital|Spital|Stift)\b",
    r"\b(?:[Bb]ệnh viện|[Pp]hòng khám|[Tt]rung tâm [Yy] tế|TTYT|BV)\s+"
    r"(?:(?:[ĐđD]a khoa|[Tt]rung ương|[Qq]uốc tế|[Tt]ỉnh|[Hh]uyện|[Qq]uận|[Tt]hành phố|[Đđ]ại học|Nhi|Phổi)\s+)*"
    rf"(?P<id>{_SYLLABLE}(?:\s{_SYLLABLE}){{1,3}})",
    # Ward Ellison 7
    rf"\b(?:[Ww]ard|[Uu]nit|Station|[Ww]ing|[Pp]avilion|Pabellón|[Ff]loor|[Pp]lanta|[Aa]la)\s+(?P<id>{_P}(?<=\w\w\w)\s\d{{1,3}})(?!\w|[.,]\d)",
)
_HOSPITAL_TOKENS = (
    "hospital center centre clinic infirmary hospice nursing health clínica clinica sanatorio policlínica policlínico casa maternidade"
    " maternidad ambulatorio centro hôpital hôpitaux clinique polyclinique chu chru chr hospices klinikum krankenhaus spital"
    " universitätsklinikum universitätskrankenhaus universitätsspital kreisklinikum kreiskrankenhaus kreisspital stadtklinikum"
    " stadtkrankenhaus stadtspital uniklinikum unikrankenhaus unispital kantonsklinikum kantonskrankenhaus kantonsspital landesklinikum"
    " landeskrankenhaus landesspital uniklinik universitätsklinik lungenklinik tagesklinik thoraxklinik rehaklinik klinik"
    " herzzentrum praxis stift bệnh phòng trung ttyt bv ward unit station wing pavilion pabellón floor planta ala"
)

# Postal addresses.
_STREETS = (
    rf"(?<![\w.,/-])(?P<id>\d{{1,5}}[ \t](?:[NSEW]\.?[ \t])?(?:[{UPPER}]{_L}+[ \t]){{1,3}}(?:Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Boulevard|Blvd"
    r"|Way|Court|Terrace|Circle|Highway|Hwy|Parkway|Square)\b\.?(?:,?[ \t](?:Apt|Unit|Suite)\.?[ \t]\w+)?)",
    r"\b(?:[Cc]alle|C/|[Aa]venida|[Aa]vda\.?|[Pp]laza|[Pp]aseo|[Cc]arretera|[Rr]ua|[Tt]ravessa|[Pp]raça|[Aa]lameda|[Ee]strada)\s+(?:(?:de|del|la|las|los|el|da|do|dos|das)\s+)*"
    rf"(?P<id>[{UPPER}]{_L}+(?:\s{_PART}?[{UPPER}]{_L}+){{0,3}}(?:,?\s+(?:n\.?[ºo°]\s*)?\d{{1,5}})?)",
    rf"(?<!\w)(?P<id>(?:\d{{1,4}}(?:\s?(?:bis|ter))?,?\s+)?(?:rue|avenue|boulevard|impasse|quai|allée)\s+(?:(?:de|du|des|la|les)\s+|de\s+l['’]|d['’]|l['’])*"
    rf"[{UPPER}]{_L}+(?:[\s-]{_PART}?[{UPPER}]{_L}+){{0,3}})",
    rf"(?<!\w)(?P<id>\d{{1,4}},?\s+(?:place|chemin|route)\s+(?:(?:de|du|des|la|les)\s+|d['’]|l['’])*[{UPPER}]{_L}+(?:[\s-][{UPPER}]{_L}+){{0,2}})",
    r"\b(?:[Ww]ohnt|[Ww]ohnhaft|Adresse|Anschrift)\s*:?\s+(?:in\s+)?"
    rf"(?P<id>(?:(?:Am|An\sde[rn]|Im|Zum|Zur|Auf\sde[rm]|In\sde[rn])\s)?[{UPPER}]{_L}+(?:[\s-][{UPPER}]{_L}+){{0,2}}\s\d{{1,4}}\s?[a-z]?)\b",
    rf"(?<!\w)(?P<id>(?:[Ss]ố\s+)?\d{{1,4}}(?:/\d+)*[A-Z]?\s+(?:đường|phố|ngõ)\s+{_SYLLABLE}(?:\s{_SYLLABLE}){{0,3}})",
    rf"\b(?:[Pp]hường|[Qq]uận|[Hh]uyện|[Tt]hôn|[Tt]hị trấn|[Tt]hành phố|TP\.)\s+(?P<id>{_SYLLABLE}(?:\s{_SYLLABLE}){{1,2}})",
    r"\b(?i:(?:home\s+|mailing\s+)?address|domicilio|dirección|endereço|adresse|anschrift|địa chỉ)\s*:\s*(?P<id>(?=[^.;\n]{0,99}[^\W_])[^.;\n]{3,100})",
    r"\b(?:CEP|ZIP|[Zz]ip(?:\scode)?|PLZ|CP|C\.P\.)\s*:?\s*(?P<id>\d{5}(?:-?\d{3,4})?)(?!\d)",
    rf"\b(?:lives|living|resides|residing)\s+(?:in|at)\s+(?P<id>{_PLACE})",
)
_STREET_TOKENS = (
    "street st avenue ave road rd lane ln drive boulevard blvd way court terrace circle highway hwy parkway square calle c avenida avda"
    " plaza paseo carretera rua travessa praça alameda estrada rue impasse quai allée place chemin route wohnt wohnhaft adresse"
    " anschrift đường phố ngõ phường quận huyện thôn thị thành tp address domicilio dirección endereço địa cep zip plz cp p lives"
    " living resides residing"
)
_GERMAN_STREETS = (
    rf"(?<!\w)(?!Atem|Zugang|Harn|Gallen|Luft|Blut)(?P<id>[{UPPER}](?:{_L}|-){{0,40}}(?:straße|strasse|str\.|weg|gasse|platz|allee|damm)\s\d{{1,4}}\s?[a-h]?)(?!\w|[.,]\d|\s?[mc]m\b)",
)
_GERMAN_ENDINGS = ("straße ", "strasse ", "str. ", "weg ", "gasse ", "platz ", "allee ", "damm ")
_TOWNS = (
    # Springfield, MA 01103
    rf"(?<!\w)(?P<id>[{UPPER}]{_L}+(?:[ \t][{UPPER}]{_L}+){{0,2}},\s(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI"
    r"|S[CD]|T[NX]|UT|V[AT]|W[AIVY])\s+\d{5}(?:-\d{4})?)(?!\d)",
    # behind a street that was replaced: 28013 Madrid; or the number of the house
    rf"___,?(?:\s*\d{{1,2}}\s?[ºª°](?:\s?[A-Z]\b)?,?)?\s+(?P<id>(?:[DAF]-)?\d{{4,5}}\s+{_PLACE})",
    rf"(?:___|\w),\s+(?P<id>\d{{5}}\s+{_P})(?=[\s,]*(?:$|[.;,)]))",
    r"\b(?:[Rr]ua|[Aa]venida|[Tt]ravessa|[Pp]raça|[Cc]alle)\s+(?:\w+\s+)?___,\s*(?P<id>\d{1,5})\b",
)

# Dates, times and ages.
_YEAR = r"(?:19|20)\d\d"
_MONTHS = (
    r"(?:januar|jänner|februar|märz|april|mai|juni|juli|august|september|oktober|november|dezember|jän\.|mär\.|okt\.|dez\."
    r"|janvier|février|fevrier|mars|avril|juin|juillet|août|aout|septembre|octobre|novembre|décembre|decembre|janv\.|févr\.|avr\.|juil\.|déc\."
    r"|janeiro|fevereiro|março|abril|maio|junho|julho|agosto|setembro|outubro|novembro|dezembro)"
)
_DATES = (
    rf"(?<!\w)(?<!\d[.,])(?P<id>\d{{1,2}}(?:er|[.ºo])?\s*(?:de\s+)?(?i:{_MONTHS})(?!\w)(?:\s*(?:de\s+)?{_YEAR})?)(?!\d)(?<!\smai)(?<!\smars)",
    rf"(?<!\w)(?P<id>\d{{1,2}}(?:er|[.º])?\s*(?i:mai|mars)\s+{_YEAR})(?!\d)",
    r"\b(?:[Ll]e|[Dd]u|[Aa]u|[Aa]m|[Vv]om|[Zz]um|[Ss]eit|[Bb]is)\s+(?P<id>\d{1,2}(?:er|\.)?\s*(?i:mai|mars))\b",
    rf"(?<!\w)(?P<id>(?i:{_MONTHS})\s+(?:de\s+)?{_YEAR})(?!\d)",
)
_DATE_TOKENS = (
    "januar jänner februar märz april mai juni juli august september oktober november dezember jän mär okt dez janvier février fevrier"
    " mars avril juin juillet août aout septembre octobre novembre décembre decembre janv févr avr juil déc janeiro fevereiro março abril"
    " maio junho julho agosto setembro outubro novembro dezembro"
)
_CUED_DATES = (
    r"\b(?:am|vom|zum|seit|bis|geb\.?|dated|on|du|le|au|em|ngày|del|el)\s+(?P<id>\d{1,2}\.\s?\d{1,2}\.\s?(?:\d{4}|\d\d))(?!\d|\.\d)",
    r"\b(?:am|vom|zum|seit|bis)\s+(?P<id>\d{1,2}\.\s?(?:0?[1-9]|1[0-2])\.)(?!\s?\d|\w)(?!\s+(?:Rippe|BWK|LWK|HWK|Tag))",
    rf"(?<!\w)(?P<id>\d{{1,2}}\s+tháng\s+\d{{1,2}}(?:,?\s+năm\s+{_YEAR}))(?!\d)",
    rf"\bngày\s+(?P<id>\d{{1,2}}\s+tháng\s+\d{{1,2}}(?:,?\s+năm\s+{_YEAR})?)(?!\d)",
    rf"(?P<id>\btháng\s+\d{{1,2}}(?:\s+năm\s+|[/-]){_YEAR})(?!\d)",
    r"\b(?i:geboren|jahrgang|née?|nascid[oa]s?|sinh(?:\snăm)?)\s*:?\s+(?:en\s+|em\s+|im\s+Jahr\s+)?(?P<id>(?:18|19|20)\d\d)(?!\d)",
)
_CUED_DATE_TOKENS = "am vom zum seit bis geb dated on du le au em ngày del el tháng geboren jahrgang né née nascido nascida nascidos nascidas sinh"
_CLOCK = r"(?:[01]?\d|2[0-3])"
_TIMES = (
    rf"(?<![\w:.])(?P<id>{_CLOCK}(?:\s?[.:]\s?[0-5]\d)?\s?Uhr)\b",
    rf"(?<![\w:.,])(?P<id>{_CLOCK}\s?h\s?[0-5]\d)(?!\w)",
    rf"(?<![\w:.])(?P<id>{_CLOCK}\s?giờ\s?[0-5]\d(?:\s?phút)?)(?!\w)",
    rf"\b(?:um|gegen|à|vers|às|as|lúc)\s+(?P<id>{_CLOCK}(?::[0-5]\d|\s?giờ\b|\s?h\b))(?![\w:])",
)
_AGES = (
    r"(?<![\w.,])(?P<id>9\d|1[0-3]\d)(?=[\s-]*(?:jährig\w*|Jahre(?:\s+alte?\w?)?|J\.|ans|anos|tuổi)(?!\w)(?!\s+(?:de\s+recul|plus\s+tard|après|zuvor)))",
    r"\b(?:Alter|[Ââ]ge|[Ii]dade|[Tt]uổi)\s*:?\s*(?P<id>9\d|1[0-3]\d)(?![\w%]|[.,]\d)",
)

# Numbers of people, records and devices.
_NO = r"(?:\s*(?:n(?:um(?:ber|mer|ero)?|úmero|uméro|r|o)?\b\.?|[nN][.º°o]{0,2}(?=\s|\d)|id\b|ID\b|số\b|\#|:|=))*\s*"
_TOKEN = r"(?P<id>(?=[A-Za-z0-9./-]*\d[A-Za-z0-9./-]*\d)[A-Za-z0-9]+(?:[./-][A-Za-z0-9]+)*)(?<=[A-Za-z0-9./-]{4})(?!\w)"
_SERIAL = (
    r"(?P<id>(?=[A-Za-z0-9/-]{5})(?:(?=[\d/-]{0,20}[A-Za-z])(?=(?:[A-Za-z/-]{0,9}\d){3})|(?=(?:[/-]?\d){5}))"
    r"[A-Za-z0-9]+(?:[/-][A-Za-z0-9]+)*)(?!\w)"
)
_RECORDS = (
    r"\b(?i:fall-?(?:nummer|nr\b\.?)|patienten-?(?:nummer|nr\b\.?|id)|auftrags-?(?:nummer|nr\b\.?)|untersuchungs-?(?:nummer|nr\b\.?)|versicherten-?(?:nummer|nr\b\.?)"
    r"|aufnahme-?(?:nummer|nr\b\.?)|pat\.-?(?:nr\b\.?|id)|ipp|nip|nda|dossier|nir|accession|n[º°]?\s*(?:de|du|do|da)\s+(?:dossier|patient|séjour|exame|registro|prontuário)"
    r"|número\s+de\s+(?:acceso|acesso|historia|registro)|acceso|acesso|prontuário|cpf|rg|registro|cns|matrícula|atendimento"
    r"|(?:examen|exame|étude|estudo)(?=\s*(?:n[º°o]|num|núm|numéro|número))"
    r"|số\s+(?:hồ sơ|bệnh án|vào viện|phim|thẻ)|mã\s+(?:bệnh nhân|bn|ca|số|hồ sơ|y tế|phim)|cmnd|cccd)" + _NO + _TOKEN,
    r"\b(?i:acc(?:ession)?)\b\.?" + _NO + _TOKEN,
    r"\b(?i:study|order|exam|case|film|requisition|estudio|examen|untersuchung|examen|exame|phim)"
    + _NO
    + r"(?P<id>(?=[A-Za-z0-9-]*[A-Za-z])(?=[A-Za-z0-9-]*\d{4})[A-Z0-9]+(?:-[A-Z0-9]+)*)(?!\w)",
    r"(?<![\w.-])(?P<id>\d{3}\.\d{3}\.\d{3}-\d\d|\d\d\.\d{3}\.\d{3}-\d)(?!\w)",
)
_RECORD_TOKENS = (
    "fallnummer fall patientennummer patienten auftragsnummer auftrags untersuchungsnummer untersuchungs versichertennummer versicherten"
    " aufnahmenummer aufnahme pat ipp nip nda dossier nir accession n número acceso acesso prontuário cpf rg registro cns matrícula"
    " atendimento examen exame étude estudo số mã cmnd cccd acc study order exam case film requisition estudio untersuchung phim"
)
_DEVICES = (r"(?i:\bserial|\bs/n|\bsn|\bserie|\bsérie|\bseriennummer|\bserien-nr\b\.?|\bseri|\blot)\b" + _NO + _SERIAL,)
_DEVICE_TOKENS = "serial s sn serie série seriennummer serien seri lot"
_PHONES = (
    r"\b(?i:tel|telefon(?:nummer)?|handy|mobil|durchwahl|t[ée]l|téléphone|telefone|celular|fone|ramal|đt|sđt|điện thoại|hotline)\b\.?\s*:?\s*"
    r"(?P<id>\+?\(?\d(?:[\s()./–-]{0,3}\d){3,14})(?!\w)",
    r"(?<![\w.,/-])(?P<id>0[1-9](?:[ .]\d\d){4})(?![\w-])",
    r"(?<![\w.,/-])(?P<id>\(\d\d\)\s?9?\d{4}-\d{4}|0\d{3}[ .]\d{3}[ .]\d{3})(?![\w-])",
)

MORE_RULES = (
    _rule("date", _DATE_TOKENS, _DATES, r"\d"),
    _rule("date", _CUED_DATE_TOKENS, _CUED_DATES, r"\d"),
    _rule("time", "uhr h giờ um gegen à vers às as lúc", _TIMES, r"\d"),
    _rule(
        "age above 89",
        "jährig jährige jähriger jährigen jähriges jährigem jahre j ans anos tuổi alter âge idade",
        _AGES,
        r"9\d|1[0-3]\d",
    ),
    _rule("record number", _RECORD_TOKENS, _RECORDS[:3], r"\d"),
    _rule("record number", "", _RECORDS[3:], r"\d\.\d{3}\.\d{3}-"),
    _rule("device serial", _DEVICE_TOKENS, _DEVICES, r"\d\w*[/-]?\w*\d"),
    _rule(
        "phone",
        "tel telefon telefonnummer handy mobil durchwahl tél téléphone telefone celular fone ramal đt sđt điện hotline",
        _PHONES[:1],
        r"\d",
    ),
    _rule("phone", "", _PHONES[1:], r"\d(?:[ .)-]+\d+){2}"),
    _rule("name", _TITLE_TOKENS, _TITLES),
    _rule("name", _CUE_TOKENS, _CUES[:1]),
    _rule("name", _PATIENT_TOKENS, _CUES[1:]),
    _rule("name", "thi thị văn", _VIETNAMESE_NAMES),
    _rule("name", _INITIALS_TOKENS, _INITIALS),
    _rule("hospital", _HOSPITAL_TOKENS, _HOSPITALS),
    _rule("address", _STREET_TOKENS, _STREETS),
    Rule("address", tuple(map(re.compile, _GERMAN_STREETS)), _GERMAN_ENDINGS, re.compile(r"\d")),
    _rule("address", "", _TOWNS, r"\d{4,5}|___, \d"),
)  # fmt: skip
