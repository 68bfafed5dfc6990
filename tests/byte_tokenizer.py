"""A byte-level BPE, made by the tokenizers library."""

import pathlib
from collections.abc import Iterable

import tokenizers


def save_byte_tokenizer(path: pathlib.Path, texts: Iterable[str], vocab_size: int) -> None:
    """tokenizer.json of bytes, a few merges of `texts`, and tokens that begin and end a text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(path))
