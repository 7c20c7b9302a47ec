"""How wrong cached scores of an age are, and what to take from them for it: learned for free."""

import torch
from torch import Tensor

OCTAVES = 24  # of ages: 0, 1 to 2, 3 to 6, 7 to 14, …; the last has all that are older
MEMORY = 2_048  # scores of an octave that count in full, about: older ones fade
PRIOR = 8.0  # scores that an octave is lent from the younger one, so that a few say little


class ScoreErrors:
    """Variances of (stale score - fresh score) by age, and the discount that they call for.

    If a stale score is the fresh one and a Gaussian error of variance v, E exp(stale) is
    exp(fresh + v / 2): so v / 2 is taken from it, and sums of exp(score) are right again. Errors
    are known of the rows that were drawn, by exp(stale): that moves the errors' mean by v and
    leaves their variance, so it is the variance about the mean that is kept.
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
        """Return what to take from the scores of rows of these ages, (n,)."""
        variances, variance = [], 0.0
        for count, total, squares in self.sums.T.tolist():
            spread = max(squares - total**2 / count, 0.0) if count else 0.0
            variance = (spread + PRIOR * variance) / (count + PRIOR)
            variances.append(variance)
        return torch.tensor(variances)[octave(ages)] / 2


def octave(ages: Tensor) -> Tensor:
    """Return floor(log2(age + 1)), at most the last octave."""
    # Not by a logarithm, which may fall short of a whole number.
    return (torch.frexp(ages.double() + 1).exponent.long() - 1).clamp(max=OCTAVES - 1)
