"""What was met while reading: counts for the manifest, and places for the user."""

from dataclasses import dataclass, field

MAX_EXAMPLES = 3


@dataclass
class Tally:
    """Counts by kind of problem, with the places of the first few of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        """Count one problem of `kind`; `place` says where it is and what it is."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(place)

    def lines(self) -> list[str]:
        """One line a kind, for the terminal."""
        return [
            f"{kind}: {count:,} ({'; '.join(self.examples[kind])}"
            f"{'; ...' if count > len(self.examples[kind]) else ''})"
            for kind, count in self.counts.items()
        ]
