"""The tournament's options: losses as by hand, and corrections that correct."""

import pytest
import torch


def random_batch(tournament, ids):
    """Return a model, a batch of pairs with items `ids`, and what its loss has to be, by hand."""
    torch.manual_seed(0)
    task = tournament.tiny()
    model = tournament.towers.TwoTowers(task, "separate", 5.0)
    ids = torch.tensor(ids)
    rows = torch.arange(len(ids))
    batch = tournament.method.Batch(
        torch.from_numpy(task.queries)[rows], torch.from_numpy(task.items)[ids], ids
    )
    scores = model.scale() * model.queries(batch.queries) @ model.items(batch.items).T

    def by_hand(scores):
        others = (ids[:, None] != ids) | torch.eye(len(ids), dtype=torch.bool)
        each = [row[counts].logsumexp(0) for row, counts in zip(scores, others, strict=True)]
        return torch.stack(each) - scores.diagonal()

    return model, batch, by_hand(scores), by_hand(scores.T)


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return [each.grad.to_dense().clone() for each in model.tables()]


def test_the_symmetric_loss_also_asks_items_for_their_queries(tournament):
    model, batch, there, back = random_batch(tournament, [4, 9, 4, 7])
    assert not torch.allclose(there.mean(), back.mean(), rtol=1e-3)
    loss = tournament.in_batch.in_batch_loss(model, symmetric=0.25)(batch)
    wanted = 0.75 * there.mean() + 0.25 * back.mean()
    torch.testing.assert_close(loss, wanted)
    pairs = zip(gradients_of(model, loss), gradients_of(model, wanted), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_hard_queries_weigh_more_and_their_weights_are_constants(tournament, power):
    model, batch, losses, _ = random_batch(tournament, [4, 9, 4, 7])
    missing = (1 - (-losses).exp()).detach() ** power
    wanted = (missing / missing.sum() * losses).sum()
    loss = tournament.in_batch.in_batch_loss(model, hard_weight=power)(batch)
    torch.testing.assert_close(loss, wanted)
    pairs = zip(gradients_of(model, loss), gradients_of(model, wanted), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


def test_losses_of_nothing_have_a_weighed_mean_of_zero(tournament):
    losses = torch.zeros(3, requires_grad=True)
    value = tournament.in_batch.weighed_mean(losses, 1.0)
    value.backward()
    assert value.item() == 0
    assert losses.grad.isfinite().all()


def begun(tournament, model, options, cache_size=16):
    """Return the loss of a cache method as it begins."""
    setting = tournament.method.Setting(model, tournament.tiny(), 4, cache_size, 0, options)
    return tournament.methods.METHODS["cache"](setting).phases[0].loss


@pytest.mark.parametrize("seen", ["items", "queries"])
def test_an_empty_cache_leaves_the_in_batch_losses(tournament, seen):
    model, batch, _, _ = random_batch(tournament, [4, 9, 4, 7])
    name = {"items": "symmetric", "queries": "other_direction"}[seen]
    loss = begun(tournament, model, {name: 0.25, "hard_weight": 1.0})(batch)
    wanted = tournament.in_batch.in_batch_loss(model, symmetric=0.25, hard_weight=1.0)(batch)
    torch.testing.assert_close(loss, wanted)
    pairs = zip(gradients_of(model, loss), gradients_of(model, wanted), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_the_other_direction_scores_items_against_cached_queries_of_other_items(tournament):
    model, batch, _, _ = random_batch(tournament, [4, 9, 4, 7])
    # In the cache then: queries of items 4, 9, 4 and 7. In the batch: of 9, 20, 21 and 22.
    _, later, _, _ = random_batch(tournament, [9, 20, 21, 22])
    later = later._replace(queries=later.queries.roll(1, 1))
    later.queries[:, 0] = 1
    loss = begun(tournament, model, {"other_direction": 1 - 1e-6, "max_staleness": None})
    loss(batch)
    with torch.no_grad():
        found = loss(later)
        cached, asked, items = (
            tower(tokens)
            for tower, tokens in [
                (model.queries, batch.queries),
                (model.queries, later.queries),
                (model.items, later.items),
            ]
        )
        scores = model.scale() * items @ torch.cat([asked, cached]).T
        scores[0, 4 + 1] = -torch.inf  # the cached query of item 9, which asks now
        wanted = torch.nn.functional.cross_entropy(scores, torch.arange(4))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_discounted_scores_have_the_sum_of_fresh_ones(tournament):
    generator = torch.Generator().manual_seed(0)
    errors = tournament.score_errors.ScoreErrors()
    deviation = torch.tensor([0.2, 0.6, 0.9, 1.2])
    ages = torch.tensor([0, 1, 2, 3, 5, 7, 14])  # of octaves 0, 1, 1, 2, 2, 3, 3
    octaves = torch.tensor([0, 1, 1, 2, 2, 3, 3])
    assert torch.equal(tournament.score_errors.octave(ages), octaves)
    top = torch.tensor([2**31 - 1, 2**30])
    assert tournament.score_errors.octave(top).max() == tournament.score_errors.OCTAVES - 1

    def scores(count):
        kind = torch.randint(len(ages), (count,), generator=generator)
        fresh = torch.randn(count, generator=generator)
        noise = torch.randn(count, generator=generator) * deviation[octaves[kind]]
        return ages[kind], fresh, fresh + noise

    for _ in range(300):
        old, fresh, stale = scores(4_000)
        # As a step draws them: by the stale scores.
        drawn = torch.multinomial(stale.exp(), 64, replacement=True, generator=generator)
        errors.learn(old[drawn], (stale - fresh)[drawn])
    old, fresh, stale = scores(400_000)
    for each in range(4):
        of = tournament.score_errors.octave(old) == each
        left = (stale - errors.discounts(old))[of].logsumexp(0) - fresh[of].logsumexp(0)
        assert left.abs() < 0.06
    assert stale.logsumexp(0) - fresh.logsumexp(0) > 0.2
    # An octave of which nothing is known is trusted no more than the one before it.
    assert errors.discounts(torch.tensor([30])) == errors.discounts(torch.tensor([14]))


def test_what_is_learned_is_taken_from_the_scores_of_cached_rows(tournament):
    model, batch, _, _ = random_batch(tournament, [4, 9, 14, 7])
    found = {}
    for taken in (None, 0.0, 1.5):
        against = tournament.against_cache.AgainstCache(
            *(model.items, model.scale, 6, 16, 0),
            {"max_staleness": None, **({} if taken is None else {"residual_mix": True})},
        )
        if taken is not None:
            against.errors.discounts = lambda ages, taken=taken: torch.full(ages.shape, taken)
        for ids in (batch.ids, batch.ids + 50):
            queries, items = model.queries(batch.queries), model.items(batch.items)
            loss = against.loss(queries, items, batch.items, ids)
        found[taken] = loss.item()
    inside = model.scale() * queries @ items.T
    cached = inside.clone() - 1.5  # the first step's rows, which are the same items' texts
    wanted = torch.nn.functional.cross_entropy(torch.cat([inside, cached], 1), torch.arange(4))
    assert found[None] == pytest.approx(found[0.0], rel=1e-5)
    assert found[1.5] == pytest.approx(wanted.item(), rel=1e-5)
    assert found[1.5] < found[0.0] - 0.05


def test_errors_are_of_the_scores_of_those_who_drew(tournament):
    model, batch, _, _ = random_batch(tournament, [4, 9, 14, 7])
    against = tournament.against_cache.AgainstCache(
        *(model.items, model.scale, 6, 16, 0),
        {"max_staleness": None, "num_samples": 3, "residual_mix": True},
    )
    texts, before = model.queries(batch.queries), model.items(batch.items)
    against.loss(texts, before, batch.items, batch.ids)
    with torch.no_grad():
        model.items.vectors += 0.1 * torch.randn_like(model.items.vectors)
    after, told = model.items(batch.items), []
    against.errors.learn = lambda *seen: told.append(seen)
    against.loss(texts, after, batch.items, batch.ids + 50)
    ((ages, errors),) = told
    assert ages.tolist() == [0] * 12
    possible = model.scale() * texts @ (before - after).T
    away = (errors.reshape(4, 3, 1) - possible[:, None]).abs().amin(2)
    assert away.max() < 1e-5
    assert errors.abs().min() > 1e-3
