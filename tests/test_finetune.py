import copy

import pytest
import torch
from torch import nn

from sparsedm_compile.finetune import distillation_loss, finetune
from sparsedm_compile.layers import sparse_layers
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.models import UViT
from sparsedm_compile.noise import VPSDE, SchedulerProcess
from sparsedm_compile.schedules import EIGHTHS, DrawnPatterns, StagedPatterns
from sparsedm_compile.sparsify import get_plan, set_pattern, sparsify, use_pattern


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small to share: with two threads on a busy machine a step takes ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_uvit(num_classes: int = -1) -> UViT:
    torch.manual_seed(0)
    return UViT(
        img_size=4, patch_size=2, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=num_classes
    ).eval()


def student_and_teacher() -> tuple[UViT, UViT]:
    teacher = tiny_uvit()
    student = copy.deepcopy(teacher)
    sparsify(student, "2:4", policy="sparsedm")
    return student, teacher


def images(n: int = 4, batch: int = 16) -> list[torch.Tensor]:
    """Images of two kinds, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    sign = torch.randint(2, (n, batch, 1, 1, 1), generator=generator) * 2.0 - 1
    return list(sign.expand(n, batch, 1, 4, 4) * 0.8)


class TestLoss:
    @pytest.mark.parametrize("weights", [(1.0, 0.1), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
    def test_equals_the_formula(self, weights):
        student, noise, teacher = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
        loss = distillation_loss(
            student, noise, teacher, denoising_weight=weights[0], distillation_weight=weights[1]
        ).item()
        n = student.numel()
        by_hand = weights[0] * ((student - noise) ** 2).sum() / n + weights[1] * ((student - teacher) ** 2).sum() / n
        assert loss == pytest.approx(by_hand.item(), rel=1e-6)

    def test_default_weights_are_those_of_the_paper(self):
        student, noise, teacher = torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([2.0])
        assert distillation_loss(student, noise, teacher).item() == pytest.approx(1 + 0.1 * 4)

    def test_gradients_reach_the_student_alone(self):
        student, noise, teacher = (torch.randn(4, requires_grad=True) for _ in range(3))
        distillation_loss(student, noise, teacher).backward()
        expected = 2 / 4 * ((student - noise) + 0.1 * (student - teacher))
        torch.testing.assert_close(student.grad, expected.detach())
        assert noise.grad is None
        assert teacher.grad is None

    def test_half_precision_is_compared_in_float32(self):
        """In half precision the square of 300 is infinite."""
        student = torch.full((4,), 300.0, dtype=torch.float16)
        assert distillation_loss(student, torch.zeros_like(student), student).item() == pytest.approx(90_000)

    def test_errors(self):
        x = torch.zeros(2, 4)
        with pytest.raises(ValueError, match=r"noise has shape \(1, 4\), prediction \(2, 4\)"):
            distillation_loss(x, x[:1], x)
        with pytest.raises(ValueError, match=r"teacher_prediction has shape \(1, 4\)"):
            distillation_loss(x, x, x[:1])
        with pytest.raises(ValueError, match="needs a teacher"):
            distillation_loss(x, x, None)
        for weights in ((-1.0, 0.1), (0.0, 0.0), (float("nan"), 1.0)):
            with pytest.raises(ValueError, match="0 or more, and not both 0"):
                distillation_loss(x, x, x, denoising_weight=weights[0], distillation_weight=weights[1])


class TestFinetune:
    def test_loss_decreases_and_masks_hold(self):
        student, teacher = student_and_teacher()
        record = finetune(student, teacher, images(), steps=80, learning_rate=4e-3, warmup_steps=10, progress=False)
        assert record.steps == 80
        assert sum(record.losses[-20:]) < 0.7 * sum(record.losses[:20])
        layer = student.in_blocks[0].mlp.fc1
        response = layer(torch.eye(16)) - layer.bias
        assert response.detach().count_nonzero() == layer.weight.numel() // 2  # masked at use
        assert layer.weight.count_nonzero() == layer.weight.numel()  # dense in the checkpoint

    def test_the_first_loss_is_the_papers(self):
        """Recomputed here from the definition, with the same draws."""
        student, teacher = student_and_teacher()
        batch = images(1)
        generator = torch.Generator().manual_seed(7)
        t = 1 - torch.rand(16, generator=generator)
        noise = torch.randn(batch[0].shape, generator=generator)
        x_t = VPSDE().perturb(batch[0], t, noise)
        with torch.no_grad():
            ours, theirs = student(x_t, 999 * t), teacher(x_t, 999 * t)
        expected = (ours - noise).square().mean() + 0.1 * (ours - theirs).square().mean()
        assert not torch.equal(ours, theirs)
        record = finetune(student, teacher, batch, steps=1, seed=7, progress=False)
        assert record.losses[0] == pytest.approx(expected.item(), rel=1e-5)

    def test_teacher_is_not_touched(self):
        student, teacher = student_and_teacher()
        teacher.train()
        teacher.mid_block.eval()
        before = copy.deepcopy(teacher.state_dict())
        seen = []
        teacher.register_forward_hook(
            lambda module, _, output: seen.append((module.training, output.requires_grad, output.grad_fn))
        )
        finetune(student, teacher, images(), steps=3, progress=False)
        assert seen == [(False, False, None)] * 3
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
        assert teacher.training
        assert not teacher.mid_block.mlp.training

    def test_ablations(self):
        """Denoising alone never asks the teacher; teacher alone gives loss 0 to a student that equals it."""
        student, teacher = student_and_teacher()
        finetune(student, None, images(), steps=2, distillation_weight=0, progress=False)
        teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
        finetune(student, teacher, images(), steps=2, distillation_weight=0, progress=False)

        dense = tiny_uvit()
        twin = copy.deepcopy(dense)
        sparsify(twin, "2:4", policy="sparsedm")
        set_pattern(twin, "dense")
        record = finetune(twin, dense, images(), steps=1, denoising_weight=0, progress=False)
        assert record.losses == [0.0]

    @pytest.mark.parametrize("decay", [0.0, 2e-4])
    def test_srste_acts_and_is_removed(self, decay, monkeypatch, masked_dense):
        """Taught by its own masked function alone, a student has no gradient but the decay: AdamW's first step by hand.

        That is ``learning_rate * g / (|g| + eps)`` with ``g = decay * weight`` where the mask drops, and 0 elsewhere.
        """
        optimizers = []

        class Observed(torch.optim.AdamW):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                optimizers.append(self)

        monkeypatch.setattr(torch.optim, "AdamW", Observed)
        student, _ = student_and_teacher()
        weight = student.in_blocks[0].mlp.fc1.weight
        start = weight.detach().clone()
        gradient = decay * start.masked_fill(magnitude_mask(start, "2:4"), 0)
        options = {"denoising_weight": 0, "learning_rate": 1e-3, "weight_decay": 0.0, "warmup_steps": 0, "ema_decay": 0}
        finetune(student, masked_dense(student), images(), steps=1, srste_decay=decay, progress=False, **options)
        torch.testing.assert_close(weight.detach(), start - 1e-3 * gradient / (gradient.abs() + 1e-8))

        weight.grad = torch.zeros_like(weight)
        optimizers[0].step()
        assert weight.grad.count_nonzero() == 0

    def test_same_seed_same_weights(self):
        results = []
        for seed in (3, 3, 4):
            student, teacher = student_and_teacher()
            finetune(student, teacher, images(), steps=3, seed=seed, progress=False)
            results.append(student.in_blocks[0].mlp.fc1.weight.detach())
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])

    def test_condition_reaches_student_and_teacher(self):
        teacher = tiny_uvit(num_classes=3)
        student = copy.deepcopy(teacher)
        sparsify(student, "2:4", policy="sparsedm")
        batch = (images(1)[0], torch.randint(3, (16,)))
        assert finetune(student, teacher, [batch], steps=2, progress=False).steps == 2

    def test_nan_stops_at_its_step_with_good_weights(self):
        student, teacher = student_and_teacher()
        data = images(3)
        data[2] = data[2] * float("nan")
        with pytest.raises(FloatingPointError, match="loss is nan at step 3; the model keeps"):
            finetune(student, teacher, data, steps=10, progress=False)
        assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
        assert all(parameter.grad is None for parameter in student.parameters())

    def test_frozen_parameters_stay(self):
        student, teacher = student_and_teacher()
        student.pos_embed.requires_grad_(False)
        before = student.pos_embed.clone()
        finetune(student, teacher, images(), steps=3, progress=False)
        assert torch.equal(student.pos_embed, before)

    def test_compiled_training_equals_eager(self):
        class Denoiser(nn.Module):
            def __init__(self):
                super().__init__()
                self.into, self.out = nn.Linear(16, 64), nn.Linear(64, 16)

            def forward(self, x, timesteps):
                hidden = self.into(x.flatten(1)) + timesteps.unsqueeze(1) / 999
                return self.out(torch.tanh(hidden)).view_as(x)

        losses, weights = [], []
        for compiled in (False, True):
            torch.manual_seed(0)
            teacher = Denoiser()
            student = copy.deepcopy(teacher)
            sparsify(student, "2:4", policy="all")
            losses.append(finetune(student, teacher, images(), steps=4, compile=compiled, progress=False).losses)
            weights.append(student.into.weight.detach())
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)

    def test_diffusers_scheduler_and_model(self):
        """The first loss recomputed with diffusers' own ``add_noise``."""
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.DDPMScheduler()
        student, teacher = student_and_teacher()
        batch = images(1)
        generator = torch.Generator().manual_seed(7)
        t = torch.randint(1000, (16,), generator=generator)
        noise = torch.randn(batch[0].shape, generator=generator)
        x_t = scheduler.add_noise(batch[0], noise, t)
        with torch.no_grad():
            ours, theirs = student(x_t, t), teacher(x_t, t)
        expected = (ours - noise).square().mean() + 0.1 * (ours - theirs).square().mean()
        process = SchedulerProcess(scheduler)
        record = finetune(student, teacher, batch, steps=1, seed=7, process=process, progress=False)
        assert record.losses[0] == pytest.approx(expected.item(), rel=1e-4)


class TestFixedMask:
    def test_mask_of_the_start_is_that_of_the_averaged_weights(self):
        student, teacher = student_and_teacher()
        start = {name: magnitude_mask(layer.weight, "2:4") for name, layer in sparse_layers(student).items()}
        finetune(student, teacher, images(), steps=20, learning_rate=4e-2, fixed_mask=True, progress=False)
        for name, layer in sparse_layers(student).items():
            assert torch.equal(layer.weight != 0, start[name])

    @pytest.mark.parametrize(
        ("data", "options", "message"),
        [
            ([], {}, "batches is empty"),
            (images(), {"checkpoint_every": 0}, "checkpoint_every must be at least 1 step, got 0"),
            (images(), {"checkpoint_dir": "damaged"}, r"manifest\.json is damaged"),
        ],
    )
    def test_an_error_before_the_first_step_loses_no_weight(self, data, options, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "damaged").mkdir()
        (tmp_path / "damaged" / "manifest.json").write_text("")
        student, teacher = student_and_teacher()
        with pytest.raises(ValueError, match=message):
            finetune(student, teacher, data, steps=1, fixed_mask=True, progress=False, **options)
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))

    def test_excludes_patterns(self):
        student, teacher = student_and_teacher()
        with pytest.raises(ValueError, match="fixed_mask=True holds one mask and patterns change it"):
            finetune(student, teacher, images(), steps=1, fixed_mask=True, patterns=["dense", "2:4"])


def patterns_seen(model: UViT, calls: list) -> None:
    """Record the pattern, the mode and whether gradients are on, at each call of the model."""
    layer = model.in_blocks[0].mlp.fc1
    layer.register_forward_pre_hook(lambda m, _: calls.append((m.pattern, m.training, torch.is_grad_enabled())))


class TestPatterns:
    def test_each_step_draws_one_and_the_plan_comes_back(self):
        student, teacher = student_and_teacher()
        set_pattern(student, "2:4", rules={"*.fc2": "1:4"})
        plan, calls = get_plan(student), []
        patterns_seen(student, calls)
        finetune(student, teacher, images(), steps=30, patterns=["dense", "2:4", "1:4"], seed=2, progress=False)
        drawn = DrawnPatterns(("dense", "2:4", "1:4"), 2)
        assert [pattern for pattern, _, _ in calls] == [str(drawn(step)) for step in range(30)]
        assert {pattern for pattern, _, _ in calls} == {"dense", "2:4", "1:4"}
        assert get_plan(student) == plan
        assert student.in_blocks[0].mlp.fc2.pattern == "1:4"

    def test_dense_teaches_in_place(self):
        """Without a teacher, the target is the model's own dense answer to the same x_t."""
        student, _ = student_and_teacher()
        student.in_blocks[0].mlp.register_forward_hook(
            lambda module, _, output: output + 1 if module.training else output  # tells modes apart, as dropout does
        )
        batch, calls = images(1), []
        seed = next(s for s in range(99) if str(DrawnPatterns(("dense", "1:4"), s)(0)) == "1:4")
        generator = torch.Generator().manual_seed(seed)
        t = 1 - torch.rand(16, generator=generator)
        noise = torch.randn(batch[0].shape, generator=generator)
        x_t = VPSDE().perturb(batch[0], t, noise)
        with torch.no_grad(), use_pattern(student, "dense"):
            theirs = student.eval()(x_t, 999 * t)
        with torch.no_grad(), use_pattern(student, "1:4"):
            ours = student.train()(x_t, 999 * t)
        expected = (ours - noise).square().mean() + 0.1 * (ours - theirs).square().mean()
        patterns_seen(student, calls)
        record = finetune(student, None, batch, steps=1, patterns=["dense", "1:4"], seed=seed, progress=False)
        assert record.losses[0] == pytest.approx(expected.item(), rel=1e-5)
        assert calls == [("dense", False, False), ("1:4", True, True)]

    def test_a_dense_step_is_not_taught_by_itself(self):
        student, _ = student_and_teacher()
        calls = []
        patterns_seen(student, calls)
        finetune(student, None, images(), steps=2, patterns=["dense"], progress=False)
        assert calls == [("dense", True, True)] * 2

    def test_all_patterns_learn(self):
        losses = {}
        for name, patterns in (("one", None), ("three", ["dense", "2:4", "1:4"])):
            student, teacher = student_and_teacher()
            set_pattern(student, "2:4")
            teacher = teacher if patterns is None else None
            options = {"learning_rate": 4e-3, "warmup_steps": 10, "progress": False, "seed": 1}
            finetune(student, teacher, images(), steps=80, patterns=patterns, **options)
            for pattern in ("dense", "1:4"):
                with use_pattern(student, pattern):
                    losses[name, pattern] = finetune(
                        copy.deepcopy(student),
                        None,
                        images(),
                        steps=4,
                        learning_rate=0,
                        distillation_weight=0,
                        srste_decay=0,
                        progress=False,
                    ).losses
        assert sum(losses["three", "1:4"]) < 0.97 * sum(losses["one", "1:4"])
        assert sum(losses["three", "dense"]) < 1.1 * sum(losses["one", "dense"])

    def test_progressive_trains_one_model_and_ends_at_its_last_pattern(self):
        student, teacher = student_and_teacher()
        weights, calls = list(student.parameters()), []
        patterns_seen(student, calls)
        schedule = StagedPatterns.every(2, ["15:16", "7:8", "3:4", "2:4"])
        finetune(student, teacher, images(), steps=10, patterns=schedule, progress=False)
        wanted = ["15:16"] * 2 + ["7:8"] * 2 + ["3:4"] * 2 + ["2:4"] * 4
        assert [pattern for pattern, _, _ in calls] == wanted
        assert all(a is b for a, b in zip(student.parameters(), weights, strict=True))
        assert set(map(str, get_plan(student).patterns().values())) == {"2:4"}

    def test_progressive_stopped_early_is_left_where_it_was(self):
        student, teacher = student_and_teacher()
        finetune(student, teacher, images(), steps=3, patterns=StagedPatterns.every(2, EIGHTHS), progress=False)
        assert student.in_blocks[0].mlp.fc1.pattern == "6:8"

    def test_an_error_puts_the_plan_back(self):
        student, teacher = student_and_teacher()
        plan = get_plan(student)
        for patterns in (["dense", "1:4"], StagedPatterns.every(1, EIGHTHS)):
            data = images(3)
            data[2] = data[2] * float("nan")
            with pytest.raises(FloatingPointError):
                finetune(student, teacher, data, steps=9, patterns=patterns, progress=False)
            assert get_plan(student) == plan

    def test_errors(self):
        student, teacher = student_and_teacher()
        with pytest.raises(ValueError, match="needs a teacher"):
            finetune(student, None, images(), steps=1, patterns=["2:4", "1:4"])
        with pytest.raises(ValueError, match="needs a teacher"):  # dense, taught by nothing, would drift
            finetune(student, None, images(), steps=1, patterns=["dense", "1:4"], denoising_weight=0)
        with pytest.raises(ValueError, match=r"no layer of the model takes 1:4v128: output width 16 is not a multiple"):
            finetune(student, teacher, images(), steps=1, patterns=["dense", "1:4v128"])
        with pytest.raises(ValueError, match="patterns must be a sequence"):
            finetune(student, teacher, images(), steps=1, patterns=())


class TestMixedPrecision:
    @pytest.mark.parametrize(("amp", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
    def test_computes_in_half_and_trains_float32_weights(self, amp, dtype):
        student, teacher = student_and_teacher()
        seen = set()
        for model in (student, teacher):
            model.in_blocks[0].mlp.fc1.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
        record = finetune(
            student, teacher, images(), steps=40, amp=amp, learning_rate=4e-3, warmup_steps=5, progress=False
        )
        assert seen == {dtype}
        assert sum(record.losses[-10:]) < 0.8 * sum(record.losses[:10])
        assert {p.dtype for p in student.parameters()} == {torch.float32}

    def test_float16_equals_float32_to_its_precision(self):
        """Wherever the loss scale were missing or left in, or the decay scaled with it, weights would differ."""
        results = {}
        for amp in (None, "float16"):
            student, teacher = student_and_teacher()
            finetune(
                student,
                teacher,
                images(),
                steps=5,
                amp=amp,
                srste_decay=0.1,
                ema_decay=0.0,
                warmup_steps=0,
                learning_rate=1e-3,
                progress=False,
            )
            results[amp] = [p.detach() - q for p, q in zip(student.parameters(), teacher.parameters(), strict=True)]
        moved = torch.cat([d.flatten() for d in results[None]])
        error = torch.cat([d.flatten() for d in results["float16"]]) - moved
        assert error.norm() < 0.05 * moved.norm()

    def test_a_teacher_in_place_takes_no_gradient_away(self):
        """Autocast keeps casts of weights: those made for the teacher have no gradient."""
        student, _ = student_and_teacher()
        start = [p.detach().clone() for p in student.parameters()]
        finetune(
            student,
            None,
            images(),
            steps=4,
            patterns=["dense"] + ["1:4"] * 99,
            amp="bfloat16",
            ema_decay=0.0,
            weight_decay=0.0,
            srste_decay=0.0,
            progress=False,
        )
        still = [n for (n, p), q in zip(student.named_parameters(), start, strict=True) if torch.equal(p, q)]
        assert still == []

    def test_unknown_type(self):
        student, teacher = student_and_teacher()
        with pytest.raises(ValueError, match="amp must be 'bfloat16', 'float16' or None, got 'fp16'"):
            finetune(student, teacher, images(), steps=1, amp="fp16")


class TestErrors:
    def test_dense_model(self):
        with pytest.raises(ValueError, match="no sparse layers: call sparsify"):
            finetune(tiny_uvit(), tiny_uvit(), images(), steps=1)

    def test_teacher_missing_or_wrong(self):
        student, _ = student_and_teacher()
        with pytest.raises(ValueError, match="needs a teacher: pass one, or distillation_weight=0"):
            finetune(student, None, images(), steps=1)
        with pytest.raises(ValueError, match=r"shares weights with the model .*copy\.deepcopy\(model\)"):
            finetune(student, student, images(), steps=1)
        with pytest.raises(TypeError, match=r"teacher must be a torch\.nn\.Module, got str"):
            finetune(student, "teacher", images(), steps=1)

    def test_sparse_teacher(self):
        student, _ = student_and_teacher()
        teacher = copy.deepcopy(student)
        message = (
            r"teacher is sparse itself \('in_blocks\.0\.attn\.qkv', 12 layers in all\): .*deepcopy\(model\) before"
        )
        with pytest.raises(ValueError, match=message):
            finetune(student, teacher, images(), steps=1)
        set_pattern(teacher, "dense")
        assert finetune(student, teacher, images(), steps=1, progress=False).steps == 1

    def test_numbers(self):
        student, teacher = student_and_teacher()
        with pytest.raises(ValueError, match="needs a limit"):
            finetune(student, teacher, images())
        with pytest.raises(ValueError, match="decay must be a finite number"):
            finetune(student, teacher, images(), steps=1, srste_decay=-1)
        with pytest.raises(ValueError, match="EMA: decay"):
            finetune(student, teacher, images(), steps=1, ema_decay=2)
        with pytest.raises(TypeError, match=r"torch\.nn\.Module, got int"):
            finetune(3, teacher, images(), steps=1)

    def test_an_error_puts_the_teachers_mode_back(self):
        student, teacher = student_and_teacher()
        teacher.train()
        with pytest.raises(ValueError, match="batches is empty"):
            finetune(student, teacher, [], steps=1, progress=False)
        assert teacher.training
