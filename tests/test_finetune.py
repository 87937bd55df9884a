import copy

import pytest
import torch
from torch import nn

from sparsedm_compile.finetune import distillation_loss, finetune
from sparsedm_compile.models import UViT
from sparsedm_compile.noise import VPSDE
from sparsedm_compile.sparsify import set_pattern, sparsify


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

    def test_srste_acts_and_is_removed(self):
        """With the learning signal off (teacher alone, student equal to it) only the decay can move a weight."""
        moved = {}
        for decay in (0.0, 2e-4):
            student, teacher = student_and_teacher()
            start = student.in_blocks[0].mlp.fc1.weight.detach().clone()
            finetune(
                student, teacher, images(), steps=3, srste_decay=decay, ema_decay=0.0, weight_decay=0.0, progress=False
            )
            moved[decay] = student.in_blocks[0].mlp.fc1.weight.detach() - start
        assert not torch.equal(moved[0.0], moved[2e-4])

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
