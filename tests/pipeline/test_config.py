"""Options of a run: where they come from, and every mistake at once."""

import pytest

from mts_fast.pipeline.config import Config, load_config

DATA = {"real": "a", "synthetic": ["b"], "model": "m"}


def test_files_then_assignments_then_options(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('epochs = 3\nlr = 0.1\nmodel = "m"\nreal = "a"\nsynthetic = ["b"]\n')
    config = load_config(str(file), {"seed": 5, "val": None}, ["lr=0.2", "decay_epochs=[1, 2]"])
    assert (config.epochs, config.lr, config.seed, config.val) == (3, 0.2, 5, None)
    assert config.decay_epochs == (1, 2) and config.synthetic == ("b",)
    assert load_config(None, {**DATA, "epochs": 4}, ["epochs=9"]).epochs == 4
    config = load_config(str(file), {}, [], {"epochs": 8, "momentum": 0.5})
    assert (config.epochs, config.momentum) == (3, 0.5)


def test_values_as_in_toml_or_bare_words():
    assignments = [
        "flip=true",
        "optimizer=adamw",
        'device="cpu"',
        "hypergradient_lr=1e-3",
        "jitter = 0.4",
    ]
    config = load_config(None, DATA, assignments)
    assert config.flip is True and config.optimizer == "adamw" and config.device == "cpu"
    assert config.hypergradient_lr == 1e-3 and config.jitter == 0.4


def test_all_mistakes_in_one_go():
    assignments = ["epohcs=3", "lr=-1", "batch_size=many", "schedule=sine", "seed"]
    with pytest.raises(ValueError) as error:
        load_config(None, {"real": "a", "synthetic": ["b"]}, assignments)
    told = str(error.value)
    for said in (
        "6 mistakes",
        "'epohcs' is no option; the nearest is 'epochs'",
        "'lr': input should be greater than 0, got -1",
        "'batch_size': input should be a valid integer",
        "got 'many'",
        "'schedule': input should be 'cosine', 'step' or 'constant', got 'sine'",
        "--set 'seed' lacks '='",
        "'model' is not given; pass --model",
    ):
        assert said in told
    assert "nothing was trained" in told


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no file"), ("epochs 3", "KEY = VALUE"), ("[a", "KEY = VALUE")]
)
def test_files_that_are_none(content, said, tmp_path):
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_config(str(file), DATA, [])


@pytest.mark.parametrize("name", Config.model_fields)
def test_every_option_can_be_saved_and_read_again(name):
    config = load_config(None, DATA, [])
    assert Config(**config.model_dump()) == config
    assert getattr(config, name) == config.model_dump()[name]
