"""The tokenizer: byte-pair encoding over our captions in CLIP's format, about a thousand tokens, 24 positions."""

import json
import random
import string
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from raydiff.assets.recipe.words import COLOURS, NAMES, STYLES, Subject, random_caption

POSITIONS = 24
VOCABULARY = 1000
CAPTIONS = 20_000
WORD_END = "</w>"  # CLIP marks the last piece of a word
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
CHARACTERS = string.ascii_lowercase + string.digits + ".,-!'"


def build_tokenizer(work: Path) -> None:
    vocabulary, merges = byte_pairs(sample_captions())
    folder = work / "tokenizer"
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS)
    tokenizer.save_pretrained(folder)
    # transformers 4 reads these two in place of tokenizer.json.
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")


def sample_captions() -> list[str]:
    rng = random.Random(0)
    return [
        random_caption(Subject(rng.choice(NAMES), rng.choice(STYLES), rng.choice(list(COLOURS)), face=True), rng)
        for _ in range(CAPTIONS)
    ]


def byte_pairs(captions: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges; the single characters come first, so that no word is unknown."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        initial_alphabet=list(CHARACTERS),
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [piece for character in CHARACTERS for piece in (character, character + WORD_END)]
    pieces += [piece for first, second in merges for piece in (first, second, first + second)]
    # CLIP finds the end of a text at its highest token id, so the end token is the last.
    return {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *SPECIAL]))}, merges


class Texts:
    """Token ids of captions, each caption tokenised once."""

    def __init__(self, folder: Path):
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.known: dict[str, list[int]] = {}

    def __call__(self, captions: list[str]) -> list[list[int]]:
        """(B, 24), padded with the end token as in Stable Diffusion."""
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self.known]:
            ids = self.tokenizer(new, padding="max_length", max_length=POSITIONS, truncation=True).input_ids
            self.known.update(zip(new, ids, strict=True))
        return [self.known[caption] for caption in captions]
