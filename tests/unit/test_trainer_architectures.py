"""Any causal language model whose projections are nn.Linear trains as it does under peft.

"Equal" is to 1e-5 of the largest entry of each tensor, float32. The other side is peft itself, on a
copy of the model, one sequence at a time, without padding and without any code of ours.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load
from transformers import GPT2Config, GPT2LMHeadModel

from rollmesh.errors import InvalidRequest
from rollmesh.types import Datum, LoraConfig, LossConfig, TrainerAdapter
from services.trainer.config import TrainerConfig
from services.trainer.export import make_version
from services.trainer.model import Model
from services.trainer.model import load as load_model
from services.trainer.requests import advance, next_pass
from tests.fakes.architectures import ARCHITECTURES, MAX_LENGTH, VOCAB_SIZE, WINDOW

TOLERANCE = 1e-5
LENGTHS = (5, 12, 1, 33, 7, 20)  # of two padded lengths
LOSSES = (LossConfig("cross_entropy"), LossConfig("importance_sampling"))

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
each_embedding = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
each_target = pytest.mark.parametrize("targets", next(iter(ARCHITECTURES.values())).targets)


def trained(name, *, tied, max_batch_tokens=4 * MAX_LENGTH):
    torch.set_num_threads(1)  # the machine is shared, and bits depend on it
    return Model(ARCHITECTURES[name].build(tied=tied), max_batch_tokens=max_batch_tokens)


def random_weights(model, lora):
    """An adapter in the middle of its training: B is not zero."""
    fresh = model.lora.fresh(
        rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules, seed=lora.seed
    )
    generator = torch.Generator().manual_seed(lora.seed)
    return fresh.replaced(
        [p + 0.1 * torch.randn(p.shape, generator=generator) for p in fresh.parameters()]
    )


def batch(lengths, config, seed=0):
    """Random data; the first third of each is masked, as prompts are."""
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        weights = rng.uniform(0.5, 1.5, length).astype(np.float32)
        weights[: length // 3] = 0
        sampled = config.loss != "cross_entropy"
        data.append(
            Datum(
                token_ids=rng.integers(0, VOCAB_SIZE, length).astype(np.int32),
                target_token_ids=rng.integers(0, VOCAB_SIZE, length).astype(np.int32),
                weights=weights,
                sampling_logprobs=rng.uniform(-5, -2, length).astype(np.float32)
                if sampled
                else None,
                advantages=rng.normal(size=length).astype(np.float32) if sampled else None,
            )
        )
    return data


def as_peft(module, lora, weights):
    """`module` with `weights` on it by peft's own hand, and its factors as `weights` lists them."""
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.target_modules),
    )
    peft = get_peft_model(module, config).eval()
    modules = dict(peft.base_model.model.named_modules())
    factors = []
    for layer, pair in weights.factors.items():
        for part, values in zip(("lora_A", "lora_B"), pair, strict=True):
            factor = getattr(modules[layer], part)["default"].weight
            factor.data.copy_(values)
            factors.append(factor)
    # peft adapts the layers that we adapt, and no more.
    assert len(factors) == sum(parameter.requires_grad for parameter in peft.parameters())
    return peft, factors


def peft_logprobs(peft, datum):
    """Log-probability of each target [T], the sequence by itself."""
    ids = torch.from_numpy(datum.token_ids[None].astype(np.int64))
    logprobs = torch.log_softmax(peft(input_ids=ids).logits[0], dim=-1)
    targets = torch.from_numpy(datum.target_token_ids.astype(np.int64))
    return logprobs.gather(-1, targets[:, None])[:, 0]


def peft_result(peft, factors, data, config):
    """What BatchGradients should hold, by autograd alone."""
    logprobs = []
    terms = []
    for datum in data:
        p = peft_logprobs(peft, datum)
        logprobs.append(p.detach())
        weights = torch.from_numpy(datum.weights)
        if config.loss == "cross_entropy":
            terms.append(-weights * p)
        else:
            ratio = torch.exp(p - torch.from_numpy(datum.sampling_logprobs))
            terms.append(-weights * ratio * torch.from_numpy(datum.advantages))
    terms = torch.cat(terms)
    gradients = torch.autograd.grad(terms.sum(), factors)
    return SimpleNamespace(gradients=gradients, logprobs=logprobs, terms=terms.detach().double())


def assert_equal(found, expected):
    """Each of the tensors to TOLERANCE of its largest entry; none of them is all zeros."""
    for one, other in zip(found, expected, strict=True):
        one, other = torch.as_tensor(one), torch.as_tensor(other)  # noqa: PLW2901
        assert one.shape == other.shape
        assert (largest := other.abs().max()) > 0
        assert (one - other).abs().max() <= TOLERANCE * largest


def assert_same_result(found, expected):
    assert_equal(found.logprobs, expected.logprobs)
    assert_equal(found.gradients, expected.gradients)
    error = abs(found.metrics["loss"] - expected.terms.sum().item())
    assert error <= TOLERANCE * expected.terms.abs().sum()  # the terms have both signs


@each_architecture
@each_embedding
@each_target
def test_logprobs_and_gradients_are_those_of_peft(name, tied, targets):
    architecture = ARCHITECTURES[name]
    lora = LoraConfig(4, alpha=6.0, target_modules=architecture.targets[targets], seed=3)
    model = trained(name, tied=tied)
    weights = random_weights(model, lora)
    peft, factors = as_peft(architecture.build(tied=tied), lora, weights)
    for config in LOSSES:
        data = batch(LENGTHS, config)
        expected = peft_result(peft, factors, data, config)
        assert_same_result(model.forward_backward(weights, data, config), expected)
    assert_equal(model.forward(weights, data), expected.logprobs)


@each_architecture
def test_adapters_of_any_shape_in_one_pass_are_each_what_peft_makes_of_them_alone(name):
    architecture = ARCHITECTURES[name]
    sets = architecture.targets
    tenants = [
        (LoraConfig(2, 16.0, sets["attention"], seed=1), (9, 3), "importance_sampling"),
        (LoraConfig(8, 4.0, sets["mlp"], seed=2), (17,), "cross_entropy"),
        (LoraConfig(5, 5.0, sets["all-linear and unembedding"], seed=3), (4, 30), "cross_entropy"),
        (LoraConfig(1, 2.0, sets["unembedding"], seed=4), (1, 11, 6), "importance_sampling"),
        (LoraConfig(3, 9.0, sets["all-linear"], seed=5), (32,), "cross_entropy"),
    ]
    model = trained(name, tied=True, max_batch_tokens=16 * MAX_LENGTH)
    batches = []
    for lora, lengths, loss in tenants:
        config = LossConfig(loss)
        data = batch(lengths, config, seed=lora.seed)
        batches.append((lora, random_weights(model, lora), data, config))
    requests = [model.request(weights, data, config) for _, weights, data, config in batches]

    advance(next_pass(requests, model.max_batch_tokens), model.run_pass)

    for request, (lora, weights, data, config) in zip(requests, batches, strict=True):
        assert request.next_unit is None  # one pass was enough for everybody
        peft, factors = as_peft(architecture.build(tied=True), lora, weights)
        assert_same_result(request.gradients({}), peft_result(peft, factors, data, config))


@pytest.mark.parametrize("num_threads", [1, 3])
@each_architecture
def test_bits_are_the_same_alone_and_beside_any_number_of_others(name, num_threads):
    sets = ARCHITECTURES[name].targets
    config = LossConfig("importance_sampling")
    model = trained(name, tied=True, max_batch_tokens=64 * MAX_LENGTH)
    torch.set_num_threads(num_threads)
    try:
        lora = LoraConfig(3, 9.0, sets["all-linear and unembedding"], seed=5)
        weights, data = random_weights(model, lora), batch((30,), config)
        alone = model.forward_backward(weights, data, config)
        for number in (1, 2, 5, 40):
            requests = [model.request(weights, data, config)] + [
                model.request(
                    random_weights(model, LoraConfig(2, 4.0, sets["attention"], seed=seed)),
                    batch((20,), config, seed=seed),
                    config,
                )
                for seed in range(number)
            ]
            advance(next_pass(requests, model.max_batch_tokens), model.run_pass)
            beside = requests[0].gradients({})
            assert beside.logprobs[0].tobytes() == alone.logprobs[0].tobytes()
            for ours, theirs in zip(beside.gradients, alone.gradients, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(1)


@each_architecture
@each_target
def test_peft_loads_an_export_and_gives_its_logprobs(tmp_path, name, targets):
    architecture = ARCHITECTURES[name]
    lora = LoraConfig(4, alpha=6.0, target_modules=architecture.targets[targets], seed=3)
    model = trained(name, tied=True)
    weights = random_weights(model, lora)
    view = TrainerAdapter("projects/p/adapters/a", lora, 1, 1, has_pending_gradients=False)
    version = make_version(view, weights, "tiny")
    (tmp_path / "adapter_model.safetensors").write_bytes(version.file)
    (tmp_path / "adapter_config.json").write_text(version.header.adapter_config_json)

    peft = PeftModel.from_pretrained(architecture.build(tied=True), tmp_path).eval()

    own = get_peft_model_state_dict(peft, save_embedding_layers=False)
    assert load(version.file).keys() == own.keys()
    data = batch(LENGTHS, LossConfig("cross_entropy"))
    with torch.no_grad():
        expected = [peft_logprobs(peft, datum) for datum in data]
    assert_equal(model.forward(weights, data), expected)


@each_architecture
def test_the_default_targets_are_all_linear_layers_as_peft_understands_them(name):
    architecture = ARCHITECTURES[name]
    model = trained(name, tied=False)
    lora = model.lora.fresh(rank=1, alpha=1.0, target_modules=model.lora.target_modules, seed=0)
    peft = get_peft_model(
        architecture.build(tied=False), PeftLoraConfig(target_modules="all-linear")
    )
    assert set(lora.factors) == set(peft.base_model.targeted_module_names)
    assert set(model.lora.target_modules) == set(architecture.targets["all-linear"])
    assert model.lora.unembedding == architecture.unembedding


def test_a_window_shorter_than_the_sequences_hides_the_rest_of_them():
    model = trained("mistral", tied=False)
    num_layers = 2
    lora = LoraConfig(2, 4.0, ARCHITECTURES["mistral"].targets["all-linear"], seed=3)
    (datum,) = batch((20,), LossConfig("cross_entropy"))
    token_ids = datum.token_ids.copy()
    token_ids[0] = (token_ids[0] + 1) % VOCAB_SIZE

    one, other = model.forward(
        random_weights(model, lora), [datum, replace(datum, token_ids=token_ids)]
    )

    reach = num_layers * (WINDOW - 1) + 1
    assert (one[:reach] != other[:reach]).all()
    assert (one[reach:] == other[reach:]).all()


def test_a_model_whose_projections_are_no_linear_layers_is_refused_by_its_name(tmp_path):
    # GPT-2 multiplies by Conv1D; its unembedding alone is an nn.Linear.
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=MAX_LENGTH, n_embd=8, n_layer=1, n_head=2
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match="has no linear layers") as caught:
        load_model(
            TrainerConfig(base_model={"name": "gpt2", "path": str(tmp_path)}, listen="127.0.0.1:0")
        )
    assert caught.value.context["field"] == "base_model.path"
    assert str(tmp_path) in str(caught.value)
