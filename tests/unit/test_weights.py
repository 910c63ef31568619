"""Reading a checkpoint by slices, and saying what is wrong with a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headgate.shard.errors import ModelError
from headgate.shard.weights import Fused, Weights

MATRIX = torch.arange(48, dtype=torch.float32).view(8, 6)

pytestmark = pytest.mark.usefixtures("reference_kernels")


def checkpoint(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path / "model.safetensors")
    return path


def opened(path: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return Weights(path, dtype=dtype, device="cpu")


def test_slices(tmp_path: Path) -> None:
    weights = opened(checkpoint(tmp_path, a=MATRIX, b=MATRIX + 100, c=MATRIX[0].clone()))
    assert torch.equal(weights.head("a", (8, 6), range(2, 5)), MATRIX[2:5])
    assert torch.equal(weights.columns("b", (8, 6), range(1, 4)), MATRIX[:, 1:4] + 100)
    assert torch.equal(weights.replicated("c", (6,)), MATRIX[0])
    assert weights.nbytes == 4 * (3 * 6 + 8 * 3 + 6)
    weights.finish()


@pytest.mark.parametrize("packed", [False, True])
def test_fused_rows_from_either_form(tmp_path: Path, packed: bool) -> None:
    q, k, v = MATRIX, MATRIX[:4] + 100, MATRIX[:4] + 200
    if packed:
        path = checkpoint(tmp_path, **{"attn.qkv.weight": torch.cat((q, k, v))})
    else:
        parts = {"attn.q.weight": q, "attn.k.weight": k.clone(), "attn.v.weight": v.clone()}
        path = checkpoint(tmp_path, **parts)
    weights = opened(path)
    cuts = ((0, range(4, 8)), (1, range(2, 4)), (2, range(2, 2)), (2, range(4)), (0, range(1)))
    sizes = (8, 4, 4)
    got = weights.fused_rows("attn", Fused(("q", "k", "v"), "qkv", sizes, cuts), 6)
    assert torch.equal(got, torch.cat((q[4:], k[2:], v, q[:1])))
    weights.finish()


def test_fused_bias(tmp_path: Path) -> None:
    weights = opened(
        checkpoint(tmp_path, **{"m.g.bias": MATRIX[0].clone(), "m.u.bias": MATRIX[1].clone()})
    )
    cuts = ((0, range(2)), (1, range(2)))
    got = weights.fused_bias("m", Fused(("g", "u"), "gu", (6, 6), cuts))
    assert got.tolist() == [0, 1, 6, 7]


def test_values_are_rounded_to_the_stored_dtype(tmp_path: Path) -> None:
    value = torch.tensor([1.0009765625])  # bfloat16 has no such number
    weights = opened(checkpoint(tmp_path, a=value), torch.bfloat16)
    got = weights.replicated("a", (1,))
    assert got.dtype == torch.float32
    assert got.item() == 1.0


def test_names_with_and_without_prefix(tmp_path: Path) -> None:
    path = checkpoint(
        tmp_path, **{"norm.weight": MATRIX[0].clone(), "model.lm_head.weight": MATRIX}
    )
    weights = opened(path)
    weights.replicated("model.norm.weight", (6,))
    weights.head("lm_head.weight", (8, 6), range(8))
    weights.finish()


def test_several_files_with_an_index(tmp_path: Path) -> None:
    save_file({"a": MATRIX}, tmp_path / "one.safetensors")
    save_file({"b": MATRIX}, tmp_path / "two.safetensors")
    save_file({"a": MATRIX}, tmp_path / "stray.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = opened(tmp_path)
    assert weights.has("a") and weights.has("b")


def test_an_index_that_names_absent_files(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "gone.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names files that are not there: gone"):
        opened(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="is not an index"):
        opened(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    save_file({"a": MATRIX}, tmp_path / "one.safetensors")
    save_file({"a": MATRIX}, tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match="tensor a is in both"):
        opened(tmp_path)


def test_missing_tensor(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks the tensor model\.norm\.weight"):
        opened(checkpoint(tmp_path, a=MATRIX)).replicated("model.norm.weight", (6,))


def test_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor a has shape \[8, 6\].*asks for \[8, 7\]"):
        opened(checkpoint(tmp_path, a=MATRIX)).head("a", (8, 7), range(8))


def test_leftovers(tmp_path: Path) -> None:
    tensors = {f"extra.{index}": MATRIX.clone() for index in range(7)}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = MATRIX[0].clone()
    weights = opened(checkpoint(tmp_path, a=MATRIX, **tensors))
    weights.ignore("a")
    with pytest.raises(ModelError, match=r"holds 7 tensors.*extra\.0, .*extra\.4 and 2 more"):
        weights.finish()


@pytest.mark.parametrize("keep", [0, 5, 60, 150, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    file = checkpoint(tmp_path, a=MATRIX) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or not a safetensors"):
        opened(tmp_path)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no weights"):
        opened(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"<html>404</html>" * 20)
    with pytest.raises(ModelError, match="is truncated or not a safetensors"):
        opened(tmp_path)


def test_quantised_tensor(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, a=MATRIX.to(torch.int8))
    with pytest.raises(ModelError, match="tensor a is int8"):
        opened(path).head("a", (8, 6), range(8))


def test_a_tied_matrix_shares_the_table_where_it_can(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, a=MATRIX)
    weights = opened(path)
    table = weights.table("a", (8, 6), range(8))
    assert weights.tied(table) is table
    assert weights.nbytes == MATRIX.nbytes
    narrow = opened(path, torch.bfloat16)
    table = narrow.table("a", (8, 6), range(8))
    assert table.dtype == torch.bfloat16
    assert narrow.tied(table).dtype == torch.float32  # which torch multiplies fastest
    assert narrow.nbytes == MATRIX.nbytes * 3 // 2


def test_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, a=MATRIX)
    weights = opened(path)
    table = weights.table("a", (8, 6), range(2, 8))
    weights.finish()
    (path / "model.safetensors").write_bytes(b"")  # a view of the mapped file would be SIGBUS
    assert torch.equal(table, MATRIX[2:])
