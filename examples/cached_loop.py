"""Train a docstring search; cached_loop.py is in_batch_loop.py with a cache: three lines differ.

python examples/in_batch_loop.py
python examples/cached_loop.py
"""

import torch
from docstring_pairs import BUCKETS, PADDING, as_data, mine_pairs
from negcache_torch import NegativeCacheLoss
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

WIDTH, SCALE, EPOCHS = 32, 20.0, 4

torch.manual_seed(0)
data = as_data(mine_pairs(2_000))
queries, items = torch.from_numpy(data.queries), torch.from_numpy(data.items)
train_rows, held_out = torch.from_numpy(data.train), torch.from_numpy(data.held_out)
words = nn.EmbeddingBag(BUCKETS, WIDTH, padding_idx=PADDING)  # both towers read the same words
query_tower = nn.Sequential(words, nn.Linear(WIDTH, WIDTH))
item_tower = nn.Sequential(words, nn.Linear(WIDTH, WIDTH))
loss_fn = NegativeCacheLoss(1_024, {"row": train_rows}, WIDTH, SCALE, id_keys=["row"])


def embed_queries(tokens: Tensor) -> Tensor:
    """Map token ids (n, words) to embeddings (n, WIDTH) of length 1."""
    return functional.normalize(query_tower(tokens), dim=1)


def embed_items(tokens: Tensor) -> Tensor:
    """Map token ids (n, words) to embeddings (n, WIDTH) of length 1."""
    return functional.normalize(item_tower(tokens), dim=1)


def loss_of(rows: Tensor) -> Tensor:
    """Return the loss of a batch of pairs, given by their rows."""
    query, item = embed_queries(queries[rows]), embed_items(items[rows])
    return loss_fn(lambda cached: embed_items(items[cached["row"]]), query, item, {"row": rows})


@torch.no_grad()
def evaluate() -> tuple[float, float]:
    """Return the loss of held-out pairs, and recall@10 of their items among all items."""
    scores = embed_queries(queries[held_out]) @ embed_items(items).T
    better = (scores > scores.gather(1, held_out[:, None])).sum(dim=1)
    return loss_of(held_out).item(), (better < 10).double().mean().item()


parameters = [*words.parameters(), *query_tower[1].parameters(), *item_tower[1].parameters()]
optimizer = torch.optim.Adam(parameters, lr=3e-3)
for epoch in range(1, EPOCHS + 1):
    loader = DataLoader(train_rows, batch_size=16, shuffle=True)
    for rows in tqdm(loader, desc=f"epoch {epoch}", leave=False):
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("epoch {}: held-out loss {:.2f}, recall@10 {:.3f}".format(epoch, *evaluate()))
