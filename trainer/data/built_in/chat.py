"""The auxiliary task: short English dialogues, and facts about films; text only."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainer.data.built_in.catalogue import Split, require_material
from trainer.data.built_in.covers import films_by_split
from trainer.data.built_in.material import Film, dialogues, prolific_directors
from trainer.data.built_in.samples import Exchange, Sample, generator, split_groups

_LONGEST_LINE = 16  # words
_LONGEST_TALK = 4  # exchanges
_FACT_DIRECTORS = 60  # those with most films: their names come back, others would be met once
_UNWANTED = re.compile(r"\b(bend over|kill\w*|die|dead|sex\w*|god|hate|stupid|drunk|nazi\w*)\b", re.IGNORECASE)
_QUESTION = re.compile(
    r"(what|who|whom|whose|when|where|which|why|how|do|does|did|is|are|am|was|were|can|could|will|would|"
    r"should|have|has)\b",
    re.IGNORECASE,
)


def tidied(line: str) -> str | None:
    """A capital first, an end mark last; None for what is not plain English."""
    line = re.sub(r"\.{2,}", ".", line).strip(" *\"'")
    if line.isupper():
        line = line.capitalize()
    if not line or len(line.split()) > _LONGEST_LINE:
        return None
    if re.search(r"[^A-Za-z0-9 ,.?!';:%$()-]", line):
        return None
    line = line[0].upper() + line[1:]
    if line[-1] not in ".?!":
        line = line.rstrip(",;:-") + ("?" if _QUESTION.match(line) else ".")
    return line


def _dialogues() -> dict[str, tuple[Exchange, ...]]:
    """First line -> exchanges of every dialogue whose lines are all plain; others are left out."""
    found = {}
    for lines in dialogues():
        clean = [tidied(line) for line in lines]
        if all(clean) and len(lines) <= 2 * _LONGEST_TALK and not _UNWANTED.search(" ".join(lines)):
            pairs = zip(clean[::2], clean[1::2], strict=True)
            found[clean[0] or ""] = tuple(Exchange(q or "", a or "") for q, a in pairs)
    return found


def _film_facts(film: Film) -> tuple[Exchange, ...]:
    return (
        Exchange(f"Who directed {film.title}?", f"{film.director}."),
        Exchange("When was it released?", f"In {film.year}."),
        Exchange("What kind of film is it?", f"It is listed as {film.genre}."),
    )


def samples(seed: int, split: Split, count: int) -> Iterator[Sample]:
    """About half dialogues. Films come from the same split as on the covers: no test cover is given away."""
    plain = _dialogues()
    first_lines = split_groups(sorted(plain), generator(seed, "chat", "dialogues"))[split]
    known = prolific_directors(_FACT_DIRECTORS)
    facts = [_film_facts(film) for film in films_by_split(seed)[split] if film.director in known]
    talks = [plain[line] for line in sorted(first_lines)]
    require_material("chat", split, count, len(talks) + len(facts), "dialogues and films")
    rng = generator(seed, "chat", split)
    rng.shuffle(talks)
    taken = min(len(talks), max(count // 2, count - len(facts)))
    chosen = [*talks[:taken], *facts[: count - taken]]
    rng.shuffle(chosen)
    for exchanges in chosen:
        yield Sample(exchanges, None, shuffle=False)
