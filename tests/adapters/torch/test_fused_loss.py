"""A loss with fused=True is the loss without it, in PyTorch; the kernels are interpreted.

Triton reads TRITON_INTERPRET when it is imported, so the cases run this file as a program.
"""

import contextlib
import copy
import sys
from unittest import mock

import negcache_torch as negcache
import programs
import pytest
import torch
import triton_apart
from negcache_torch import _backend, _namespace

SLOTS, WIDTH, ROWS, VOCABULARY = 200, 16, 6, 40
EVERYTHING = {
    "estimator": "exact_query",
    "num_samples": 2,
    "id_keys": ("id",),
    "group_key": "group",
    "margin": 0.5,
    "log_frequency_key": "frequency",
}
# How far gradients may be off: the readout's probabilities are rounded to the rows' dtype.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.int8: 1e-2}


def loss_of(dtype=torch.float32, **options):
    return negcache.NegativeCacheLoss(
        SLOTS,
        {"token": negcache.FieldSpec((), torch.int32)},
        negcache.FieldSpec((WIDTH,), dtype),
        scale=3.0,
        labels={
            "id": negcache.FieldSpec((), torch.int32),
            "group": negcache.FieldSpec((), torch.int32),
            "frequency": negcache.FieldSpec((), torch.float32),
        },
        generator=0,
        **options,
    )


def batch_of(generator, rows):
    def integers(high):
        return torch.randint(high, (rows,), generator=generator, dtype=torch.int32)

    return {
        "token": integers(VOCABULARY),
        "id": integers(30),
        "group": integers(2),
        "frequency": torch.randn(rows, generator=generator),
    }


def step(loss_fn, tower, query, features):
    def embed(rows):
        return tower(rows["token"])

    return loss_fn(embed, query, embed(features), features)


def trained(loss_fn, run=step):
    """Return losses and gradients of some steps with a moving tower, from a full cache."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tower = torch.nn.Embedding(VOCABULARY, WIDTH)
    with torch.no_grad():
        tower.weight.div_(3)
    loss_fn.prefill(lambda rows: tower(rows["token"]), batch_of(generator, SLOTS), 64)
    losses, gradients = [], []
    for _ in range(3):
        query = torch.randn(ROWS, WIDTH, generator=generator)
        loss = run(loss_fn, tower, query, batch_of(generator, ROWS))
        tower.weight.grad = None
        loss.backward()
        losses.append(loss.detach())
        gradients.append(tower.weight.grad.clone())
        with torch.no_grad():
            tower.weight.sub_(0.1 * tower.weight.grad)
    return torch.stack(losses), torch.stack(gradients)


@contextlib.contextmanager
def rows_multiplied_as_stored():
    """A CPU has no product of halves that adds up in float32."""
    with (
        mock.patch.object(_backend.TorchBackend, "multiplies_as_stored", return_value=True),
        mock.patch.object(_backend, "_values_are_at_hand", return_value=False),
        mock.patch.object(_namespace, "product_of_halves", lambda a, b: a.float() @ b.float()),
    ):
        yield


def near(found, expected, dtype):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    error = (found[1] - expected[1]).norm() / expected[1].norm()
    assert error < NEAR[dtype], (dtype, error)


def steps_are_those_of_the_plain_loss():
    for dtype in NEAR:
        with rows_multiplied_as_stored():
            plain = trained(loss_of(dtype, **EVERYTHING))
        near(trained(loss_of(dtype, fused=True, **EVERYTHING)), plain, dtype)
    shared = {"estimator": "shared"}
    near(trained(loss_of(fused=True, **shared)), trained(loss_of(**shared)), torch.float32)


def the_kernel_is_what_scores():
    called = mock.patch.object(
        _backend.TorchBackend, "fused_block_weights", side_effect=RuntimeError("called")
    )
    with called, pytest.raises(RuntimeError, match="called"):
        trained(loss_of(fused=True))
    with called:
        trained(loss_of())


def a_step_compiles_to_one_graph():
    fused = loss_of(fused=True, **EVERYTHING)
    other = copy.deepcopy(fused)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = trained(fused, compiled), trained(other)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


CASES = [steps_are_those_of_the_plain_loss, the_kernel_is_what_scores, a_step_compiles_to_one_graph]


def test_a_fused_loss_is_the_plain_one():
    names = [each.__name__ for each in CASES]
    done = programs.run(__file__, *names, **triton_apart.interpreting())
    assert done.stdout.splitlines() == names


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 4},
        {"retrieval_fn": negcache.MaxScoreRetrievalFn()},
        {"score_transform": torch.tanh},
        {"matryoshka_dims": (4, 12)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_kernels_do_not_know_is_refused_in_words(options):
    words = f"fused=True does not work with {next(iter(options))}"
    with pytest.raises(negcache.OptionError, match=words):
        loss_of(fused=True, **options)


if __name__ == "__main__":
    programs.main(globals(), sys.argv[1:], print)
