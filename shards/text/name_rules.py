"""Patterns of the privacy gate for people, in six languages, each behind a word that says so.

    for rule in NAME_RULES:
        rule.name, rule.patterns, rule.tokens       # "name", ..., the words without which no pattern can match

English, Spanish, German, French, Portuguese and Vietnamese. All rules look at every text, because reports quote each
other and cite colleagues in other languages. Unlike those of identifier_rules.py these patterns tell capital
letters from small ones: a name is a run of words with capitals behind a title, a role or a label.
"""

import re

from shards.text.identifier_rules import NO_NAME, UPPER, Rule, case_rule

# Words of names.
LETTER = r"[^\W\d_]"
_STOP = (
    rf"(?i:{NO_NAME})(?!(?i:patient(?:in|e)?|befund|thorax|röntgen|lunge|herz|klinik|beurteilung|untersuchung"
    rf"|verlauf|kein|der|die|das"
    r"|und|mit|im|ist|wurde|nach|bei|frau|herrn?|monsieur|madame|mme|docteur|professeur|radiographie|examen|pas"
    r"|une?|et"
    r"|avec|pour|dans|est|poumons?|cœur|conclusion|doutor|senhora?|exame|tórax|sem|com|pulmões|coração|um|uma"
    r"|não|bác|bệnh"
    r"|ông|bà|phổi|tim|không|ngày|stable|unchanged|clear|normal|heart|there|it|he|she|we|views?|portable|upright"
    r"|supine|left"
    r"|right|bilateral|upper|lower|middle|new|prior|further|given|please|x-?ray|rx|tc|tac|rm|irm|mrt|lwk|bwk|hwk"
    r"|chuyên|khoa|trưởng|chẩn)\b)"
)
_CAP = rf"(?:[dDlL]['’])?(?=[{UPPER}]){_STOP}\w"
_WORD = rf"(?:{_CAP}(?:\.(?=\s?[{UPPER}])|{LETTER}*(?:['’-]{LETTER}+)*\b))"
_MIXED = rf"(?:{_CAP}{LETTER}*[^\W\d_{UPPER}](?:['’-]{LETTER}+)*\b)"  # with a small letter: no abbreviation
PARTICLE = (
    r"(?:(?:de\s+las?|de\s+los|del?|das?|dos|du|des|la|le|van\s+der|van|von|vom|zu|zur|der|den|di|bin|al"
    r"|e|y|i)\s+)"
)
_NAME = rf"{PARTICLE}?{_WORD}(?:[ \t]+{PARTICLE}?{_WORD}){{0,4}}"
_PERSON = rf"{PARTICLE}?(?:{_WORD}[ \t]+{PARTICLE}?){{0,3}}{_MIXED}"  # one word at least is no abbreviation
_FULL = rf"{_WORD}[ \t]+{PARTICLE}?(?:{_WORD}[ \t]+{PARTICLE}?){{0,3}}{_MIXED}"  # two words at least
SYLLABLE = rf"[{UPPER}][^\W\d_{UPPER}]{{0,6}}\b"  # Vietnamese names are written by syllables
_VIETNAMESE = rf"{_STOP}{SYLLABLE}(?:[ \t]+{SYLLABLE}){{1,4}}"
_DR = (
    r"(?:(?:Dr|Dra|Prof|PD|Priv\.-Doz|med|Dipl|Doctora?|Doutora?|Docteure?|Professeure?|Pr|Mr|Mrs|Ms|Herrn?|Frau|Mme|M"
    r"|ThS|TS|PGS|GS|BS|BSCK[IV]*)\b\.?\s+){0,4}"
)

_TITLES = (
    rf"\b(?:Don|Doña|Dña|Señor(?:a|ita)?|[Ee]nfermer[oa]|[Dd]octora?|[Ss]eñor(?:a|ita)?|doña)\.?\s+(?P<id>{_PERSON})",
    rf"\b(?:Dona|[Dd]outora?|[Ss]enhora?|[Ee]nfermeir[oa]|Seu)\s+(?P<id>{_PERSON})",
    r"\b(?:Herrn?|Frau|Fr\.|Hr\.|Hrn\.|(?:Ober|Assistenz|Chef|Stations|Haus|Fach)(?:arzt|ärztin)|OA|OÄ|Kolleg"
    r"(?:en|in)|Schwester|Pfleger"
    rf"|Privatdozent(?:in)?|PD)\s+{_DR}(?P<id>{_PERSON})",
    rf"\bMM?\.\s+(?!\w+(?:us|osis|ii|iae|um|eps|oides)\b)(?P<id>{_PERSON})",
    r"\b(?:Mmes?\.?|Mlles?\.?|Monsieur|Madame|Mademoiselle|[Dd]octeure?|[Pp]rofesseure?|Pr\.?|Infirmi(?:er|ère)"
    r"|Dre)\s+"
    rf"{_DR}(?P<id>{_PERSON})",
    rf"\b(?:Dra?|Prof)\.?\s+(?P<id>{_PERSON})",
    rf"\b(?:Nurse|nurse|[Pp]ractitioner|[Tt]echnologist|[Rr]esident|[Ff]ellow|[Aa]ttending|[Ii]ntern)\s+"
    rf"(?P<id>{_FULL})",
    rf"\b(?:Bác sĩ|bác sĩ|BSCK[IV]+\.?|ĐD|Ông|Bà|[Aa]nh|[Cc]hị|ông|bà)\s+{_DR}(?P<id>{_VIETNAMESE})",
    r"\b(?:B[Ss]|T[hH][sS]|TS|P?GS|CK[IV]+|KTV)(?:\.|"
    r"(?=\s+[\w\s]{0,20}[À-ÃÈ-ÊÌÍÒ-ÕÙÚÝà-ãè-êìíò-õùúýĂăĐđĨĩŨũƠơƯưẠ-ỹ]))\s+"
    rf"{_DR}(?P<id>{_VIETNAMESE})",
    # Behind what was replaced: "Mr. ___ An has".
    r"\b(?:Dra?|Mrs?|Ms|Miss|Frau|Herr)\.?\s+___\s(?P<id>An|To|Do|In|On|Or|By|No|Who|Will)(?=\s+(?:has|had|was"
    r"|is|will|who|denies)\b|\s*[,;)])",
)
_TITLE_TOKENS = (
    "don doña dña señor señora señorita enfermero enfermera doctor doctora dr dra dona doutor doutora senhor"
    " senhora enfermeiro"
    " enfermeira seu herr herrn frau fr hr hrn oberarzt oberärztin assistenzarzt assistenzärztin chefarzt"
    " chefärztin stationsarzt"
    " stationsärztin hausarzt hausärztin facharzt fachärztin oa oä kollegen kollegin schwester pfleger privatdozent"
    " privatdozentin pd m mm mme mmes mlle mlles monsieur madame mademoiselle docteur docteure professeur"
    " professeure pr"
    " infirmier infirmière dre prof nurse practitioner technologist resident fellow attending intern bác bs ths"
    " ts pgs gs"
    " bscki bsckii ck cki ckii ktv đd ông bà anh chị mr mrs ms miss"
)

_ROLE_LABELS = (
    r"(?i:resident|fellow|intern|surgeon|technician|radiographer|reader|author|consultant|signed|co-?signed|"
    r"(?:seen|over-?read|reported)\s+by"
    r"|m[eé]dic[oa](?:\s+\w+){0,3}|radi[oó]log[oa]|residente|adjunt[oa]|firmado|firma|solicitante|t[eé]cnic[oa]"
    r"|enfermer[oa]"
    r"|zuweiser(?:in)?|einweiser(?:in)?|überweiser(?:in)?|haus(?:arzt|ärztin)|ober(?:arzt|ärztin)|arzt|ärztin"
    r"|radiologe|radiologin|untersucher(?:in)?"
    r"|befunder(?:in)?|unterschrift|gez\."
    r"|m[eé]decin(?:\s+\w+){0,2}|op[eé]rat(?:eur|rice)|radiologue|interne|prescripteur|sign[eé]e?|manipulat"
    r"(?:eur|rice)|correspondant"
    r"|radiologista|assinado|assinatura|operador"
    r"|ktv|người đọc|người bệnh|bệnh nhân|bác sĩ(?:\s+(?:đọc|chỉ định|điều trị))?|kỹ thuật viên)"
)
_CUES = (
    rf"\b{_ROLE_LABELS}\s*:\s*{_DR}(?P<id>{_PERSON})",
    # Behind these a single word in capitals is a name, too.
    r"\b(?i:(?:last|first|family)?\s?name|surname|forename|apellidos?|nombre|nachname|vorname|familienname|nom"
    r"|pr[eé]nom|nome|sobrenome|họ và tên|họ tên)"
    rf"\s*:\s*{_DR}(?P<id>{_NAME})",
    rf"\b(?i:patient(?:in|e)?|paciente)\s*:\s*{_DR}(?P<id>{_FULL})",
    rf"\b(?:Paciente|Patient(?:in|e)?)\s+{_DR}(?P<id>{_FULL})(?=\s*[,;(])",
    rf"\b(?:[Bb]ệnh nhân|[Nn]gười bệnh|BN)\s*:?\s+(?P<id>{_VIETNAMESE})",
    # Kin, and who was spoken with.
    r"\b(?:wife|husband|daughter|son|mother|father|sister|brother|spouse)\b,?\s+"
    rf"(?P<id>{_MIXED}(?:\s{_MIXED})?)(?=,|\s+(?:states|reports|says|was|is|has)\b)",
    rf"\b(?:with|by|to)\s+(?P<id>{_MIXED}(?:\s{_MIXED})?)(?=,?\s+who\s)",
    rf"\b(?:[Cc]ontact|[Cc]all|[Nn]otify|[Pp]age)\s+(?P<id>{_FULL})(?=\s+(?:at|on|with)\b|\s*[,.;(])",
)
_AGED = (rf"(?<!\w)(?P<id>{_MIXED}\s(?:{_WORD}\s)?{_MIXED})(?=,?\s+is\s+an?\s+(?:\d|___))",)
_CUE_TOKENS = (
    "resident fellow intern surgeon technician radiographer reader author consultant signed cosigned by médico"
    " médica medico medica"
    " radiólogo radióloga radiologo radiologa residente adjunto adjunta firmado firma solicitante técnico"
    " técnica tecnico tecnica"
    " enfermero enfermera zuweiser zuweiserin einweiser einweiserin überweiser überweiserin hausarzt hausärztin"
    " oberarzt oberärztin"
    " arzt ärztin radiologe radiologin untersucher untersucherin befunder befunderin unterschrift gez seen over"
    " overread reported co nachname vorname familienname name nom operateur opérateur opératrice ktv surname"
    " forename apellido apellidos nombre familienname sobrenome"
    " prénom prenom médecin medecin radiologue interne prescripteur signé signée signe signee manipulateur"
    " manipulatrice correspondant"
    " nome radiologista assinado assinatura operador họ người bệnh bác kỹ bn"
)
_PATIENT_TOKENS = (
    "paciente patient patientin patiente bệnh người bn wife husband daughter son mother father sister brother"
    " spouse contact"
    " call notify page with by to"
)
_VIETNAMESE_NAMES = (rf"(?<!\w)(?P<id>{SYLLABLE}\s(?:Thi|Thị|Văn)\s{SYLLABLE}(?:\s{SYLLABLE})?)",)

# Who signed, dictated or typed: a name, or initials.
_BY = r"(?:by|por|par|von|durch|bởi|pelo|pela)"
_DONE = (
    r"(?i:dictated|checked|countersigned|transcribed|typed|read|over-?read|reviewed|approved|verified|signed"
    r"|reported|entered|scribed"
    r"|dictado|transcrito|informado|redactado|mecanografiado|validado|firmado|revisado|remitido|solicitado"
    r"|dict[eé]e?|saisie?|relue?|tapée?|transcrite?|frappée?|validée?|signée?|rédigée?|interprétée?|lue?"
    r"|diktiert|geschrieben|befundet|erfasst|vidiert|freigegeben|unterschrieben|gelesen"
    r"|ditado|digitado|transcrito|laudo|laudado|assinado|conferido|liberado)"
)
_NO_INITIALS = (
    r"(?!(?i:the|an?|our|us|me|him|her|them|two|both|this|that|team|pacs|mri?|cta?|ed|er|icu|el|la|los|las|un"
    r"|una|su|le|les|une|nos|der|die|das"
    r"|dem|den|uns|ihm|ihr|ein|eine|o|os|as|um|uma|ele|ela|tc|tac|rm|irm|mrt|eco|ai|cad|pet|all|one|it|you|fax"
    r"|tel|web|hand|mail|x+)\b)"
)
_INITIALS = (
    rf"\b{_DONE}\s+(?:electronically\s+)?{_BY}\s*:?\s*(?P<id>{_NO_INITIALS}[{UPPER}a-z]{{2,4}})(?=\s*"
    rf"(?:[.,;/)\n]|$)|\s+(?:and|y|und|et|e)\b)",
    r"\b(?i:diktat|schreib(?:kraft|dienst|er(?:in)?)|typist|typed|dictation|dict|trans(?:cri(?:ption|pción|ção"
    r"|ptionist))?|digit(?:ado|ação|ador)|secret[aá]ri[oa]|secretary|secrétaire|mecanograf[oa]|frappe|saisie"
    r"|dactylo)\s*[:.]?\s+"
    rf"(?P<id>{_NO_INITIALS}(?:[{UPPER}]{{2,4}}|[a-z]{{2,3}}))(?=\s*(?:[.,;/)\n]|$))",
    rf"\b{_DONE}\s+{_BY}\s*:?\s*{_DR}(?P<id>{_PERSON})",
)
_STROKED_INITIALS = (r"(?<!\w)(?P<id>(?!(?:AP|PA|CT|MR|US|LAT)\b)[A-Z]{2,4}[/:][a-z]{2,4})(?=\s*(?:\n|$))",)  # PKR/tls
_INITIALS_TOKENS = (
    "dictated checked countersigned transcribed typed read over overread reviewed approved verified signed"
    " reported entered scribed"
    " dictado transcrito informado redactado mecanografiado validado firmado revisado remitido solicitado"
    " dicte dictée dictee dicté saisi saisie relu relue tapé tapée transcrit transcrite frappé frappée validé"
    " validée signé signée rédigé"
    " rédigée interprété interprétée lu lue diktiert geschrieben befundet erfasst vidiert freigegeben"
    " unterschrieben gelesen"
    " ditado digitado laudo laudado assinado conferido liberado"
    " diktat transcription transcripción transcrição transcriptionist digitado digitação digitador"
    " secretária secretário secretario frappe saisie dactylo schreibdienst schreibkraft schreiber schreiberin"
    " typist dictation dict trans secretary secretaria"
    " secrétaire mecanografo mecanografa"
)

NAME_RULES = (
    case_rule("name", _TITLE_TOKENS, _TITLES, before=0),
    case_rule("name", _CUE_TOKENS, _CUES[:2], before=0),
    case_rule("name", _PATIENT_TOKENS, _CUES[2:], before=0),
    Rule("name", tuple(map(re.compile, _AGED)), (" is a ", " is an "), None),
    case_rule("name", "thi thị văn", _VIETNAMESE_NAMES, before=9),
    case_rule("name", _INITIALS_TOKENS, _INITIALS, before=0),
    Rule("name", tuple(map(re.compile, _STROKED_INITIALS)), ("/", ":"), None),
)
