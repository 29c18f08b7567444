"""LoRA under ZeRO-3 on 1 and 2 ranks: gradients, merged weights, the base model as reference, export and resumption."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

from tests.lora_ranks import DROPOUT, LORA, PAIRS, VARIANTS
from tests.models import save_odd_model, save_random_model, trajectories, unrounded
from tests.upge.train.test_engine import plain_gradient, token_loss
from tests.upge.train.test_update import launch
from upge.errors import ConfigError
from upge.train.adapter import Adapter, Weight, planned_weights
from upge.train.config import LoraConfig
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import pack


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_odd_model(tmp_path_factory.mktemp("model"), tied=False)


RANKS = [pytest.param(1, marks=pytest.mark.slow, id="1 rank"), pytest.param(2, marks=pytest.mark.slow, id="2 ranks")]


@pytest.fixture(scope="module", params=RANKS)
def results(model, request, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("lora")
    launch("lora_ranks", request.param, model, folder / "found.pt", folder)
    launch("lora_ranks", request.param, model, folder / "variants.pt", "")
    variants = torch.load(folder / "variants.pt", weights_only=False)
    return torch.load(folder / "found.pt", weights_only=False) | {"folder": folder, "variants": variants}


def products(matrices: dict[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Weight → the names of its A and B."""
    names = [name for name in matrices if ".lora_A." in name]
    return {name.replace(".lora_A.default", ""): (name, name.replace(".lora_A.", ".lora_B.")) for name in names}


def chain_rule(matrices: dict[str, Tensor], by_weight: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The gradients of A and B from those of the merged weights: s·Bᵀ·G and s·G·Aᵀ."""
    gradients = {}
    for weight, (a, b) in products(matrices).items():
        gradients[a] = scale * matrices[b].double().T @ by_weight[weight]
        gradients[b] = scale * by_weight[weight] @ matrices[a].double().T
    return gradients


def plain_model(path, weights: dict[str, Tensor]) -> torch.nn.Module:
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    network.load_state_dict(weights)
    return network


def plain_logprobs(network: torch.nn.Module) -> list[Tensor]:
    rows = []
    for prompt, response in PAIRS:
        logits = network(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].detach())
    return rows


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(results) == set(expected)
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        difference = float((results[name] - value).abs().max())
        assert difference <= tolerance * scale, (name, difference / scale)


def test_the_gradient_is_the_whole_one_restricted_to_the_subspace(model, results):
    """By the chain rule through W + s·B·A, from the gradient of the same loss with respect to the merged weights."""
    network = plain_model(model, results["weights"])
    for variant in (0, 1):
        network.zero_grad()
        token_loss(network, variant).backward()
        by_weight = {name: p.grad for name, p in network.named_parameters()}
        expected = chain_rule(results["matrices"], by_weight, LORA.alpha / LORA.rank)
        assert_close(results["gradients"][variant], expected, 2e-5)


def test_the_gradient_in_float64(tmp_path):
    """As above to rounding of float64, with packed attention and the chunked head."""
    folder = save_random_model(tmp_path)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    unrounded(network)
    policy = PackedPolicy(network)
    adapter = Adapter(network, LORA)
    for name, parameter in adapter.parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged = {weight.name: weight.merged().clone() for weight in adapter.weights()}
    logprobs, _ = policy(pack(PAIRS, "cpu"))
    logprobs.sum().backward()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    unrounded(plain)
    plain.load_state_dict(merged, strict=False)
    total = torch.zeros((), dtype=torch.float64)
    for prompt, response in PAIRS:
        logits = plain(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        total = total + logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()
    total.backward()
    assert float(logprobs.sum().detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    matrices = {name: p.detach() for name, p in adapter.parameters()}
    by_weight = {name: p.grad for name, p in plain.named_parameters()}
    expected = chain_rule(matrices, by_weight, LORA.alpha / LORA.rank)
    assert_close({name: p.grad for name, p in adapter.parameters()}, expected, 1e-10)
    assert all(p.grad is None for name, p in network.named_parameters() if ".lora_" not in name)


def test_the_policy_starts_as_the_base_model_and_keeps_its_other_weights(model, results):
    base = AutoModelForCausalLM.from_pretrained(model).state_dict()
    weights, matrices = results["first"]
    assert all(torch.equal(weights[name], values) for name, values in base.items()) and set(weights) == set(base)
    assert all(bool(value.any()) == (".lora_A." in name) for name, value in matrices.items())
    changed = {name for name, values in base.items() if not torch.equal(results["weights"][name], values)}
    assert changed == set(products(matrices)) and len(changed) == 14


def test_merged_weights_are_the_base_plus_the_product(model, results):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).state_dict()
    matrices = results["matrices"]
    for weight, (a, b) in products(matrices).items():
        expected = base[weight] + 5 / 3 * matrices[b].double() @ matrices[a].double()
        assert torch.allclose(results["weights"][weight].double(), expected, atol=1e-6), weight


def test_the_log_probs_of_policy_and_reference(model, results):
    """The policy's are those of the merged weights, the reference's those of the base model."""
    merged, base = plain_model(model, results["weights"]), AutoModelForCausalLM.from_pretrained(model)
    for ours, theirs in ((results["policy"], merged), (results["reference"], base.double())):
        for row, expected in zip(ours, plain_logprobs(theirs), strict=True):
            assert torch.allclose(row[: len(expected)].double(), expected, atol=2e-5)
    assert float((results["policy"] - results["reference"]).abs().max()) > 1e-2
    for name, gradient in results["gradients"][0].items():
        assert torch.equal(results["after the reference"][name], gradient), name


def test_only_the_adapters_are_trained(model, results):
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(Qwen2Config.from_pretrained(model))

    def planned(lora: LoraConfig) -> int:
        return sum(part.numel() for weight in planned_weights(network, lora) for part in weight.adapter or ())

    by_hand = sum(w.numel() for w in results["matrices"].values())
    assert results["trained"] == by_hand == planned(LORA)
    assert planned(DROPOUT) == 2 * 3 * (63 + 64 + 101 + 63)
    assert planned(LoraConfig()) == 0


def test_the_planned_weights_are_those_of_the_adapter(model):
    """Names, order, shapes, types and scale, on which the buckets of gathered weights depend."""

    def rows(weights):
        return [(w.name, [(p.shape, p.dtype) for p in w.parts], w.scale) for w in weights]

    for lora in (LORA, DROPOUT):
        with torch.device("meta"):
            planned = AutoModelForCausalLM.from_config(Qwen2Config.from_pretrained(model)).to(torch.bfloat16)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        assert rows(planned_weights(planned, lora)) == rows(Adapter(network, lora).weights())


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpointing_offloading_and_bfloat16_train_the_same(results, name):
    """The first gradient, and the weights after two updates.

    bfloat16 has 8 bits. Its weights are not compared: AdamW divides a gradient by its size, so that a small entry with
    the wrong sign moves the weight as far as a large one.
    """
    gradient, weights = results["variants"][name]
    pairs = [(gradient, results["first gradient"], 3e-2 if name == "bfloat16" else 1e-5)]
    if name != "bfloat16":
        pairs.append((weights, results["weights"], 1e-5))
    for seen, expected, tolerance in pairs:
        assert set(seen) == set(expected)
        flat, right = (torch.cat([each[n].float().flatten() for n in expected]) for each in (seen, expected))
        assert (flat - right).norm() <= tolerance * right.norm(), (flat - right).norm() / right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_merge(dtype):
    """Those planned are what torch allocates in float32: in bfloat16 the copy of W is freed before the result."""
    weight, a, b = (torch.nn.Parameter(torch.randn(size, dtype=dtype)) for size in ((64, 512), (2, 512), (64, 2)))
    one = Weight("w", weight, (a, b), 0.5)
    allocated = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
            result = operator(*arguments, **(keywords or {}))
            pointers = {tensor.data_ptr() for tensor in (*held, *arguments) if isinstance(tensor, Tensor)}
            is_new = isinstance(result, Tensor) and result.data_ptr() not in pointers
            if is_new and result.numel() == weight.numel() and result.dtype == torch.float32:
                allocated.append(result.nbytes)
            return result

    held = (weight, a, b)
    with Counted():
        one.merged()
    assert one.merging_bytes == sum(allocated) and Weight("w", weight).merging_bytes == 0


@pytest.mark.parametrize("name", ["plain", "noisy"])
def test_a_continuation_equals_the_uninterrupted_run(results, name):
    """Also with dropout, whose random numbers follow from the step."""
    assert results[name, "state"] == {"step": 5}
    for key, weight in results[name, "went on"].items():
        assert torch.equal(results[name, "resumed"][key], weight), key


def test_a_checkpoint_holds_the_adapters_only(results):
    """Weights, moments and masters of the adapters, and the base model's names; the base model has 450 kB."""
    trained = 4 * results["trained"]
    assert 3 * trained < results["plain", "bytes"] < 6 * trained + 150_000


def test_the_export_is_the_merged_model_and_the_adapter(model, results):
    from peft import PeftModel

    final = results["folder"] / "final"
    whole = AutoModelForCausalLM.from_pretrained(final).state_dict()
    assert all(torch.equal(whole[name], values) for name, values in results["weights"].items())
    base = AutoModelForCausalLM.from_pretrained(model)
    merged = PeftModel.from_pretrained(base, final / "adapter").merge_and_unload().state_dict()
    assert set(merged) == set(whole)
    for name, values in whole.items():
        assert torch.allclose(merged[name], values, atol=1e-6), name


def test_dropout_is_random_in_passes_with_gradient_only(results):
    first, second = results["noisy gradients"]
    assert all(torch.equal(first[name], values) for name, values in second.items()), "both passes are the step's first"
    noisy, plain, again = results["noisy log-probs"]
    assert torch.equal(plain, again) and float((noisy - plain).abs().max()) > 1e-3


def test_dropout_follows_from_the_seed_and_the_pass(model):
    def logprobs(seed: int, *place: int) -> Tensor:
        network = AutoModelForCausalLM.from_pretrained(model)
        policy, adapter = PackedPolicy(network), Adapter(network, DROPOUT, seed)
        for _, parameter in adapter.parameters():
            torch.nn.init.constant_(parameter, 0.1)
        state = torch.get_rng_state()
        with adapter.dropout(*place):
            values = policy(pack(PAIRS, "cpu"))[0].detach()
        assert torch.equal(torch.get_rng_state(), state)
        return values

    first = logprobs(0, 1, 2)
    assert torch.equal(logprobs(0, 1, 2), first)
    for other in ((0, 1, 3), (0, 2, 2), (1, 1, 2)):
        assert float((logprobs(*other) - first).abs().max()) > 1e-4, other


def test_bad_target_modules_are_refused(model):
    network = AutoModelForCausalLM.from_pretrained(model)
    for name, fix in (("q_prj", "did you mean 'q_proj'"), ("lm_head", "known: "), ("embed_tokens", "known: ")):
        with pytest.raises(ConfigError, match=f"model.lora.target_modules: found '{name}'.*{fix}"):
            Adapter(network, LoraConfig(rank=2, target_modules=["q_proj", name]))


def test_the_model_that_is_compared_with_is_right(model):
    """The plain gradients do depend on the weights that carry adapters."""
    assert len(trajectories()) == 25 and all(bool(g.any()) for g in plain_gradient(model, 0).values())
