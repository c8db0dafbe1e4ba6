"""Numbers of a run reach the trackers that it asks for; one that fails costs the run nothing."""

import sys
import types

import pytest
from tune_tools import WORDS, write

from gemmakit.errors import InputError, MissingDependency
from gemmakit.tune import TuneSettings, resume, tune
from gemmakit.tune.report import read_metrics
from gemmakit.tune.trackers import Trackers


@pytest.fixture
def settings(tiny, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"Say {w}", "completion": w} for w in WORDS])
    return dict(model=str(tiny), data=str(rows), out=str(tmp_path / "out"), rank=2, batch_size=2, max_steps=4)


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the service, which is on a network: what it was told."""
    told = types.SimpleNamespace(begun=[], logged=[], ended=0, broken_at=None)

    def log(values, step):
        if step == told.broken_at:
            raise ConnectionError("the network is gone")
        told.logged.append((step, values))

    def finish():
        told.ended += 1

    module = types.ModuleType("wandb")
    module.init, module.log, module.finish = lambda **named: told.begun.append(named), log, finish
    module.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_a_service_is_told_what_metrics_holds_and_goes_on_where_the_run_does(settings, wandb, tmp_path):
    def stop(step, total):
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(TuneSettings(**settings, track=("wandb",), save_steps=1), tell=stop)
    resume(tmp_path / "out")
    assert [values["loss"] for step, values in wandb.logged[-3:]] == [
        record["loss"] for record in read_metrics(tmp_path / "out")[-3:]
    ]
    assert [step for step, _ in wandb.logged] == [1, 2, 2, 3, 4]
    first, second = wandb.begun
    assert first == second and first["config"]["rank"] == 2 and first["name"].startswith("out-")
    assert wandb.ended == 2


def test_a_service_that_fails_is_told_of_and_costs_the_run_nothing(settings, wandb, tmp_path):
    wandb.broken_at = 2
    with pytest.warns(UserWarning, match="wandb takes no more numbers of this run, which goes on: the network is gone"):
        assert tune(TuneSettings(**settings, track=("wandb",))).finished
    assert [step for step, _ in wandb.logged] == [1]
    assert len(read_metrics(tmp_path / "out")) == 4


def test_a_service_that_does_not_begin_costs_nothing_of_what_the_folder_held(settings, wandb, tmp_path, monkeypatch):
    """Those that had begun are closed."""

    def init(**named):
        raise ConnectionError("log in first")

    refusing = types.ModuleType("trackio")
    refusing.init, refusing.__spec__ = init, types.SimpleNamespace(name="trackio")
    monkeypatch.setitem(sys.modules, "trackio", refusing)
    held = {"tune.json": b"{}", "adapter_model.safetensors": b"old", "metrics.jsonl": b""}
    (tmp_path / "out").mkdir()
    for name, content in held.items():
        (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(InputError, match="--track trackio does not begin: log in first"):
        tune(TuneSettings(**settings, track=("wandb", "trackio")), overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == held
    assert len(wandb.begun) == wandb.ended == 1


def test_event_files_hold_the_numbers_of_the_run(settings, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard's files are written by its package: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tune(TuneSettings(**settings, track=("tensorboard",)))
    found = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in result.records]  # float32 there


def test_events_of_a_run_that_died_before_its_first_save_are_hidden(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard's files are written by its package: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (range(6), range(3)):
        trackers = Trackers(("tensorboard",), tmp_path, {}, begun=1)
        for step in steps:
            trackers.put({"step": step, "loss": len(steps)})
        trackers.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(0, 3), (1, 3), (2, 3)]


def test_what_is_not_there_is_said_before_anything_is_written(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("gemmakit.tune.trackers.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="--track trackio needs the package trackio"):
        tune(TuneSettings(**settings, track=("trackio",)))
    with pytest.raises(InputError, match="track is \\('mlflow',\\); it must be a list of 'tensorboard'"):
        TuneSettings(**settings, track=("mlflow",))
    assert not (tmp_path / "out" / "tune.json").exists()
