"""Tokenise texts as texts: a control token that a report spells out is so many characters, and steers nothing.

    tokenizer = TextTokenizer(family.tokenizer)
    tokenizer.text("Clear <|image|> lungs.")         # ids of which none is a control token; they decode to this text
    tokenizer.chat("Where is <|image|>?", template)  # control tokens are those of the template, not those of the text

A text without any control token has the ids that the tokenizer alone gives it.
"""

import copy
import re
import threading
from collections.abc import Callable
from typing import Any

from radhpc.core.errors import UserError

STAND_IN = "text of this turn"  # takes the place of a text in a chat while its template is filled in

_copying = threading.Lock()


class TextTokenizer:
    """A tokenizer that knows which of its tokens are for the chat's template alone."""

    def __init__(self, tokenizer: Any, *control_ids: int | None) -> None:
        """`control_ids`: those of further tokens that mean something to the model, such as its image token's."""
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number for number, token in added.items() if getattr(token, "special", False)}
        special |= {*tokenizer.all_special_ids, *(number for number in control_ids if number is not None)}
        self._unknown: int | None = tokenizer.unk_token_id  # an ordinary text may have it, too
        self._control = frozenset(special)
        names = sorted(filter(None, tokenizer.convert_ids_to_tokens(sorted(special))), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._splitting: Any = None

    def text(self, text: str) -> list[int]:
        """Return the ids of a text, of which none is a control token."""
        ids = self._ids(text)
        return ids if self._control.isdisjoint(ids) else self._split(text)

    def chat(self, text: str, chat: Callable[[str], str]) -> list[int]:
        """Return the ids of `chat(text)`, a template filled in. Raises UserError for one that changes its texts."""
        if self._control.isdisjoint(self._ids(text)):
            return self._ids(chat(text))
        before, *rest = chat(STAND_IN).split(STAND_IN)
        if len(rest) != 1:
            raise UserError(
                f"model.chat_template: writes the user's text {len(rest)} times; expected is once, so that control "
                "tokens which a text spells out can be told from the template's own"
            )
        # The tokenizer cuts at control tokens, so what lies between the template's nearest two is one piece.
        start = max((match.end() for match in self._names.finditer(before)), default=0)
        following = self._names.search(rest[0])
        end = following.start() if following else len(rest[0])
        piece = before[start:] + text + rest[0][:end]
        return [*self._ids(before[:start]), *self._split(piece), *self._ids(rest[0][end:])]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _split(self, text: str) -> list[int]:
        """Return the ids of a text that spells out control tokens."""
        with _copying:
            if self._splitting is None:
                # A copy: it is a state of the tokenizer, which other threads are using.
                self._splitting = copy.deepcopy(self._tokenizer)
                self._splitting.split_special_tokens = True
                self._splitting("", add_special_tokens=False, split_special_tokens=True)
        ids = list(self._splitting(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        control = self._control - {self._unknown}
        if control.isdisjoint(ids):
            return ids
        # Tokens that are not marked as special in the tokenizer's files: cut them in two.
        pieces, start = [], 0
        for match in self._names.finditer(text):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        return [i for piece in (*pieces, text[start:]) for i in self._ids(piece) if i not in control]
