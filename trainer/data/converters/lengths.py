"""Cutting conversations at a number of tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from trainer.data.converters.base import Rejected
from trainer.errors import UserError


class TokenLimit:
    """Counts the tokens of the texts themselves; what a chat template adds comes on top."""

    def __init__(self, folder: str, limit: int) -> None:
        path = Path(folder) / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever is wrong with a file
            raise UserError(f"tokenizer: {path} cannot be read ({error})") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.limit = limit

    def cut(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The leading pairs that fit as a whole; if the first does not, its answer is cut.

        Raises:
            Rejected: the first question alone leaves no room for an answer.
        """
        used = 0
        for number, (question, answer) in enumerate(pairs):
            asked, answered = (self.tokenizer.encode(text, add_special_tokens=False) for text in (question, answer))
            need = len(asked.ids) + len(answered.ids)
            if used + need > self.limit:
                if number:
                    return pairs[:number]
                room = self.limit - len(asked.ids)
                kept = answer[: answered.offsets[room - 1][1]].rstrip() if room > 0 else ""
                if not kept:
                    raise Rejected("too long", f"the first question alone has {len(asked.ids)} tokens")
                return [(question, kept)]
            used += need
        return pairs
