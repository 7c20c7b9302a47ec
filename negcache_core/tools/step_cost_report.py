"""The results of `scaling`, as a readable table."""

from typing import NamedTuple


class Scaling(NamedTuple):
    """What one rank holds, computes and sends: with the longest shard, in any step but the first.

    slots:         of its shard
    tables:        name -> bytes that it holds as long as the handler lives
    work:          purpose -> bytes that it needs during a step's draw
    multiply_adds: purpose -> multiply-adds in a step
    sent:          exchange -> bytes that it sends to other ranks in a step, in the order of a step
    world_size:    the number of ranks
    """

    slots: int
    tables: dict[str, int]
    work: dict[str, int]
    multiply_adds: dict[str, int]
    sent: dict[str, int]
    world_size: int

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables of a rank."""
        return sum(self.tables.values())

    @property
    def work_bytes(self) -> int:
        """The most bytes in use during a step's draw, without the tables.

        The memory of a tile is free again before the drawing needs its own.
        """
        return sum(self.work.values()) - min(self.work["tile"], self.work["drawing"])

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends to the others in a step."""
        return sum(self.sent.values())

    @property
    def sent_by_all(self) -> int:
        """Bytes that all ranks send in a step."""
        return self.world_size * self.sent_bytes

    def table(self) -> str:
        """Return the figures as text: one line for each that is not 0, with its unit."""
        lines = [f"one of {self.world_size} ranks, {self.slots:,} slots"]
        for title, total, figures, unit in (
            ("tables", self.table_bytes, self.tables, "B"),
            ("work memory of a step", self.work_bytes, self.work, "B"),
            ("multiply-adds of a step", sum(self.multiply_adds.values()), self.multiply_adds, ""),
            ("sent to other ranks in a step", self.sent_bytes, self.sent, "B"),
        ):
            lines.append(f"{title:<34}{_readable(total, unit):>10}")
            lines += [f"  {name:<32}{_readable(n, unit):>10}" for name, n in figures.items() if n]
        lines.append(f"{'sent by all ranks in a step':<34}{_readable(self.sent_by_all, 'B'):>10}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _readable(number: float, unit: str) -> str:
    """Return a number to three digits, with a decimal prefix.

    >>> _readable(516_000_000, "B"), _readable(999, "B")
    ('516 MB', '999 B')
    """
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5:
            digits = f"{number:.3g}"
            return f"{digits} {prefix}{unit}".rstrip()
        number /= 1000
    return f"{number:,.0f} P{unit}"
