"""Named full configurations; a recipe is a function without arguments that returns a `Config`.

Scores in the docstrings are the paper's where they say so. docs/results.md lists our own, with hardware and commit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from slrnet.config import Config, ConfigError, config_from_dict, nearest

__all__ = ["RECIPES", "RELEASED_SSS_THRESHOLDS", "demo", "get_recipe", "voc_wsss", "voc_wsss_lite"]

RECIPES: dict[str, Callable[[], Config]] = {}
"""All recipes by name."""
RELEASED_SSS_THRESHOLDS: dict[str, Any] = {"confidence_threshold": 0.8, "background_threshold": 0.9, "floor": 0.6}
"""Thresholds of the released code for pixel labels and unlabeled images, where no image label rules a class out."""

_STRIDE_16: dict[str, Any] = {"output_stride": 16, "aspp_dilations": (6, 12, 18)}
"""Half the dilations of stride 8, so the ASPP covers the same part of the image."""
_RELEASED: dict[str, dict[str, Any]] = {
    "data": {"crop_filter": "bicubic"},
    "views": {"flip": False, "own_color": False, "sizes": "truncated", "unwarp": "probs"},
    "model": {"bias_start": "default", "auxiliary_views": "first", "sync_batch_norm": False},
    "cvlr": {"form": "released", "start": "default"},
    "calibration": {"fusion": "probs", "refine_image": "distorted"},
    "losses": {"mask_consistency": "probs", "code_consistency": "maximum", "class_divisor": "data"},
    "train": {"epochs": 30, "pretrain_epochs": 6, "cosine_epochs": 25, "precision": "fp32"},
    "evaluation": {"resizing": "released", "gating": "scores", "background_power": 3.0},
}
"""What the authors' code does otherwise than the paper, from image labels of VOC."""
_RELEASED_MASKS: dict[str, dict[str, Any]] = {
    "data": {"crop_size": 448},
    "losses": {"pixel_balance": True, "pixel_validity": True},
    "weights": {"pixel_labels": 2.0, "pixel_pretraining": 1.0, "pixel_mean": 1.0},
    "evaluation": {"background_power": 1.0},
}
"""What it changes with true masks."""


def get_recipe(name: str) -> Config:
    """Builds the configuration of a recipe; a `ConfigError` for an unknown name says which one is the nearest."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}{nearest(name, RECIPES)}; known are {', '.join(RECIPES)}")
    return RECIPES[name]()


def _recipe(build: Callable[[], Config]) -> Callable[[], Config]:
    """Lists a recipe in `RECIPES` and writes its name into the configuration."""

    @functools.wraps(build)
    def named() -> Config:
        return build().model_copy(update={"recipe": build.__name__})

    RECIPES[build.__name__] = named
    return named


def _derive(base: Config, **changes: Any) -> Config:
    """`base` with other settings; for a section, the fields to replace."""
    values = base.model_dump()
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return config_from_dict(values)


@_recipe
def voc_wsss() -> Config:
    """Pascal VOC 2012 from image labels, WideResNet-38 (paper Experiment I).

    Paper: 67.2 % mIoU on val with multi-scale inference and CRF, 64.07 % without CRF (Table 7). Not yet run by us.
    Command: `slrnet train --recipe voc_wsss --data SHARDS --num-workers 8`, with the weights
    that docs/training.md names.
    """
    return Config()


@_recipe
def voc_sss_image_labels() -> Config:
    """Pascal VOC 2012 from the 1,464 masks of its training list and 9,118 image labels (paper Experiment IV).

    Paper: 75.1 % mIoU on val, 75.5 % on test, without CRF (Table 5). Not yet run by us. The paper draws images with
    masks five times and doubles their loss. The released code trains 30 epochs at crop 448 and draws them three times.
    Command: `slrnet train --recipe voc_sss_image_labels --data SHARDS --num-workers 8` on 8 GPUs. Make SHARDS with
    `slrnet prepare voc --sbd`, which names the training list `voc_train`. Weights as for `voc_wsss`.
    """
    return _derive(voc_wsss(), setting="sss_image_labels", data={"pixel_labeled_subset": "voc_train"})


@_recipe
def voc_sss() -> Config:
    """Pascal VOC 2012 from the 1,464 masks of its training list and 9,118 unlabeled images (paper Experiment V).

    Paper: 72.4 % mIoU on val without CRF, 72.9 % with ResNet-101 (Table 6; `--set model.encoder=resnet101`). Not yet
    run by us. As in the paper, only the labels differ from `voc_sss_image_labels`. The thresholds are those of the
    released code, which trains 40 epochs at crop 448 and draws images with masks seven times.
    Command: `slrnet train --recipe voc_sss --data SHARDS --num-workers 8` on 8 GPUs; all else as for
    `voc_sss_image_labels`.
    """
    return _derive(voc_sss_image_labels(), setting="sss", calibration=RELEASED_SSS_THRESHOLDS)


@_recipe
def coco_wsss() -> Config:
    """COCO 2014 from image labels of half of its training images, 80 classes (paper Experiment II).

    Paper: 35.0 % mIoU on val (Table 3). Not yet run by us. The released code doubles the consistency weights
    (`--set weights.consistency=8 --set losses.class_divisor=data`) and makes its pseudo labels by another rule.
    Command: `slrnet train --recipe coco_wsss --data SHARDS --num-workers 8` on 8 GPUs. Make SHARDS with
    `slrnet prepare coco --fraction 0.5`. Weights as for `voc_wsss`.
    """
    return voc_wsss()


@_recipe
def l2id_wsss() -> Config:
    """L2ID (ILSVRC DET) from image labels, 200 long-tailed classes (paper Experiment III).

    Paper: 52.3 % mIoU on val, 49.03 % on test, by a DeepLabv3+ trained on pseudo labels of this network, which itself
    reaches 52.5 % on val (Table 4, Sec. 4.3). Not yet run by us. As in the released code, sampling balances the classes
    and the decoder is 512 wide.
    Command: `slrnet train --recipe l2id_wsss --data SHARDS --num-workers 8` on 8 GPUs, SHARDS from `slrnet prepare
    l2id`. Weights as for `voc_wsss`. `slrnet class-balance SHARDS --strength 1` shows the shares of the classes.
    """
    return _derive(voc_wsss(), data={"class_balance": 1.0}, model={"decoder_dim": 512, "skip_dim": 96})


@_recipe
def voc_wsss_released() -> Config:
    """VOC from image labels as the authors' released code trains the published checkpoint, in every known respect.

    It differs from `voc_wsss`, which follows the paper, in the fields below; `docs/method.md` lists them with both
    sources. One difference remains: the released code distorts brightness, contrast, saturation and hue of an image in
    a random order, on bytes. With another encoder than WideResNet-38, it has the rate of weights for biases
    (`--set optim.bias_lr_factor=1.0`). Paper: 67.2 % mIoU on val with CRF. Not yet run by us.
    Command: `slrnet train --recipe voc_wsss_released --data SHARDS --num-workers 2` on 2 GPUs, as the authors did: each
    worker's batch norms see its own images. `benchmarks/released_training.py` compares it step by step.
    """
    return _derive(voc_wsss(), **_RELEASED)


@_recipe
def voc_sss_image_labels_released() -> Config:
    """VOC from masks and image labels as the released code trains it; beside `voc_wsss_released`, crop and weights.

    The cross-entropy of true masks, balanced between classes, counts three times: in place of the classification loss
    of these images, as the mean over the batch's images with masks, and, after pretraining, as the mean over all.
    Paper: 75.1 % mIoU on val, without CRF. Not yet run by us.
    Command: `slrnet train --recipe voc_sss_image_labels_released --data SHARDS --num-workers 2` on 2 GPUs.
    """
    return _derive(
        _derive(voc_wsss_released(), **_RELEASED_MASKS),
        setting="sss_image_labels",
        data={"pixel_labeled_subset": "voc_train", "pixel_oversampling": 3},
        weights={"segmentation": 0.5, "classification": 0.5, "consistency": 2.0},
        optim={"reference_batch_size": 8},
        train={"batch_size": 8},
    )


@_recipe
def voc_sss_released() -> Config:
    """VOC from masks and unlabeled images as the released code trains it; see `voc_sss_image_labels_released`.

    The background's probability is cubed before refinement, and its thresholds are chosen for that.
    Paper: 72.4 % mIoU on val, without CRF. Not yet run by us.
    Command: `slrnet train --recipe voc_sss_released --data SHARDS --num-workers 2` on 2 GPUs.
    """
    return _derive(
        _derive(voc_wsss_released(), **_RELEASED_MASKS),
        setting="sss",
        data={"pixel_labeled_subset": "voc_train", "pixel_oversampling": 7},
        calibration=RELEASED_SSS_THRESHOLDS | {"background_power": 3.0},
        losses={"mask_background": False, "pixel_validity": False},
        optim={"reference_batch_size": 10},
        train={"epochs": 40, "pretrain_epochs": 11, "cosine_epochs": 30, "batch_size": 10},
        evaluation={"gating": "none"},
    )


@_recipe
def coco_wsss_released() -> Config:
    """COCO from image labels as the released code trains it, as far as it goes; see `voc_wsss_released`.

    Not offered: its draws with replacement, 40,000 an epoch, weighted by rare classes (here: balanced draws, an epoch
    is the data set), and a factor for each class in the classification loss. With consistency weights of 8, the
    authors' other experiment, use gamma 0.6. Paper: 35.0 % mIoU on val. Not yet run by us.
    Command: `slrnet train --recipe coco_wsss_released --data SHARDS --num-workers 2` on 2 GPUs.
    """
    return _derive(
        voc_wsss_released(),
        data={"crop_filter": "bilinear", "class_balance": 1.0},
        calibration={"rule": "normalized", "confidence_threshold": 0.5, "floor": 0.1},
        losses={"positive_weight": 10.0},
        optim={"reference_batch_size": 6},
        train={"epochs": 20, "cosine_epochs": 15, "batch_size": 6},
        evaluation={"background_power": 1.0, "gating_top": 8},
    )


@_recipe
def l2id_wsss_released() -> Config:
    """L2ID from image labels with the released network, 512 wide; no file of its experiment is published.

    One convolution in the mask head, shallow features lifted before global cue injection, and the auxiliary head's
    classification loss at full weight. All else is as in `coco_wsss_released`, which is a guess.
    Paper: 52.3 % mIoU on val. Not yet run by us.
    Command: `slrnet train --recipe l2id_wsss_released --data SHARDS --num-workers 2` on 2 GPUs.
    """
    return _derive(
        coco_wsss_released(),
        model={"decoder_dim": 512, "skip_dim": 96, "head_layers": 1, "head_dropout": 0.3, "lift_skip": True},
        cvlr={"dim": 512},
        weights={"auxiliary_classification": 1.0},
    )


_TRANSFORMER: dict[str, dict[str, Any]] = {
    "data": {"crop_scale": (0.5, 1.0)},
    "model": _STRIDE_16 | {"skip_stride": 4, "skip_share": 0.33, "frozen_stages": 0, "dropout": 0.1},
    "calibration": {"source": "ema"},
    "optim": {"name": "adamw", "lr": 2e-5, "new_lr_factor": 10.0, "bias_lr_factor": 1.0, "weight_decay": 0.01}
    | {"layer_decay": 0.8, "warmup_steps": 500, "clip_norm": 1.0},
    "train": {"ema": 0.996},
}
"""What plain vision transformers with self-supervised weights want: AdamW at small rates that fall toward the first
blocks, and pseudo labels from the weights' average. The rate lies between UniMatch V2's 5e-6 and ToCo's 6e-5."""
_FROZEN: dict[str, Any] = {"model": {"frozen_stages": "all"}, "optim": {"lr": 2e-4, "layer_decay": 1.0}}
"""Only pyramid and decoder train, at ten times the rate."""


@_recipe
def voc_wsss_dinov2() -> Config:
    """VOC from image labels on DINOv2's ViT-B with patches of 14 pixels, crop 448, AdamW and an EMA teacher.

    Single-stage methods on plain ViTs reach 71 % mIoU on val (ToCo) to 84 % (WeCLIP+, with CLIP and DINO); expect
    between. Not yet run by us. Hardware: one GPU of 80 GB, or two of 40 GB; `train.accumulation=4` on one of 24 GB.
    About 1.3 TFLOP for an image, so an hour on an A100 at 40 % of its peak: reckoned, not measured.
    `--set model.lora_rank=16` trains few weights.
    Command: `slrnet train --recipe voc_wsss_dinov2 --data SHARDS --num-workers 1`. Weights come from the Hugging Face
    hub, license Apache 2.0.
    """
    base = _derive(voc_wsss(), **_TRANSFORMER)
    return _derive(base, data={"crop_size": 448}, model={"encoder": "timm:vit_base_patch14_dinov2.lvd142m"})


@_recipe
def voc_wsss_dinov2_frozen() -> Config:
    """`voc_wsss_dinov2` with a frozen encoder: it runs without a graph, and only pyramid and decoder train.

    Expect a few points less than with a trained encoder. Not yet run by us. Hardware: one GPU of 24 GB; about
    half an hour on an A100, reckoned as there.
    Command: `slrnet train --recipe voc_wsss_dinov2_frozen --data SHARDS --num-workers 1`.
    """
    return _derive(voc_wsss_dinov2(), **_FROZEN)


@_recipe
def voc_wsss_dinov3() -> Config:
    """VOC from image labels on DINOv3's ViT-B with patches of 16 pixels; all else as `voc_wsss_dinov2`.

    Expect about as much as with DINOv2. Not yet run by us. Hardware and hours as there. DINOv3's license restricts
    use, and its weights on the hub may ask you to log in.
    Command: `slrnet train --recipe voc_wsss_dinov3 --data SHARDS --num-workers 1`.
    """
    return _derive(voc_wsss_dinov2(), model={"encoder": "timm:vit_base_patch16_dinov3.lvd1689m"})


@_recipe
def voc_wsss_dinov3_frozen() -> Config:
    """`voc_wsss_dinov3` with a frozen encoder, as `voc_wsss_dinov2_frozen`.

    Expect a few points less than with a trained encoder. Not yet run by us. Hardware: one GPU of 24 GB.
    Command: `slrnet train --recipe voc_wsss_dinov3_frozen --data SHARDS --num-workers 1`.
    """
    return _derive(voc_wsss_dinov3(), **_FROZEN)


@_recipe
def voc_sss_dinov2() -> Config:
    """VOC from the 1,464 masks of its training list and unlabeled images on DINOv2's ViT-B, crop 518.

    UniMatch V2 reaches 90.8 % mIoU on val with the same encoder and masks; expect less, as here calibration differs.
    As there, two views share the channels of half of the images, and the average of the weights labels. Not yet run
    by us. Hardware: two GPUs of 80 GB, or one with `train.accumulation=2`; 1.5 hours on an A100, reckoned.
    Command: `slrnet train --recipe voc_sss_dinov2 --data SHARDS --num-workers 2`, SHARDS as for `voc_sss`.
    """
    base = _derive(voc_sss(), **_TRANSFORMER)
    return _derive(
        base,
        data={"crop_size": 518},
        model={"encoder": "timm:vit_base_patch14_dinov2.lvd142m", "complementary_dropout": 0.5},
    )


@_recipe
def voc_sss_dinov2_frozen() -> Config:
    """`voc_sss_dinov2` with a frozen encoder, as `voc_wsss_dinov2_frozen`.

    Expect a few points less than with a trained encoder. Not yet run by us. Hardware: one GPU of 24 GB.
    Command: `slrnet train --recipe voc_sss_dinov2_frozen --data SHARDS --num-workers 1`.
    """
    return _derive(voc_sss_dinov2(), **_FROZEN)


@_recipe
def coco_wsss_dinov2() -> Config:
    """COCO from image labels on DINOv2's ViT-B; all else as `voc_wsss_dinov2`.

    Single-stage methods on plain ViTs reach 42 % mIoU on val (ToCo) to 56 % (WeCLIP+); expect between. Not yet run by
    us. Hardware: two GPUs of 80 GB; 2.5 hours on one A100, reckoned.
    Command: `slrnet train --recipe coco_wsss_dinov2 --data SHARDS --num-workers 2`, SHARDS as for `coco_wsss`.
    """
    return voc_wsss_dinov2()


@_recipe
def coco_wsss_dinov2_frozen() -> Config:
    """`coco_wsss_dinov2` with a frozen encoder, as `voc_wsss_dinov2_frozen`.

    Expect a few points less than with a trained encoder. Not yet run by us. Hardware: one GPU of 24 GB.
    Command: `slrnet train --recipe coco_wsss_dinov2_frozen --data SHARDS --num-workers 1`.
    """
    return _derive(coco_wsss_dinov2(), **_FROZEN)


def _lite() -> Config:
    """What all recipes for two CPU cores share: EfficientNet-Lite0 at stride 16, and a short schedule on small crops.

    Crops zoom in, dropout is lower, CVLR is centered, consistency and auxiliary losses weigh less, thresholds keep more
    background. The balanced cross entropy makes the network predict too much foreground, so validation takes the square
    root of the background's probability and predicts only classes with high class scores. The CRF strengthens the
    background by itself and gets a higher exponent.
    """
    return _derive(
        Config(),
        data={"crop_size": 208, "crop_scale": (0.4, 1.0), "workers": 0},
        model=_STRIDE_16 | {"encoder": "efficientnet_lite0", "frozen_stages": 2, "dropout": 0.2},
        cvlr={"centered": True},
        calibration={"refine_stride": 2, "confidence_threshold": 0.5, "background_threshold": 0.5, "floor": 0.4},
        losses={"mask_consistency": "probs"},
        weights={"consistency": 3.0, "auxiliary": 0.1},
        optim={"lr": 1e-3},
        train={"epochs": 6, "pretrain_epochs": 2, "batch_size": 8},
        evaluation={"pseudo_mask_images": 100, "gating": "scores", "background_power": 0.5},
        crf={"background_power": 1.5},
    )


@_recipe
def voc_wsss_lite() -> Config:
    """VOC from image labels on two CPU cores: EfficientNet-Lite0 at stride 16, crop 304.

    Pseudo labels come from a linear probe of the encoder's features, and teach the decoder by plain cross-entropy: they
    follow the objects' sizes, which the focal mask penalty of the classification loss does not, so that loss weighs
    little. Changes for a short schedule: crops zoom in, dropout is lower, CVLR is centered, consistency and auxiliary
    losses weigh less, thresholds keep more background, the decoder is narrower. Crops show images of 320 pixels at 1.2
    to 1.8 times their size; predict such small ones with `evaluation.scale=1.5`.
    Command: `slrnet train --recipe voc_wsss_lite --data SHARDS --num-workers 2`; two workers of one thread are
    faster than one of two. Hardware, minutes and score: see docs/results.md.
    """
    return _derive(
        _lite(),
        data={"crop_size": 304},
        model={"decoder_dim": 128},
        calibration={"masks": "probe"},
        losses={"pseudo_balance": "plain", "validity": "soft"},
        weights={"classification": 0.1},
        train={"epochs": 5, "pretrain_epochs": 1},
        evaluation={"gating": "none", "background_power": 1.0},
    )


@_recipe
def voc_sss_image_labels_lite() -> Config:
    """VOC from masks and image labels on two CPU cores: EfficientNet-Lite0 at stride 16, crop 160, and some masks.

    True masks train from the first step, so one epoch before pseudo labels is enough. Validation uses the masks
    unchanged, as in `voc_sss_lite`. `--set data.pixel_labeled_subset=NAME` chooses another subset.
    Command: `slrnet train --recipe voc_sss_image_labels_lite --data SHARDS --num-workers 2`. About 19 minutes on 2
    cores with 150 masks and 1,053 image labels. Score: see docs/results.md.
    """
    return _derive(
        _lite(),
        setting="sss_image_labels",
        data={"crop_size": 160, "pixel_labeled_subset": "voc_train"},
        train={"epochs": 3, "pretrain_epochs": 1},
        evaluation={"gating": "none", "background_power": 1.0},
        crf={"background_power": None},
    )


@_recipe
def voc_sss_lite() -> Config:
    """VOC from masks and unlabeled images on two CPU cores: as `voc_sss_image_labels_lite`, without image labels.

    The first two epochs draw only images with masks, because unlabeled ones teach nothing yet. As in the released code,
    every epoch draws images with masks seven times. For comparison, train only on images with masks:
    `--set data.train_subset=NAME --set data.pixel_labeled_subset=NAME --set train.epochs=12`.
    Command: `slrnet train --recipe voc_sss_lite --data SHARDS --num-workers 2`. Score: see docs/results.md.
    """
    return _derive(
        voc_sss_image_labels_lite(),
        setting="sss",
        data={"pixel_oversampling": 7, "pretrain_on": "labeled"},
        train={"epochs": 6, "pretrain_epochs": 2},
        calibration=RELEASED_SSS_THRESHOLDS,
    )


@_recipe
def coco_wsss_lite() -> Config:
    """COCO from image labels on two CPU cores: `voc_wsss_lite` with the released code's consistency.

    That is a mean over COCO's 80 classes, with twice the weight that VOC's six classes had on two cores.

    Command: `slrnet train --recipe coco_wsss_lite --data SHARDS --num-workers 2`. Score: not yet run.
    """
    return _derive(voc_wsss_lite(), losses={"class_divisor": "data"}, weights={"consistency": 2.0})


@_recipe
def l2id_wsss_lite() -> Config:
    """L2ID from image labels on two CPU cores: `voc_wsss_lite` with class-balanced sampling.

    Command: `slrnet train --recipe l2id_wsss_lite --data SHARDS --num-workers 2`. Score: not yet run.
    """
    return _derive(voc_wsss_lite(), data={"class_balance": 1.0})


@_recipe
def voc_distill() -> Config:
    """The second stage (paper Table 2): DeepLabV3+ on the pseudo masks of a trained network, plain cross-entropy.

    Paper: 69.3 % mIoU on val, 69.4 % on test, with WideResNet-38 (`--set model.encoder=wide_resnet38`). Not yet run by
    us. The paper gives no schedule, so this one is ours.
    Command: `slrnet distill --recipe voc_distill --data PSEUDO --num-workers 8`, PSEUDO from `slrnet pseudo-label`.
    """
    return _derive(
        Config(),
        setting="sss",
        data={
            "pixel_labeled_subset": "pseudo_labeled",
            "pixel_oversampling": 1,
            "crop_size": 512,
            "crop_scale": (0.3, 1.0),
        },
        views={"scales": (1.0,)},
        model=_STRIDE_16
        | {"architecture": "deeplabv3plus", "encoder": "resnet101"}
        | {"frozen_stages": 0, "freeze_batch_norm": False, "dropout": 0.1},
        cvlr={"enabled": False},
        weights={"pixel_labels": 1.0, "consistency": 0.0},
        optim={"lr": 1e-3},
        train={"epochs": 30, "pretrain_epochs": 0},
        evaluation={"pseudo_mask_images": 0, "panel_images": 0},
    )


@_recipe
def voc_distill_lite() -> Config:
    """`voc_distill` on two CPU cores: EfficientNet-Lite0 with the batch norms of its ImageNet weights, crop 192.

    Command: `slrnet distill --recipe voc_distill_lite --data PSEUDO --num-workers 2`. Score: see docs/results.md.
    """
    return _derive(
        voc_distill(),
        data={"crop_size": 192, "crop_scale": (0.4, 1.0), "workers": 0},
        model={"encoder": "efficientnet_lite0", "frozen_stages": 1, "freeze_batch_norm": True},
        train={"epochs": 10, "batch_size": 8},
    )


@_recipe
def demo() -> Config:
    """The embedded, synthetic data set on two CPU cores, in minutes.

    Pictures of 128 pixels have 8x8 deep features, so dilations are small, and the shallow features come from stride 4.
    A narrow decoder at twice the rate learns as much in five epochs as a wide one in seven, in half the time.
    Command: `make demo`, or `slrnet train` without arguments.
    """
    return _derive(
        _lite(),
        data={"crop_size": 128, "shuffle_buffer": 200},
        model={"decoder_dim": 64, "aspp_dilations": (1, 2, 3), "skip_stride": 4, "skip_share": 0.33},
        losses={"pseudo_balance": "sqrt"},
        weights={"consistency": 5.0},
        optim={"lr": 2e-3},
        train={"epochs": 5, "pretrain_epochs": 1, "log_every": 5},
        evaluation={"pseudo_mask_images": 32, "panel_images": 6, "gating": "none"},
    )
