"""RecFormer: its published size, what reaches the first token, and that neither batch nor padding leaves a trace."""

from dataclasses import replace

import pytest
import torch
from models.packed_inputs import random_inputs
from torch import nn

from textrec.models.recformer import PRESETS, RecFormer, RecFormerConfig, RecFormerForPretraining
from textrec.schema import InputError

TINY = replace(PRESETS["tiny"], vocabulary_size=300)
LENGTHS = [[40, 1, 300, 17], [5], [12, 12], [700, 3]]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def model() -> RecFormer:
    torch.manual_seed(0)
    model = RecFormer(TINY).eval()
    with torch.no_grad():  # of order 1, as after training, where the initial .02 would hide everything
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return model


def test_published_sizes():
    with torch.device("meta"):
        assert parameters(RecFormer(PRESETS["base"])) == 148_110_336
        without_dead_bias = 39_296_178 - 50_265
        assert parameters(RecFormerForPretraining(PRESETS["base"]).head) == without_dead_bias
        minilm = RecFormer(PRESETS["minilm"])
    assert all(len(each.blocks) == layers for each, layers in ((minilm, 6),))
    pooler, types, position_rows, global_projections = 384 * 385, 2 * 384, 51 * 384, 6 * 3 * 384 * 385
    published = 22_713_216 - pooler
    assert parameters(minilm) == published + types + position_rows + global_projections


def adapted(model: RecFormer) -> RecFormer:
    """LoRA of rank 8 on every linear layer of the blocks, as the RecFormer study has it."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = "query|key|value|query_global|key_global|value_global|attention_output|enter|leave"
    return inject_adapter_in_model(LoraConfig(r=8, target_modules=rf"blocks\..*\.({layers})"), model)


def test_adapters_reach_every_linear_layer_and_merge():
    from peft.tuners.lora import LoraLayer

    with torch.device("meta"):
        base = adapted(RecFormer(PRESETS["base"]))
    assert sum(isinstance(part, LoraLayer) for part in base.modules()) == 108
    assert sum(parameter.numel() for parameter in base.parameters() if parameter.requires_grad) == 1_769_472

    torch.manual_seed(0)
    model, inputs = adapted(RecFormer(TINY)).eval(), random_inputs([40, 300])
    with torch.no_grad():
        untouched_BD = model.encode(*inputs)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        apart_BD, states_TD = model.encode(*inputs), model(*inputs)
        for part in model.modules():
            if isinstance(part, LoraLayer):
                part.merge()
        torch.testing.assert_close(model.encode(*inputs), apart_BD, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(*inputs), states_TD, rtol=0, atol=1e-5)
    assert (apart_BD - untouched_BD).abs().max() > 1e-2


def test_encode_is_the_first_tokens_state(model):
    for lengths in LENGTHS:
        inputs = random_inputs(lengths)
        with torch.inference_mode():
            states_TD, first_BD = model(*inputs), model.encode(*inputs)
        starts_B = inputs[3].cumsum(0) - inputs[3]
        assert (first_BD - states_TD[starts_B]).abs().max() < 1e-6
        assert states_TD.shape == (sum(lengths), 64) and first_BD.shape == (len(lengths), 64)


def test_a_vector_depends_on_no_other_row_of_its_batch(model):
    batches = [random_inputs(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    together = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    with torch.inference_mode():
        alone_BD = torch.cat([model.encode(*batch) for batch in batches])
        difference = (model.encode(*together) - alone_BD).abs().max()
        assert difference < 1e-5
        scale = alone_BD.norm(dim=-1).min()
        assert difference / scale < 1e-6
        together[3] = together[3].flip(0)  # twin: other sequences of the same tokens
        assert (model.encode(*together) - alone_BD).abs().max() > 1e-1


@pytest.mark.parametrize("path", ["dense", "blocked"])
def test_far_tokens_reach_each_other_through_the_first_alone(path):
    """Layer 1: the first token sees a token 500 away and a far ordinary token does not; layer 2: it does."""
    torch.manual_seed(0)
    model = RecFormer(replace(TINY, attention_window=8, attention_path=path)).eval()
    inputs = random_inputs([600])
    changed = [inputs[0].clone(), *inputs[1:]]
    changed[0][550] = 3 + (changed[0][550] - 2) % 297
    layers = [[], []]
    for block in model.blocks:
        block.register_forward_hook(lambda block, _, output: layers[[*model.blocks].index(block)].append(output))
    with torch.no_grad():
        model(*inputs), model(*changed)
    first, second = ((one - other).abs().amax(1) for one, other in layers)
    assert first[0] > 0 and (first[546:555] > 0).all()
    assert not first[1:546].any() and not first[555:].any()
    assert second[50] > 0 and (second > 0).all()


def test_only_masked_tokens_are_scored(model):
    torch.manual_seed(0)
    pretraining = RecFormerForPretraining(TINY).eval()
    inputs, masked_N = random_inputs([40, 9]), torch.tensor([3, 40, 47])
    with torch.no_grad():
        logits_NV = pretraining(*inputs, masked_N)
        expected_NV = pretraining.head(pretraining.encoder(*inputs))[masked_N]
    torch.testing.assert_close(logits_NV, expected_NV, rtol=0, atol=1e-5)
    assert logits_NV.shape == (3, 300)
    words, decoder = pretraining.encoder.word_table.weight, pretraining.head.decoder.weight
    assert torch.equal(words, decoder) and words.data_ptr() != decoder.data_ptr()


def test_every_parameter_takes_part_in_both_losses(model):
    torch.manual_seed(0)
    pretraining = RecFormerForPretraining(TINY)
    inputs = random_inputs([40, 9])
    pretraining.encoder.encode(*inputs).square().sum().backward()
    assert [name for name, p in pretraining.encoder.named_parameters() if p.grad is None] == []
    unread = pretraining.encoder.blocks[-1].attention.query.weight
    assert not unread.grad.any() and pretraining.encoder.blocks[0].attention.query.weight.grad.any()
    pretraining.zero_grad()
    pretraining(*inputs, torch.tensor([3])).sum().backward()
    assert [name for name, p in pretraining.named_parameters() if p.grad is None] == []


def test_a_padding_token_is_never_learnt():
    assert not RecFormer(TINY).word_table.weight[TINY.padding_id].any()


def test_scores_by_hand():
    """Logits of two pairs: cosines 1, .7071; 0, .7071, over .05."""
    model = RecFormer(replace(TINY, num_layers=1))
    first, second = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([[20.0, 14.142136], [0.0, 14.142136]])
    torch.testing.assert_close(model.scores(first, second), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "tokens", "sentence"),
    [([3, 0], 3, "empty sequence"), ([3, 4], 8, "adds up to 7: expected 8"), ([1025], 1025, "at most 1024")],
)
def test_impossible_inputs_are_refused(model, lengths, tokens, sentence):
    ids_T = torch.zeros(tokens, dtype=torch.long)
    with pytest.raises(InputError, match=sentence):
        model(ids_T, ids_T, ids_T, torch.tensor(lengths))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"num_heads": 5}, "num_heads=5"), ({"max_tokens": 2000}, "max_tokens=2000"), ({"attention_path": "x"}, "'x'")],
)
def test_impossible_sizes_are_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        RecFormerConfig(**{"num_positions": 1026, **changes})
