"""An exported graph scores what the model scores, for batches and lengths it was not traced with."""

import copy

import pytest
import torch

from textrec.models.bert4rec import BERT4Rec, BERT4RecConfig
from textrec.models.exporting import export_onnx, export_program
from textrec.models.gru4rec import GRU4Rec, GRU4RecConfig
from textrec.models.hstu import HSTU, HSTUConfig
from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.models.sequence_model import Layout
from textrec.schema import InputError

SIZE = {"num_items": 30, "max_sequence_length": 12, "embedding_dim": 8, "num_blocks": 1}
MODELS = {
    "sasrec": lambda: SASRec(SASRecConfig(**SIZE)),
    "esasrec": lambda: SASRec(SASRecConfig(**SIZE, block="ligr", temperature=0.05, tie_item_table=False)),
    "bert4rec": lambda: BERT4Rec(BERT4RecConfig(**SIZE)),
    "gru4rec": lambda: GRU4Rec(GRU4RecConfig(**SIZE)),
}


def batches(name: str) -> list[torch.Tensor]:
    """Batches of several shapes, padded left, right and between, with an empty history."""
    source = torch.Generator().manual_seed(0)
    shapes = [(1, 12), (5, 12)] if name == "gru4rec" else [(1, 1), (4, 7), (3, 11), (2, 2)]
    drawn = [torch.randint(0, 31, shape, generator=source) for shape in shapes]
    drawn[-1][0] = 0
    return drawn


def scores_of(model, items_BL):
    with torch.no_grad():
        scores_BI = model.scores(model.encode(items_BL), model.item_vectors())
    return torch.cat([torch.full((len(items_BL), 1), -torch.inf), scores_BI[:, 1:]], 1)


@pytest.mark.parametrize("name", ["esasrec", "gru4rec"])
def test_exported_program_scores_what_the_model_scores(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    before = copy.deepcopy(model.state_dict())
    program = export_program(model)
    assert all(torch.equal(before[weight], value) for weight, value in model.state_dict().items())
    assert model.training and Layout.of.__self__ is Layout  # the model and the layout are left as they were
    model.eval()
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for items_BL in batches(name):
        torch.testing.assert_close(loaded(items_BL), scores_of(model, items_BL), rtol=0, atol=1e-5)
    with torch.no_grad():
        model.item_table.weight[1:] *= 1.1  # twin: other weights are told apart
    assert (loaded(items_BL) - scores_of(model, items_BL))[:, 1:].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sasrec", "bert4rec", "gru4rec"])
def test_onnx_runtime_scores_what_the_model_scores(name, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"writing an ONNX file needs {package} (optional extra `export`)")
    reason = "running an ONNX file needs onnxruntime (optional extra `export`)"
    onnxruntime = pytest.importorskip("onnxruntime", reason=reason)
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    export_onnx(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for items_BL in batches(name):
        (scores_BI,) = session.run(["scores"], {"items": items_BL.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores_BI), scores_of(model, items_BL), rtol=0, atol=1e-5)


def test_a_model_that_attends_padding_is_refused():
    with pytest.raises(InputError, match="HSTU: its attention depends on the lengths"):
        export_program(HSTU(HSTUConfig(num_items=9)))
    with pytest.raises(InputError, match="attend_padding=True"):
        export_program(SASRec(SASRecConfig(**SIZE, attend_padding=True)))
