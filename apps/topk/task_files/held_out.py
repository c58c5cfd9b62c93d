"""Three tasks made of any text: whole documents, last words and continuations.

Documents and passages are drawn by a hash of their words: the order of the files and the names
they have play no part, and of passages with the same words there is one.
"""

import heapq
import random
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from apps.topk.corpus.draws import content_hash, draw, seed_key
from apps.topk.task_files.task import Task, choice_task, last_word_task, rolling_task

# Words of a passage whose last word is asked for, which has at least as many sentences.
LAST_WORD_WORDS, LAST_WORD_SENTENCES = range(40, 101), 3
MIN_LETTERS = 4  # of that word
# Words of a passage that is to be continued, its sentences, and words of the continuation.
CONTEXT_WORDS, CONTEXT_SENTENCES = range(30, 101), 2
CONTINUATION_WORDS = range(6, 41)
CHOICES = 4
# A wrong continuation is at most so many times as long or as short as the right one.
LENGTH_RATIO = 1.2
# So many times as many passages as are asked for are drawn, to choose from.
POOL = 20
# The most frequent words of the text are no last words: they need no passage to be guessed. So
# many are left out, but no more than a hundredth of all words.
COMMON_WORDS = 100

Span = tuple[int, int]  # where a sentence starts in a text and where it ends, without the space

_GAP = re.compile(r"""(?:(?<=[.!?…])|(?<=[.!?…]["'”\u2019»)\]]))\s+|\n\s*\n\s*""")
# The end of "J. R. Mrs. Smith" after each point: no sentence ends there.
_SHORTENED = re.compile(r"(?<!\w)[^\W\d_]{1,3}\.$")
_WORD = re.compile(rf"[^\W\d_]{{{MIN_LETTERS},}}")
_LAST_WORD = re.compile(rf"(?<=\S) ([^\W\d_]{{{MIN_LETTERS},}})[^\w\s]*(?:\s[^\w\s]+)*$")


class Sample:
    """Up to `size` of the items that are offered, drawn by the words of a text with each."""

    def __init__(self, size: int, seed: int, purpose: bytes):
        self.size, self.key, self.purpose = size, seed_key(seed), purpose
        self._held: list[tuple[int, Any]] = []  # a heap, the largest rank first
        self._ranks: set[int] = set()

    def offer(self, text: str, item: Any) -> None:
        rank = self.rank(text)
        if rank in self._ranks or (len(self._held) == self.size and rank > -self._held[0][0]):
            return
        self._ranks.add(rank)
        heapq.heappush(self._held, (-rank, item))
        if len(self._held) > self.size:
            self._ranks.remove(-heapq.heappop(self._held)[0])

    def rank(self, text: str) -> int:
        return int.from_bytes(draw(content_hash(text), self.key, self.purpose), "big")

    def drawn(self) -> list[Any]:
        """The items, in an order that is drawn too."""
        return [item for _, item in sorted(self._held, key=lambda held: -held[0])]


def held_out_tasks(name: str, texts: Iterable[str], max_items: int, seed: int) -> list[Task]:
    """NAME_rolling, NAME_last_word and NAME_continuation, of up to `max_items` items each.

    One that the text gives no item for has none. Memory grows with the number of different
    words only, not with the text.
    """
    documents = Sample(max_items, seed, b"rolling")
    passages = Sample(POOL * max_items, seed, b"last word")
    continued = Sample(POOL * max_items, seed, b"continuation")
    counts: Counter[str] = Counter()
    for text in texts:
        documents.offer(text, text)
        counts.update(word.lower() for word in _WORD.findall(text))
        for context, word in last_words(text):
            passages.offer(context + word, (context, word))
        for context, sentence in continuations(text):
            continued.offer(context + sentence, (context, sentence))
    uncommon = without_common_words(passages.drawn(), counts)
    return [
        rolling_task(f"{name}_rolling", documents.drawn()),
        last_word_task(f"{name}_last_word", uncommon[:max_items]),
        choice_task(f"{name}_continuation", choices(continued.drawn(), max_items, seed)),
    ]


def without_common_words(
    passages: list[tuple[str, str]], counts: Counter[str]
) -> list[dict[str, str]]:
    """The items of the passages whose last word is not one of the most frequent in `counts`."""
    common = counts.most_common(min(COMMON_WORDS, len(counts) // 100))
    left_out = {word for word, _ in common}
    return [
        {"context": context, "word": word}
        for context, word in passages
        if word.strip().lower() not in left_out
    ]


def sentences(text: str) -> list[Span]:
    """The sentences of a text, told by their last sign; a blank line ends one as well."""
    spans, start = [], len(text) - len(text.lstrip())
    for gap in _GAP.finditer(text, start):
        if gap.end() < len(text) and _is_end(text, start, gap):
            spans.append((start, gap.start()))
            start = gap.end()
    end = len(text.rstrip())
    return [*spans, (start, end)] if start < end else spans


def _is_end(text: str, start: int, gap: re.Match[str]) -> bool:
    if gap[0].count("\n") > 1:
        return True
    before = text[max(start, gap.start() - 5) : gap.start()]
    shortened = _SHORTENED.search(before)
    return not text[gap.end()].islower() and not (shortened and shortened[0][0].isupper())


def last_words(text: str) -> Iterator[tuple[str, str]]:
    """Passages without their last word, and that word behind a space.

    The word also stands in a sentence before the last one, so that who has read the passage
    has met it. Passages do not overlap.
    """
    spans, first = sentences(text), 0
    while first < len(spans):
        last = _last_sentence(text, spans, first)
        if last is None:
            first += 1
            continue
        passage = text[spans[first][0] : spans[last][1]]
        word = _LAST_WORD.search(passage)
        yield passage[: word.start()], " " + word[1]
        first = last + 1


def _last_sentence(text: str, spans: list[Span], first: int) -> int | None:
    """The sentence that ends a passage from sentence `first` on; None where none does."""
    words = 0
    for last in range(first, len(spans)):
        words += _count_words(text, spans[last])
        if words >= LAST_WORD_WORDS.stop:
            return None
        long_enough = words in LAST_WORD_WORDS and last - first + 1 >= LAST_WORD_SENTENCES
        if long_enough and _asks_for_known_word(text, spans[first], spans[last]):
            return last
    return None


def _asks_for_known_word(text: str, first: Span, last: Span) -> bool:
    found = _LAST_WORD.search(text[slice(*last)])
    before = text[first[0] : last[0]]
    return bool(found) and re.search(rf"(?<!\w){re.escape(found[1])}(?!\w)", before) is not None


def continuations(text: str) -> Iterator[tuple[str, str]]:
    """Passages of a few sentences, and the sentence after each. Passages do not overlap."""
    spans, first = sentences(text), 0
    while first < len(spans):
        last = _context_end(text, spans, first)
        if last is None or not _continues(text, spans, last):
            first += 1
            continue
        yield text[spans[first][0] : spans[last][1]], text[slice(*spans[last + 1])]
        first = last + 2


def _context_end(text: str, spans: list[Span], first: int) -> int | None:
    words = 0
    for last in range(first, len(spans)):
        words += _count_words(text, spans[last])
        if words in CONTEXT_WORDS and last - first + 1 >= CONTEXT_SENTENCES:
            return last
        if words >= CONTEXT_WORDS.stop:
            return None
    return None


def _continues(text: str, spans: list[Span], last: int) -> bool:
    """Whether a sentence of a fit length comes after `last`, in the same line."""
    if last + 1 == len(spans):
        return False
    gap = text[spans[last][1] : spans[last + 1][0]]
    return not gap.strip(" ") and _count_words(text, spans[last + 1]) in CONTINUATION_WORDS


def choices(continued: list[tuple[str, str]], max_items: int, seed: int) -> list[dict[str, Any]]:
    """Items of the first passages, each with three continuations of others.

    continued: passages and their continuations.
    """
    pool = sorted({sentence for _, sentence in continued}, key=_by_length)
    key, items = seed_key(seed), []
    for context, right in continued:
        chance = random.Random(draw(content_hash(context), key, b"choices"))
        options = _wrong_ones(pool, context, right, chance)
        if not options:
            continue
        gold = chance.randrange(CHOICES)
        options.insert(gold, right)
        items.append({"query": context, "choices": options, "gold": gold})
        if len(items) == max_items:
            break
    return items


def _wrong_ones(pool: list[str], context: str, right: str, chance: random.Random) -> list[str]:
    """Three of `pool`, which is sorted by length, or none where too few are alike in length.

    How many of them are shorter than the right one is drawn first: else the right one would
    mostly be of middle length, and could be guessed by that.
    """
    place = bisect_left(pool, _by_length(right), key=_by_length)
    shorter = range(bisect_left(pool, len(right) / LENGTH_RATIO, key=len), place)
    longer = range(place + 1, bisect_right(pool, len(right) * LENGTH_RATIO, key=len))
    wrong = CHOICES - 1
    for count in chance.sample(range(CHOICES), CHOICES):
        if count > len(shorter) or wrong - count > len(longer):
            continue
        places = chance.sample(shorter, count) + chance.sample(longer, wrong - count)
        options = [pool[place] for place in chance.sample(places, wrong)]
        if not any(option in context for option in options):
            return options
    return []


def _by_length(text: str) -> tuple[int, str]:
    return len(text), text


def _count_words(text: str, span: Span) -> int:
    return len(text[slice(*span)].split())
