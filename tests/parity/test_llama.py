"""Our LLaMA against Toy-RecLM's recorded numbers, and against transformers' with copied weights."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from textrec.models.llama import Llama, LlamaConfig
from textrec.training import losses

PUBLISHED = {
    "item_emb": "item_table", r"\.wq": ".query", r"\.wk": ".key", r"\.wv": ".value", r"\.wo": ".output",
    r"\.w1": ".gate", r"\.w2": ".down", r"\.w3": ".up", "ffn_norm": "forward_norm", "^norm": "final_norm",
    "^layers": "blocks",
}  # fmt: skip


def published(folder, **settings) -> Llama:
    model = Llama(LlamaConfig(**{
        "num_items": 60, "max_sequence_length": 12, "embedding_dim": 32, "num_blocks": 2, "num_heads": 4,
        "dropout": 0.0, "faithful": True, **settings,
    }))  # fmt: skip
    weights = {}
    for name, weight in load_file(folder / "toy_reclm" / "llama.safetensors").items():
        for theirs, ours in PUBLISHED.items():
            name = re.sub(theirs, ours, name)
        weights[name] = weight
    model.load_state_dict(weights)
    return model


@pytest.fixture
def recorded(golden) -> dict[str, torch.Tensor]:
    arrays = np.load(golden / "toy_reclm" / "llama.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_states_scores_and_loss_equal_the_published_ones(golden, recorded):
    model, items_BL = published(golden), recorded["sequences"]
    real_BL = items_BL != 0
    hidden_TD = model(items_BL)
    torch.testing.assert_close(hidden_TD, recorded["features"][real_BL], rtol=0, atol=1e-5)
    scores_BI = model.scores(model.encode(items_BL), model.item_vectors())
    torch.testing.assert_close(scores_BI, recorded["predict_scores"], rtol=0, atol=5e-5)
    positives_T, negatives_T1 = recorded["positives"][real_BL], recorded["negatives"][real_BL][:, None]
    for name, picks_T1 in (("positive", positives_T[:, None]), ("negative", negatives_T1)):
        picked_T = losses.picked_scores(hidden_TD, model.item_vectors(), picks_T1)[:, 0]
        torch.testing.assert_close(picked_T, recorded[f"{name}_logits"][real_BL], rtol=0, atol=5e-5)
    total = losses.gbce(hidden_TD, model.item_vectors(), positives_T, negatives_T1)
    assert 2 * total.item() / len(positives_T) == pytest.approx(recorded["loss"].item(), abs=1e-5)


def test_the_parts_equal_the_published_ones(golden, recorded):
    """On the row without padding, what the first attention and the first block return."""
    model, items_BL = published(golden), recorded["sequences"][:1]
    assert (items_BL != 0).all()
    found = {}
    for name in ("blocks.0.attention", "blocks.0"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, inputs, output, name=name: found.update({name: output}))
    model(items_BL)
    torch.testing.assert_close(found["blocks.0.attention"], recorded["attention0_output"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["blocks.0"], recorded["block0_output"][0], rtol=0, atol=1e-5)


def test_fewer_columns_are_another_amount_of_attended_padding(golden, recorded):
    model, items_BL = published(golden, max_sequence_length=5), recorded["sequences"][:, -5:]
    expected_TD = recorded["features_last_5_columns_only"][items_BL != 0]
    torch.testing.assert_close(model(items_BL), expected_TD, rtol=0, atol=1e-5)


def test_padding_left_out_of_attention_is_not_the_published_model(golden, recorded):
    ours, items_BL = published(golden, faithful=False), recorded["sequences"]
    real_BL = items_BL != 0
    difference_T = (ours(items_BL) - recorded["features"][real_BL]).abs().amax(1)
    full_T = real_BL.all(1)[real_BL.nonzero()[:, 0]]
    assert difference_T[full_T].max() < 1e-5 and difference_T[~full_T].max() > 1e-2


@pytest.fixture
def language_model():
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=41, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def batch() -> torch.Tensor:
    items_BL = torch.randint(1, 41, (4, 9), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((9, 4, 1, 7)):
        items_BL[row, length:] = 0
    return items_BL


def test_states_and_gradients_equal_those_of_transformers(language_model, tmp_path):
    language_model.save_pretrained(tmp_path)
    table_ID = language_model.model.embed_tokens.weight.detach()
    ours = Llama.from_causal_lm(tmp_path, 40, items_ID=table_ID, max_sequence_length=9, dropout=0.0)
    assert not ours.item_table.weight[0].any()
    items_BL = batch()
    real_BL = items_BL != 0
    theirs_BLD = language_model.model(input_ids=items_BL, attention_mask=real_BL.long()).last_hidden_state
    ours_TD = ours(items_BL)
    torch.testing.assert_close(ours_TD, theirs_BLD[real_BL], rtol=0, atol=1e-5)
    towards_TD = torch.linspace(-1, 1, ours_TD.numel()).view_as(ours_TD)
    (ours_TD * towards_TD).mean().backward()
    (theirs_BLD[real_BL] * towards_TD).mean().backward()
    table_gradient = language_model.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours.item_table.weight.grad[1:], table_gradient[1:], rtol=0, atol=1e-5)
    for ours_block, theirs_block in zip(ours.blocks, language_model.model.layers, strict=True):
        for part, theirs in (
            (ours_block.feed_forward.down, theirs_block.mlp.down_proj),
            (ours_block.attention.value, theirs_block.self_attn.v_proj),
            (ours_block.attention_norm, theirs_block.input_layernorm),
        ):
            assert part.weight.grad.abs().max() > 1e-3
            torch.testing.assert_close(part.weight.grad, theirs.weight.grad, rtol=0, atol=1e-5)
        query = theirs_block.self_attn.q_proj.weight.grad.unflatten(0, (6, 2, 2)).transpose(1, 2).flatten(0, 2)
        torch.testing.assert_close(ours_block.attention.query.weight.grad, query, rtol=0, atol=1e-5)
    with torch.no_grad():  # twin: queries paired the other way turn otherwise
        for block in ours.blocks:
            block.attention.query.weight.copy_(
                block.attention.query.weight.unflatten(0, (6, 2, 2)).transpose(1, 2).flatten(0, 2)
            )
        assert (ours(items_BL) - ours_TD).abs().max() > 1e-2


def test_the_first_blocks_alone_and_a_table_by_chance(language_model, tmp_path):
    language_model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    ours = Llama.from_causal_lm(tmp_path, num_items=200, num_blocks=2, dropout=0.0)
    assert len(ours.blocks) == 2 and ours.item_table.weight[1:].std().item() == pytest.approx(0.3, rel=0.1)
    items_BL = torch.randint(1, 201, (2, 5))
    with torch.no_grad():
        theirs = language_model.model(inputs_embeds=ours.item_table(items_BL), output_hidden_states=True)
        expected_BLD = language_model.model.norm(theirs.hidden_states[2])
        torch.testing.assert_close(ours(items_BL), expected_BLD.flatten(0, 1), rtol=0, atol=1e-5)
        assert (ours(items_BL) - theirs.last_hidden_state.flatten(0, 1)).abs().max() > 1e-2
