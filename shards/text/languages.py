"""Decides in which languages the privacy gate has rules, and which texts are in another one.

    primary_language("pt-BR"), has_rules("pt-BR")      # "pt", True
    tally = LanguageTally()
    tally.count("sv", "Inga infiltrat.")               # for each study
    tally.without_rules, tally.messages()               # {"sv": 1}, ["language: ..."]

A language is what the archive says, or what the user said of it. Texts in letters that no language with rules uses
count as a language without rules, whatever was said. Whether a text in Latin letters is in its language is only
estimated, from its most frequent small words, and is warned about.
"""

import re
from collections import Counter

LANGUAGES = ("en", "es", "de", "fr", "pt", "vi")  # that have rules
_CODE = re.compile(r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{2,8}){0,3}")  # BCP 47, as far as archives use it
OTHER_LETTERS = "other letters"  # stands for the language of texts whose letters no language with rules uses
_THREE_LETTERS = {
    "eng": "en",
    "spa": "es",
    "deu": "de",
    "ger": "de",
    "fra": "fr",
    "fre": "fr",
    "por": "pt",
    "vie": "vi",
}
_SMALL_WORDS = {  # one of them is in nearly every sentence of the language; in stemmed reports, too
    "en": "the of is are no there and with in to for a an has seen not or normal clear",
    "es": "de la el en sin no con se los las del y por al una un es rx compatible",
    "de": "der die das und im in mit kein keine des von nicht ist bei am nach links rechts den",
    "fr": "de la le les du des pas et en à au un une avec sans est l d",
    "pt": "de do da e sem com o a os as em no na não à ao um uma dos",
    "vi": "không phổi hai của và các có bên trên tim hình ảnh tràn bóng dịch màng",
}
_WORDS_OF = {language: frozenset(words.split()) for language, words in _SMALL_WORDS.items()}
_LEAST_WORDS = 6  # shorter texts, such as answers, need none of the small words
_ESTIMATED = 1000  # texts of a language that are looked at
_FEW = 0.5  # of the texts have one of the small words: then it is another language


def primary_language(code: str) -> str:
    """Return the first part of a language code in two letters, where it has any: "pt" of pt-BR, pt_BR and por."""
    first = code.strip().lower().replace("_", "-").split("-", 1)[0]
    return _THREE_LETTERS.get(first, first)


def is_code(text: str) -> bool:
    """Return whether a text is a language code."""
    return _CODE.fullmatch(text) is not None


def has_rules(code: str) -> bool:
    """Return whether the privacy gate has rules for the language of a code."""
    return primary_language(code) in LANGUAGES


def has_other_letters(text: str) -> bool:
    """Return whether three in ten letters or more of a text are none that a language with rules uses."""
    if text.isascii():
        return False
    letters = [letter for letter in text if letter.isalpha()]
    latin = sum(letter < "\u0250" or "\u1e00" <= letter < "\u1f00" for letter in letters)
    return 10 * latin <= 7 * len(letters) and bool(letters)


class LanguageTally:
    """Counts studies with texts in languages without rules, and how many texts read like the language they are said
    to be in."""

    def __init__(self) -> None:
        self.without_rules: Counter[str] = Counter()  # studies
        self._read: Counter[str] = Counter()  # texts looked at
        self._alike: Counter[str] = Counter()  # those that read like their language

    def count(self, code: str, text: str) -> None:
        """Count a study with the language `code` and all its texts in one."""
        language = primary_language(code)
        if not text or not is_code(code):
            return  # a study without a code is refused later, by name
        if language not in LANGUAGES:
            self.without_rules[language] += 1
        elif has_other_letters(text):
            self.without_rules[OTHER_LETTERS] += 1
        elif self._read[language] < _ESTIMATED and len(words := text.lower().split()) >= _LEAST_WORDS:
            self._read[language] += 1
            self._alike[language] += not _WORDS_OF[language].isdisjoint(words)

    def messages(self) -> list[str]:
        """Return warnings about languages that the texts do not read like."""
        return [
            f"language: texts are said to be in {language}, but {read - self._alike[language]} of the first {read} "
            "have none of its most frequent words; identifiers in a language without rules stay in them"
            for language, read in sorted(self._read.items())
            if self._alike[language] < _FEW * read
        ]
