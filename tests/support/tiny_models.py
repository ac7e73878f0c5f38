"""Small models made on the spot: Hugging Face folders with random weights and a working tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_TEXT = """
the of and to in a that is was for on with as by at from it be are this which or an has not were had have one two
people country government great war peace state union year law time world work nation power public congress new
first last long water sea land city house day night man woman child book word light dark fire snow rain ship road
"""
WORDS = tuple(_TEXT.split())


def sentences(count: int, seed: int = 0) -> list[str]:
    """Random sentences of 5 to 30 known words."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        length = int(torch.randint(5, 30, (), generator=generator))
        picks = torch.randint(0, len(WORDS), (length,), generator=generator)
        texts.append(" ".join(WORDS[i] for i in picks.tolist()).capitalize() + ".")
    return texts


def save_tokenizer(folder: Path) -> int:
    """Write a WordPiece tokenizer of :data:`WORDS` and letters as BERT has it; returns the vocabulary's size."""
    from transformers import BertTokenizerFast

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *letters, *(f"##{c}" for c in letters), *WORDS]
    unique = list(dict.fromkeys(vocabulary))
    (folder / "vocab.txt").write_text("\n".join(unique) + "\n", encoding="utf-8")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(unique)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return len(unique)


def save_tiny_bert(folder: Path, seed: int = 0) -> Path:
    """A two-layer BERT encoder with random weights and a tokenizer."""
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=160,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def save_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A two-layer Llama with grouped-query attention, random weights and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=172,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def shard(folder: Path) -> None:
    """Split a folder's weights over two files with an index, half of them in float16."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name].half() for name in members}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, members in halves.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_tiny_t5(folder: Path, seed: int = 0) -> Path:
    """A T5 of one layer a side whose embedding is its head too, random weights and a tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary + 1,  # the last one is the end, which no text holds
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=vocabulary,
        initializer_factor=4.0,  # so large that it does not only repeat a token
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_tiny_whisper(folder: Path, seed: int = 0) -> Path:
    """A Whisper of one layer a side that hears one second, random weights, a feature extractor and a tokenizer."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=vocabulary + 1,
        num_mel_bins=8,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50,
        max_target_positions=40,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=vocabulary,
        decoder_start_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return folder
