"""Bytes and strings from anywhere made into text that can be written as UTF-8."""

from apps.topk.corpus.tally import Tally

REPLACED = "lines with characters that are not Unicode, mended with U+FFFD"


def decode(content: bytes, place: str, tally: Tally) -> str:
    """UTF-8 as text; what is none becomes U+FFFD and is counted, with its `place`."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        tally.add(REPLACED, f"{place}: byte {error.start + 1}")
        return content.decode("utf-8", errors="replace")


def without_surrogates(text: str, place: str, tally: Tally) -> str:
    """`text` with pairs of surrogates joined and lone ones, counted, made U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        tally.add(REPLACED, f"{place}: character {error.start + 1} of the text")
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
