"""The synchronous half of the transformers backend: the model and its adapters.

Everything here runs in the backend's one compute thread.

Shapes: N completions that still run, T tokens of a sequence, V tokens in the vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load as tensors_in
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rollmesh.digest import safetensors_digest
from rollmesh.errors import DigestMismatch
from rollmesh.types import PromptLogprobs
from services.sampler.backends.base import Delta, Model
from services.sampler.backends.drawing import drawn, likeliest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rollmesh.types import Continuation, StopReason
    from services.sampler.backends.base import Draw, LoadedAdapter
    from services.sampler.config import SamplerConfig


@dataclass
class Group:
    """Completions of one request that are all of one length. Lists of N run along the batch."""

    adapter: LoadedAdapter | None
    draw: Draw
    running: list[int]
    """N indices of completions."""
    cache: DynamicCache
    next_logits_NV: torch.Tensor  # noqa: N815 - the suffix is the shape
    token_ids: dict[int, list[int]]
    """What each completion has so far, by index."""

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        if len(rows) == len(self.running):
            return
        self.running = [self.running[row] for row in rows]
        self.cache.batch_select_indices(torch.tensor(rows, dtype=torch.long))


class Engine:
    """A model, and the adapters that are on it."""

    def start(self, config: SamplerConfig) -> Model:
        """Load model and tokenizer."""
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        path = config.base_model.source
        dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self._base: Any = base.to(self._device).eval()
        self._peft: Any = None
        self._eos = _eos_token_ids(self._base, self._tokenizer)
        longest: int = self._base.config.max_position_embeddings
        if config.max_length is not None and config.max_length > longest:
            raise ValueError(f"max_length: {config.max_length}, the model's own is {longest}")
        return Model(
            vocab_size=self._base.config.vocab_size,
            max_length=config.max_length or longest,
            max_loras=config.max_loras,
        )

    def load(self, adapter: LoadedAdapter) -> None:
        """Put an adapter on the model and read it back from there.

        Raises:
            DigestMismatch: the file, or what is on the model, is not what `adapter` says.
            ValueError, RuntimeError, KeyError, TypeError, AttributeError: PEFT cannot use it.
        """
        file = _checked(adapter)
        tensors = tensors_in(file)
        for tensor_name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{tensor_name} has values that are not finite")
        config = PeftConfig.from_peft_type(**json.loads(adapter.config))
        config.inference_mode = True
        name = _peft_name(adapter)
        if self._peft is None:
            self._peft = PeftModel(self._base, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)
        try:
            set_peft_model_state_dict(self._peft, tensors, adapter_name=name)
            self._read_back(adapter, tensors)
        except BaseException:
            self.unload(adapter)
            raise
        self._peft.eval()

    def unload(self, adapter: LoadedAdapter) -> None:
        """Take an adapter off the model."""
        name = _peft_name(adapter)
        if len(self._peft.peft_config) > 1:
            # PEFT warns when the active adapter goes.
            self._peft.set_adapter(next(other for other in self._peft.peft_config if other != name))
            self._peft.delete_adapter(name)
        else:
            self._base, self._peft = self._peft.unload(), None

    @torch.inference_mode()
    def begin(
        self,
        adapter: LoadedAdapter | None,
        prompt_token_ids: list[int],
        completions: Sequence[Continuation],
        draw: Draw,
    ) -> Group:
        """Read the prompt once, and what completions of one length have already."""
        cache = DynamicCache(config=self._base.config)
        logits_NV = self._next_logits(adapter, [prompt_token_ids], cache)  # noqa: N806
        cache.batch_repeat_interleave(len(completions))
        begun = [list(each.token_ids) for each in completions]
        if begun[0]:
            logits_NV = self._next_logits(adapter, begun, cache)  # noqa: N806
        running = [each.index for each in completions]
        return Group(
            adapter=adapter,
            draw=draw,
            running=running,
            cache=cache,
            next_logits_NV=logits_NV.expand(len(completions), -1),
            token_ids=dict(zip(running, begun, strict=True)),
        )

    @torch.inference_mode()
    def step(self, group: Group) -> list[Delta]:
        """Draw one token of each completion that runs, and compute what follows it."""
        places = [(index, len(group.token_ids[index])) for index in group.running]
        token_ids, logprobs = drawn(group.next_logits_NV, group.draw, places)
        deltas = []
        for index, token_id, logprob in zip(group.running, token_ids, logprobs, strict=True):
            group.token_ids[index].append(token_id)
            reason = self._stop_reason(group.token_ids[index], group.draw)
            deltas.append(Delta(index, [token_id], [logprob], reason))
        if group.draw.top_logprobs is not None:
            top = zip(deltas, *likeliest(group.next_logits_NV, group.draw), strict=True)
            deltas = [
                replace(delta, top_token_ids=[ids], top_logprobs=[values])
                for delta, ids, values in top
            ]
        going_on = [row for row, delta in enumerate(deltas) if delta.stop_reason is None]
        group.keep(going_on)
        if going_on:
            batch = [[group.token_ids[index][-1]] for index in group.running]
            group.next_logits_NV = self._next_logits(group.adapter, batch, group.cache)
        return deltas

    @torch.inference_mode()
    def prompt_logprobs(
        self, adapter: LoadedAdapter | None, token_ids: list[int], num_top: int
    ) -> PromptLogprobs:
        """Of each token given those before it, and of the `num_top` likeliest in its place."""
        tokens_1T = torch.tensor([token_ids], device=self._device)  # noqa: N806
        with self._policy(adapter) as model:
            logits_TV = model(input_ids=tokens_1T).logits[0, :-1].float()  # noqa: N806
        logprobs_TV = logits_TV.log_softmax(-1)  # noqa: N806
        logprobs = logprobs_TV.gather(1, tokens_1T[0, 1:, None]).squeeze(1)
        top = logprobs_TV.topk(num_top)
        return PromptLogprobs(
            (math.nan, *logprobs.tolist()),
            ((-1,) * num_top, *map(tuple, top.indices.tolist())),
            ((math.nan,) * num_top, *map(tuple, top.values.tolist())),
        )

    def _read_back(self, adapter: LoadedAdapter, tensors: dict[str, torch.Tensor]) -> None:
        """Compare what is on the model with `tensors`, names and bits."""
        name = _peft_name(adapter)
        loaded = {
            key.replace(f".{name}", "", 1): tensor
            for key, tensor in self._peft.state_dict().items()
            if name in key.split(".")
        }
        if wrong := loaded.keys() ^ tensors.keys():
            # PEFT itself would leave out the ones, and the others at their random start.
            raise ValueError(f"tensors do not match its configuration: {', '.join(sorted(wrong))}")
        for key, tensor in loaded.items():
            wanted = tensors[key].to(tensor.device, tensor.dtype)
            # Bytes: NaNs are equal to nothing, and -0 is to 0.
            if not torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8)):
                raise DigestMismatch(
                    f"{adapter.name}: PEFT has other values for {key} than the file",
                    resource=adapter.name,
                    value=key,
                )

    def _next_logits(
        self, adapter: LoadedAdapter | None, batch: list[list[int]], cache: DynamicCache
    ) -> torch.Tensor:
        """Float32 logits [N, V] of what follows `batch`, which `cache` takes in."""
        with self._policy(adapter) as model:
            output = model(
                input_ids=torch.tensor(batch, device=self._device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    @contextlib.contextmanager
    def _policy(self, adapter: LoadedAdapter | None) -> Iterator[Any]:
        if self._peft is None:
            yield self._base
        elif adapter is None:
            with self._peft.disable_adapter():
                yield self._peft
        else:
            if self._peft.active_adapter != _peft_name(adapter):
                self._peft.set_adapter(_peft_name(adapter), inference_mode=True)
            yield self._peft

    def _stop_reason(self, token_ids: list[int], draw: Draw) -> StopReason | None:
        if token_ids[-1] in draw.stop_token_ids:
            return "stop"
        if token_ids[-1] in self._eos and not draw.ignore_eos:
            return "stop"
        if draw.stop:
            text = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
            # It was not there a token ago, so this token completes it.
            if any(stop in text for stop in draw.stop):
                return "stop"
        return "length" if len(token_ids) >= draw.max_tokens else None


def _checked(adapter: LoadedAdapter) -> bytes:
    """The bytes of its file, which have its digest."""
    file = b""
    try:
        file = (adapter.folder / "adapter_model.safetensors").read_bytes()
        digest = safetensors_digest(file)
    except (OSError, ValueError) as error:
        digest = str(error)
    if digest != adapter.digest:
        raise DigestMismatch(
            f"{adapter.name}: its file has the digest {digest}, not {adapter.digest}",
            resource=adapter.name,
            value=digest,
            allowed=adapter.digest,
        )
    return file


def _peft_name(adapter: LoadedAdapter) -> str:
    # Without dots, and unlike any part of the name of a layer.
    return f"adapter{adapter.number}"


def _eos_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """End of sequence as the tokenizer and the model's generation_config.json name it."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {token_id for token_id in [tokenizer.eos_token_id, *ids] if token_id is not None}
