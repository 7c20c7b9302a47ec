"""Models of images and sounds made on the spot, and what they take."""

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule, Router, Transformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny_transformer import SPECIAL, TOKENS, WORDS, make_tokenizer
from tokenizers import processors
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

WIDTH = 16


class Tower(InputModule):
    """A layer on numbers; with the same weights each time."""

    def __init__(self, numbers):
        super().__init__()
        torch.manual_seed(2)
        self.numbers, self.layer = numbers, nn.Linear(numbers, WIDTH)

    def get_embedding_dimension(self):
        return WIDTH

    def save(self, *_, **__):
        """Nothing loads it."""


class Images(Tower):
    """Images of 8 x 8."""

    modalities = ("image",)

    def preprocess(self, inputs, prompt=None, **kwargs):
        pixels = [np.asarray(each, dtype=np.float32) / 255.0 for each in inputs]
        return {"pixel_values": torch.from_numpy(np.stack(pixels)), "modality": "image"}

    def forward(self, features):
        assert features.keys() <= {"pixel_values", "modality", "task"}  # what the model made
        features["sentence_embedding"] = self.layer(features["pixel_values"].flatten(1))
        return features


class Patches(Images):
    """Images of which all patches, four each, are rows of one tensor."""

    def preprocess(self, inputs, prompt=None, **kwargs):
        pixels = super().preprocess(inputs)["pixel_values"]
        return {
            "pixel_values": pixels.reshape(4 * len(inputs), -1),
            "sizes": pixels.new_ones(len(inputs)),
        }

    def forward(self, features):
        rows = features["pixel_values"].reshape(len(features["sizes"]), -1)
        features["sentence_embedding"] = self.layer(rows)
        return features


class Sounds(Tower):
    """Sounds of any length: the mean over their frames of `numbers` samples."""

    modalities = ("audio",)

    def preprocess(self, inputs, prompt=None, **kwargs):
        waves = [torch.as_tensor(each["array"], dtype=torch.float32) for each in inputs]
        mask = [torch.ones(len(wave), dtype=torch.int64) for wave in waves]
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_values": pad(waves, batch_first=True),
            "attention_mask": pad(mask, batch_first=True),
            "modality": "audio",
        }

    def forward(self, features):
        waves, mask = features["input_values"], features["attention_mask"]
        sizes = mask.sum(1, keepdim=True) // self.numbers
        features["sentence_embedding"] = (
            self.layer(waves.unflatten(1, (-1, self.numbers))).tanh()
            * (torch.arange(waves.shape[1] // self.numbers) < sizes)[:, :, None]
        ).sum(1) / sizes
        return features


def make_images(count, size=(8, 8), seed=0):
    pick = np.random.default_rng(seed)
    pixels = pick.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def make_sounds(count, seed=0):
    """Of 4 to 20 samples."""
    pick = np.random.default_rng(seed)
    return [
        {"array": pick.standard_normal(4 * pick.integers(1, 6)), "sampling_rate": 16_000}
        for _ in range(count)
    ]


def texts_to(tower):
    """A table of words for queries, a tower for documents."""
    torch.manual_seed(1)
    query = StaticEmbedding(make_tokenizer(), embedding_dim=WIDTH)
    router = Router({"query": [query], "document": [tower]})
    return SentenceTransformer(modules=[router], device="cpu")


def make_clip(folder):
    """A CLIP of a few thousand weights: texts and images through parts of one module."""
    tokenizer = make_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, model_max_length=TOKENS)
    size = {"height": 8, "width": 8}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size)
    CLIPProcessor(image_processor=processor, tokenizer=fast).save_pretrained(folder)
    torch.manual_seed(0)
    layers = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    words = {"vocab_size": len(SPECIAL + WORDS), "max_position_embeddings": TOKENS}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = CLIPConfig(
        text_config={**layers, **words, **ends},
        vision_config={**layers, "image_size": 8, "patch_size": 4},
        projection_dim=WIDTH,
    )
    CLIPModel(config).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder))], device="cpu")
