"""The privacy gate: replaces what identifies a person in a free text by `___`, the mark that MIMIC uses.

    scrub("Compared with 12/03/2019. Discussed with Dr. Smith at 3:15 pm.")
    ("Compared with ___. Discussed with Dr. ___ at ___.", {"date": 1, "name": 1, "time": 1})

Rules (identifier_rules.py), not a model: a rule can be read, tested and counted, and the same text always gives the
same bytes. A name without a title, degree or header beside it is not found, so an archive that was never de-identified
needs more than this gate.
"""

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from radhpc.core.sample import CHEXPERT, Report, Sample
from shards.text import identifier_rules
from shards.text.identifier_rules import Rule, case_rule
from shards.text.languages import is_code
from shards.text.name_rules import NAME_RULES
from shards.text.number_rules import NUMBER_RULES
from shards.text.place_rules import PLACE_RULES

RULES = (*identifier_rules.RULES, *NUMBER_RULES, *NAME_RULES, *PLACE_RULES)
MARK = "___"
REACH = 200  # characters behind a token in which a match ends
SECTIONS = tuple(Report.model_fields)
_DIGIT = re.compile(r"\d")


class _LettersOnly(dict[int, int | str]):
    """A table for str.translate: what is no letter becomes a space."""

    def __missing__(self, code: int) -> int | str:
        self[code] = code if chr(code).isalpha() else " "
        return self[code]


_LETTERS = _LettersOnly()


def rules_digest() -> str:
    """Return the identity of the rules: other rules give other texts."""
    patterns = "\n".join(pattern.pattern for rule in RULES for pattern in rule.patterns)
    return hashlib.sha256(patterns.encode()).hexdigest()[:16]


class RuleSet:
    """Rules to apply together, in their order."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.rules = rules
        self.tokens = frozenset[str]().union(*(rule.tokens for rule in rules))


STANDARD = RuleSet(RULES)


def with_names(names: Sequence[str]) -> RuleSet:
    """Return the rules and, before them, one for names that a person has listed: as written, or in capitals."""
    if not names:
        return STANDARD
    spelled = {form for name in names for form in (name, name.upper())}
    pattern = "|".join(
        re.escape(form).replace(r"\ ", r"\s+") for form in sorted(spelled, key=lambda form: (-len(form), form))
    )
    first = " ".join(name.lower().translate(_LETTERS).split()[0] for name in names)
    return RuleSet((case_rule("listed name", first, (rf"(?<!\w)(?P<id>{pattern})(?!\w)",), before=0), *RULES))


def scrub(text: str, rules: RuleSet = STANDARD) -> tuple[str, dict[str, int]]:
    """Replace what identifies a person by MARK. Returns the text, and how often each rule was applied.

    Repeats until no rule matches, so that scrubbing twice changes nothing.
    """
    counts: dict[str, int] = {}
    while True:
        before, view = text, _TextView(text, rules.tokens)
        for rule in rules.rules:
            if not view.may_match(rule):
                continue
            times = 0
            for pattern in rule.patterns:
                text, replaced = pattern.subn(_mark, text)
                times += replaced
            if times:
                counts[rule.name] = counts.get(rule.name, 0) + times
                view = _TextView(text, rules.tokens)
        if text == before:
            return text, counts


class _TextView:
    """A text in the forms that show cheaply which rules cannot match in it."""

    def __init__(self, text: str, tokens: frozenset[str]) -> None:
        self.text, low = text, text.lower()
        self.digit = _DIGIT.search(text) is not None
        self.spaced = f" {' '.join(low.split())}"
        self.letters = f" {low.translate(_LETTERS)} "  # with a space in front, a token has the position of its space
        self.tokens = tokens.intersection(self.letters.split())
        self.aligned = len(low) == len(text)  # a few capitals have two small letters

    def may_match(self, rule: Rule) -> bool:
        """Return False where no pattern of the rule can match."""
        if (rule.near and not self.digit) or (rule.tokens and self.tokens.isdisjoint(rule.tokens)):
            return False
        if (rule.words and not _contains_any(self.spaced, rule.words)) or (
            rule.near and not rule.near.search(self.text)
        ):
            return False
        return rule.before is None or not self.aligned or self._matches_at_token(rule, rule.before)

    def _matches_at_token(self, rule: Rule, before: int) -> bool:
        for token in self.tokens & rule.tokens:
            place = self.letters.find(word := f" {token} ")
            while place >= 0:
                for pattern in rule.patterns:
                    if before:
                        match = pattern.search(self.text, max(0, place - before), place + REACH)
                    else:
                        match = pattern.match(self.text, place)
                    if match:
                        return True
                place = self.letters.find(word, place + 1)
        return False


def _contains_any(text: str, words: tuple[str, ...]) -> bool:
    for word in words:  # noqa: SIM110 (any() over a generator takes three times as long)
        if word in text:
            return True
    return False


def _mark(match: re.Match[str]) -> str:
    text, start = match[0], match.start()
    return text[: match.start("id") - start] + MARK + text[match.end("id") - start :]


def scrub_report(report: Report, rules: RuleSet = STANDARD) -> tuple[Report, Counter[str]]:
    """Scrub all sections of a report. Returns it, and how often each rule was applied."""
    counts: Counter[str] = Counter()
    sections: dict[str, str] = {}
    for section in SECTIONS:
        if text := getattr(report, section):
            clean, applied = scrub(text, rules)
            if applied:
                sections[section] = clean
                counts.update(applied)
    return (report.model_copy(update=sections) if sections else report), counts


def remaining_identifiers(sample: Sample) -> list[str]:
    """Return what a rule still finds in a finished description, as "field: rule"; the words are never quoted.

    It checks the texts, the language, projections, boxes, and the names of labels, vocabularies and the
    dataset.
    """
    texts = {section: getattr(sample.report, section) for section in SECTIONS}
    texts |= {"question": sample.question, "answer": sample.answer}
    findings = [f"{field}: {rule}" for field, text in texts.items() if text for rule in scrub(text)[1]]
    if not is_code(sample.language):
        findings.append("language: no language code")
    findings += [f"dataset: {rule}" for rule in _rules_in_name(sample.dataset)]
    for number, view in enumerate(sample.images):
        findings += [f"images.{number}.view: {rule}" for rule in _rules_in_name(view.view or "")]
    for number, box in enumerate(sample.boxes):
        findings += [
            f"boxes.{number}: {rule}" for text in (box.label, box.source or "") for rule in _rules_in_name(text)
        ]
    labels = dict.fromkeys(
        rule
        for vocabulary, values in sample.labels.items()
        for name in (vocabulary, *values)
        if name not in CHEXPERT
        for rule in _rules_in_name(name)
    )
    return findings + [f"labels: {rule}" for rule in labels]


@functools.lru_cache(maxsize=10_000)
def _rules_in_name(name: str) -> tuple[str, ...]:
    """Return the rules that match in a name; underscores separate its words, too."""
    return tuple(scrub(name.replace("_", " "))[1])
