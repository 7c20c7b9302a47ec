"""The results of `scaling`, as a readable table."""

from typing import NamedTuple


class Scaling(NamedTuple):
    """What one rank holds, computes and sends: of the longest shard, in one step after the first.

    slots:         of its shard
    tables:        bytes by what they hold, for as long as the handler lives
    work:          bytes by purpose, while a step draws
    multiply_adds: by purpose
    sent:          bytes to other ranks by purpose, one for each exchange, in their order
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
        """Bytes beside the tables while a step draws; no tile is there any more when it does."""
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
        """Return it readably: one line for each figure that is not 0, with its unit."""
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
