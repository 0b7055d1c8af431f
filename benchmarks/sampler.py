"""How fast the sampler is: `python -m benchmarks.sampler [--only raw mesh failover]`.

Prints tables, and as its last line one JSON object of numbers. Ratios are of one run, in which the
ways that are compared take turns: the median over the rounds of the ratio within a round.

The model is a random Qwen3 of 3.0 million parameters (14 layers, hidden size 128, 2,048 words), the
adapters are of rank 16 on all its linear layers; one thread, as suits a model of this size, on two
cores. It computes in bfloat16 where the processor has instructions for it, else in float32: a
processor without takes ten times as long over bfloat16, beside which nothing else could be seen.

raw: vLLM alone, 128 prompts of 32 tokens at once, 32 tokens each, 8 slots.
- lora_vs_stock: 4 adapters, our LoRA kernels over vLLM's own for CPUs. (Prompts count: the longer
  they are, the more vLLM's own copy. lora_vs_stock_decode is with prompts of 4 tokens.)
- lora_vs_base: 4 adapters over none, our kernels, the same engine.
mesh: 16 prompts of 32 tokens × 8 completions × 48 tokens at once, 4 waves, over gRPC through
coordinator and sampler, over vLLM alone with the same LoRA kernels and the same requests:
- mesh_vs_raw_base, mesh_vs_raw_lora: without an adapter, and from 4 adapters.
- swap_cost: share of the tokens/s of 2 adapters that is lost when another tenant also publishes.
  In both cases it makes 10 versions a second and draws one token after each: of the newest where it
  publishes them, else of the one version that is live. So the loss is that of publishing and
  swapping alone, the trainer's export included, which is on the same two cores. Two slots are left
  to it: a version is drawn from while the next one is loaded. A version is made by loading another
  checkpoint: 10 steps a second of training alone would take more than one of the two cores. The
  rates that both sides reached are printed.
- overcommit_vs_resident: adapters 4 times as many as slots over as many as slots; the same
  requests, all made at once.
- publish_to_token_*: from the call of PublishAdapter to the arrival of the new version's first
  token, on a mesh that has nothing else to do.
failover: a mesh with two samplers, of which one is killed in the middle of 16 streams.
- failover_s: until another sampler's tokens of these streams arrive; the median of the kills.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.sampler_mesh import MODEL, VERSIONS_PER_S, bench_mesh, random_prompts
from benchmarks.sampler_model import RANK, make_adapter, make_model
from benchmarks.sampler_raw import Work, raw_engine
from benchmarks.sampler_rounds import ratio, show, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.sampler_rounds import Speeds

Figures = dict[str, float]
PARTS = ("raw", "mesh", "failover")
SLOTS = 4
"""Of the mesh's sampler; vLLM alone has 8 where kernels are compared."""
PUBLISHES = 100
DTYPES = ("bfloat16", "float32")


def main() -> None:
    """Print the tables and the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each way")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--dtype", choices=DTYPES, default=_own_dtype(), help="of engines")
    arguments = parser.parse_args()
    print(f"engines compute in {arguments.dtype}", flush=True)  # noqa: T201
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        adapters = [make_adapter(folder / f"adapter-{index}", index) for index in range(4)]
        if "raw" in arguments.only:
            figures |= raw(folder / "model", adapters, arguments)
        if "mesh" in arguments.only:
            figures |= through_the_mesh(folder / "model", adapters, arguments)
        if "failover" in arguments.only:
            figures |= asyncio.run(failover(folder / "model", arguments.dtype, kills=4))
    print(json.dumps(figures))  # noqa: T201


def _own_dtype() -> str:
    """What this processor is made for."""
    return DTYPES[0] if torch.cpu._is_avx512_bf16_supported() else DTYPES[1]  # noqa: SLF001


def settings(model: Path, dtype: str, **changes: Any) -> dict[str, Any]:
    """Of a sampler."""
    return {
        "base_model": {"name": MODEL, "path": str(model)},
        "backend": "vllm",
        "dtype": dtype,
        "max_num_seqs": 128,
        "max_rank": RANK,
        "max_loras": SLOTS,
        "kv_cache_memory": "512MiB",
        "enforce_eager": True,
        "num_threads": 1,
        **changes,
    }


def raw(model: Path, adapters: list[Path], arguments: argparse.Namespace) -> Figures:
    """Measure vLLM alone, with its own LoRA kernels and with ours."""
    of_both = settings(model, arguments.dtype, max_loras=8)
    with raw_engine(of_both, "StockWorker") as stock, raw_engine(of_both, "KernelsWorker") as ours:
        base = Work(random_prompts(128, 32), 1, 32, logprobs=False)
        lora = replace(base, adapters=adapters)
        decode = replace(lora, prompts=random_prompts(128, 4))
        speeds = take_turns(
            {
                "no adapter, vLLM's kernels": lambda: stock.run(base),
                "no adapter": lambda: ours.run(base),
                "4 adapters, vLLM's kernels": lambda: stock.run(lora),
                "4 adapters": lambda: ours.run(lora),
                "4 adapters, short prompts, vLLM's kernels": lambda: stock.run(decode),
                "4 adapters, short prompts": lambda: ours.run(decode),
            },
            arguments.rounds,
        )
    show("vLLM alone", speeds)
    stock_decode = "4 adapters, short prompts, vLLM's kernels"
    return {
        "lora_vs_stock": ratio(speeds, "4 adapters", "4 adapters, vLLM's kernels"),
        "lora_vs_base": ratio(speeds, "4 adapters", "no adapter"),
        "lora_vs_stock_decode": ratio(speeds, "4 adapters, short prompts", stock_decode),
    }


def through_the_mesh(model: Path, adapters: list[Path], arguments: argparse.Namespace) -> Figures:
    """The mesh beside vLLM alone, then what publishing and too few slots cost."""
    of_both = settings(model, arguments.dtype)
    with asyncio.Runner() as runner, raw_engine(of_both, "KernelsWorker") as engine:
        context = bench_mesh(model, of_both, num_samplers=1)
        mesh = runner.run(context.__aenter__())
        try:
            runner.run(mesh.more_tenants(4 * SLOTS + 1))
            own, all_others = mesh.tenants[:SLOTS], mesh.tenants[: 4 * SLOTS]
            base = Work(random_prompts(64, 32), 8, 48)
            lora = replace(base, adapters=adapters)

            def beside(*, publishing: bool) -> Callable[[], float]:
                few = own[: SLOTS - 2]  # two slots are left to the tenant that publishes
                return lambda: runner.run(mesh.run_beside(base, few, publishing=publishing))

            speeds = take_turns(
                {
                    "vLLM alone, no adapter": lambda: engine.run(base),
                    "mesh, no adapter": lambda: runner.run(mesh.run(base)),
                    "vLLM alone, 4 adapters": lambda: engine.run(lora),
                    "mesh, 4 adapters": lambda: runner.run(mesh.run(base, own)),
                    "mesh, 16 adapters, 4 slots": lambda: runner.run(mesh.run(base, all_others)),
                    "mesh, beside versions": beside(publishing=False),
                    "mesh, beside versions that are published": beside(publishing=True),
                },
                arguments.rounds,
            )
            times = runner.run(mesh.publish_to_token_ms(PUBLISHES))
        finally:
            runner.run(context.__aexit__(None, None, None))
    show("mesh and vLLM alone", speeds)
    for what, rates in mesh.versions_per_s.items():
        listed = ", ".join(f"{rate:.1f}" for rate in rates)
        print(f"{what}, a second: {listed} (at most {VERSIONS_PER_S})")  # noqa: T201
    return {**_mesh_figures(speeds), **_publish_figures(times)}


def _mesh_figures(speeds: Speeds) -> Figures:
    published = "mesh, beside versions that are published"
    return {
        "mesh_vs_raw_base": ratio(speeds, "mesh, no adapter", "vLLM alone, no adapter"),
        "mesh_vs_raw_lora": ratio(speeds, "mesh, 4 adapters", "vLLM alone, 4 adapters"),
        "swap_cost": round(1 - ratio(speeds, published, "mesh, beside versions"), 3),
        "overcommit_vs_resident": ratio(speeds, "mesh, 16 adapters, 4 slots", "mesh, 4 adapters"),
    }


def _publish_figures(times: list[float]) -> Figures:
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    figures = {"publish_to_token_p50_ms": cuts[49], "publish_to_token_p99_ms": cuts[98]}
    print(f"\n{len(times)} publishes to the first token, ms: {figures}")  # noqa: T201
    return {key: round(value, 1) for key, value in figures.items()}


async def failover(model: Path, dtype: str, kills: int) -> Figures:
    """Kill one sampler after the other."""
    found = []
    async with bench_mesh(model, settings(model, dtype), num_samplers=2) as mesh:
        await mesh.more_tenants(2)
        prompts = random_prompts(16, 32)
        for count in range(kills):
            found.append(await mesh.failover_s(f"sampler-{count % 2}", prompts))
            await mesh.running.serving()
    print(f"\nseconds until another sampler goes on: {sorted(found)}")  # noqa: T201
    return {"failover_s": round(statistics.median(found), 2)}


if __name__ == "__main__":
    main()
