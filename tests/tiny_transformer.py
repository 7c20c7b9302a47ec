"""A sentence-transformers model made on the spot: a real Transformer, a few thousand weights."""

import negcache_torch as negcache
import numpy as np
import torch
from datasets import Dataset
from negcache_sentence_transformers import keep_cache
from negcache_sentence_transformers._contents import text_ids
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TOKENS = 16
BATCH = 4


def make_tokenizer():
    tokenizer = Tokenizer(
        models.WordLevel({word: row for row, word in enumerate(SPECIAL + WORDS)}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def make_model(folder, *, dropout=0.0, dtype=torch.float32):
    """The same weights each time."""
    tokenizer = make_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    modules = [Transformer(str(folder), max_seq_length=TOKENS), Pooling(16)]
    return SentenceTransformer(modules=modules, device="cpu").to(dtype)


def make_texts(count, seed=0):
    """Distinct texts of 2 to 10 words."""
    pick = np.random.default_rng(seed)
    return [" ".join([WORDS[row % 60], *pick.choice(WORDS, 1 + row % 9)]) for row in range(count)]


def make_pairs(count):
    texts = make_texts(count)
    return Dataset.from_dict({"anchor": [text[:5] for text in texts], "positive": texts})


def make_trainer(folder, model, loss, data, *, keep=True, **options):
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": BATCH,
            "max_steps": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            **options,
        },
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, loss=loss
    )
    return keep_cache(trainer) if keep else trainer


def weights(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def columns(model, *texts):
    return [model.preprocess(list(column)) for column in texts]


def gradients(model, loss):
    return torch.autograd.grad(
        loss, list(model.parameters()), allow_unused=True, materialize_grads=True
    )


def written(loss):
    return loss.handler.cache.age != negcache.EMPTY


def ids_of(model, texts):
    features = model.preprocess(list(texts))
    return text_ids(features["input_ids"], features["attention_mask"]).tolist()
