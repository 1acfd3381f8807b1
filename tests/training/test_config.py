"""Wrong keys and values are refused with their name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from tkn.app.command import CONFIG_DIR
from tkn.cli import compose
from tkn.training.config import check_config

#: What a user must say of his own data.
REQUIRED = {
    "folder": ["data.path=parts"],
    "faces": ["data.path=people", "data.target=age"],
    "python": ["data.factory=shapes:load"],
}
#: What these networks can't be without.
NEEDED = {"timm": ("model.network=resnet18",), "python": ("model.factory=torchvision.models:resnet18",)}


@contextmanager
def _extras_named(config: DictConfig) -> Iterator[None]:
    """Where a library that the configuration needs is not installed, its check must name the extra that has it."""
    if config.model.name == "timm" and find_spec("timm") is None:
        who, extra = "model=timm", "timm"
    elif config.channels.checkpoint is not None and find_spec("torch_pruning") is None:
        who, extra = "channels.checkpoint", "channels"
    else:
        yield
        return
    with pytest.raises(ValueError, match=f"{who} needs the extra '{extra}'"):
        yield


@pytest.mark.parametrize("model", [path.stem for path in sorted((CONFIG_DIR / "model").glob("*.yaml"))])
@pytest.mark.parametrize("data", [path.stem for path in sorted((CONFIG_DIR / "data").glob("*.yaml"))])
def test_every_model_and_data_set_composes(model: str, data: str) -> None:
    needed = [*REQUIRED.get(data, ()), *NEEDED.get(model, ())]
    config = compose(f"model={model}", f"data={data}", *needed)
    with _extras_named(config):
        config = check_config(config)
    assert (config.model.name, config.data.name) == (model, data)


def test_recipes_are_the_papers() -> None:
    recipes = {data: compose(f"data={data}").recipe for data in ("mnist", "tlmnist", "svhn", "gtsrb", "pain")}
    assert recipes["mnist"] == recipes["tlmnist"]
    assert [(name, r.epochs, r.batch_size, r.optimizer.name, r.optimizer.lr) for name, r in recipes.items()] == [
        ("mnist", 20, 128, "SGD", 0.1),
        ("tlmnist", 20, 128, "SGD", 0.1),
        ("svhn", 40, 64, "SGD", 0.1),
        ("gtsrb", 100, 64, "AdamW", 1e-3),
        ("pain", 100, 64, "Adam", 1e-3),
    ]
    assert [r.optimizer.weight_decay for r in recipes.values()] == [1e-4, 1e-4, 1e-4, 0.05, 1e-4]


def test_the_recipe_can_be_chosen_apart_from_the_data() -> None:
    assert compose("data=mnist", "recipe=gtsrb").recipe == compose("data=gtsrb").recipe


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiments_name_themselves_and_compose(path: Path) -> None:
    config = compose(f"experiment={path.stem}")
    with _extras_named(config):
        config = check_config(config)
    assert config.experiment == path.stem
    assert f"# tkn-run experiment={path.stem}\n" in path.read_text()
    if path.stem.startswith("table"):
        assert config.data.get("source", "full") == "full"
        assert config.recipe == compose(f"data={config.data.name}").recipe
        assert (config.penalty.l2 > 0) == config.model.name.startswith("t")


def test_an_experiment_can_be_overridden() -> None:
    config = compose("experiment=smoke", "model=dn10", "data.limit=7")
    assert (config.experiment, config.model.name, config.data.limit) == ("smoke", "dn10", 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+penalty.l3=1", r"unknown key 'penalty\.l3'; did you mean 'penalty\.l2'"),
        ("+sede=1", "unknown key 'sede'; did you mean 'seed'"),
        ("+data.sorce=full", "unknown key of data=tlmnist 'sorce'; did you mean 'source'"),
        ("+trainer.max_epoch=1", "unknown key trainer 'max_epoch'; did you mean 'max_epochs'"),
        ("+trainer.num_nodes=2", "unknown key trainer 'num_nodes'"),
        ("trainer.precision=bf16-true", r"trainer\.precision=bf16-true must be one of 32-true"),
        ("recipe.lr_schedule=cos", r"recipe\.lr_schedule=cos must be one of drops, cosine"),
        ("recipe.warmup=1", r"recipe\.warmup=1\.0 must be a fraction of the run within \[0, 1\)"),
        ("recipe.attention_lr_factor=-1", r"recipe\.attention_lr_factor=-1\.0 must be at least 0"),
        ("recipe.label_smoothing=1", r"recipe\.label_smoothing=1\.0 must be within \[0, 1\)"),
        ("recipe.ema_decay=1", r"recipe\.ema_decay=1\.0 must be null or within \(0, 1\)"),
        ("penalty.start=2", r"penalty\.start=2\.0 must be a fraction of the run within \[0, 1\]"),
        ("penalty.start=0.5 penalty.end=0.4", r"penalty\.end=0\.4 must be within \[penalty\.start, 1\]"),
        ("trainer.compile=1", r"trainer\.compile=1 must be true or false"),
        ("trainer.fourier=1", r"trainer\.fourier=1 must be true or false"),
        ("trainer.cuda_graphs=1", r"trainer\.cuda_graphs=1 must be true or false"),
        ("trainer.limit_val_batches=0", r"trainer\.limit_val_batches=0 must be null or more than 0"),
        ("data.source=1", r"data\.source=1 must be of type str"),
        ("data.distractor_seed=1.5", r"data\.distractor_seed=1\.5 must be of type int"),
        ("+recipe.optimizer.momentun=1", "recipe.optimizer 'momentun'; did you mean 'momentum'"),
        ("recipe.optimizer.name=SDG", r"unknown recipe\.optimizer\.name 'SDG'; did you mean 'SGD'"),
        ("model.name=tdn11", "unknown model 'tdn11'; did you mean 'tdn10'"),
        ("model.dropout=1", r"model\.dropout=1 must lie within \[0, 1\)"),
        ("model.dropout=much", r"model\.dropout='much' must be of type float"),
        ("+model.layer=all", "unknown key of model=tdn10 'layer'; did you mean 'layers'"),
        ("model=dn10 +model.layers=all", "unknown key of model=dn10 'layers'"),
        ("model.layers=0.5", r"model\.layers=0\.5 must be of type str"),
        ("model.gradient_clip_norm=0", r"model\.gradient_clip_norm=0 must be null or positive"),
        ("model.pretrained_lr_factor=0.1", r"model\.pretrained_lr_factor=0\.1 has no effect without model\.weights"),
        ("+model.thin=0.5", r"model\.thin=0\.5 is for dense networks, and this one has target layers"),
        ("model=dn10 model.thin=0", r"model\.thin=0 must be null or positive"),
        (
            "model=dn10 model.thin=0.5 model.weights=x",
            r"model\.thin=0\.5 makes a network that model\.weights can't fit",
        ),
        (
            "model=torchvision model.network=resnet",
            r"unknown model\.network of torchvision 'resnet'; did you mean 'resnet",
        ),
        (
            "model=torchvision model.layers=all",
            r"model\.layers=all chooses target layers: it needs model\.targeted=true",
        ),
        ("model=torchvision model.stem=tiny", r"model\.stem=tiny must be null or small"),
        ("model=torchvision +model.dropout=0.1", "unknown key of model=torchvision 'dropout'"),
        ("model=timm", r"key 'model\.network' is missing"),
        ("model=python", r"key 'model\.factory' is missing"),
        ("model=python model.factory=nets", r"model\.factory=nets must be"),
        ("model=python model.factory=no_such:net", r"model\.factory=no_such:net.* can't be imported"),
        ("model=python model.factory=math:pi", r"model\.factory=math:pi"),
        ("model=python model.factory=math:sine", "math has no function sine"),
        ("channels.macs=1e6", r"channels\.macs=1000000\.0 and channels\.checkpoint need each other"),
        ("channels.checkpoint=x", r"channels\.macs=None and channels\.checkpoint need each other"),
        ("channels.checkpoint=x channels.macs=1e6", r"channels\.checkpoint=x is for dense networks"),
        ("model=dn10 model.thin=.5 channels.checkpoint=x channels.macs=1e6", "both make the network narrower"),
        ("channels.lr_factor=0", r"channels\.lr_factor=0\.0 must be positive"),
        ("channels.lr_factor=0.5", r"channels\.lr_factor=0\.5 must be 0\.1 without channels\.checkpoint"),
        ("rois.places=random", r"rois\.places=random has no effect without rois\.checkpoint"),
        ("rois.checkpoint=x", r"penalty\.l2=0\.0001 has no effect on the ROIs of rois\.checkpoint: take penalty=none"),
        ("penalty=budget penalty.share=.3 rois.checkpoint=x", r"penalty\.share=0\.3 has no effect on the ROIs"),
        ("penalty=budget penalty.macs=3e6 rois.checkpoint=x", r"penalty\.macs=3000000\.0 has no effect on the ROIs"),
        ("model=dn10 penalty=none rois.checkpoint=x", r"rois\.checkpoint=x is for targeted networks"),
        (
            "penalty=none rois.checkpoint=x channels.checkpoint=x channels.macs=1e6",
            r"channels\.checkpoint=x is for dense networks",
        ),
        ("+rois.place=random", r"unknown key 'rois\.place'; did you mean 'rois\.places'"),
        ("attention.name=boxcar", r"attention\.name=boxcar must be one of gaussian, cauchy, flat"),
        ("attention.scale_unit=0", r"attention\.scale_unit=0\.0 must be positive"),
        ("attention.min_size=0", r"attention\.min_size=0 must be 'kernel' or a whole number"),
        ("attention.min_size=2.5", r"attention\.min_size=2\.5 must be"),
        ("attention.clip=maybe", r"attention\.clip: Value 'maybe'"),
        ("penalty.l2=-1e-4", r"penalty\.l2=-0\.0001 must be at least 0"),
        ("penalty.beta=-1", r"penalty\.beta=-1\.0 must be at least 0"),
        ("prune.runs=0", r"prune\.runs=0 must be null or at least 1"),
        ("prune.margin=1", r"prune\.margin=1\.0 must be within \[0, 1\)"),
        ("prune.grace=-1", r"prune\.grace=-1\.0 must be within \[0, 1\)"),
        ("recipe.batch_size=0", r"recipe\.batch_size=0 must be at least 1"),
        ("recipe.lr_drops=[15]", r"recipe\.lr_drops=\[15\.0\] must be fractions"),
        ("recipe.weight_decay_as=caffe", r"recipe\.weight_decay_as=caffe must be torch or keras"),
        ("recipe.optimizer.lr=-1", r"recipe\.optimizer\.lr=-1 must be a number, at least 0"),
        ("seed=-1", "seed=-1 must be a whole number"),
        ("seed=one", "seed: Value 'one'"),
        ("mode=tset", "mode=tset must be train or test"),
        ("mode=test", "checkpoint=None must be the path"),
        ("data.limit=0", r"data\.limit=0 must be null or at least 1"),
        ("data.validation=-1", r"data\.validation=-1 must be"),
        ("trainer.max_epochs=0", r"trainer\.max_epochs=0 must be a whole number"),
        ("trainer.max_epochs=null", r"trainer\.max_epochs=None must be a whole number"),
        ("trainer.devices=0", r"trainer\.devices=0 must be a whole number of processes, at least 1"),
        ("trainer.devices=auto", r"trainer\.devices=auto must be a whole number of processes"),
        ("trainer.devices=65", r"recipe\.batch_size=128 must be at least 2 for each of 65 processes"),
        ("trainer.strategy=dpp", r"trainer\.strategy=dpp must be auto or ddp"),
    ],
)
def test_wrong_keys_and_values(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(compose(*override.split()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.flip=no", r"data\.flip='no' must be of type bool"),
        ("data.landmark_noise=abc", r"data\.landmark_noise='abc' must be of type float"),
        ("data.test_subjects=true", r"data\.test_subjects=True must be of type int \| list\[str\]"),
        ("data.test_subjects=[1,2]", r"data\.test_subjects=\[1, 2\] must be of type"),
        ("+data.validation=5", r"data\.validation=5 must be 0 for faces"),
        ("recipe.label_smoothing=0.1", r"recipe\.label_smoothing=0\.1 must be 0 for faces"),
    ],
)
def test_wrong_values_for_faces(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(compose("data=pain", override))


def test_values_of_every_accepted_type() -> None:
    for override in ("data.test_subjects=3", "data.test_subjects=[a,b]", "data.landmark_noise=1", "data.flip=false"):
        check_config(compose("data=pain", override))


def test_missing_keys_are_named() -> None:
    config = compose()
    OmegaConf.set_struct(config, False)
    del config["penalty"]
    with pytest.raises(ValueError, match="key 'penalty' is missing"):
        check_config(config)
