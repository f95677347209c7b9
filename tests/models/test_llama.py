"""LLaMA: published sizes, growing histories, adapters, language models as a start, and what every model promises."""

import json
import math
import time

import numpy as np
import pytest
import torch
from models.behaviours import (
    assert_causal,
    assert_long_histories_keep_the_newest,
    assert_overfits_one_batch,
    assert_padding_is_invisible,
    assert_recommends,
    assert_refit_is_fresh,
    assert_save_load_identical,
    fit,
    random_histories,
)
from models.test_learnability import histories, recall_at_1, train

from textrec.models.exporting import export_onnx, export_program
from textrec.models.llama import Llama, LlamaConfig, SwiGLU
from textrec.models.sequence_model import SequenceModel
from textrec.schema import InputError
from textrec.training.module import SequenceModule, TrainingConfig

SIZE = {
    "num_items": 30, "max_sequence_length": 12, "embedding_dim": 16, "num_heads": 4, "dropout": 0.0,
    "initial_std": 0.2, "scale_item_table": False,
}  # fmt: skip
VARIANTS = {
    "plain": {}, "grouped": {"num_key_value_heads": 2}, "one key": {"num_key_value_heads": 1},
    "cosine": {"temperature": 0.05}, "faithful": {"faithful": True, "scale_item_table": True},
}  # fmt: skip
every_variant = pytest.mark.parametrize("name", VARIANTS)


def build(name: str = "plain", **settings) -> Llama:
    return Llama(LlamaConfig(**(SIZE | VARIANTS[name] | settings)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parameters(**settings) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(LlamaConfig(num_items=3416, **settings)).parameters())


def test_parameters_of_toy_reclm():
    assert parameters(embedding_dim=512, num_blocks=8, num_heads=8) == 27_055_104


def test_parameters_of_the_small_configuration():
    """Two blocks of four square matrices, three of 64 x 192, two norms; a table with its padding row; a norm."""
    assert parameters() == 3417 * 64 + 2 * (4 * 64**2 + 3 * 64 * 192 + 2 * 64) + 64
    shared = parameters(num_heads=4, num_key_value_heads=1)
    assert parameters() - shared == 2 * 2 * 64 * 48  # keys and values are a quarter as wide


@every_variant
def test_what_every_model_promises(name, tmp_path):
    assert_causal(lambda: build(name))
    assert_padding_is_invisible(lambda: build(name))
    assert_long_histories_keep_the_newest(lambda: build(name))
    assert_save_load_identical(lambda: build(name), tmp_path)
    assert_refit_is_fresh(lambda: build(name))
    assert_recommends(lambda: build(name))


@pytest.mark.parametrize("name", ["grouped", "cosine"])
def test_overfits_one_batch(name):
    assert_overfits_one_batch(lambda: build(name), learning_rate=5e-3)


@pytest.mark.parametrize("name", ["plain", "cosine"])
def test_the_padding_row_stays_zero(name):
    """Row 0 is exactly zero after 20 AdamW steps with decay, while others move; the published one is not."""
    model = build(name)
    before_ID = model.item_table.weight.detach().clone()
    fit(model, random_histories(30, (4, 6)), steps=20, learning_rate=1e-2, weight_decay=0.1)
    assert not model.item_table.weight[0].any() and not torch.equal(before_ID, model.item_table.weight)
    assert build("faithful").item_table.weight[0].any()


def test_which_matrices_start_small():
    ours, published = (build(num_blocks=8, embedding_dim=64, faithful=each) for each in (False, True))
    expected = 0.2 / math.sqrt(16)
    for block, small, usual in (
        *((each, each.feed_forward.down, each.feed_forward.up) for each in ours.blocks),
        *((each, each.feed_forward.up, each.feed_forward.down) for each in published.blocks),
    ):
        assert small.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert block.attention.output.weight.std().item() == pytest.approx(expected, rel=0.05)
        for each in (usual, block.feed_forward.gate, block.attention.query, block.attention.value):
            assert each.weight.std().item() == pytest.approx(0.2, rel=0.05)


def states_by_hand(model: Llama, items: list[int], first_position: int = 0) -> torch.Tensor:
    """One history, one position, one head and one pair at a time, in complex numbers."""
    config, x = model.config, model.item_table.weight[items]
    size, shares = config.embedding_dim // config.num_heads, config.num_heads // (config.num_key_value_heads or 4)
    positions = torch.arange(len(items)) + first_position
    turns = torch.polar(torch.ones(len(items), size // 2), torch.stack(
        [positions * config.rope_theta ** (-2 * pair / size) for pair in range(size // 2)], 1
    ))  # fmt: skip

    def norm(module, x):
        return x / (x.pow(2).mean(1, keepdim=True) + config.norm_eps).sqrt() * module.weight

    def head_of(projection, x, head):
        part = projection(x)[:, head * size : (head + 1) * size]
        return part, torch.view_as_real(torch.view_as_complex(part.reshape(-1, size // 2, 2)) * turns).flatten(1)

    for block in model.blocks:
        normed, mixed = norm(block.attention_norm, x), []
        for head in range(config.num_heads):
            query, key = (
                head_of(projection, normed, number)[1]
                for projection, number in ((block.attention.query, head), (block.attention.key, head // shares))
            )
            scores = (query @ key.T / math.sqrt(size)).masked_fill(
                torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf
            )
            mixed.append(scores.softmax(1) @ head_of(block.attention.value, normed, head // shares)[0])
        x = x + block.attention.output(torch.cat(mixed, 1))
        normed, network = norm(block.forward_norm, x), block.feed_forward
        gate = network.gate(normed)
        x = x + network.down(gate / (1 + torch.exp(-gate)) * network.up(normed))
    return norm(model.final_norm, x)


@pytest.mark.parametrize("name", ["plain", "grouped", "one key"])
@torch.no_grad()
def test_states_by_hand(name):
    model, items = build(name).eval(), [3, 14, 15, 9, 2, 6]
    for norm in (model.final_norm, *(block.attention_norm for block in model.blocks)):
        norm.weight.uniform_(0.5, 1.5)
    states_LD = model(torch.tensor([items]))
    torch.testing.assert_close(states_LD, states_by_hand(model, items), rtol=0, atol=1e-5)
    torch.testing.assert_close(states_LD, states_by_hand(model, items, first_position=17), rtol=0, atol=1e-5)
    model.blocks[0].attention.key.weight.mul_(1.1)
    assert (model(torch.tensor([items])) - states_LD).abs().max() > 1e-3


def test_the_input_table_is_scaled_by_the_root_of_the_width():
    plain, scaled = build().eval(), build(scale_item_table=True).eval()
    scaled.load_state_dict(plain.state_dict())
    items_BL = random_histories(30, (2, 5))
    assert not torch.allclose(scaled(items_BL), plain(items_BL))
    with torch.no_grad():
        plain.item_table.weight *= 4
    torch.testing.assert_close(scaled(items_BL), plain(items_BL))


def test_norms_compute_in_fp32():
    norm = build().to(torch.bfloat16).final_norm
    x_TD = torch.randn(50, 16).bfloat16()
    wide_TD = x_TD.float()
    exact_TD = (wide_TD * torch.rsqrt(wide_TD.pow(2).mean(1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(norm(x_TD), exact_TD)
    narrow_TD = x_TD * torch.rsqrt(x_TD.pow(2).mean(1, keepdim=True) + 1e-5)
    assert not torch.equal(narrow_TD, exact_TD)


@pytest.mark.parametrize(("width", "hidden"), [(512, 1376), (64, 192), (32, 96)])
def test_the_feed_forward_width_is_rounded_up(width, hidden):
    assert SwiGLU(LlamaConfig(num_items=3, embedding_dim=width)).down.in_features == hidden


@pytest.mark.parametrize("name", ["plain", "grouped", "cosine"])
def test_growing_histories_are_read_as_whole_ones(name):
    """Also once rows outgrow the window of 12 items, with rows that do not grow, and with an empty one."""
    model = build(name)
    source = torch.Generator().manual_seed(1)
    items_BL = torch.randint(1, 31, (4, 5), generator=source)
    items_BL[0, :3], items_BL[1], items_BL[2, 2:] = 0, 0, 0
    reading, steps, lengths = model.start(items_BL), [], []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: steps.append(len(output)))
    tolerance = 1e-5 * (20 if name == "cosine" else 1)  # its vectors are 20 long
    for _ in range(9):
        new_BN = torch.randint(0, 31, (4, 2), generator=source)
        new_BN[3] = torch.randint(0, 2, (2,), generator=source) * new_BN[3]
        items_BL = torch.cat([items_BL, new_BN], 1)
        steps.clear()
        found_BD = reading.extend(new_BN)
        lengths.append((int((items_BL != 0).sum(1).max()), steps[0], int((new_BN != 0).sum())))
        with torch.no_grad():
            torch.testing.assert_close(found_BD, model.encode(items_BL), rtol=0, atol=tolerance)
    inside = [(read, new) for length, read, new in lengths if length <= 12]
    outside = [(read, new) for length, read, new in lengths if length > 12]
    assert len(inside) >= 3 and all(read == new for read, new in inside)  # the new positions alone
    assert len(outside) >= 3 and all(read > new for read, new in outside)  # whole windows


def test_a_history_that_was_not_remembered_is_noticed():
    model = build()
    items_BL = random_histories(30, (2, 6))
    reading = model.start(items_BL[:, :4])
    reading.kept[model.blocks[0].attention][:, 1] = 0
    with torch.no_grad():
        difference = (reading.extend(items_BL[:, 4:]) - model.encode(items_BL)).abs().max()
    assert difference > 1e-3


def test_a_model_that_attends_padding_reads_anew():
    for act in (
        lambda: build("faithful").start(torch.ones(1, 3, dtype=torch.long)),
        lambda: export_program(build("faithful")),
    ):
        with pytest.raises(InputError, match="attends"):
            act()


def test_adapters_train_merge_and_travel_alone(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model, items_BL = build("grouped").eval(), random_histories(30, (4, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = ["query", "key", "value", "output", "gate", "up", "down"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    plain_TD = adapted(items_BL).detach()
    fit(adapted, items_BL, steps=10, learning_rate=1e-2)
    adapted_TD = adapted.eval()(items_BL).detach()
    assert (adapted_TD - plain_TD).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)
    fresh = build("grouped").eval()
    fresh.load_state_dict(before)
    torch.testing.assert_close(fresh(items_BL), plain_TD, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(loaded(items_BL), adapted_TD, rtol=0, atol=1e-6)
    merged = loaded.merge_and_unload()
    assert type(merged) is Llama and merged.state_dict().keys() == before.keys()
    torch.testing.assert_close(merged(items_BL), adapted_TD, rtol=0, atol=1e-5)


@pytest.fixture
def language_model_folder(tmp_path):
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    config = TheirConfig(vocab_size=11, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_language_model_that_starts_blocks_is_saved_as_ours(language_model_folder, tmp_path):
    model = Llama.from_causal_lm(language_model_folder, 30, dropout=0.0, temperature=0.1).eval()
    model.save_pretrained(tmp_path / "ours")
    items_BL = random_histories(30, (2, 4))
    assert torch.equal(SequenceModel.from_pretrained(tmp_path / "ours").encode(items_BL), model.encode(items_BL))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"head_dim": 4}, "head_dim is 4, expected 8"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10.0}}, "rope_type is 'linear'"),
    ],
)
def test_language_models_that_compute_otherwise_are_refused(language_model_folder, changed, sentence):
    path = language_model_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(InputError, match=sentence):
        Llama.from_causal_lm(language_model_folder, num_items=30)


def test_what_does_not_fit_a_language_model_is_refused(language_model_folder, tmp_path):
    with pytest.raises(InputError, match="num_blocks=3: expected 1 to the 2 blocks"):
        Llama.from_causal_lm(language_model_folder, num_items=30, num_blocks=3)
    with pytest.raises(InputError, match=r"item_table.weight \(31, 8\) for \(31, 16\)"):
        Llama.from_causal_lm(language_model_folder, num_items=30, items_ID=torch.zeros(31, 8))
    with pytest.raises(InputError, match="holds no language model"):
        Llama.from_causal_lm(tmp_path / "nowhere", num_items=30)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_heads": 16}, "num_heads=16"), ({"num_heads": 3}, "num_heads=3"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"), ({"max_sequence_length": 0}, "max_sequence_length=0"),
    ],
)  # fmt: skip
def test_configurations_refuse_what_cannot_be(wrong, named):
    with pytest.raises(ValueError, match=named):
        build(**wrong)


def test_the_rate_warms_up_and_falls_to_its_floor_over_the_steps_there_are():
    from types import SimpleNamespace

    settings = {"learning_rate": 3e-4, "warmup_steps": 2, "schedule": "cosine"}
    factors = {}
    for floor in (1e-5, 0.0):
        module = SequenceModule(build(), TrainingConfig(**settings, final_learning_rate=floor), seed=0)
        module._trainer = SimpleNamespace(estimated_stepping_batches=10)
        schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
        factors[floor] = [3e-4 * schedule.lr_lambdas[0](step) for step in range(13)]
    assert factors[1e-5][:3] == pytest.approx([1.5e-4, 3e-4, 3e-4])
    assert factors[1e-5][6] == pytest.approx((3e-4 + 1e-5) / 2) and factors[1e-5][10:] == pytest.approx([1e-5] * 3)
    assert factors[0.0][10:] == [0.0] * 3 and factors[0.0][6] == 3e-4 * 0.5 * (1.0 + math.cos(math.pi * 0.5))
    with pytest.raises(ValueError, match="final_learning_rate=0.1: expected 0 to"):
        TrainingConfig(final_learning_rate=0.1)


@pytest.mark.slow
def test_the_order_2_chain_is_learnt_and_another_users_history_teaches_nothing():
    def fresh():
        torch.manual_seed(0)
        return Llama(LlamaConfig(num_items=50, max_sequence_length=8, embedding_dim=32, num_heads=2, dropout=0.0))

    model, started = fresh(), time.process_time()
    train(model, steps=250)
    assert time.process_time() - started < 60
    assert recall_at_1(model) >= 0.85 and recall_at_1(model, exchange=True) <= 0.1
    twin = fresh()
    train(twin, steps=100, exchange=True)
    assert recall_at_1(twin) <= 0.15
    newest = histories(2000, seed=7)[:, -1]
    assert (newest == np.bincount(histories(2000, seed=1).ravel()).argmax()).mean() <= 0.1


@pytest.mark.parametrize("name", ["grouped", "cosine"])
def test_exported_graphs_score_what_the_model_scores(name, tmp_path):
    model = build(name).eval()
    program = export_program(model).module()
    for shape in ((1, 1), (4, 7), (2, 12)):
        items_BL = torch.randint(0, 31, shape)
        with torch.no_grad():
            scores_BI = model.scores(model.encode(items_BL), model.item_vectors())[:, 1:]
        torch.testing.assert_close(program(items_BL)[:, 1:], scores_BI, rtol=0, atol=2e-5)


def test_onnx_runtime_scores_what_the_model_scores(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"an ONNX file needs {package} (optional extra `export`)")
    import onnxruntime

    model, items_BL = build("grouped").eval(), torch.randint(0, 31, (3, 9))
    export_onnx(model, tmp_path / "model.onnx")
    runtime = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (scores_BI,) = runtime.run(["scores"], {"items": items_BL.numpy()})
    with torch.no_grad():
        expected_BI = model.scores(model.encode(items_BL), model.item_vectors())
    torch.testing.assert_close(torch.from_numpy(scores_BI)[:, 1:], expected_BI[:, 1:], rtol=0, atol=1e-5)
