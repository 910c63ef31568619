"""Small tokenizers of the three kinds that detokenisation tells apart, made in memory."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = "<|end|>"


def byte_level() -> Tokenizer:
    """256 bytes, a few merges (some end inside a character), a special and a plain added token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    merges = []
    for left, right in (("h", "e"), ("l", "l"), ("Ġ", "w"), ("ð", "Ł"), ("ðŁ", "ĺ")):
        merges.append((left, right))
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    tokenizer.add_tokens([AddedToken("<｜user｜>", special=False)])
    return tokenizer


def byte_fallback(strip: bool = True) -> Tokenizer:
    """Words with a space mark, and single bytes for everything else, as Llama 2 has them."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for word in ("▁", "▁hello", "▁world", "a", "b", "é", "▁a", "h"):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """Words with a space mark and no bytes, as T5 has them."""
    vocabulary = {"<unk>": 0, "</s>": 1}
    for word in ("▁hello", "▁world", "lo", "▁", "é", "😀", "▁x"):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def word_piece() -> Tokenizer:
    """Continuations marked by ##, as BERT has them."""
    words = ("[UNK]", "[SEP]", "hello", "##lo", "world", "##s", ".", ",")
    tokenizer = Tokenizer(
        models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer
