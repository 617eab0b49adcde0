"""Parses the text of a MIMIC-CXR report into its findings and its impression.

                                     FINAL REPORT
     INDICATION:  ___ year old man with cough.

     FINDINGS:  The lungs are clear.

     IMPRESSION:  No acute disease.

parse_report(text, "50414267")
Report(findings="The lungs are clear.", impression="No acute disease.")

A header stands at the start of a line, behind a space: capitals, a colon, white space. Its many spellings and the
exceptions for 54 studies are facts that MIMIC-CXR's authors found (MIT-LCP/mimic-cxr, txt/section_parser.py). What is
chosen here agrees, oddities included, with the sections that their txt/create_section_files.py writes, except that a
section of white space alone counts as none, and that their file of sections leaves those 54 studies out.
"""

import re
from itertools import pairwise
from typing import NamedTuple

from radhpc.core.sample import Report

# Section: what headers call it, misprints included. "NDICATION" heads the impression of the one report that has it.
_SPELLINGS = {
    "findings": (
        "findings", "finding", "findins", "findindgs", "findgings", "findngs", "findnings", "finidngs",
        "reference findings", "chest, two views",
    ),
    "impression": (
        "impression", "conclusion", "findings and impression", "findings/impression", "findings/ impression",
        "impresson", "imprression", "imoression", "impressoin", "imprssion", "impresion", "imperssion", "mpression",
        "impession", "ndication",
    ),
    "comparison": (
        "comparison", "comparisons", "comparison exam", "comparison film", "reference exam", "comparision",
        "comparsion", "comparrison", "comparisions",
    ),
    "indication": ("indication", "idication", "clinical indication", "reason for exam", "reason for examination"),
    "history": ("history", "clinical history", "patient history", "clinical information", "pfi"),
    "examination": ("examination", "exam", "type of examination"),
    "recommendations": ("recommendations", "recommendation", "recommendation(s)"),
    "wet read": ("wet read", "wetread"),
}  # fmt: skip
_SECTION_OF = {spelling: section for section, spellings in _SPELLINGS.items() for spelling in spellings}
_WITHIN = ("impression", "findings", "history", "comparison", "addendum")  # a header that contains one is one
# A header that tells how the picture was taken stands above what was seen in it.
_VIEW = re.compile(
    "chest|portable|pa and lat|lateral and pa|ap and lateral|lateral and ap|frontal and|two views|one view|"
    "frontal view|pa view|ap view|lateral view|bone window|frontal upright|frontal semi-upright|ribs"
)
_HEADER = re.compile(r"\n (?P<name>[A-Z ()/,-]+):\s")
_PARAGRAPH = "\n \n"
_RULE = re.compile(r"^[^\S\n]*_{10,}[^\S\n]*$", re.MULTILINE)  # a drawn line; what was de-identified is ___

# Studies whose report stands under a header of another section, by study_id.
_MISPLACED = {
    "50913680": "recommendations", "59363654": "examination", "59279892": "technique", "59768032": "recommendations",
    "57936451": "indication", "50058765": "indication", "53356173": "examination", "53202765": "technique",
    "50808053": "technique", "51966317": "indication", "50743547": "examination", "56451190": "note",
    "59067458": "recommendations", "59215320": "examination", "55124749": "indication", "54365831": "indication",
    "59087630": "recommendations", "58157373": "recommendations", "56482935": "recommendations",
    "58375018": "recommendations", "54654948": "indication", "55157853": "examination", "51491012": "history",
}  # fmt: skip
# Studies whose report stands between two characters of the text; where both are 0 nobody described the picture.
_STRETCH = {
    "50525523": (201, 349), "57564132": (233, 554), "59982525": (313, 717), "53488209": (149, 475),
    "54875119": (234, 988), "50196495": (59, 399), "56579911": (59, 218), "52648681": (292, 631),
    "59889364": (172, 453), "53514462": (73, 377), "59505494": (59, 450), "53182247": (59, 412),
    "51410602": (47, 320), "56412866": (522, 822), "54986978": (59, 306), "59003148": (262, 505),
    "57150433": (61, 394), "56760320": (219, 457), "59562049": (158, 348), "52674888": (145, 296),
    "55258338": (192, 568), "59330497": (140, 655), "52119491": (179, 454),
    "58235663": (0, 0), "50798377": (0, 0), "54168089": (0, 0), "53071062": (0, 0), "56724958": (0, 0),
    "54231141": (0, 0), "53607029": (0, 0), "52035334": (0, 0),
}  # fmt: skip


class ReportSection(NamedTuple):
    """A section of the text. The headers and texts of all sections, concatenated, are the whole text."""

    name: str  # findings, impression, ..., or the header in small letters
    header: str  # as it is written, with the space around it; empty at the start of the text
    text: str


def parse_report(text: str, study: str) -> Report:
    """Select the sections that describe the picture, on one line each; empty where none does.

    Of sections of one name the last counts. A report with neither findings nor impression gives as `other` its last
    paragraph, else what stands under comparison. So do the 54 exceptions, known by `study` (digits), with the text
    that is theirs.
    """
    if study in _STRETCH:
        start, end = _STRETCH[study]
        return Report(other=_one_line(text[start:end]))
    sections = {section.name: section.text for section in parse_sections(text) if section.text.strip()}
    if study in _MISPLACED and (misplaced := sections.get(_MISPLACED[study])):
        return Report(other=_one_line(misplaced))
    findings, impression = (_one_line(sections.get(name, "")) for name in ("findings", "impression"))
    if findings or impression:
        return Report(findings=findings, impression=impression)
    return Report(other=_one_line(sections.get("last_paragraph", "")) or _one_line(sections.get("comparison", "")))


def parse_sections(text: str) -> list[ReportSection]:
    """Split a text into its sections: "preamble" before the first header, or "full report" where there is none.

    Where findings and impression are both empty, the last other section ends at its first blank line, and what
    follows is the "last_paragraph".
    """
    headers = list(_HEADER.finditer(text))
    first = headers[0].start("name") if headers else len(text)
    sections = [ReportSection("preamble" if headers else "full report", "", text[:first])]
    for header, following in pairwise([*headers, None]):
        assert header is not None
        start, end = max(first, header.start()), following.start() if following else len(text)
        name = _section_of(header["name"].lower().strip())
        sections.append(ReportSection(name, text[start : header.end()], text[header.end() : end]))
    if any(section.name in ("findings", "impression") and section.text.strip() for section in sections):
        return sections
    place = max(n for n, section in enumerate(sections) if section.name not in ("findings", "impression"))
    before, blank, after = sections[place].text.partition(_PARAGRAPH)
    if blank:
        sections[place : place + 1] = [
            sections[place]._replace(text=before),
            ReportSection("last_paragraph", blank, after),
        ]
    return sections


def _section_of(header: str) -> str:
    """Return the section that a lower-case header begins."""
    if header in _SECTION_OF:
        return _SECTION_OF[header]
    within = next((name for name in _WITHIN if name in header), None)
    return within or ("findings" if _VIEW.search(header) else header)


def _one_line(text: str) -> str | None:
    """Remove drawn lines, and collapse white space to single spaces; None where nothing is left."""
    return " ".join(_RULE.sub(" ", text).split()) or None
