"""Patterns of the privacy gate for dates, times, ages and numbers, in six languages, each behind a word that says so.

    for rule in NUMBER_RULES:
        rule.name, rule.patterns, rule.tokens       # "date", ..., the words without which no pattern can match

English, Spanish, German, French, Portuguese and Vietnamese. All rules look at every text, because reports quote each
other and cite colleagues in other languages. Those of English and Spanish dates are in identifier_rules.py.
"""

from shards.text.identifier_rules import case_rule, word_rule

# Dates, times and ages.
_YEAR = r"(?:19|20)\d\d"
_MONTHS = (
    r"(?:januar|jänner|februar|märz|april|mai|juni|juli|august|september|oktober|november|dezember|jän\.|mär\."
    r"|okt\.|dez\."
    r"|janvier|février|fevrier|mars|avril|juin|juillet|août|aout|septembre|octobre|novembre|décembre|decembre"
    r"|janv\.|févr\.|avr\.|juil\.|déc\."
    r"|janeiro|fevereiro|março|abril|maio|junho|julho|agosto|setembro|outubro|novembro|dezembro)"
)
_DATES = (
    rf"(?<!\w)(?<!\d[.,])(?P<id>\d{{1,2}}(?:er|[.ºo])?\s*(?:de\s+)?(?i:{_MONTHS})(?!\w)(?:\s*"
    rf"(?:de\s+)?{_YEAR})?)(?!\d)(?<!\smai)(?<!\smars)",
    rf"(?<!\w)(?P<id>\d{{1,2}}(?:er|[.º])?\s*(?i:mai|mars)\s+{_YEAR})(?!\d)",
    r"\b(?:[Ll]e|[Dd]u|[Aa]u|[Aa]m|[Vv]om|[Zz]um|[Ss]eit|[Bb]is)\s+(?P<id>\d{1,2}(?:er|\.)?\s*(?i:mai|mars))\b",
    rf"(?<!\w)(?P<id>(?i:{_MONTHS})\s+(?:de\s+)?{_YEAR})(?!\d)",
    r"(?<!\w)(?P<id>\d{1,2}(?P<bar>[/-])(?i:jan|fev|fév|févr|mar|mrz|abr|avr|apr|mai|jun|juin|jul|juil|ago|aoû"
    r"|aug|set|sep|sept|out|okt|oct|nov|dez|déc|dic)\.?(?P=bar)\d\d(?:\d\d)?)(?!\w)",
)
_DATE_TOKENS = (
    "januar jänner februar märz april mai juni juli august september oktober november dezember jän mär okt dez"
    " janvier février fevrier"
    " mars avril juin juillet août aout septembre octobre novembre décembre decembre janv févr avr juil déc"
    " janeiro fevereiro março abril"
    " maio junho julho agosto setembro outubro novembro dezembro jan fev fév mar mrz abr apr jun jul ago aoû aug"
    " set sep sept out oct nov dez dic"
)
_CUED_DATES = (
    r"\b(?:am|vom|zum|seit|bis|geb\.?|dated|on|du|le|au|em|ngày|del|el)\s+(?P<id>\d{1,2}\.\s?\d{1,2}\.\s?"
    r"(?:\d{4}|\d\d))(?!\d|\.\d)",
    r"\b(?:am|vom|zum|seit|bis)\s+(?P<id>\d{1,2}\.\s?(?:0?[1-9]|1[0-2])\.)(?!\s?\d|\w)(?!\s+(?:Rippe|BWK|LWK|HWK"
    r"|Tag))",
    r"\b(?i:geboren|jahrgang|née?|nascid[oa]s?|sinh(?:\snăm)?)\s*:?\s+(?:en\s+|em\s+|im\s+Jahr\s+)?(?P<id>(?:18"
    r"|19|20)\d\d)(?!\d)",
    rf"(?<!\w)(?P<id>\d{{1,2}}\s+tháng\s+\d{{1,2}}(?:,?\s+năm\s+{_YEAR}))(?!\d)",
    rf"\bngày\s+(?P<id>\d{{1,2}}\s+tháng\s+\d{{1,2}}(?:,?\s+năm\s+{_YEAR})?)(?!\d)",
    rf"(?P<id>\btháng\s+\d{{1,2}}(?:\s+năm\s+|[/-]){_YEAR})(?!\d)",
)
_CUED_DATE_TOKENS = (
    "am vom zum seit bis geb dated on du le au em ngày del el geboren jahrgang né née nascido nascida nascidos"
    " nascidas sinh"
)
_CLOCK = r"(?:[01]?\d|2[0-3])"
_TIMES = (
    rf"(?<![\w:.])(?P<id>{_CLOCK}(?:\s?[.:]\s?[0-5]\d)?\s?Uhr)\b",
    rf"(?<![\w:.,])(?P<id>{_CLOCK}\s?h\s?[0-5]\d)(?!\w)",
    rf"(?<![\w:.])(?P<id>{_CLOCK}\s?giờ\s?[0-5]\d(?:\s?phút)?)(?!\w)",
    rf"\b(?:um|gegen|à|vers|às|as|lúc)\s+(?P<id>{_CLOCK}(?::[0-5]\d|\s?giờ\b|\s?h\b))(?![\w:])",
)
_AGES = (
    r"(?<![\w.,])(?P<id>9\d|1[0-3]\d)(?=[\s-]*(?:jährige?[rnsm]?|Jahre(?:\s+alte?\w?)?|J\.|ans|anos|tuổi)(?!\w)"
    r"(?!\s+(?:de\s+recul|plus\s+tard|après|zuvor)))",
    r"\b(?:Alter|[Ââ]ge|[Ii]dade|[Tt]uổi)\s*:?\s*(?P<id>9\d|1[0-3]\d)(?![\w%]|[.,]\d)",
)

# Ages above 89 in words.
_WORDED_AGES = (
    r"(?<!\w)(?P<id>ninety(?:[ -](?:one|two|three|four|five|six|seven|eight|nine))?|(?:a|one)\shundred(?:\s"
    r"(?:and\s)?\w+)?)(?=[\s-]+(?:years?|yrs?|y/?o)\b)",
    r"(?<!\w)(?P<id>(?:noventa(?:\s(?:y|e)\s\w+)?|cien(?:to\s\w+)?|cem|cento\s+e\s+\w+))(?=\s+(?:años|anos)\b)",
    r"(?<!\w)(?P<id>quatre-vingt-(?:dix(?:-(?:sept|huit|neuf))?|onze|douze|treize|quatorze|quinze|seize)|nonante"
    r"(?:-\w+)?|cent(?:\s\w+)?)(?=\s+ans\b)",
    r"(?<!\w)(?P<id>(?:\w+und)?neunzig|hundert(?:und)?\w{0,9}?)(?=-?jährig|\s+Jahre\s+alt)",
    r"(?<!\w)(?P<id>chín\s+(?:mươi|mốt)(?:\s+\w+)?)(?=\s+tuổi)",
)
_WORDED_AGE_WORDS = (
    "ninety",
    "hundred",
    "noventa",
    "cien",
    "cem",
    "cento",
    "vingt-",
    "nonante",
    "cent ",
    "neunzig",
    "hundert",
    "chín ",
)

# Numbers of people, records and devices.
_NO = r"(?:\s*(?:n(?:um(?:ber|mer|ero)?|úmero|uméro|r|o)?\b\.?|[nN][.º°o]{0,2}(?=\s|\d)|id\b|ID\b|số\b|\#|:|=))*\s*"
_TOKEN = r"(?P<id>(?=[A-Za-z0-9./-]*\d[A-Za-z0-9./-]*\d)[A-Za-z0-9]+(?:[./-][A-Za-z0-9]+)*)(?<=[A-Za-z0-9./-]{4})(?!\w)"
_SERIAL = (
    r"(?P<id>(?=[A-Za-z0-9/-]{5})(?:(?=[\d/-]{0,20}[A-Za-z])(?=(?:[A-Za-z/-]{0,9}\d){3})|(?=(?:[/-]?\d){5}))"
    r"[A-Za-z0-9]+(?:[/-][A-Za-z0-9]+)*)(?!\w)"
)
_RECORDS = (
    r"\b(?i:fall-?(?:nummer|nr\b\.?)|hospital(?=\s*(?:n[or]\b|num|\#|id\b))|patienten-?(?:nummer|nr\b\.?|id)"
    r"|auftrags-?(?:nummer|nr\b\.?)|untersuchungs-?(?:nummer|nr\b\.?)|versicherten-?(?:nummer|nr\b\.?)"
    r"|aufnahme-?(?:nummer|nr\b\.?)|pat\.-?(?:nr\b\.?|id)|ipp|nip|nda|dossier|nir|accession(?:-?nr\b\.?)?|nhs"
    r"|crm|coren|npi|lanr|rpps|adeli|gmc|colegiad[oa]|pedido|petición|solicitação|volante|demande|auftrag"
    r"|anforderung|n[º°]?\s*(?:de|du|do|da)\s+(?:dossier|patient|séjour|exame|registro|prontuário)"
    r"|número\s+de\s+(?:acceso|acesso|historia|registro)|acceso|acesso|prontuário|cpf|rg|registro|cns|matrícula"
    r"|atendimento"
    r"|(?:examen|exame|étude|estudo)(?=\s*(?:n[º°o]|num|núm|numéro|número))"
    r"|số\s+(?:hồ sơ|bệnh án|vào viện|phim|thẻ)|mã\s+(?:bệnh nhân|bn|ca|số|hồ sơ|y tế|phim)|cmnd|cccd)" + _NO + _TOKEN,
    r"\b(?i:acc(?:ession)?)\b\.?" + _NO + _TOKEN,
    r"\b(?i:study|order|exam|case|film|requisition|estudio|examen|untersuchung|examen|exame|phim)"
    + _NO
    + r"(?P<id>(?=[A-Za-z0-9-]*[A-Za-z])(?=[A-Za-z0-9-]*\d{4})[A-Z0-9]+(?:-[A-Z0-9]+)*)(?!\w)",
    r"(?<![\w.-])(?P<id>\d{3}\.\d{3}\.\d{3}-\d\d|\d\d\.\d{3}\.\d{3}-[\dA-Z])(?!\w)",
)
# Numbers in groups: of the NHS, and of French and German insurances.
_GROUPED = (
    r"\b(?i:nhs|nir|sécu(?:rité\s+sociale)?|versicherten-?(?:nummer|nr\b\.?)|sozialversicherungs-?(?:nummer"
    r"|nr\b\.?)|sus|thẻ bhyt|bhyt)\b" + _NO + r"(?P<id>[A-Z]{0,2}\d{1,4}(?:[ -]\d{1,4}){2,7})(?!\w)",
)
_GROUPED_TOKENS = (
    "nhs nir sécu sécurité versichertennummer versicherten sozialversicherungsnummer sozialversicherungs sus thẻ bhyt"
)
_RECORD_TOKENS = (
    "fallnummer fallnr fall nhs crm coren npi lanr rpps adeli gmc colegiado colegiada pedido petición"
    " solicitação volante demande auftrag"
    " anforderung auftragsnr patientennr patientennummer patienten auftragsnummer auftrags untersuchungsnummer"
    " untersuchungs versichertennummer versicherten"
    " aufnahmenummer aufnahme pat ipp nip nda dossier nir accession n número acceso acesso prontuário cpf rg"
    " registro cns matrícula"
    " atendimento examen exame étude estudo số mã cmnd cccd acc study order exam case film requisition estudio"
    " untersuchung phim hospital"
)
_DEVICES = (
    r"\b(?i:serial|s/n|sn|serie|série|serien-?(?:nummer|nr)|seri|sê-ri|xê-ri|lot|geräte-?(?:nummer|nr))\b\.?"
    r"(?:\s(?:du|des|de|del|do|da|of the|máy)\s\w+)?" + _NO + r"(?:[A-Z]{2,4} )?" + _SERIAL,
)
_DEVICE_TOKENS = "serial s sn serie série seriennummer seriennr serien seri sê xê lot gerätenummer gerätenr geräte"
_PHONES = (
    r"\b(?i:tel|telefon(?:nummer)?|handy|mobil|durchwahl|t[ée]l|téléphone|telefone|celular|fone|ramal|đt|sđt"
    r"|điện thoại|hotline)\b\.?\s*:?\s*"
    r"(?P<id>\+?\(?\d(?:[\s()./–-]{0,3}\d){3,14})(?!\w)",
    r"(?<![\w.,/-])(?P<id>0[1-9](?:[ .]\d\d){4}|\+\d\d\s?\(0\)\s?\d{1,5}(?:[\s/-]?\d){4,9})(?![\w-])",
    r"(?<![\w.,/-])(?P<id>\(\d\d\)\s?9?\d{4}-\d{4}|0\d{3}[ .]\d{3}[ .]\d{3})(?![\w-])",
)

NUMBER_RULES = (
    case_rule("date", _DATE_TOKENS, _DATES, r"\d", 14),
    case_rule("date", _CUED_DATE_TOKENS, _CUED_DATES[:3], r"\d\.|[12]\d\d\d", 0),
    case_rule("date", "tháng ngày", _CUED_DATES[3:], r"\d", 4),
    case_rule("time", "uhr h giờ", _TIMES[:3], r"\d", 10),
    case_rule("time", "um gegen à vers às as lúc", _TIMES[3:], r"\d(?::\d|\s?[gh])", 0),
    case_rule(
        "age above 89",
        "jährig jährige jähriger jährigen jähriges jährigem jahre j ans anos tuổi alter âge idade",
        _AGES,
        r"9\d|1[0-3]\d",
        8,
    ),
    word_rule("age above 89", _WORDED_AGE_WORDS, _WORDED_AGES),
    case_rule("record number", _RECORD_TOKENS, _RECORDS[:3], r"\d", 0),
    case_rule("record number", _GROUPED_TOKENS, _GROUPED, r"\d[ -]\d", 0),
    case_rule("record number", "", _RECORDS[3:], r"\d\.\d{3}\.\d{3}-"),
    case_rule("device serial", _DEVICE_TOKENS, _DEVICES, r"\d\w*[/-]?\w*\d", 0),
    case_rule(
        "phone",
        "tel telefon telefonnummer handy mobil durchwahl tél téléphone telefone celular fone ramal đt sđt điện hotline",
        _PHONES[:1],
        r"\d",
        0,
    ),
    case_rule("phone", "", _PHONES[1:], r"\d(?:[ .()-]+\d+){2}"),
)
