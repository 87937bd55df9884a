import pytest

from sparsedm_compile.recipes.config import load_recipe, recipe_names

SMALL = """
[data]
name = "digits"
[model]
img_size = 8
[train]
steps = 3
[finetune]
steps = 2
[quality]
samples = 8
{extra}
[[rows]]
name = "SparseDM 2:4"
{row}
"""


def write(tmp_path, extra="", row=""):
    path = tmp_path / "small.toml"
    path.write_text(SMALL.format(extra=extra, row=row))
    return str(path)


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.rows


def test_packaged_recipes_hold_the_three_data_sets():
    assert recipe_names() == ["cifar10", "digits", "fashion-mnist"]


def test_values_arrive(tmp_path):
    recipe = load_recipe(write(tmp_path, "seeds = [4, 5]", 'flexible = ["dense", "1:4"]'))
    assert (recipe.name, recipe.seed, recipe.train.steps, recipe.finetune.steps) == ("small", 0, 3, 2)
    assert recipe.quality.seeds == (4, 5)
    assert recipe.row("SparseDM 2:4").flexible == ("dense", "1:4")
    assert recipe.row("SparseDM 2:4").file == "sparsedm-2-4"


@pytest.mark.parametrize(
    ("extra", "row", "message"),
    [
        ("sampels = 3", "", "quality has no key 'sampels' .did you mean 'samples'"),
        ("seeds = []", "", "at least 2 samples and 1 seed"),
        ("", 'mask = "asp"', "mask is 'asp'; valid are sr-ste, ste, fixed"),
        ("", 'select = "obs"', "select is 'obs'; valid are magnitude, wanda, sparsegpt"),
        ("", 'pattern = "5:4"', "5:4"),
        ("", "macs = 0.5", "macs and candidates go together"),
        ("", 'train = false\nflexible = ["dense"]', "is not trained"),
        ("", "train = false\nsteps = 5", "is not trained"),
        ("", "steps = 0", "steps must be at least 1, got 0"),
        ("", '[[rows]]\nname = "sparsedm 2:4"', "two rows are called 'sparsedm-2-4'"),
        ("", '[[rows]]\nname = "a/b"', "must be text that a file can be called by"),
        ("", '[[rows]]\nname = "Dense"', "row name 'Dense' is taken"),
        ("", "[[rows]]", r"rows\[1\] lacks 'name'"),
        ("[surprise]", "", "the recipe has no key 'surprise'"),
        ("[train]", "", "small.toml"),
    ],
)
def test_errors_name_the_recipe_and_what_is_wrong(tmp_path, extra, row, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(write(tmp_path, extra, row))
    assert "small.toml" in str(error.value)


def test_unknown_recipe_and_row(tmp_path):
    with pytest.raises(ValueError, match="unknown recipe 'mnist'; valid are cifar10, digits, fashion-mnist"):
        load_recipe("mnist")
    with pytest.raises(
        FileNotFoundError,
        match=r"missing\.toml does not exist; a recipe is a TOML file, or one of those that come with the package: "
        r"cifar10, digits, fashion-mnist$",
    ):
        load_recipe(str(tmp_path / "missing.toml"))
    with pytest.raises(ValueError, match="has no row 'x'; rows are 'SparseDM 2:4'"):
        load_recipe(write(tmp_path)).row("x")
