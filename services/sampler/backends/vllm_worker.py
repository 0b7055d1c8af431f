"""vLLM's worker processes as the sampler uses them: verified slots, checked steps, own draws.

Chosen with vLLM's own `worker_cls`, so it needs no plugin to be installed and is never missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollmesh.errors import DigestMismatch, FailedPrecondition
from services.sampler.backends.vllm_draws import CounterSampler
from services.sampler.backends.vllm_identity import MismatchError, UnusableError
from services.sampler.backends.vllm_life import report, shared_folder, show_life
from services.sampler.backends.vllm_provenance import BlockLedger, IdentityError, Provenance
from services.sampler.backends.vllm_slots import VerifiedSlots

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class VerifiedWorker:
    """What is added to one of vLLM's workers, to be named before it among the base classes."""

    model_runner: Any
    rank: int

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self._folder = shared_folder(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        show_life(self._folder, f"worker-{self.rank}")

    def init_device(self) -> None:
        """Put the own sampler into the model runner that this makes."""
        super().init_device()  # type: ignore[misc]
        self._sampler = CounterSampler()
        self.model_runner.sampler = self._sampler

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """From now on the slots are watched."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self._slots = VerifiedSlots(self.model_runner.lora_manager)

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        """From now on there are key-value blocks."""
        super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        config = self.model_runner.kv_cache_config
        sizes = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
        self._provenance = Provenance(BlockLedger(config.num_blocks, sizes), self._slots)

    def load_adapter(
        self, number: int, folder: str, digest: str, config: str
    ) -> tuple[str, str] | None:
        """Load and read back an adapter; why that failed: the error's reason and text."""
        try:
            self._slots.load(number, Path(folder), digest, config)
        except MismatchError as error:
            return DigestMismatch.reason, str(error)
        except UnusableError as error:
            return FailedPrecondition.reason, str(error)
        return None

    def unload_adapter(self, number: int) -> None:
        """Free the slot of an adapter."""
        self._slots.unload(number)

    def execute_model(self, scheduler_output: Any) -> Any:
        """A step's forward pass. Its tokens are drawn afterwards, if the step was in order."""
        try:
            self._provenance.begin(scheduler_output)
            output = super().execute_model(scheduler_output)  # type: ignore[misc]
            if scheduler_output.total_num_scheduled_tokens:
                self._sampler.rows = self._provenance.check(
                    self.model_runner.input_batch, scheduler_output.num_scheduled_tokens
                )
        except IdentityError as error:
            # vLLM tells the callers no more than that the engine died, which it does of this.
            report(self._folder, f"worker-{self.rank}", str(error))
            raise
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Draw the step's tokens."""
        state = self.model_runner.execute_model_state
        if grammar_output is not None and state is not None and state.logits is not None:
            # vLLM would take the policy's own log-probabilities after masking the logits.
            self._sampler.policy_logprobs = self._sampler.compute_logprobs(state.logits)
        return super().sample_tokens(grammar_output)  # type: ignore[misc]
