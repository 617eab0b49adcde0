"""Splits the text of a report into its sections, by their headers.

split("INDICATION: cough. FINDINGS: Clear lungs. IMPRESSION: Normal.")
Report(findings="Clear lungs.", impression="Normal.", other="INDICATION: cough.")
"""

import re

from radhpc.core.sample import Report

_SECTION = {
    "findings": "findings", "finding": "findings",
    "impression": "impression", "impressions": "impression", "conclusion": "impression", "conclusions": "impression",
}  # fmt: skip
_OTHERS = (
    "indications?", "(?:clinical )?(?:history|information)", "comparisons?", "techniques?", "exam(?:ination)?",
    "procedure", "recommendations?", "addendum", "(?:final )?report",
)  # fmt: skip
# A header stands at the start of the text, of a line or of a sentence, and ends with a colon.
_HEADER = re.compile(
    rf"(?:^|(?<=[\n.!?:])|(?<=[.!?:]\s))[^\S\n]*(?P<name>{'|'.join((*_SECTION, *_OTHERS))})[^\S\n]*:", re.IGNORECASE
)


def split(text: str) -> Report:
    """Split a text into sections; all of it is `other` without a header of findings or impression."""
    parts: dict[str, list[str]] = {"findings": [], "impression": [], "other": []}
    headers = list(_HEADER.finditer(text))
    if not any(header["name"].lower() in _SECTION for header in headers):
        return Report(other=text.strip() or None)
    parts["other"].append(text[: headers[0].start()])
    for header, following in zip(headers, [*headers[1:], None], strict=True):
        section = _SECTION.get(header["name"].lower(), "other")
        start = header.start() if section == "other" else header.end()  # other sections keep their headers
        parts[section].append(text[start : following.start() if following else len(text)])
    joined = {name: " ".join(filter(None, map(str.strip, texts))) or None for name, texts in parts.items()}
    return Report(**joined)
