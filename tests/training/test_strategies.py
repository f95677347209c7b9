"""Every strategy trains what one process trains, keeps it, and goes on with another number of processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from training.distributed_script import CONFIG, MODELS, MUTANTS, TRAINING, train

from textrec.models.sasrec import SASRec
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training import strategies
from textrec.training.batches import HistoryBatches, InParts, next_item_targets, training_loader
from textrec.training.consolidation import consolidate
from textrec.training.launch import describe, launch
from textrec.training.module import TrainingConfig
from textrec.training.trainer import fit

TESTS = Path(__file__).parents[1]
SHARED = ["ddp", "fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
OFFLOADED = ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]
TARGET = "training.distributed_script:train"
OTHERS, CUT = ["HSTU", "Llama"], ["fsdp", "deepspeed_stage_3"]
POSITIONS = 253  # of one epoch


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"strategy": "deepspeed_stage_4"}, "strategy='deepspeed_stage_4': expected one of"),
        ({"precision": "64"}, "precision='64': expected one of"),
        ({"accumulate": 0}, "accumulate=0: expected at least 1"),
    ],
)
def test_settings_are_checked(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainingConfig(**settings)


def test_half_precision_is_for_cuda():
    with pytest.raises(InputError, match="precision='16-mixed' needs CUDA"):
        strategies.precision_of(TrainingConfig(precision="16-mixed"), "cpu")
    assert strategies.precision_of(TrainingConfig(), "cpu") == "32-true"
    assert strategies.precision_of(TrainingConfig(), "cuda") == "bf16-mixed"


def test_mixed_precision_clips_the_gradients_of_a_fused_optimizer(ring, tmp_path):
    weights = {}
    for name, clip in (("free", None), ("clipped", 1e-9)):  # far below Adam's epsilon: nothing is left to step along
        torch.manual_seed(0)
        training = replace(TRAINING, precision="bf16-mixed", gradient_clip=clip, weight_decay=0.0, max_epochs=1)
        fit(SASRec(CONFIG), ring, training, seed=0, folder=tmp_path / name)
        weights[name] = consolidate(tmp_path / name / "last.ckpt")
    torch.manual_seed(0)
    first = SASRec(CONFIG).state_dict()
    assert apart(weights["clipped"], first) < 3e-4 < apart(weights["free"], first)


def test_an_absent_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"needs the package deepspeed.*textrec\[deepspeed\]"):
        strategies.trainer_for(TrainingConfig(strategy="deepspeed_stage_2"), "cpu", 1, [], tmp_path)


@pytest.mark.parametrize("name", [name for name in strategies.STRATEGIES if name.startswith("deepspeed")])
def test_the_configuration_is_one_that_the_installed_deepspeed_knows(name):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    written = strategies.zero_config(name, "cpu", 8) | {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    read = DeepSpeedConfig(written)
    assert read.zero_config.stage == int(name[16]) and read.gradient_clipping == 0.5
    assert (read.zero_config.offload_optimizer is not None) == name.endswith("_offload")
    assert (read.zero_config.offload_param is not None) == (name == "deepspeed_stage_3_offload")
    assert read.zero_allow_untested_optimizer and not read.zero_force_ds_cpu_optimizer
    written["zero_optimization"]["overlap_com"] = True
    with pytest.raises(ValueError, match="overlap_com"):
        DeepSpeedConfig(written)


def test_a_batch_in_parts_is_that_batch(ring):
    dataset = HistoryBatches(ring.histories, ring.split.train_end_U, 8, next_item_targets)
    whole = list(training_loader(dataset, 16, seed=0))
    parts = training_loader(dataset, 16, seed=0, parts=3)
    assert isinstance(parts, InParts) and len(parts) == 3 * len(whole) == len(list(parts))
    for batch, three in zip(whole, zip(*[iter(parts)] * 3, strict=True), strict=True):
        assert {part["targets_in_step"] for part in three} == {int((batch["targets"] > 0).sum())}
        rows = sorted(map(tuple, torch.cat([part["items"] for part in three]).tolist()))
        assert rows == sorted(map(tuple, batch["items"].tolist()))


def test_accumulation_is_exact_and_a_mean_of_means_is_not(ring, tmp_path, monkeypatch):
    """The parts of a batch hold unequal numbers of positions."""

    def weights(name: str, **settings):
        torch.manual_seed(0)
        training = replace(TRAINING, learning_rate=1e-2, **settings)
        fit(SASRec(CONFIG), ring, training, seed=0, folder=tmp_path / name)
        return consolidate(tmp_path / name / "last.ckpt")

    whole, parts = weights("whole"), weights("parts", accumulate=4)
    assert apart(whole, parts) < 1e-5

    plain = InParts.__iter__
    mean_of_means = lambda self: ({k: v for k, v in b.items() if k != "targets_in_step"} for b in plain(self))  # noqa: E731
    monkeypatch.setattr(InParts, "__iter__", mean_of_means)
    monkeypatch.setattr(
        strategies.DistributedModule, "mean_over_step", lambda self, total, count: total / max(count, 1)
    )
    assert apart(whole, weights("mutant", accumulate=4)) > 1e-4


def apart(one: dict, two: dict) -> float:
    """Return the largest difference, but for key biases: their true gradient is zero, Adam steps along the noise."""
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one if not name.endswith("key.bias"))


def test_processes_have_unequal_shares(ring):
    """Where shares are equal, means over processes of their means are right by chance."""
    dataset = HistoryBatches(ring.histories, ring.split.train_end_U, 8, next_item_targets)
    for epoch in range(3):
        counts = []
        for rank in range(2):
            loader = training_loader(dataset, 16, 0, rank, 2)
            loader.sampler.set_epoch(epoch)
            counts.append([int((batch["targets"] > 0).sum()) for batch in loader])
        assert all(one != two for one, two in zip(*counts, strict=True)) and sum(map(sum, counts)) == POSITIONS
    assert len(ring.split.targets("validation")[0]) % 2 == 1


@dataclass
class Runs:
    """Three epochs by one process; by two, in every strategy; and by one and two again from what the others kept."""

    single: dict
    curve: list
    folder: Path
    told: dict


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    from training.conftest import write_ring

    return write_ring(tmp_path_factory.mktemp("data") / "ring").folder


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory) -> Runs:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("runs")
    curve = train(str(prepared), str(folder / "single"), ["auto"])["curves"]["auto"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(TESTS))
        told = {}
        two = {"prepared": str(prepared), "folder": str(folder / "two"), "names": SHARED + OFFLOADED, "keep": 0}
        told["two"] = launch(TARGET, two | {"accumulate": 2}, folder / "two", 2)
        hand_over(folder / "two", folder / "one", SHARED + OFFLOADED)
        one = {"prepared": str(prepared), "folder": str(folder / "one"), "names": SHARED + OFFLOADED, "keep": 1}
        told["one"] = launch(TARGET, one | {"accumulate": 2}, folder / "one", 1)
    return Runs(consolidate(folder / "single" / "auto" / "last.ckpt"), curve, folder, told)


def hand_over(source: Path, target: Path, names: list[str]) -> None:
    """Let runs in `target` begin with the checkpoints kept in `source`."""
    for name in names:
        kept, last = source / name / "kept.ckpt", target / name / "last.ckpt"
        last.parent.mkdir(parents=True)
        shutil.copytree(kept, last) if kept.is_dir() else shutil.copy(kept, last)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED + OFFLOADED)
def test_two_processes_equal_one(runs, name):
    assert apart(runs.single, consolidate(runs.folder / "two" / name / "last.ckpt")) < 1e-5
    for one, two in zip(runs.curve, runs.told["two"]["curves"][name], strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
        assert two["ndcg@10"] == pytest.approx(one["ndcg@10"], abs=1e-9)  # every user once


@pytest.mark.distributed
@pytest.mark.slow
def test_clipping_is_felt_so_that_equality_speaks_of_it(runs, prepared, tmp_path):
    train(str(prepared), str(tmp_path), ["auto"], gradient_clip=None)
    assert apart(runs.single, consolidate(tmp_path / "auto" / "last.ckpt")) > 1e-4


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED + OFFLOADED)
def test_one_process_goes_on_where_two_stopped(runs, name):
    assert apart(runs.single, consolidate(runs.folder / "one" / name / "last.ckpt")) < 1e-5
    curve = runs.told["one"]["curves"][name]
    assert [entry["epoch"] for entry in curve] == [0, 1, 2]
    assert curve[0] == runs.told["two"]["curves"][name][0]  # of the two processes: carried along, not trained again


@pytest.fixture(scope="module")
def others(prepared, tmp_path_factory) -> tuple[Path, dict]:
    """Two processes train other models, cut into shares, and SASRec with mistakes; what they told by name."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("others")
    calls = {name: {"model": name, "names": CUT, "max_epochs": 2} for name in OTHERS}
    calls |= {name: {"mutant": name, "names": ["ddp"]} for name in MUTANTS}
    calls = {name: call | {"prepared": str(prepared), "folder": str(folder / name)} for name, call in calls.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(TESTS))
        told = launch(f"{TARGET}_all", {"calls": list(calls.values())}, folder, 2)
    return folder, dict(zip(calls, told, strict=True))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("model", OTHERS)
def test_two_processes_equal_one_for_other_models(others, prepared, tmp_path, model):
    """Bias tables of odd lengths, buckets that no pair falls into, norms without a bias: all are cut and joined."""
    folder, told = others
    [curve] = train(str(prepared), str(tmp_path), ["auto"], model=model, max_epochs=2)["curves"].values()
    single = consolidate(tmp_path / "auto" / "last.ckpt")
    cls, config = MODELS[model]
    seed_everything(0)
    for name, start in cls(config).named_parameters():
        assert (single[name] - start).abs().max() > 1e-3, name
    for name in CUT:
        assert apart(single, consolidate(folder / model / name / "last.ckpt")) < 1e-5, name
        for one, two in zip(curve, told[model]["curves"][name], strict=True):
            assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
            assert two["ndcg@10"] == pytest.approx(one["ndcg@10"], abs=1e-9)


@pytest.mark.distributed
@pytest.mark.slow
def test_mistakes_break_the_equality(runs, others):
    folder, told = others
    differs = apart(runs.single, consolidate(folder / "mean_of_means" / "ddp" / "last.ckpt"))
    assert differs > 1e-4
    for name in ("mean_over_processes", "filled_up"):
        assert apart(runs.single, consolidate(folder / name / "ddp" / "last.ckpt")) < 1e-5
        for one, two in zip(runs.curve, told[name]["curves"]["ddp"], strict=True):
            assert abs(two["ndcg@10"] - one["ndcg@10"]) > 1e-6, name


@pytest.mark.distributed
@pytest.mark.slow
def test_the_best_model_is_whole(runs):
    for name in SHARED + OFFLOADED:
        model = SASRec.from_pretrained(runs.folder / "two" / name / "model")
        assert model.item_table.weight.shape == (31, 15)
        best = max(runs.curve, key=lambda entry: entry["ndcg@10"])["epoch"]
        if best == 2:
            assert apart(model.state_dict(), consolidate(runs.folder / "two" / name / "last.ckpt")) < 1e-6


@pytest.mark.distributed
@pytest.mark.slow
def test_process_zero_alone_writes(runs):
    log = (runs.folder / "two" / "launch.log").read_text()
    assert runs.told["two"]["world_size"] == 2
    for name in SHARED + OFFLOADED:
        row = runs.folder / "two" / name
        assert len((row / "logs" / "metrics.csv").read_text().splitlines()) == 4, log[-2000:]  # a header, three epochs
        assert len(list((row / "logs").glob("events*"))) == 1
        assert not list(row.rglob("*.partial-*"))
    assert runs.told["two"]["tokens"] == 3 * POSITIONS  # both processes' positions


@pytest.mark.distributed
@pytest.mark.slow
def test_the_written_configuration_is_what_ran(runs):
    written = json.loads((runs.folder / "two" / "deepspeed_stage_2" / "deepspeed.json").read_text())
    assert written["zero_optimization"]["stage"] == 2
    assert written["train_micro_batch_size_per_gpu"] == 4  # 16 histories over 2 processes in 2 parts
    assert written["gradient_accumulation_steps"] == 2 and written["gradient_clipping"] == 0.5


def free_port() -> str:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return str(asked.getsockname()[1])


def run_together(commands: list[list[str]], environments: list[dict]) -> None:
    """Start one command per machine, all of them this one, and wait for all."""
    base = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    started = [
        subprocess.Popen(command, env=base | extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command, extra in zip(commands, environments, strict=True)
    ]
    for process in started:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_machines_under_torchrun_go_on_where_one_process_stopped(runs, prepared):
    folder, names = runs.folder / "machines", ["ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"]
    hand_over(runs.folder / "one", folder, names)
    arguments = {"prepared": str(prepared), "folder": str(folder), "names": names, "accumulate": 2}
    spec = describe(TARGET, arguments, folder)
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=127.0.0.1:{free_port()}", "-m", "textrec.training.launch", str(spec)]  # fmt: skip
    run_together([start, start], [{}, {}])
    told = json.loads((folder / "result.json").read_text())
    assert told["world_size"] == 2
    for name in names:
        assert [entry["epoch"] for entry in told["curves"][name]] == [0, 1, 2]
        assert apart(runs.single, consolidate(folder / name / "last.ckpt")) < 1e-5, name


@pytest.mark.distributed
@pytest.mark.slow
def test_tasks_of_slurm_find_each_other(runs, prepared):
    folder = runs.folder / "slurm"
    spec = describe(TARGET, {"prepared": str(prepared), "folder": str(folder), "names": ["ddp"]}, folder)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
           "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": free_port()}  # fmt: skip
    start = [sys.executable, "-m", "textrec.training.launch", str(spec)]
    tasks = [job | {"SLURM_PROCID": rank, "SLURM_NODEID": rank, "SLURM_LOCALID": "0"} for rank in ("0", "1")]
    run_together([start, start], tasks)
    assert json.loads((folder / "result.json").read_text())["world_size"] == 2
    assert apart(runs.single, consolidate(folder / "ddp" / "last.ckpt")) < 1e-5


@pytest.mark.distributed
@pytest.mark.slow
def test_two_machines_of_deepspeeds_hostfile(runs, prepared):
    folder = runs.folder / "hostfile"
    arguments = {"prepared": str(prepared), "folder": str(folder), "names": ["deepspeed_stage_2"]}
    spec = describe(TARGET, arguments, folder)
    (folder / "hosts").write_text("first slots=1\nsecond slots=1\n")
    start = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(folder / "hosts"),
             "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", free_port()]  # fmt: skip
    what = ["--module", "textrec.training.launch", str(spec)]
    run_together([[*start, "--node_rank", rank, *what] for rank in ("0", "1")], [{"DS_ACCELERATOR": "cpu"}] * 2)
    assert json.loads((folder / "result.json").read_text())["world_size"] == 2
    assert apart(runs.single, consolidate(folder / "deepspeed_stage_2" / "last.ckpt")) < 1e-5
