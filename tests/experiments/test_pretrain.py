"""The command that makes `model=tiny`, and the model that it made."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import pretrain
from upge.data import Arithmetic
from upge.data.arithmetic import side

SHIPPED = Path(__file__).parents[2] / "experiments" / "models" / "tiny"
SMALL = ["--steps=3", "--batch=8", "--hidden=32", "--layers=1", "--problems=8", "--samples=1", "--checkpoint-every=2"]


@pytest.fixture(autouse=True)
def keep_the_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(folder: Path, *options: str) -> dict[str, torch.Tensor]:
    assert pretrain.main(["--output", str(folder), *SMALL, *options]) == 0
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_short_run_makes_a_loadable_model_that_its_seed_determines(tmp_path: Path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    other = make(tmp_path / "c", "--seed=1")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    readme = (tmp_path / "a" / "README.md").read_text()
    assert "--steps=3" in readme and "| 6 numbers |" in readme
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.decode(tokenizer.encode("1 +  2\n")) == "1 +  2\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--noise=2"], "--noise"),
        (["--hidden=40"], "--hidden"),
        (["--steps=0"], "--steps"),
        (["--output=."], "not empty"),
    ],
)
def test_bad_options_end_before_any_training(tmp_path: Path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        pretrain.main(["--output=new", *options])
    assert caught.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_corpus_stays_on_the_training_side_and_is_as_noisy_as_asked():
    right = 0
    for prompt, solution in islice(pretrain.corpus(seed=0, noise=0.2, misread=0.9), 2000):
        terms = [int(t) for t in prompt.removesuffix("=?").replace("-", "+-").split("+")]
        assert side(terms) == "train"
        if len(terms) == 2:
            right += solution.endswith(f"\\boxed{{{sum(terms)}}}")
    two = sum(weight for level, weight in pretrain.mixture(6).items() if level.startswith("2 "))
    assert right / (2000 * two) == pytest.approx(0.8, abs=0.05)
    assert sum(pretrain.mixture(6).values()) == pytest.approx(1.0)


def test_longer_problems_take_equal_shares():
    shares = pretrain.mixture(8)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert [level for level in shares if level.endswith("mixed")] == [f"{n} mixed" for n in range(2, 8)]
    assert shares["8 numbers"] == shares["2 numbers"] == pytest.approx(0.8 / 7)
    lengths = {prompt.count("+") + prompt.count("-") + 1 for prompt, _ in islice(pretrain.corpus(0, 0, 0, 8), 300)}
    assert lengths == {*range(2, 9)}


def test_a_noisy_step_misreads_and_slips_as_asked():
    rng = pretrain.random.Random(0)
    assert pretrain.noisy_step(rng, 0.0, 0.0)(20, -7) == 13
    assert pretrain.noisy_step(rng, 0.0, 1.0)(20, -7) == 27
    assert pretrain.noisy_step(rng, 0.0, 1.0)(20, 7) == 27
    assert pretrain.noisy_step(rng, 1.0, 0.0)(20, 7) != 27


def test_padding_does_not_change_the_loss():
    torch.manual_seed(0)
    tokenizer = pretrain.build_tokenizer()
    model = pretrain.build_model(tokenizer, hidden=32, layers=1).eval()
    rows = [(torch.tensor(tokenizer.encode(text)), start) for text, start in (("1+2=?\n3", 6), ("11+22=?\n33+4", 8))]
    together = pretrain.batch_loss(model, rows, tokens=5)
    apart = sum(pretrain.batch_loss(model, [row], tokens=5) for row in rows)
    by_hand = 0.0
    for ids, start in rows:
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        by_hand -= sum(logprobs[t - 1, ids[t]] for t in range(start, len(ids))) / 5
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(together, by_hand)


def test_the_shipped_model_is_small_and_solves_the_easiest_level():
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) <= 4 * 2**20
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    assert model.num_parameters() < 1_000_000 and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) and model.config.tie_word_embeddings
    problems = Arithmetic(levels=["2 numbers"], evaluation_size=64).load().evaluation
    responses = pretrain.generate(model, tokenizer, [p.prompt for p in problems], do_sample=False)
    right = sum(map(pretrain.is_right, responses, problems))
    assert right / len(problems) >= 0.9
