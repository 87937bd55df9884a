"""Runs that stop and go on: bit-equal to one that did not, and refused where they could not be."""

import copy
import json
import resource
import signal

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

from sparsedm_compile.data_position import RepeatedBatches
from sparsedm_compile.ema import EMA
from sparsedm_compile.finetune import finetune
from sparsedm_compile.sparsify import set_pattern, sparsify
from sparsedm_compile.training import train
from sparsedm_compile.training_checkpoint import ProcessState, TrainingCheckpoints


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small to share: with two threads on a busy machine a step takes ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Denoiser(nn.Module):
    """Has a buffer, dropout and a frozen weight, each of which a checkpoint could forget."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(16, width), nn.BatchNorm1d(width), nn.Linear(width, 16)
        self.drop = nn.Dropout(0.2)
        self.into.bias.requires_grad_(False)

    def forward(self, x, timesteps):
        hidden = self.norm(self.into(x.flatten(1))) + timesteps.unsqueeze(1) / 999
        return self.out(self.drop(torch.tanh(hidden))).view_as(x)


def pair(pattern="2:4", width=32) -> tuple[Denoiser, Denoiser]:
    torch.manual_seed(0)
    teacher = Denoiser(width)
    student = copy.deepcopy(teacher)
    sparsify(student, pattern, policy="all")
    return student, teacher


def batches() -> DataLoader:
    data = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(2))


def run(folder=None, steps=20, student=None, **options):
    """One start of the run, as a new process would make it."""
    fresh, teacher = pair()
    student = student or fresh
    torch.manual_seed(5)
    options = {"learning_rate": 1e-2, "warmup_steps": 8, "ema_decay": 0.9, "checkpoint_every": 3, **options}
    if options.get("patterns"):
        teacher = None
    options.setdefault("steps", steps)
    record = finetune(
        student, teacher, options.pop("batches", None) or batches(), checkpoint_dir=folder, progress=False, **options
    )
    return student, record


KINDS = {
    "srste": {},
    "fixed": {"fixed_mask": True},
    "flexible": {"patterns": ["dense", "2:4", "1:4"]},
    "float16": {"amp": "float16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_in_three_pieces_is_bit_equal_to_in_one(tmp_path, kind):
    whole, expected = run(**KINDS[kind])
    for steps in (7, 11):
        run(tmp_path, steps, **KINDS[kind])
    student, record = run(tmp_path, **KINDS[kind])
    assert record.steps == 20
    assert record.losses == expected.losses
    for name, tensor in whole.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name


def test_stopped_between_checkpoints_repeats_the_steps_since(tmp_path):
    whole, expected = run()

    class Stop(Exception):
        pass

    class StopAt(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                self.given = getattr(self, "given", 0) + 1
                if self.given == 12:
                    raise Stop
                yield batch

    data = batches()
    data.__class__ = StopAt
    with pytest.raises(Stop):
        run(tmp_path, batches=data)
    assert json.loads((tmp_path / "manifest.json").read_text())["step"] == 9
    student, record = run(tmp_path)
    assert record.losses == expected.losses
    assert torch.equal(student.into.weight, whole.into.weight)


def test_done_already_leaves_the_averaged_weights(tmp_path):
    whole, _ = run(tmp_path)
    student, record = run(tmp_path)
    assert record.steps == 20
    assert torch.equal(student.into.weight, whole.into.weight)


@pytest.mark.parametrize("kind", ["srste", "fixed"])
def test_weights_of_the_start_do_not_matter(tmp_path, kind):
    whole, _ = run(**KINDS[kind])
    run(tmp_path, 7, **KINDS[kind])
    other, _ = pair()
    with torch.no_grad():
        other.into.weight.normal_()  # by which other weights would be masked
    student, _ = run(tmp_path, student=other, **KINDS[kind])
    assert torch.equal(student.into.weight, whole.into.weight)


def test_the_loss_scale_is_kept(tmp_path):
    scales = []
    for steps in (4, 8):
        model = nn.Linear(4, 4)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # overflows for more than 8 steps
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"ema": EMA(model), "steps": steps, "scaler": scaler, "checkpoint_dir": tmp_path, "progress": False}
        train(model, optimizer, lambda x, model=model: 1e6 * model(x).square().sum(), [torch.ones(2, 4)], **options)
        scales.append(scaler.get_scale())
    assert scales == [2.0**123, 2.0**119]


def test_the_directory_holds_one_checkpoint_that_others_can_read(tmp_path):
    run(tmp_path, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "step-00000008.safetensors"]
    with safe_open(tmp_path / "step-00000008.safetensors", "pt") as file:
        assert json.loads(file.metadata()["settings"])["plan"] == {"into": "2:4", "out": "2:4"}
        assert file.get_tensor("model/into.weight").count_nonzero() == 32 * 16  # the dense weights


def test_nan_stops_and_keeps_the_last_checkpoint(tmp_path):
    data = list(batches())[:4]
    data[3] = data[3] * float("nan")
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 4; .*training.* the state after step 3"):
        run(tmp_path / "training", batches=data)
    _, record = run(tmp_path / "training", steps=3, batches=data)
    assert record.steps == 3
    assert record.losses == run(steps=3, batches=data)[1].losses


class TestDamage:
    def stopped(self, folder):
        """A run stopped after 8 steps, and a student with weights of its own."""
        run(folder, 8)
        student, _ = pair()
        with torch.no_grad():
            student.into.weight.normal_()
        return folder / "step-00000008.safetensors", student, copy.deepcopy(student.state_dict())

    def refused(self, folder, student, before, message, **options):
        with pytest.raises(ValueError, match=message):
            run(folder, student=student, **options)
        assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())

    def test_truncated(self, tmp_path):
        path, student, before = self.stopped(tmp_path)
        content = path.read_bytes()
        path.write_bytes(content[:-100])
        self.refused(tmp_path, student, before, rf"is truncated: {len(content) - 100} bytes of {len(content)}")

    def test_one_bit(self, tmp_path):
        path, student, before = self.stopped(tmp_path)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        self.refused(tmp_path, student, before, r"its SHA-256 is not that of manifest\.json; restore it from a copy")

    @pytest.mark.parametrize("manifest", ["", "[1]", '{"step": 8}'])
    def test_manifest(self, tmp_path, manifest):
        _, student, before = self.stopped(tmp_path)
        (tmp_path / "manifest.json").write_text(manifest)
        self.refused(tmp_path, student, before, r"manifest\.json is damaged")

    def test_missing(self, tmp_path):
        path, student, before = self.stopped(tmp_path)
        path.unlink()
        self.refused(
            tmp_path, student, before, r"step-00000008\.safetensors is missing, though manifest\.json names it"
        )


class OnGPU:
    """Saves what a CUDA generator does: a state of 16 bytes."""

    def state_dict(self):
        return torch.zeros(16, dtype=torch.uint8)


class Stubborn:
    """Part of a run that saves, and cannot go on."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        raise RuntimeError("stubborn")


def test_a_part_that_cannot_go_on_leaves_the_others_as_they_were(tmp_path):
    def parts(seed):
        torch.manual_seed(seed)
        model, loader = nn.Linear(16, 16), batches()
        loader.generator.manual_seed(seed)
        optimizer, noise = torch.optim.Adam(model.parameters()), torch.Generator().manual_seed(seed)
        data = RepeatedBatches(loader)
        parts = {"process": ProcessState(data, torch.device("cpu")), "optimizer": optimizer, "model": model}
        return parts | {"ema": EMA(model), "noise": noise, "stubborn": Stubborn()}, data, loader.generator

    def state(parts, generator):
        tensors = [*parts["model"].parameters(), *parts["ema"].shadow.values(), parts["noise"].get_state()]
        return [tensor.detach().clone() for tensor in (*tensors, generator.get_state(), torch.get_rng_state())]

    saved, data, _ = parts(1)
    saved["model"](next(data).flatten(1)).sum().backward()
    saved["optimizer"].step()
    TrainingCheckpoints(tmp_path, saved, {}).save(1)
    fresh, _, generator = parts(2)
    before = state(fresh, generator)
    with pytest.raises(RuntimeError, match="stubborn"):
        TrainingCheckpoints(tmp_path, fresh, {}).restore()
    assert all(map(torch.equal, before, state(fresh, generator)))
    assert not fresh["optimizer"].state


def test_another_number_of_processes_is_said(tmp_path, monkeypatch, caplog):
    run(tmp_path, 3)
    run(tmp_path, 6)
    assert "processes" not in caplog.text
    monkeypatch.setattr("sparsedm_compile.training_checkpoint.rank_and_world", lambda: (0, 2))
    run(tmp_path, 9)
    assert "a run of 1 processes goes on in 2: all take the place in the data that the first had" in caplog.text


class TestOfAnotherRun:
    def test_plan(self, tmp_path):
        run(tmp_path, 3)
        student, _ = pair()
        set_pattern(student, "2:4", rules={"out": "1:4"})
        with pytest.raises(ValueError, match=r"a run with plan\['out'\] = 2:4, and this one has 1:4"):
            run(tmp_path, student=student)

    def test_model(self, tmp_path):
        run(tmp_path, 3, distillation_weight=0.0)
        student, _ = pair(width=64)
        message = r"another model: 'into\.bias' has \(32,\) there and \(64,\) here"
        with pytest.raises(ValueError, match=message):
            run(tmp_path, student=student, distillation_weight=0.0)

    @pytest.mark.parametrize("option", [{"learning_rate": 0.5}, {"seed": 1}, {"amp": "bfloat16"}, {"warmup_steps": 2}])
    def test_arguments(self, tmp_path, option):
        run(tmp_path, 3)
        ((name, value),) = option.items()
        with pytest.raises(ValueError, match=rf"a run with {name} = .*, and this one has {value}: go on as that run"):
            run(tmp_path, **option)

    def test_dtype(self, tmp_path):
        run(tmp_path, 3)
        student, _ = pair()
        with pytest.raises(ValueError, match=r"another model: 'into\.bias' has float32 there and bfloat16 here"):
            run(tmp_path, student=student.bfloat16())

    def test_kind_of_generator(self, tmp_path):
        TrainingCheckpoints(tmp_path, {"model": nn.Linear(2, 2), "noise": OnGPU()}, {}).save(1)
        model = nn.Linear(2, 2)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"generator 'noise' was on another kind of device than cpu \(.* 16 bytes"):
            TrainingCheckpoints(tmp_path, {"model": model, "noise": torch.Generator()}, {}).restore()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_clipping_of_any_loop(self, tmp_path):
        def start(norm):
            model = nn.Linear(4, 4)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            options = {"ema": EMA(model), "steps": 1, "checkpoint_dir": tmp_path, "progress": False}
            train(model, optimizer, lambda x: model(x).sum(), [torch.ones(1, 4)], max_grad_norm=norm, **options)

        start(1.0)
        with pytest.raises(ValueError, match=r"a run with max_grad_norm = 1\.0, and this one has 2\.0"):
            start(2.0)

    def test_every(self):
        with pytest.raises(ValueError, match="checkpoint_every must be at least 1 step, got 0"):
            run(steps=1, checkpoint_every=0)


class TestDirectoryThatCannotBeWritten:
    """Found before the model is called; it holds the weights that it would have kept from the steps before."""

    def refused(self, folder, message, **options):
        student, teacher = pair()
        calls = []
        student.register_forward_pre_hook(lambda *_: calls.append(1))
        with pytest.raises(OSError, match=message):
            run(folder, student=student, **options)
        assert calls == []
        return student, teacher

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_file_in_its_place(self, tmp_path, kind):
        (tmp_path / "run").write_text("notes")
        message = r"checkpoints cannot be saved in .*run: it is a file; choose another directory, or make this one"
        student, teacher = self.refused(tmp_path / "run", message, **KINDS[kind])
        assert torch.equal(student.into.weight, teacher.into.weight)
        assert (tmp_path / "run").read_text() == "notes"

    def test_a_file_above_it(self, tmp_path):
        (tmp_path / "file").write_text("")
        self.refused(tmp_path / "file" / "run", r"cannot be saved in .*run: .*Not a directory")

    def test_no_permission_to_go_on(self, tmp_path, monkeypatch):
        """Refused as the system would; root, whom it lets write anywhere, may run the tests."""
        run(tmp_path, 6)
        before = (tmp_path / "manifest.json").read_bytes()
        averaged, _ = run(tmp_path, 6)

        def forbidden(dir):
            raise PermissionError(13, "Permission denied", str(dir))

        monkeypatch.setattr("tempfile.TemporaryFile", forbidden)
        student, _ = self.refused(tmp_path, r"cannot be saved in .*: \[Errno 13\] Permission denied")
        assert (tmp_path / "manifest.json").read_bytes() == before
        assert torch.equal(student.into.weight, averaged.into.weight)
        assert len(run(tmp_path, 6)[1].losses) == 6  # done, so that nothing need be written


@pytest.fixture
def small_disk():
    """``small_disk(bytes)``: the kernel refuses files that grow beyond, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error from write, not a signal
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_keeps_the_checkpoint_before(tmp_path, small_disk):
    whole, expected = run()
    run(tmp_path, 6)
    size = (tmp_path / "step-00000006.safetensors").stat().st_size
    small_disk(size // 2)
    with pytest.raises(OSError, match=r"checkpoint of step 9 could not be saved; that of step 6 is intact: .*step-0"):
        run(tmp_path)
    small_disk(resource.RLIM_INFINITY if resource.getrlimit(resource.RLIMIT_FSIZE)[1] < 0 else 2**40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "step-00000006.safetensors"]
    student, record = run(tmp_path)
    assert record.losses == expected.losses
    assert torch.equal(student.into.weight, whole.into.weight)


def test_full_disk_at_the_manifest_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    """The new file is there, and nothing says so yet."""
    run(tmp_path, 6)
    before = (tmp_path / "manifest.json").read_bytes()

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(OSError, match=r"step 9 could not be saved; that of step 6 is intact: .*No space left"):
        run(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert run(tmp_path)[1].losses == run()[1].losses
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "step-00000020.safetensors"]
