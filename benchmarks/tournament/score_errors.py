"""How wrong cached scores of an age are, and how much to discount them: learned for free."""

import torch
from torch import Tensor

OCTAVES = 24  # of ages: 0, 1 to 2, 3 to 6, 7 to 14, …; the last one includes all older ages
MEMORY = 2_048  # about how many scores of an octave count fully; older ones fade
PRIOR = 8.0  # scores that an octave borrows from the younger one, so that a few have little weight


class ScoreErrors:
    """Variances of (stale score - fresh score) by age, and the discount that follows.

    If a stale score is the fresh one plus a Gaussian error of variance v, E exp(stale) is
    exp(fresh + v / 2). So v / 2 is subtracted, and sums of exp(score) are right again. Errors are
    known for rows that were drawn, by exp(stale). That shifts the errors' mean by v but keeps their
    variance, so we track the variance about the mean.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(3, OCTAVES, dtype=torch.float64)  # of 1, errors, their squares

    def learn(self, ages: Tensor, errors: Tensor) -> None:
        """Take in the ages (n,) of drawn rows, and the errors of their scores, (n,)."""
        errors = errors.double()
        terms = torch.stack([torch.ones_like(errors), errors, errors.square()])
        found = torch.zeros_like(self.sums).index_add_(1, octave(ages), terms)
        self.sums = self.sums * torch.exp(-found[0] / MEMORY) + found

    def discounts(self, ages: Tensor) -> Tensor:
        """Return what to subtract from the scores of rows of these ages, (n,)."""
        variances, variance = [], 0.0
        for count, total, squares in self.sums.T.tolist():
            spread = max(squares - total**2 / count, 0.0) if count else 0.0
            variance = (spread + PRIOR * variance) / (count + PRIOR)
            variances.append(variance)
        return torch.tensor(variances)[octave(ages)] / 2


def octave(ages: Tensor) -> Tensor:
    """Return floor(log2(age + 1)), at most the last octave."""
    # Not by a logarithm, which may fall just below a whole number.
    return (torch.frexp(ages.double() + 1).exponent.long() - 1).clamp(max=OCTAVES - 1)
