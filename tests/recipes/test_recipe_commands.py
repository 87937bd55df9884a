"""From data to report with a recipe so small that its figures mean nothing: what is tested is that they are made."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from sparsedm_compile.cli import app
from sparsedm_compile.layers import layer_pattern, sparse_layers
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.quality.features import Features
from sparsedm_compile.recipes.config import load_recipe
from sparsedm_compile.recipes.data import load_images
from sparsedm_compile.recipes.workspace import Workspace

RECIPE = """
[data]
name = "digits"
[model]
img_size = 8
patch_size = 4
in_chans = 1
embed_dim = 32
depth = 2
num_heads = 2
[train]
steps = 3
[finetune]
steps = 2
batch = 16
[quality]
samples = 40
seeds = [0, 1]
steps = 2
batch = 20
[[rows]]
name = "one-shot 2:4"
train = false
[[rows]]
name = "ASP 2:4"
mask = "fixed"
teacher = false
[[rows]]
name = "SparseGPT 2:4v2"
pattern = "2:4v2"
select = "sparsegpt"
permute = true
[[rows]]
name = "half"
macs = 0.5
candidates = ["2:4", "1:4"]
policy = "all"
[[rows]]
name = "flexible"
flexible = ["dense", "1:4"]
steps = 4
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "tiny.toml").write_text(RECIPE)

    def invoke(*arguments):
        return CliRunner().invoke(
            app, [arguments[0], str(folder / "tiny.toml"), "--out", str(folder / "run"), *arguments[1:]]
        )

    def succeed(*arguments):
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        return result

    invoke.succeed = succeed
    invoke.folder = folder / "run"
    invoke.recipe = str(folder / "tiny.toml")
    return invoke


@pytest.fixture(scope="module")
def made(run):
    early = run("finetune")
    assert early.exit_code == 2
    assert "run 'sparsedm train'" in early.output
    assert not run.folder.exists()
    run.succeed("train")
    run.succeed("finetune")
    return run


def model_of(made, name):
    recipe = load_recipe(made.recipe)
    workspace, data = Workspace(recipe, made.folder), load_images(recipe.data, None)
    return workspace.row(recipe.row(name), data, make=False), workspace.dense(data, train=False)


def test_rows_come_back_with_their_plan_and_their_masks(made):
    model, dense = model_of(made, "ASP 2:4")
    layers = sparse_layers(model)
    assert {str(layer_pattern(layer)) for layer in layers.values()} == {"2:4"}
    originals = dict(dense.named_modules())
    for name, layer in layers.items():
        # The mask of ASP is that of the dense weights it started from, whatever training did since.
        mask = magnitude_mask(originals[name].weight, "2:4")
        assert torch.equal(layer.weight != 0, mask & (layer.weight != 0))


def test_budget_row_keeps_within_half_the_macs(made):
    notes = json.loads((made.folder / "rows" / "half.json").read_text())
    assert "budget" in notes
    model, dense = model_of(made, "half")
    from sparsedm_compile import count_macs

    inputs = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    assert count_macs(model, *inputs).sparse <= 0.5 * count_macs(dense, *inputs).dense


def test_flexible_row_keeps_its_dense_weights(made):
    model, _ = model_of(made, "flexible")
    from sparsedm_compile import set_pattern

    set_pattern(model, "dense")
    assert all((layer.weight != 0).float().mean() > 0.99 for layer in sparse_layers(model).values())


def test_a_row_trains_for_its_own_steps(made):
    steps = {
        name: json.loads((made.folder / "rows" / f"{name}.json").read_text())["steps"] for name in ("half", "flexible")
    }
    assert steps == {"half": 2, "flexible": 4}


def test_logs_and_metadata(made):
    lines = (made.folder / "rows" / "half.csv").read_text().splitlines()
    assert lines[0] == "step,loss,learning_rate"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2"]
    with safe_open(made.folder / "rows" / "half.safetensors", "pt") as file:
        assert file.metadata()


def test_what_exists_is_kept(made):
    paths = [made.folder / "dense.safetensors", *sorted((made.folder / "rows").glob("*.safetensors"))]
    assert len(paths) == 6
    before = [path.stat().st_mtime_ns for path in paths]
    made.succeed("train")
    made.succeed("finetune")
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_quality_judges_rows_and_writes_the_report(made):
    rows = ("--row", "dense", "--row", "half", "--row", "flexible")
    first = json.loads(made.succeed("quality", "--json", "--seeds", "1", *rows).stdout)
    report = json.loads(made.succeed("quality", "--json", *rows).stdout)
    # The second call adds a seed and leaves the first one's figures.
    assert [row["frechet"][:1] for row in report["rows"]] == [row["frechet"] for row in first["rows"]]
    names = [row["name"] for row in report["rows"]]
    assert names == ["dense", "half", "flexible, at dense", "flexible, at 1:4"]
    assert report["metric"] == "FD-CNN"
    for row in report["rows"]:
        assert len(row["frechet"]) == 2
        assert row["validation_loss"] > 0
        assert row["samples"] == 40
    dense, half, at_dense, at_quarter = (row["macs"] for row in report["rows"])
    assert dense == at_dense > half > 0
    assert at_quarter < half
    assert json.loads((made.folder / "report.json").read_text()) == report
    html = (made.folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 2
    assert all(name in html for name in names)
    # Judged already, so only collected: the scores do not change.
    again = made.succeed("quality", "--json", *rows)
    assert json.loads(again.stdout)["rows"] == report["rows"]


def test_with_inception_distances_are_fids_in_a_folder_of_their_own(made, monkeypatch, tmp_path):
    """A stand-in for its 24 million weights: the first two values of an image."""
    stand_in = Features("FID", "ab" * 32, lambda images: images.flatten(1)[:, 27:29])
    monkeypatch.setattr("sparsedm_compile.quality.features.inception_features", lambda path, device: stand_in)
    made.succeed("quality", "--row", "dense", "--seeds", "1")
    fd_cnn = (made.folder / "scores" / "dense.json").read_text()
    result = made.succeed("quality", "--json", "--row", "dense", "--seeds", "1", "--inception", str(tmp_path))
    report = json.loads(result.stdout)
    assert report["metric"] == "FID"
    assert report["features_sha256"] == "ab" * 32
    assert (made.folder / "scores" / "dense.json").read_text() == fd_cnn
    assert (made.folder / "scores-fid" / "dense.json").exists()
    assert "FID" in (made.folder / "report.html").read_text()


def test_what_another_recipe_made_or_judged_is_refused(made, tmp_path):
    changed = tmp_path / "tiny.toml"
    changed.write_text(RECIPE.replace("steps = 3", "steps = 4"))
    result = CliRunner().invoke(app, ["finetune", str(changed), "--out", str(made.folder)])
    assert result.exit_code == 2
    assert "was made with training = " in result.output
    changed.write_text(RECIPE.replace("samples = 40", "samples = 60"))
    made.succeed("quality", "--row", "dense", "--seeds", "1")
    result = CliRunner().invoke(app, ["quality", str(changed), "--out", str(made.folder), "--row", "dense"])
    assert result.exit_code == 2
    assert "was judged with samples = 40, and now it is 60" in result.output


def test_rows_of_another_dense_model_are_refused(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made.folder, run)
    recipe = load_recipe(made.recipe)
    data, row = load_images(recipe.data, None), recipe.row("one-shot 2:4")
    Workspace(recipe, run).row(row, data, make=False)
    dense = run / "dense.safetensors"
    dense.write_bytes(dense.read_bytes()[:-1] + b"\x3f")  # as if trained anew
    with pytest.raises(ValueError, match=r"was made with sha256 of dense.safetensors = [0-9a-f]{64}, and now it is"):
        Workspace(recipe, run).row(row, data, make=False)
    path = run / "rows" / "one-shot-2-4.json"
    notes = json.loads(path.read_text())
    del notes["origin"]["sha256 of dense.safetensors"]  # as earlier versions left it
    path.write_text(json.dumps(notes))
    assert sparse_layers(Workspace(recipe, run).row(row, data, make=False))


def test_a_row_that_is_not_trained_does_not_depend_on_the_training_settings(made, tmp_path):
    path = made.folder / "rows" / "one-shot-2-4.json"
    notes = json.loads(path.read_text())
    assert notes["origin"]["training"] is None
    recipe = RECIPE.replace("steps = 2\nbatch = 16", "steps = 9\nbatch = 8")
    data = load_images(load_recipe(made.recipe).data, None)

    def load(name, text=recipe):
        (tmp_path / "tiny.toml").write_text(text)
        changed = load_recipe(str(tmp_path / "tiny.toml"))
        return Workspace(changed, made.folder).row(changed.row(name), data, make=False)

    assert sparse_layers(load("one-shot 2:4"))
    with pytest.raises(ValueError, match=r"was made with training = .*'steps': 2"):
        load("ASP 2:4")
    with pytest.raises(ValueError, match=r"was made with row = .*'train': False"):
        load("one-shot 2:4", recipe.replace("train = false", "train = true"))
    # As versions wrote it that recorded the training settings of every row.
    earlier = notes["origin"] | {"training": asdict(load_recipe(made.recipe).finetune)}
    try:
        path.write_text(json.dumps(notes | {"origin": earlier}))
        assert sparse_layers(load("one-shot 2:4"))
    finally:
        path.write_text(json.dumps(notes))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("in_chans = 3", "the model takes images of shape (3, 8, 8), the data has (1, 8, 8)"),
        ("in_chans = 1\nnum_classes = 10", "num_classes = 10 makes a model that wants labels"),
        ("in_chans = 1\nwidth = 3", "unexpected keyword argument 'width'"),
    ],
)
def test_models_that_do_not_fit(tmp_path, line, message):
    (tmp_path / "other.toml").write_text(RECIPE.replace("in_chans = 1", line))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "other.toml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "finetune", "quality"])
def test_a_recipe_file_that_does_not_exist(tmp_path, command):
    result = CliRunner().invoke(app, [command, "missing.toml", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert result.output == (
        "error: recipe missing.toml does not exist; a recipe is a TOML file, or one of those that come with the "
        "package: cifar10, digits, fashion-mnist\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "finetune", "quality"])
def test_a_recipe_path_that_is_a_folder(tmp_path, command):
    (tmp_path / "mine.toml").mkdir()
    result = CliRunner().invoke(app, [command, str(tmp_path / "mine.toml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert result.output == f"error: recipe {tmp_path / 'mine.toml'} is a folder: name the TOML file in it\n"


def test_a_disk_that_fills_up_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "dense.safetensors")

    (tmp_path / "tiny.toml").write_text(RECIPE)
    monkeypatch.setattr("sparsedm_compile.recipes.workspace.save_sparse", full)
    result = CliRunner().invoke(app, ["train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "error: dense.safetensors: No space left on device; choose another path" in result.output


def test_errors(made):
    result = made("finetune", "--row", "nothing")
    assert result.exit_code == 2
    assert "has no row 'nothing'; rows are 'one-shot 2:4'" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["train", "mnist", "--out", str(made.folder)])
    assert result.exit_code == 2
    assert "unknown recipe 'mnist'" in result.output
    result = CliRunner().invoke(app, ["train", "fashion-mnist", "--out", str(made.folder)])
    assert result.exit_code == 2
    assert "fashion_mnist_28.npz" in result.output
    result = made("quality", "--inception", "missing.pth")
    assert result.exit_code == 2
    assert "Inception weights missing.pth do not exist" in " ".join(result.output.split())
    result = made("train", "--device", "tpu")
    assert result.exit_code == 2
    assert "device 'tpu' cannot be used" in result.output
