"""What users and libraries do to a whole model leaves the state of the cache in it alone."""

import copy
import io

import negcache_torch as negcache
import pytest
import torch
from cached_towers import (
    STATE,
    Model,
    assert_goes_on_alike,
    assert_same,
    batch,
    train_step,
    trained,
)
from safetensors.torch import load_model, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel.replicate import replicate
from torch.optim.swa_utils import AveragedModel


def test_a_model_has_the_state_in_its_state_dict_and_not_in_its_buffers():
    model = Model()
    assert {name for name, _ in model.named_buffers()} == {"steps"}
    assert not list(model.handler.buffers())
    assert model.state().keys() == STATE
    assert set(model.state_dict()) == STATE | {"steps"} | {n for n, _ in model.named_parameters()}
    assert model.state_dict()["handler.tables.cache_cache.age"].data_ptr() == (
        model.handler.cache.age.data_ptr()
    )


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to dtype": lambda model: model.to(torch.float16),
    "to device and dtype": lambda model: model.to("cpu", torch.bfloat16),
    "to like": lambda model: model.to(torch.zeros((), dtype=torch.float64)),
    "type": lambda model: model.type(torch.float64),
}
MOVES = {
    "to": lambda model: model.to("cpu"),
    "cpu": lambda model: model.cpu(),
    "float": lambda model: model.float(),
    "share memory": lambda model: model.share_memory(),
    "requires grad": lambda model: model.requires_grad_(),
    "memory format": lambda model: model.to(memory_format=torch.channels_last),
    "train and eval": lambda model: model.eval().train(),
    "sync batch norm": nn.SyncBatchNorm.convert_sync_batchnorm,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_model_keeps_its_rows_bit_for_bit_and_trains(cast):
    model = trained()
    before = model.state()
    cast(model)
    assert model.query.weight.dtype != torch.float32
    assert_same(model.state(), before)
    for seed in range(3):
        assert torch.isfinite(train_step(model, seed))
    cache = model.handler.cache
    assert {key: value.dtype for key, value in cache.data.items()} == {
        "x": torch.float32,
        "half": torch.bfloat16,
        "id": torch.uint16,
        "flag": torch.bool,
        "embedding": torch.float32,
    }
    assert bool((cache.age < negcache.EMPTY).all())


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_what_changes_no_value_changes_nothing(move):
    model, other = trained(), trained()
    move(model)
    assert_same(model.state(), other.state())
    assert_goes_on_alike(model, other)
    if move is MOVES["share memory"]:
        assert all(each.is_shared() for each in model.state_dict().values())


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, saved_whole],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on_as_the_model_does_and_shares_nothing(copied):
    model = trained()
    twin = copied(model)
    before = twin.state()
    assert_same(model.state(), before)
    train_step(model, 9)
    assert_same(twin.state(), before)
    train_step(twin, 9)
    assert_same(twin.state(), model.state())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_weights_has_a_cache_of_its_own_and_averages_none(use_buffers):
    model, alone = trained(), trained()
    average = AveragedModel(model, use_buffers=use_buffers)
    copied = average.module.state()
    for seed in range(3):
        for each in (model, alone):
            train_step(each, seed)
        average.update_parameters(model)
        assert_same(model.state(), alone.state())
        assert_same(average.module.state(), copied)
    assert_goes_on_alike(model, alone)


def test_a_model_made_on_meta_gets_an_empty_cache_and_the_draws_of_its_seed():
    with torch.device("meta"):
        model, unseeded = Model(), Model(generator=None)
    assert {each.device.type for each in model.state_dict().values()} == {"meta"}
    early = Model()
    early.handler = model.handler
    with pytest.raises(negcache.DeviceError, match="the cache on meta"):
        early(batch(0))
    new = Model().state()
    for each in (model, unseeded):
        each.to_empty(device="cpu")
        assert int(each.handler.cache.age.min()) == negcache.EMPTY
    assert_same(model.state(), new)
    assert model.state().keys() == unseeded.state().keys()


def test_a_model_made_on_meta_takes_a_checkpoint():
    model = trained()
    with torch.device("meta"):
        other = Model(generator=5)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert_goes_on_alike(other, model)


def test_memory_that_is_left_as_it_is_holds_no_rows():
    """Neither of to_empty() on the same device, nor after a stay on meta."""
    model, new = trained(), Model().state()
    model.to_empty(device="cpu")
    assert_same(model.state(), new)
    model = trained().to("meta")
    model.to_empty(device="cpu")
    assert_same(model.state(), new)


def test_a_step_in_a_functional_call_is_a_step():
    model, other = trained(), trained()
    given = {key: value.clone() for key, value in other.named_parameters()}
    loss = torch.func.functional_call(model, given, (batch(9),))
    assert torch.equal(loss, other(batch(9)))
    assert_same(model.state(), other.state())
    # State that is given stands in for the model's: it is written, and the model's is not.
    before, given = model.state(), {key: value.clone() for key, value in model.state_dict().items()}
    loss = torch.func.functional_call(model, given, (batch(10),))
    assert_same(model.state(), before)
    assert torch.equal(loss, other(batch(10)))
    assert_same({key: given[key] for key in STATE}, other.state())
    model.load_state_dict(given)
    assert_goes_on_alike(model, other)


def test_checkpoints_of_whole_models(tmp_path):
    model = trained()
    for way in ("safetensors", "distributed"):
        other = Model(generator=7)
        if way == "safetensors":
            save_model(model, str(tmp_path / "model.safetensors"))
            load_model(other, str(tmp_path / "model.safetensors"))
        else:
            set_model_state_dict(other, copy.deepcopy(get_model_state_dict(model)))
        assert_same(other.state(), model.state())
        assert_goes_on_alike(other, copy.deepcopy(model))


def test_copies_in_threads_are_refused():
    model = Model()
    for part in (model.handler, model.handler.cache_loss, negcache.GumbelMaxRetrievalFn()):
        with pytest.raises(negcache.OptionError) as error:
            replicate(part, [0, 1])
        assert str(error.value) == (
            "a cache is inside torch.nn.DataParallel, which runs copies of the model in threads "
            "and discards what they write: rows and draws would be lost. Use one process for each "
            "device with torch.nn.parallel.DistributedDataParallel, or keep the handler outside."
        )


def test_a_checkpoint_without_a_cache_gives_a_hint_and_loads_where_it_may():
    model = nn.ModuleDict({"towers": Model(), "other": nn.Linear(1, 1)})
    before = model["towers"].state()
    baseline = {
        key: torch.ones_like(value)
        for key, value in model.state_dict().items()
        if key.removeprefix("towers.") not in STATE
    }
    with pytest.raises(RuntimeError, match="Missing key") as error:
        model.load_state_dict(baseline)
    told = (
        '"towers.handler.tables.cache_cache.field_x: the state_dict has no cache for the handler '
        "at 'towers.handler', like that of a model trained without one. "
        "load_state_dict(state, strict=False) loads the rest and leaves the cache unchanged: a new "
        'one is empty, and handler.prefill can fill it.", '
    )
    assert str(error.value).count(told) == 1
    for key in STATE:
        assert f'"towers.{key}' in str(error.value)
    missing, unexpected = model.load_state_dict(baseline, strict=False)
    assert set(missing) == {f"towers.{key}" for key in STATE}
    assert not unexpected
    assert_same(model["towers"].state(), before)
    assert bool((model["other"].weight == 1).all())


def test_keys_that_are_no_state_or_lack_are_told_as_ever():
    model = Model()
    rows = {k: v for k, v in model.handler.tables.state_dict().items() if "age" not in k}
    with pytest.raises(RuntimeError, match=r'"cache_cache\.age"\. $'):
        model.handler.tables.load_state_dict(rows)
    state = {**model.handler.tables.state_dict(), "cache_cache.more": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"cache_cache\.more"'):
        model.handler.tables.load_state_dict(state)
