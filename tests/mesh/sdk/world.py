"""What exercises stand on: clients of the SDK at a gateway, data, and other ways to look at it."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import warnings
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import safetensors.numpy
import tinker
from tinker import types

from tests.mesh.sdk.calling import settled
from tests.mesh.sdk.reference import Reference

if TYPE_CHECKING:
    from numpy.typing import NDArray

ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
"""`eps` is large, so that a step is smooth in the gradient and no noise of it is blown up."""
TORCH_ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
SEQUENCES = ([5, 9, 13, 40, 22, 7, 31, 60], [11, 50, 3, 27, 18], [4, 4, 90, 33, 61, 72])
VOCABULARY = 104


class World:
    """One user with a key, `project`, at the gateway `url`. `base_model` lies in `folder`."""

    def __init__(self, url: str, key: str, project: str, base_model: str, folder: str) -> None:
        self.url = url
        self.key = key
        self.project = project
        self.base_model = base_model
        self.reference = Reference(folder)
        self.http = httpx.Client(base_url=f"{url}/api/v1/", headers={"X-API-Key": key})
        self._numbers = itertools.count()
        self.service = self.new_service()
        self.rest = self.client("RestClient")

    # Clients.

    def new_service(self, **kwargs: Any) -> Any:
        """A ServiceClient with a session of its own, once it is used."""
        return tinker.ServiceClient(base_url=self.url, api_key=self.key, **kwargs)

    def client(self, owner: str) -> Any:
        """A RestClient or AdminClient."""
        if owner == "AdminClient":
            return tinker.AdminClient(base_url=self.url, api_key=self.key)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return self.service.create_rest_client()

    def model(self, **kwargs: Any) -> Any:
        """A TrainingClient with a fresh adapter of a seed of its own."""
        arguments = {"rank": 8, "seed": next(self._numbers) + 1, **kwargs}
        return settled(self.service.create_lora_training_client(self.base_model, **arguments))

    def base_sampler(self) -> Any:
        return settled(self.service.create_sampling_client(base_model=self.base_model))

    def sampler(self, model: Any) -> Any:
        """A SamplingClient of a model as it is."""
        return settled(model.save_weights_and_get_sampling_client())

    @property
    def session_id(self) -> str:
        return self.service.holder.get_session_id()

    def name(self, what: str = "checkpoint") -> str:
        """One that nothing else has."""
        return f"{what}-{next(self._numbers)}"

    # Data.

    def data(self, **inputs: Any) -> list[Any]:
        """SEQUENCES as data, each input a function of a number of positions, or left out."""
        return [
            types.Datum(
                model_input=types.ModelInput.from_ints(list(tokens[:-1])),
                loss_fn_inputs={
                    "target_tokens": list(tokens[1:]),
                    **{name: make(index, len(tokens) - 1) for name, make in inputs.items()},
                },
            )
            for index, tokens in enumerate(SEQUENCES)
        ]

    def supervised(self) -> list[Any]:
        return self.data(weights=lambda index, n: [1.0] * n)

    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """The same as tokens and targets."""
        return [(list(tokens[:-1]), list(tokens[1:])) for tokens in SEQUENCES]

    # Another look at what the SDK did.

    def logprobs(self, model: Any) -> NDArray[np.float32]:
        """The trainer's, of all targets of SEQUENCES one after the other."""
        output = settled(model.forward(self.supervised(), "cross_entropy"))
        return logprobs_of(output)

    def train(self, model: Any, *, steps: int = 1) -> None:
        for _ in range(steps):
            backward = model.forward_backward(self.supervised(), "cross_entropy")
            step = model.optim_step(types.AdamParams(**ADAM))
            settled(backward), settled(step)

    def saved(self, model: Any) -> str:
        return settled(model.save_state(self.name())).path

    def adapter(self, path: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Configuration and tensors of a checkpoint, by the URL of its archive."""
        run, kind, name = path.removeprefix("tinker://").split("/")
        answer = self.http.get(
            f"training_runs/{run}/checkpoints/{kind}/{name}/archive", follow_redirects=True
        )
        assert answer.status_code == 200, answer.text
        return unpacked(answer.content)

    def weights(self, model: Any) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Those of a model as it is."""
        return self.adapter(self.saved(model))

    def checkpoint(self, path: str) -> dict[str, Any] | None:
        """As its run lists it; None: it does not."""
        run, kind, name = path.removeprefix("tinker://").split("/")
        answer = self.http.get(f"training_runs/{run}/checkpoints")
        assert answer.status_code == 200, answer.text
        found = [
            each
            for each in answer.json()["checkpoints"]
            if each["checkpoint_id"] == f"{kind}/{name}"
        ]
        return found[0] if found else None

    def session(self, session: str) -> dict[str, Any]:
        """As the search tells of it."""
        answer = self.http.post("sessions/search", json={"session_id": session})
        (found,) = answer.json()["sessions"]
        return dict(found)


def unpacked(archive: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The files of an archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {each.name: tar.extractfile(each).read() for each in tar if each.size}  # type: ignore[union-attr]
    config = json.loads(files["adapter_config.json"])
    return config, safetensors.numpy.load(files["adapter_model.safetensors"])


def logprobs_of(output: Any) -> NDArray[np.float32]:
    """Of a ForwardBackwardOutput, all data one after the other."""
    return np.concatenate(
        [
            np.asarray(each["logprobs"].data, np.float32).reshape(-1)
            for each in output.loss_fn_outputs
        ]
    )


def close(left: Any, right: Any, *, atol: float = 2e-4) -> None:
    """Equal but for the order of float32 sums."""
    np.testing.assert_allclose(
        np.asarray(left, np.float64), np.asarray(right, np.float64), rtol=1e-4, atol=atol
    )


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether tensors are equal, bit for bit."""
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) for name in left
    )


def near(left: dict[str, Any], right: dict[str, Any], *, atol: float) -> None:
    """Tensors of the same names, equal but for float32."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        np.testing.assert_allclose(tensor, right[name], rtol=1e-3, atol=atol, err_msg=name)
