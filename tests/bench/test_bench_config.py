"""Wrong keys and values of tkn-bench are refused with their name."""

from __future__ import annotations

import pytest

from tkn.app.command import CONFIG_DIR
from tkn.bench.cli import compose
from tkn.bench.config import KEYWORDS, check_config
from tkn.models import MODEL_NAMES, build_model

#: But "run", whose network is a run's own.
CASES = [path.stem for path in sorted((CONFIG_DIR / "bench" / "case").glob("*.yaml")) if path.stem != "run"]


@pytest.mark.parametrize("name", CASES)
def test_every_case_composes_and_can_be_built(name: str) -> None:
    config = check_config(compose(f"case={name}"))
    assert config.rois.share == [config.case.share]
    assert config.rois.path == f"results/rois/{config.case.name}.json"
    if name == "torchvision":
        assert config.case.name == "torchvision_mobilenet_v2_224"
        assert config.case.input_size == [3, 224, 224]
        return
    assert config.case.name == name
    if name == "keywords":
        assert config.case.baseline == config.case.targeted == KEYWORDS
        return
    for model in (config.case.baseline, config.case.targeted):
        assert model in MODEL_NAMES
    assert config.case.targeted in (f"t{config.case.baseline}", "tkn6")
    build_model(config.case.targeted, tuple(config.case.input_size), config.case.num_outputs)


def test_one_share_or_several() -> None:
    assert check_config(compose("rois.share=0.4")).rois.share == [0.4]
    assert check_config(compose("rois.share=[0.4,1]")).rois.share == [0.4, 1.0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+sede=1", "unknown key 'sede'; did you mean 'seed'"),
        ("+rois.shares=1", r"unknown key 'rois\.shares'; did you mean 'rois\.share'"),
        ("engines=[torch,openvin]", "unknown engine 'openvin'; did you mean 'openvino'"),
        ("+case.network=resnet18", r"case\.network=resnet18 must be null but with case=torchvision"),
        ("case=torchvision case.network=resnet19", "unknown case.network 'resnet19'; did you mean 'resnet18'"),
        ("case=torchvision case.network=raft_small", "unknown case.network 'raft_small'"),
        ("case=torchvision case.targets=some", r"case\.targets=some must be one of all, spatial"),
        ("case=torchvision case.targeted=tdn10", r"case\.baseline=torchvision must be torchvision, as case\.targeted"),
        ("case=keywords case.targeted=tdn10", r"case\.baseline=tc_resnet8 must be tc_resnet8, as case\.targeted"),
        ("case=keywords rois.source=file", r"rois\.source=file must be generated with case\.baseline=tc_resnet8"),
        ("case=keywords case.input_size=[1,40,101]", r"case\.input_size=\[1, 40, 101\] must be \[channels, frames\]"),
        ("case=torchvision rois.source=file", r"rois\.source=file must be generated with case=torchvision"),
        ("engines=[torch,torch]", "engines=.* must be a list of different names"),
        ("engines=[]", "engines=.* must be"),
        ("rois.source=random", r"rois\.source=random must be one of file, checkpoint, generated"),
        ("rois.share=0", r"rois\.share=\[0\.0\] must be"),
        ("rois.share=[0.5,0.5]", r"rois\.share=.* must be a number, or different ones"),
        ("rois.share=half", r"rois\.share: "),
        ("batch_sizes=[0]", r"batch_sizes=\[0\] must be"),
        ("batch_sizes=[1.5]", r"batch_sizes\[0\]: Value '1\.5'"),
        ("train_batch_sizes=[1]", r"train_batch_sizes=\[1\] must be a list of different numbers, at least 2"),
        ("dtype=half", "dtype=half must be one of float32, float16, bfloat16"),
        ("dtype=bfloat16", "dtype=bfloat16 must be float32 on a CPU, where the engines whose names end with -reduced"),
        ("dtype=float16", r"dtype=torch\.float16 on cpu must be one of float32"),
        ("device=gpu", "device='gpu' is none that torch knows"),
        ("engines=[torch-compile-max-autotune]", r"engines=\[.*\] has none that computes on device='cpu'"),
        ("threads=0", "threads=0 must be null or at least 1"),
        ("thinned.multiple=0", r"thinned\.multiple=0 must be at least 1"),
        ("measure.rounds=0", r"measure\.rounds=0 must be"),
        ("measure.repeats=0", r"measure\.repeats=0 must be"),
        ("measure.seconds=-1", r"measure\.seconds=-1\.0 must be"),
        ("measure.warmup=-1", r"measure\.warmup=-1\.0 must be"),
        ("memory=maybe", "memory: Value 'maybe'"),
        ("seed=-1", "seed=-1 must be"),
        ("case.baseline=dn11", r"case\.baseline=dn11 must be one of"),
        ("case.input_size=[28,28]", r"case\.input_size=\[28, 28\] must be"),
        ("case.num_outputs=1", r"case\.num_outputs=1 must be"),
    ],
)
def test_wrong_keys_and_values(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(compose(*override.split()))


def test_wrong_combinations() -> None:
    with pytest.raises(ValueError, match=r"rois\.path=None must be a path with rois\.source=file"):
        check_config(compose("rois.source=file", "rois.path=null"))
    with pytest.raises(ValueError, match=r"train_batch_sizes=\[\] must be set"):
        check_config(compose("batch_sizes=[]", "train_batch_sizes=[]"))
    with pytest.raises(ValueError, match="memory=True must be false without batch_sizes"):
        check_config(compose("batch_sizes=[]", "memory=true"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("case=tdn10_mnits", "unknown case 'tdn10_mnits'; did you mean 'tdn10_mnist'"),
        ("batch_size=[1]", "unknown key 'batch_size'; did you mean 'batch_sizes'"),
        ("share=1", "unknown key 'share'; did you mean '(case|rois).share'"),
    ],
)
def test_composition_names_the_nearest(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(override)
