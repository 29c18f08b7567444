"""Models whose files are cut, empty or full of NaN."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.run.prepare import check_length, check_vocabulary
from tests.faults.runs import SHORT, refused
from tests.running import ROOT
from upge.data import Example, Problem
from upge.errors import ModelError
from upge.models.loading import check_finite
from upge.rollout.transformers_engine import TransformersSampler
from upge.train.config import ModelConfig

FILE = "model.safetensors"


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(ROOT / "experiments" / "models" / "tiny", tmp_path / "model"))


def spoil(model: Path, value: float) -> None:
    weights = load_file(model / FILE)
    weights[max(weights)].view(-1)[-1] = value
    save_file(weights, model / FILE, metadata={"format": "pt"})


CONTENTS = {
    "empty": lambda content: b"",
    "a header": lambda content: content[:8],
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"x",
    "a pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_cut_file_is_refused_before_anything_is_loaded(model, kind):
    path = model / FILE
    path.write_bytes(CONTENTS[kind](path.read_bytes()))
    with pytest.raises(ModelError, match=rf"^model.path: {path} is cut or damaged .*copy it again"):
        check_length(ModelConfig(path=str(model)), 10, 10)


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_are_not_finite_are_refused_by_all_ranks(model, tmp_path, ranks):
    spoil(model, float("nan"))
    message = refused(*SHORT, "steps=1", f"model.path={model}", f"output={tmp_path / 'run'}", ranks=ranks)
    assert f"model.path: '{model}' has weights that are not finite, the first in model." in message
    assert not (tmp_path / "run").exists()


def test_a_sampler_refuses_them_as_well(model):
    spoil(model, float("inf"))
    with pytest.raises(ModelError, match="not finite"):
        TransformersSampler(str(model))


def test_the_first_weight_is_named():
    check_finite("m", [("a", torch.zeros(0)), ("b", torch.ones(2))])
    with pytest.raises(ModelError, match="the first in b"):
        check_finite(
            "m", [("a", torch.ones(2)), ("b", torch.tensor([1.0, float("inf")])), ("c", torch.full((1,), torch.nan))]
        )


@pytest.mark.parametrize("where", ["prompt_ids", "demonstrations", "rejected_ids"])
def test_a_token_without_an_embedding_is_refused_wherever_it_is(model, where):
    good = {"prompt_ids": (1,), "demonstrations": ((1,), (2, 3)), "rejected_ids": (1,)}
    vocabulary = load_file(model / FILE)["model.embed_tokens.weight"].shape[0]
    bad = {"prompt_ids": (1, vocabulary), "demonstrations": ((1,), (2, vocabulary)), "rejected_ids": (vocabulary,)}
    problem = Problem("a", "?", "1", where="a.jsonl:3")
    check_vocabulary([Example(problem, **good)], ModelConfig(path=str(model)))
    message = f"{vocabulary} embeddings, but its tokenizer makes the token {vocabulary} of a.jsonl:3"
    with pytest.raises(ModelError, match=message):
        check_vocabulary([Example(problem, **good | {where: bad[where]})], ModelConfig(path=str(model)))
