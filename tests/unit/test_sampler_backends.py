"""Which engine a machine gets, and what is said when it gets none."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from services.sampler import backends
from services.sampler.config import SamplerConfig

PREFIX = "services.sampler.backends"


def config(backend: str) -> SamplerConfig:
    return SamplerConfig.model_validate(
        {"base_model": {"name": "m", "path": "/m"}, "backend": backend}
    )


@pytest.fixture
def installed(monkeypatch):
    """Makes exactly the named backends importable; what they are is their name."""

    def install(*names: str) -> None:
        for name, kind in (("vllm", "VllmBackend"), ("transformers", "TransformersBackend")):
            module = SimpleNamespace(**{kind: lambda _, name=name: name})
            # None makes the import raise ImportError.
            there = module if name in names else None
            monkeypatch.setitem(sys.modules, f"{PREFIX}.{name}", there)

    return install


@pytest.mark.parametrize(
    ("asked", "there", "gets"),
    [
        ("auto", ["vllm", "transformers"], "vllm"),
        ("auto", ["transformers"], "transformers"),
        ("vllm", ["vllm"], "vllm"),
        ("transformers", ["vllm", "transformers"], "transformers"),
    ],
)
def test_a_machine_gets_vllm_where_it_imports(installed, asked, there, gets):
    installed(*there)
    assert backends.choose(config(asked)) == gets


def test_why_a_machine_gets_the_slow_one_is_logged(installed, caplog):
    installed("transformers")
    backends.choose(config("auto"))
    assert "vLLM does not import" in caplog.text


@pytest.mark.parametrize(
    ("asked", "there"), [("auto", []), ("vllm", ["transformers"]), ("transformers", ["vllm"])]
)
def test_a_backend_that_does_not_import_is_told(installed, asked, there):
    installed(*there)
    with pytest.raises(backends.BrokenInstallationError, match="cannot be imported"):
        backends.choose(config(asked))


@pytest.mark.parametrize(
    ("cause", "cure"),
    [
        ("operator torchvision::nms does not exist", "pip uninstall torchvision"),
        ("libtorchaudio.so: undefined symbol", "pip uninstall torchaudio"),
        ("no kernel image", None),
    ],
)
def test_a_package_that_breaks_the_imports_is_named(cause, cure):
    error = ImportError("cannot import name 'Qwen3'")
    error.__cause__ = RuntimeError(cause)
    text = backends.explained(error)
    assert text.startswith("ImportError: cannot import name")
    assert ("pip uninstall" in text) is (cure is not None)
    assert cure is None or text.endswith(cure)
