"""LoRA on a CPU: what tokens of mixed slots get, against plain mathematics, peft and vLLM."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from services.sampler.backends.vllm_lora import MAX_ROWS, SlotwiseLora, _ranks, blocks_of

SLOTS = 5
MAX_RANK = 32
INPUT = 24
Q, K, V = 40, 16, 8


class Layers:
    """Packed linear layers with an adapter of its own rank in each slot, as vLLM stacks them."""

    def __init__(self, outputs, ranks, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.outputs = outputs
        self.a = tuple(torch.zeros(SLOTS, 1, MAX_RANK, INPUT, dtype=dtype) for _ in outputs)
        self.b = tuple(torch.zeros(SLOTS, 1, out, MAX_RANK, dtype=dtype) for out in outputs)
        for a, b in zip(self.a, self.b, strict=True):
            for slot, rank in enumerate(ranks):
                a[slot, 0, :rank] = torch.randn(rank, INPUT, generator=generator)
                b[slot, 0, :, :rank] = torch.randn(b.shape[2], rank, generator=generator)

    def expected(self, y, x, slots, scale=1.0):
        """In double precision, one token after the other."""
        rows = []
        for base, token, slot in zip(y.double(), x.double(), slots, strict=True):
            parts = [
                scale * token @ a[slot, 0].double().T @ b[slot, 0].double().T
                for a, b in zip(self.a, self.b, strict=True)
            ]
            rows.append(base if slot < 0 else base + torch.cat(parts))
        return torch.stack(rows)


def result(wrapper_class, layers, y, x, slots, scale=1.0, *, is_prefill=True):
    wrapper = wrapper_class(4096, 256, "cpu", max_loras=SLOTS)
    return run(wrapper, layers, y, x, slots, scale, is_prefill=is_prefill)


def run(wrapper, layers, y, x, slots, scale=1.0, *, is_prefill=True):
    # Adapter ids are slots + 1, which vLLM turns back; 0 is the base model.
    ids = tuple(slot + 1 for slot in slots)
    mapping = LoRAMapping(ids, ids, is_prefill=is_prefill)
    wrapper.update_metadata(mapping, [slot + 1 for slot in range(SLOTS)], SLOTS, 100)
    y = y.clone()
    wrapper.add_lora_linear(y, x, layers.a, layers.b, scale, layers.outputs)
    return y


def tokens(count, outputs, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUT, generator=generator)
    y = torch.randn(count, sum(outputs), generator=generator)
    return x.to(dtype), y.to(dtype)


def mixed(count, choices, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [choices[i] for i in torch.randint(len(choices), (count,), generator=generator)]


CASES = [
    pytest.param(mixed(70, [0, 1, 2, 3]), id="mixed"),
    pytest.param(mixed(70, [-1, 0, 1, 3]), id="mixed with tokens of the base model"),
    pytest.param(mixed(70, [-1, 4]), id="the last slot and the base model"),
    pytest.param(mixed(70, [1, 4]), id="slots apart"),
    pytest.param([2] * 70, id="one slot"),
    pytest.param([3], id="one token"),
    pytest.param([-1, 3], id="one token and one of the base model"),
    pytest.param([-1] * 7, id="the base model alone"),
    pytest.param([0] * 600 + [1, 2, 3, -1], id="one slot much larger than the others"),
    pytest.param([0] * 900 + [1] * 2, id="more tokens of one slot than rows in a block"),
    pytest.param(list(range(SLOTS)) * 3, id="every slot"),
]


@pytest.mark.parametrize("outputs", [(Q,), (Q, K, V), (V, V)], ids=["q", "qkv", "gate_up"])
@pytest.mark.parametrize("slots", CASES)
def test_each_token_gets_the_adapter_of_its_slot_and_no_other(outputs, slots):
    layers = Layers(outputs, ranks=[8, 3, 32, 1, 16])
    x, y = tokens(len(slots), outputs)
    got = result(SlotwiseLora, layers, y, x, slots, scale=0.5)
    torch.testing.assert_close(
        got.double(), layers.expected(y, x, slots, 0.5), rtol=1e-6, atol=2e-5
    )
    for row, slot in enumerate(slots):
        assert slot >= 0 or torch.equal(got[row], y[row])


@pytest.mark.parametrize("is_prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)], ids=["f32", "bf16"]
)
def test_it_computes_what_vllms_own_kernels_do_where_these_are_right(dtype, relative, is_prefill):
    layers = Layers((Q, K, V), ranks=[8, 3, 32, 1, 16], dtype=dtype)
    slots = mixed(300, list(range(SLOTS)))
    x, y = tokens(len(slots), layers.outputs, dtype)
    ours = result(SlotwiseLora, layers, y, x, slots, is_prefill=is_prefill).float()
    theirs = result(PunicaWrapperCPU, layers, y, x, slots, is_prefill=is_prefill).float()
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


def test_vllms_own_kernels_give_tokens_of_the_base_model_an_adapter():
    # Why there are kernels of our own. Should vLLM mend it, part of the reason is gone.
    layers = Layers((Q,), ranks=[8] * SLOTS)
    x, y = tokens(2, (Q,))
    theirs = result(PunicaWrapperCPU, layers, y, x, [-1, 0], is_prefill=False)
    torch.testing.assert_close(theirs, layers.expected(y, x, [SLOTS - 1, 0]).float())


@pytest.mark.parametrize("rank", [1, 8, 20, 32])
def test_it_computes_what_peft_does(rank):
    base = nn.ModuleDict({"q": nn.Linear(INPUT, Q), "k": nn.Linear(INPUT, K)})
    adapted = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q", "k"])
    )
    layers = Layers((Q, K), ranks=[rank] * SLOTS)
    for index, name in enumerate("qk"):
        module = adapted.base_model.model[name]
        nn.init.normal_(module.lora_B["default"].weight)
        # vLLM has alpha / rank in B.
        layers.a[index][3, 0, :rank] = module.lora_A["default"].weight.data
        layers.b[index][3, 0, :, :rank] = module.lora_B["default"].weight.data * 2
    x, _ = tokens(50, (Q, K))
    slots = mixed(50, [0, 3])
    with torch.no_grad():
        plain = torch.cat([module.base_layer(x) for module in _layers_of(adapted)], 1)
        expected = torch.cat([module(x) for module in _layers_of(adapted)], 1)
    got = result(SlotwiseLora, layers, plain, x, slots)
    of_three = torch.tensor(slots) == 3
    assert (got - expected)[of_three].abs().max() <= 1e-6 * expected.abs().max()


def _layers_of(adapted):
    return [adapted.base_model.model[name] for name in "qk"]


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "in inference mode"])
def test_a_slot_that_is_loaded_anew_is_used_with_its_new_rank(inference):
    layers = Layers((Q, K), ranks=[4, 4, 0, 0, 0])
    x, y = tokens(40, (Q, K))
    slots = mixed(40, [0, 1])
    wrapper = SlotwiseLora(4096, 256, "cpu", max_loras=SLOTS)
    run(wrapper, layers, y, x, slots)
    larger = Layers((Q, K), ranks=[4, 32, 0, 0, 0], seed=9)
    with torch.inference_mode(inference):
        for stacked, new in zip((*layers.a, *layers.b), (*larger.a, *larger.b), strict=True):
            stacked[1].copy_(new[1])
    got = run(wrapper, layers, y, x, slots)
    torch.testing.assert_close(got.double(), layers.expected(y, x, slots), rtol=1e-6, atol=2e-5)


def test_slots_and_ranks_of_one_batch_are_not_those_of_the_next():
    layers = Layers((Q,), ranks=[4, 32, 8, 8, 8])
    x, y = tokens(6, (Q,))
    wrapper = SlotwiseLora(4096, 256, "cpu", max_loras=SLOTS)
    for slots in ([0] * 6, [0, 0, 0, 1, 1, 1], [-1] * 6, [1] * 6):
        got = run(wrapper, layers, y, x, slots)
        torch.testing.assert_close(got.double(), layers.expected(y, x, slots), rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("other_write", [False, True])
def test_the_rank_of_a_slot_that_was_overwritten_counts_from_the_next_batch_on(other_write):
    layers = Layers((Q, K), ranks=[4, 8, 8, 8, 8])
    x, y = tokens(6, (Q, K))
    wrapper = SlotwiseLora(4096, 256, "cpu", max_loras=SLOTS)
    run(wrapper, layers, y, x, [0, 1] * 3)
    if other_write:  # unannounced
        for a, b in zip(layers.a, layers.b, strict=True):
            a[1, 0, :20] = torch.randn(20, INPUT)
            b[1, 0, :, :20] = torch.randn(b.shape[2], 20)
    for a, b in zip(layers.a, layers.b, strict=True):
        torch._foreach_copy_([a[0]], [torch.randn(1, MAX_RANK, INPUT)])
        torch._foreach_copy_([b[0]], [torch.randn(1, b.shape[2], MAX_RANK)])
    wrapper.wrote(layers.a, 0, MAX_RANK)
    known = next(iter(wrapper._known.values()))
    assert (known.versions == [a._version for a in layers.a]) is not other_write
    got = run(wrapper, layers, y, x, [0, 1] * 3)
    expected = layers.expected(y, x, [0, 1] * 3)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    assert known.ranks.tolist() == ([MAX_RANK, 8, 8, 8, 8] if not other_write else [4, *[8] * 4])


def test_a_layer_that_no_adapter_of_the_batch_adapts_stays_as_it_is():
    layers = Layers((Q,), ranks=[0, 0, 8, 0, 0])
    x, y = tokens(20, (Q,))
    assert torch.equal(result(SlotwiseLora, layers, y, x, mixed(20, [0, 1, -1])), y)


@pytest.mark.parametrize("adapted", [0, 2], ids=["first", "last"])
def test_one_of_the_packed_layers_may_be_adapted_alone(adapted):
    layers = Layers((Q, K, V), ranks=[8] * SLOTS)
    for index in {0, 1, 2} - {adapted}:
        layers.a[index][:] = 0
        layers.b[index][:] = 0
    x, y = tokens(40, (Q, K, V))
    slots = mixed(40, [-1, 0, 1])
    got = result(SlotwiseLora, layers, y, x, slots)
    torch.testing.assert_close(got.double(), layers.expected(y, x, slots), rtol=1e-6, atol=2e-5)


def test_what_another_slot_holds_does_not_spread():
    layers = Layers((Q, K), ranks=[8] * SLOTS)
    x, y = tokens(60, (Q, K))
    slots = mixed(60, [0, 1, 2])
    clean = result(SlotwiseLora, layers, y, x, slots)
    layers.a[0][1] = float("nan")
    layers.b[1][3] = float("inf")  # in no token's slot
    x[torch.tensor(slots) == 1] = float("inf")
    hostile = result(SlotwiseLora, layers, y, x, slots)
    others = torch.tensor(slots) != 1
    # Blocks of the same shape: the very same bits.
    assert torch.equal(hostile[others], clean[others])


@pytest.mark.parametrize("slots", CASES)
def test_blocks_hold_every_adapted_token_once_and_waste_at_most_one_block_for_each_slot(slots):
    slots = torch.tensor(slots)
    blocks = blocks_of(slots)
    adapted = (slots >= 0).nonzero().squeeze(1)
    if blocks is None:
        assert not len(adapted)
        return
    if blocks.rows is None:
        assert len(slots) == blocks.num_rows
        assert blocks.slots.tolist() == [int(slots[0])]
        return
    assert blocks.num_rows <= MAX_ROWS
    rows = blocks.rows[adapted] - 1
    assert len(set(rows.tolist())) == len(adapted)
    assert blocks.tokens[rows].tolist() == adapted.tolist()
    assert blocks.slots[rows // blocks.num_rows].tolist() == slots[adapted].tolist()
    spare = len(blocks.tokens) - len(adapted)
    assert spare < len(set(slots[adapted].tolist())) * blocks.num_rows


def test_no_tokens_make_no_blocks():
    assert blocks_of(torch.empty(0, dtype=torch.long)) is None


@pytest.mark.parametrize(
    ("counts", "most_rows"),
    [
        ((43, 43, 42), 129),
        ((43, 43, 42, 1), 172),  # one more token, not the rows of one more adapter's batch
        ((128, 1), 160),
        ((300, 2), 400),
    ],
)
def test_a_few_tokens_of_one_more_adapter_cost_few_rows(counts, most_rows):
    slots = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    blocks = blocks_of(slots[torch.randperm(len(slots))])
    assert len(blocks.slots) * blocks.num_rows <= most_rows


def test_a_rank_is_that_of_the_last_row_in_use_of_any_packed_layer():
    for dtype in (torch.float32, torch.bfloat16):
        first, second = (torch.zeros(3, 1, 8, 6, dtype=dtype) for _ in range(2))
        first[1, 0, 2, 5] = 1e-30
        second[1, 0, 4, 0] = -1.0
        second[2, 0, 7, 3] = 1.0
        assert _ranks((first, second)).tolist() == [0, 5, 8]
