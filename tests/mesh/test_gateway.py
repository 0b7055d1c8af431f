"""The unmodified SDK against a real mesh: processes, sockets, a real model."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import tarfile
import urllib.request
from pathlib import Path

import httpx
import numpy as np
import openai
import pyrage
import pytest
import pytest_asyncio
import tinker
import yaml
from safetensors.numpy import load as load_safetensors
from tinker import types as sdk

from rollmesh.client import Client
from rollmesh.digest import safetensors_digest
from services.local.config import LocalConfig
from services.local.mesh import mesh as running_mesh

ROOT = Path(__file__).resolve().parents[2]
TOKENS = [8, 9, 79, 10, 7, 87, 11, 9]
# The SDK does not close what it opens.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
PROMPT = sdk.ModelInput.from_ints(TOKENS)
ADAM = sdk.AdamParams(learning_rate=1e-2)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(tmp_path_factory):
    """URL of the gateway, keys of two projects, the mesh and the loop that it runs in."""
    values = yaml.safe_load((ROOT / "examples" / "local.yaml").read_text())
    (sampler,) = values["samplers"]
    # What is drawn is the same; the engine is slow to start.
    sampler["backend"] = "transformers"
    sampler.pop("kv_cache_memory")
    values["gateway"] = {}
    config = LocalConfig.parse(values, source="test")
    async with running_mesh(config, tmp_path_factory.mktemp("gateway")) as mesh:
        async with Client(mesh.address) as client:
            keys = [(await client.keys.create(f"projects/{p}"))[1] for p in ("one", "two")]
        yield mesh.gateway_url, *keys, mesh, asyncio.get_running_loop()


def with_sdk(test):
    """The SDK has threads and loops of its own, and its calls block."""

    @functools.wraps(test)
    async def run(served):
        await asyncio.to_thread(test, served)

    return pytest.mark.asyncio(loop_scope="session")(run)


def service_of(served, key=1):
    return tinker.ServiceClient(base_url=served[0], api_key=served[key])


def rest_of(served, key=1):
    return tinker.RestClient(base_url=served[0], api_key=served[key])


def model_of(served, rank=8, key=1):
    return service_of(served, key).create_lora_training_client("arith", rank=rank).result()


def datum(tokens=TOKENS, **inputs):
    return sdk.Datum(
        model_input=sdk.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], **inputs},
    )


def train(training, steps, data=None):
    """The losses of so many steps."""
    losses = []
    for _ in range(steps):
        forward = training.forward_backward(data or [datum()], "cross_entropy")
        step = training.optim_step(ADAM)
        losses.append(forward.result().metrics["loss:sum"])
        step.result()
    return losses


def logprobs_of(training, tokens=TOKENS):
    [output] = training.forward([datum(tokens)], "cross_entropy").result().loss_fn_outputs
    return np.array(output["logprobs"].data)


def sampled_logprobs(sampling, prompt=PROMPT):
    return np.array(sampling.compute_logprobs(prompt).result()[1:])


@with_sdk
def test_the_loss_falls_and_sampler_and_trainer_agree_on_what_was_learnt(served):
    training = model_of(served)
    losses = train(training, 6)
    assert losses[-1] < losses[0] / 2
    sampling = training.save_weights_and_get_sampling_client().result()
    np.testing.assert_allclose(sampled_logprobs(sampling), logprobs_of(training), atol=1e-4)
    # Its tokenizer is found.
    assert training.get_tokenizer().decode(TOKENS)


@with_sdk
def test_an_old_sampling_client_keeps_the_old_weights(served):
    training = model_of(served)
    train(training, 2)
    old = training.save_weights_and_get_sampling_client().result()
    named = training.save_weights_for_sampler("old").result().path
    before = sampled_logprobs(old)
    train(training, 3)
    new = training.save_weights_and_get_sampling_client().result()
    other = training.create_sampling_client(named).result()
    for sampling in (old, other):
        np.testing.assert_array_equal(sampled_logprobs(sampling), before)
    assert np.abs(sampled_logprobs(new) - before).max() > 0.01
    base = service_of(served).create_sampling_client(base_model="arith").result()
    assert np.abs(sampled_logprobs(base) - before).max() > 0.01


@with_sdk
def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(served):
    training = model_of(served)
    train(training, 2)
    path = training.save_state("here").result().path
    expected = train(training, 3)
    service = service_of(served)
    with_optimizer = service.create_training_client_from_state_with_optimizer(path).result()
    assert train(with_optimizer, 3) == expected
    fresh = service.create_training_client_from_state(path).result()
    found = train(fresh, 3)
    assert found[0] == expected[0]
    assert found != expected
    assert fresh.get_info().lora_rank == 8


@with_sdk
def test_what_is_sampled_is_what_was_asked_for(served):
    sampling = service_of(served).create_sampling_client(base_model="arith").result()
    prompt = sdk.ModelInput.from_ints(TOKENS[:6])

    def draw(num_samples=3, **params):
        params = sdk.SamplingParams(**{"max_tokens": 6, "seed": 1, **params})
        return sampling.sample(
            prompt,
            num_samples,
            params,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=3,
            topk_sample_logprobs=2,
        ).result()

    first, again = draw(), draw()
    assert [each.tokens for each in first.sequences] == [each.tokens for each in again.sequences]
    assert len({each.sequence_id for each in first.sequences + again.sequences}) == 6
    for sequence in first.sequences:
        assert len(sequence.logprobs) == len(sequence.tokens)
        assert sequence.topk_logprobs_np.token_ids.shape == (len(sequence.tokens), 2)
    assert first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == 6
    assert [len(each) for each in first.topk_prompt_logprobs[1:]] == [3] * 5
    # Nothing ends a sample that is to end nowhere; a token that is to end it is part of it.
    endless = draw(stop=[], max_tokens=40, temperature=1.0)
    assert {(each.stop_reason, len(each.tokens)) for each in endless.sequences} == {("length", 40)}
    greedy = draw(1, temperature=0.0, stop=[]).sequences[0].tokens
    stopped = draw(1, temperature=0.0, stop=[greedy[1]]).sequences[0]
    assert stopped.stop_reason == "stop"
    assert stopped.tokens == greedy[: greedy.index(greedy[1]) + 1]
    last = sampling.sample(
        prompt,
        1,
        sdk.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        prompt_logprobs_last_n=2,
    ).result()
    assert last.prompt_logprobs[:4] == [None] * 4
    np.testing.assert_allclose(last.prompt_logprobs[4:], first.prompt_logprobs[4:], atol=1e-5)


@with_sdk
def test_logprobs_are_those_of_the_temperature(served):
    sampling = service_of(served).create_sampling_client(base_model="arith").result()
    prompt = sdk.ModelInput.from_ints(TOKENS[:3])
    warm = sampling.sample(prompt, 4, sdk.SamplingParams(max_tokens=1, seed=3, temperature=2.0))
    for sequence in warm.result().sequences:
        whole = sdk.ModelInput.from_ints([*TOKENS[:3], *sequence.tokens])
        (own,) = sampling.compute_logprobs(whole).result()[-1:]
        assert sequence.logprobs[0] != pytest.approx(own, abs=1e-3)
    cold = sampling.sample(prompt, 2, sdk.SamplingParams(max_tokens=1, seed=3)).result()
    for sequence in cold.sequences:
        whole = sdk.ModelInput.from_ints([*TOKENS[:3], *sequence.tokens])
        assert sequence.logprobs[0] == pytest.approx(
            sampling.compute_logprobs(whole).result()[-1], abs=1e-4
        )


def reference(loss, p, q, advantages):
    """The documented sums."""
    ratio = np.exp(p - q)
    match loss:
        case "importance_sampling":
            return -(ratio * advantages).sum()
        case "ppo":
            clipped = np.clip(ratio, 0.8, 1.2)
            return -np.minimum(ratio * advantages, clipped * advantages).sum()
        case "cispo":
            return -(np.clip(ratio, 0.0, 4.0) * p * advantages).sum()
        case "dro":
            return -(p * advantages - 0.5 * 0.05 * (p - q) ** 2).sum()
        case "gspo":
            s = np.exp((p - q).mean())
            return -np.minimum(s * advantages, np.clip(s, 0.9997, 1.0004) * advantages).sum()
    raise AssertionError(loss)


@with_sdk
def test_every_loss_is_its_documented_sum(served):
    training = model_of(served)
    train(training, 1)
    p = logprobs_of(training)
    rng = np.random.default_rng(0)
    q = np.minimum(p + rng.normal(scale=0.5, size=len(p)), 0).astype("f4")
    advantages = rng.normal(size=len(p)).astype("f4")
    q[:3], advantages[:3] = 0, 0  # as of a prompt
    given = datum(logprobs=q, advantages=advantages)
    for loss in ("importance_sampling", "ppo", "cispo", "dro", "gspo"):
        found = training.forward([given], loss).result().metrics["loss:sum"]
        assert found == pytest.approx(reference(loss, p, q, advantages), rel=1e-4), loss
        backward = training.forward_backward([given], loss).result().metrics["loss:sum"]
        assert backward == pytest.approx(found, rel=1e-4)
    weights = rng.normal(size=len(p)).astype("f4")  # of any sign
    found = training.forward_backward([datum(weights=weights)], "cross_entropy").result()
    assert found.metrics["loss:sum"] == pytest.approx(-(weights * p).sum(), rel=1e-4)


@with_sdk
def test_columns_of_targets_are_summed(served):
    training = model_of(served)
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 100, size=(7, 3))
    weights = rng.random(size=(7, 3)).astype("f4")
    given = datum(weights=weights)
    given.loss_fn_inputs["target_tokens"] = sdk.TensorData.from_numpy(targets)
    result = training.forward_backward([given, datum()], "cross_entropy").result()
    first, second = (np.array(each["logprobs"]._numpy) for each in result.loss_fn_outputs)
    first = first.reshape(result.loss_fn_outputs[0]["logprobs"].shape)
    assert first.shape == (7, 3)
    assert result.metrics["loss:sum"] == pytest.approx(
        -(weights * first).sum() - second.sum(), rel=1e-4
    )
    for column in range(3):
        one = datum()
        one.loss_fn_inputs["target_tokens"] = sdk.TensorData.from_numpy(targets[:, column].copy())
        [output] = training.forward([one], "cross_entropy").result().loss_fn_outputs
        np.testing.assert_allclose(output["logprobs"].data, first[:, column], atol=1e-5)


@with_sdk
def test_a_custom_loss_has_the_gradient_of_its_own(served):
    custom, plain = model_of(served), model_of(served)

    def loss(data, logprobs):
        return -sum(each.sum() for each in logprobs), {"mine:sum": 1.0}

    result = custom.forward_backward_custom([datum()], loss).result()
    assert result.metrics["mine:sum"] == 1.0
    custom.optim_step(ADAM).result()
    train(plain, 1)
    np.testing.assert_allclose(logprobs_of(custom), logprobs_of(plain), atol=1e-4)


@with_sdk
def test_the_substitute_of_stable_reinforce_says_that_it_is_one(served):
    training = model_of(served)
    p = logprobs_of(training)
    spans = [sdk.SampledProvenanceSpan(sequence_id="x", offset=0, length=len(p))]
    given = sdk.Datum(
        model_input=sdk.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={
            "target_tokens": TOKENS[1:],
            "logprobs": p.astype("f4"),
            "advantages": np.ones(len(p), "f4"),
        },
        model_input_spans=spans,
        loss_fn_input_spans=spans,
    )
    result = training.forward_backward([given], "stable_reinforce", {"kl_coeff": 0.1}).result()
    assert result.metrics["stable_reinforce_substitute:max"] == 1.0
    assert result.metrics["guarded_fraction:mean"] == 0.0
    assert result.metrics["loss:sum"] == pytest.approx(-p.sum(), rel=1e-3)


@with_sdk
def test_a_large_batch_is_cut_and_put_together_in_order(served):
    training = model_of(served)
    data = [datum([1 + index % 90, 2, 3]) for index in range(1100)]
    result = training.forward_backward(data, "cross_entropy").result()
    assert len(result.loss_fn_outputs) == 1100
    sums = [sum(each["logprobs"].data) for each in result.loss_fn_outputs]
    assert result.metrics["loss:sum"] == pytest.approx(-sum(sums), rel=1e-4)
    assert result.metrics["num_tokens:sum"] == 2200
    [alone] = training.forward([data[1050]], "cross_entropy").result().loss_fn_outputs
    np.testing.assert_allclose(
        alone["logprobs"].data, result.loss_fn_outputs[1050]["logprobs"].data, atol=1e-5
    )


@with_sdk
def test_two_keys_see_nothing_of_each_other(served):
    training = model_of(served)
    path = training.save_state("mine").result().path
    run = training.get_info().model_id
    stranger, rest = service_of(served, key=2), rest_of(served, key=2)
    for attempt in (
        lambda: rest.get_training_run(run).result(),
        lambda: rest.list_checkpoints(run).result(),
        lambda: rest.delete_checkpoint_from_tinker_path(path).result(),
        lambda: rest.get_weights_info_by_tinker_path(path).result(),
        lambda: stranger.create_training_client_from_state(path).result(),
        lambda: stranger.create_sampling_client(model_path=path).result(),
    ):
        with pytest.raises(tinker.NotFoundError):
            attempt()
    assert rest.list_user_checkpoints().result().checkpoints == []


def fetch(url):
    with urllib.request.urlopen(url) as response:  # noqa: S310 - our own gateway
        return response.read()


@with_sdk
def test_exported_weights_are_those_that_were_trained(served):
    training = model_of(served)
    train(training, 1)
    identity = pyrage.x25519.Identity.generate()
    plain = training.save_weights_external("plain").result().path
    sealed = (
        training.save_weights_external(
            "sealed", age_encryption_recipients=[str(identity.to_public())]
        )
        .result()
        .path
    )
    rest = rest_of(served)
    files = {
        name: fetch(url)
        for name, url in rest.get_external_weights_urls(plain).result().urls.items()
    }
    assert json.loads(files["adapter_config.json"])["r"] == 8
    assert json.loads(files["adapter_config.json"])["lora_alpha"] == 32
    assert load_safetensors(files["adapter_model.safetensors"])
    for name, url in rest.get_external_weights_urls(sealed).result().urls.items():
        assert pyrage.decrypt(fetch(url), [identity]) == files[name.removesuffix(".age")]
    # As older SDKs download: a redirection to an archive.
    run = training.get_info().model_id
    archive = httpx.get(
        f"{served[0]}/api/v1/training_runs/{run}/checkpoints/external_weights/plain/archive",
        headers={"x-api-key": served[1]},
    )
    assert archive.status_code == 302
    with tarfile.open(fileobj=io.BytesIO(fetch(archive.headers["location"]))) as tar:
        weights = tar.extractfile("adapter_model.safetensors").read()
        assert "checkpoint_complete" in tar.getnames()
    assert safetensors_digest(weights) == safetensors_digest(files["adapter_model.safetensors"])


@with_sdk
def test_a_checkpoint_is_sampled_also_where_it_was_not_made_for_it(served):
    training = model_of(served)
    train(training, 2)
    path = training.save_state("weights").result().path
    expected = logprobs_of(training)
    train(training, 1)
    sampling = service_of(served).create_sampling_client(model_path=path).result()
    np.testing.assert_allclose(sampled_logprobs(sampling), expected, atol=1e-4)


@with_sdk
def test_in_flight_a_sampling_client_follows_what_is_trained(served):
    training = model_of(served)
    train(training, 1)
    first = training.save_weights_and_get_sampling_client(kind="inflight").result()
    before = sampled_logprobs(first)
    train(training, 2)
    training.save_weights_and_get_sampling_client(kind="inflight").result()
    after = sampled_logprobs(first)
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(after, logprobs_of(training), atol=1e-4)


@with_sdk
def test_a_gateway_that_is_killed_costs_nothing_but_time(served):
    undisturbed, training = model_of(served), model_of(served)
    expected = train(undisturbed, 6)
    mesh, loop = served[3:]
    losses = []
    for _ in range(2):
        losses += train(training, 2)
        forward = training.forward_backward([datum()], "cross_entropy")
        loop.call_soon_threadsafe(mesh.kill, "gateway")
        losses.append(forward.result().metrics["loss:sum"])
        training.optim_step(ADAM).result()
        asyncio.run_coroutine_threadsafe(mesh.serving(), loop).result()
    assert losses == expected


def test_the_same_policies_answer_over_openais_wire(served):
    training = model_of(served, rank=4)
    train(training, 3)
    path = training.save_weights_for_sampler("agent").result().path
    sampling = service_of(served).create_sampling_client(model_path=path).result()
    drawn = sampling.sample(
        sdk.ModelInput.from_ints(TOKENS), 1, sdk.SamplingParams(max_tokens=6, temperature=0)
    ).result()
    adapter = f"projects/one/adapters/{training.model_id.replace(':train:', '-')}"
    train(training, 1)
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key=served[1]) as agent:
        listed = [model.id for model in agent.models.list()]
        for model in (path, f"{adapter}/versions/3"):
            answer = agent.completions.create(
                model=model,
                prompt=TOKENS,
                max_tokens=6,
                temperature=0,
                extra_body={"return_token_ids": True},
            )
            assert answer.choices[0].token_ids == list(drawn.sequences[0].tokens)
    assert {"arith", adapter} <= set(listed)
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key=served[2]) as other:
        for model in (path, adapter):
            with pytest.raises(openai.NotFoundError):
                other.completions.create(model=model, prompt=TOKENS, max_tokens=1)
    with (
        openai.OpenAI(base_url=f"{served[0]}/v1", api_key="tml-nobody") as nobody,
        pytest.raises(openai.AuthenticationError),
    ):
        nobody.models.list()
