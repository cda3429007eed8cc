"""Every setting of a run, as frozen pydantic models.

A run is a `Config`. Recipes (`slrnet.recipes`) build complete ones; the command line changes single fields with
`section.field=value`. Mistakes raise `ConfigError`; its messages are our own, because pydantic's span several lines
and do not name the nearest key. A test walks all fields and proves that each has an effect.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

__all__ = [
    "PROTOCOLS",
    "CalibrationConfig",
    "Config",
    "ConfigError",
    "CrfConfig",
    "CvlrConfig",
    "DataConfig",
    "EvaluationConfig",
    "Gating",
    "Implementation",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "Precision",
    "Protocol",
    "Setting",
    "Tf32",
    "TrainConfig",
    "TrainPrecision",
    "ViewsConfig",
    "WeightsConfig",
    "apply_overrides",
    "config_from_dict",
    "load_config",
    "nearest",
]

# Numbers are strict: "3", 3.0 and true are no integers, and "0.5" and true are no floats.
Fraction = Annotated[float, Field(strict=True, ge=0.0, le=1.0)]
FractionBelowOne = Annotated[float, Field(strict=True, ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(strict=True, ge=1)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0.0, allow_inf_nan=False)]

Setting = Literal["wsss", "sss_image_labels", "sss"]
"""Image labels; pixel and image labels; pixel labels and unlabeled images."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""See `evaluation.precision`."""
TrainPrecision = Literal["auto", "fp32", "bf16", "fp16", "fp64"]
"""See `train.precision`."""
Tf32 = Literal["off", "convolutions", "all"]
"""See `train.tf32`."""
Exchange = Literal["fp32", "bf16"]
"""See `train.exchange`."""
Implementation = Literal["auto", "reference", "recompute", "triton"]
"""See `cvlr.implementation`."""
Protocol = Literal["ss", "ms", "ms_crf"]
"""See `evaluation.protocol`."""
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
"""All protocols."""
Gating = Literal["none", "scores", "image_labels"]
"""See `evaluation.gating`."""


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, out of range, or in conflict with another one."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


class DataConfig(_Section):
    """Which shards to read, and how to crop an image on the CPU."""

    path: str = ""
    """Folder with the shards, `manifest.parquet` and `dataset.json`. Empty: the embedded demo data set."""
    train_split: str = "train"
    """Split of the manifest to train on."""
    val_split: str = "val"
    """Split of the manifest to validate on."""
    train_subset: str = ""
    """Named subset of the training split to train on. Empty: the whole split."""
    pixel_labeled_subset: str = ""
    """Named subset of the training split whose masks training may use. Empty in setting `wsss`, which uses no masks."""
    pixel_oversampling: PositiveInt = 5
    """How often an epoch draws each sample of `pixel_labeled_subset` (paper Sec. 4.4); it draws the others once."""
    pretrain_on: Literal["all", "labeled"] = "all"
    """Images of the first `train.pretrain_epochs` epochs: all, or only those with a label, drawn more often for the
    same length. Without pseudo labels, an unlabeled image adds only the consistency terms."""
    class_balance: Fraction = 0.0
    """How strongly sampling balances the classes. 0: draw images as they come; 1: draw all classes equally often;
    between: a class with share p of the images gets a share proportional to p^(1 - class_balance)."""
    balance_limit: Annotated[float, Field(strict=True, ge=1.0, allow_inf_nan=False)] = 10.0
    """Most draws of one image per epoch that `class_balance` may cause."""
    crop_size: PositiveInt = 321
    """Side of the square training crop, in pixels: a multiple of `model.output_stride`, or one more than a multiple.
    Vision transformers need a multiple of their patch."""
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.9, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    flip: Fraction = 0.5
    """Probability that a training crop is mirrored before the views are made."""
    crop_filter: Literal["bilinear", "bicubic"] = "bilinear"
    """How crops are resized, with antialiasing. The paper does not say. The released VOC data set is `bicubic`
    (datasets/transforms.py); those of COCO and L2ID are bilinear."""
    shuffle_buffer: PositiveInt = 1000
    """Samples held in memory to shuffle their order; 1 keeps the order of the (permuted) shards."""
    workers: NonNegativeInt = 2
    """Reader processes per training worker; 0 reads in the training process."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a damaged or missing shard: stop the run, or skip, count and report it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.crop_scale
        if not low <= high <= 1.0:
            raise ValueError(f"crop_scale is {(low, high)}; allowed are two shares with 0 < smallest <= largest <= 1")
        return self


class ViewsConfig(_Section):
    """The views of an image that go through the encoder together (paper Sec. 4.6, Table 7)."""

    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=8)] = (1.0, 0.5)
    """Scale of each view relative to the crop. The number of entries, 1 to 8, is the number of views."""
    flip: bool = True
    """Each view mirrors each image with probability 1/2. Off: no view is mirrored."""
    own_color: bool = True
    """Each view draws its own color distortion (paper Sec. 4.6). Off: the crop's colors are distorted once, before the
    views are made (released datasets/pascal_voc.py)."""
    sizes: Literal["fitted", "truncated"] = "fitted"
    """`fitted`: the side nearest to scale * crop that fits the output stride as the crop does. `truncated`: scale *
    crop rounded down (released models/slrnet.py). The paper does not say. At scale 0.5, crop 321 gives 161 or 160."""
    unwarp: Literal["logits", "probs"] = "logits"
    """Where fusion or Eq. 4 take probabilities: the softmax of un-warped logits (paper Eq. 3 un-warps the masks), or
    un-warped probabilities (released models/slrnet.py)."""
    brightness: Fraction = 0.3
    """Largest change b of brightness; factors lie in [1 - b, 1 + b]."""
    contrast: Fraction = 0.3
    """Largest change c of contrast; factors lie in [1 - c, 1 + c]."""
    saturation: Fraction = 0.3
    """Largest change s of saturation; factors lie in [1 - s, 1 + s]."""
    hue: Annotated[float, Field(strict=True, ge=0.0, le=0.5)] = 0.1
    """Largest shift of hue, in turns of the color circle."""


class CvlrConfig(_Section):
    """The cross-view low-rank module (paper Sec. 3.3, Algorithm 1), or one that Table 8 compares it with."""

    enabled: bool = True
    """Off: the decoder gets the encoder's features unchanged (Table 8, "w/o CVLR")."""
    method: Literal["cvlr", "separate", "free", "emau", "nmf", "vq", "cd"] = "cvlr"
    """`cvlr`; `separate`: one dictionary per view; `free`: atoms that stand for no class (paper: num_iters 3);
    `emau`: EM attention (num_iters 3); `nmf`, `vq`, `cd`: Hamburger (num_iters 6)."""
    num_bases: PositiveInt = 64
    """k, the number of atoms of `free`, `emau`, `nmf`, `vq` and `cd`. `cvlr` and `separate` have one atom per class."""
    form: Literal["paper", "released"] = "paper"
    """Algorithm 1 as printed, or the arithmetic of the published checkpoints."""
    dim: PositiveInt = 256
    """d, the dimension of the dictionary's atoms."""
    num_iters: PositiveInt = 1
    """T, the number of alternating updates."""
    temperature: PositiveFloat = 1.0
    """tau of the codes' softmax."""
    centered: bool = False
    """Subtract the features' mean (over all views, or one view if the method treats views separately) before
    factorizing. Off: factorize the features as they are (Algorithm 1)."""
    implementation: Implementation = "auto"
    """How the factorization and its gradient are computed; the numbers are the same. `auto` is `recompute`.
    `triton` needs a GPU and should be slower there (docs/cost.md)."""
    start: Literal["identity", "default"] = "identity"
    """First projectors. `identity`: an orthogonal one in, zeros out, so the module starts as the identity. `default`:
    PyTorch's random default for both (released models/slrnet.py). The paper does not say."""
    start_share: Fraction = 0.0
    """With start `identity`, the first output projector is this share of the input projector's transpose: the module
    starts by adding so much of the features' low-rank reconstruction to them. 0: the identity."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.start_share and self.start != "identity":
            raise ValueError(f"start_share {self.start_share} goes with start 'identity', not {self.start!r}; set one")
        if self.centered and self.form != "paper":
            raise ValueError(f"centered goes with form 'paper', not {self.form!r}; set one of the two")
        if self.method != "cvlr" and self.form != "paper":
            raise ValueError(f"method {self.method!r} has no form {self.form!r}; set form to 'paper'")
        return self


class ModelConfig(_Section):
    """Encoder, decoder and heads."""

    architecture: Literal["slrnet", "deeplabv3plus"] = "slrnet"
    """The paper's network, or DeepLabV3+ (extra `distill`) for training on masks alone: setting `sss`, without CVLR."""
    encoder: str = "wide_resnet38"
    """`wide_resnet38`, `resnet50`, `resnet101`, `efficientnet_lite0` (or 1, 2), or `timm:NAME` for a timm backbone such
    as `timm:vit_base_patch14_dinov2`."""
    encoder_weights: str = "auto"
    """`auto` (the encoder's usual pretrained weights), `none` (random), or the path of a weights file, or of a folder
    with one, such as `hf download` makes."""
    output_stride: Literal[8, 16, 32] = 8
    """Pixels of the image per pixel of the deepest features. Vision transformers count their patch as the nearest power
    of two: 16 for patches of 14 pixels."""
    skip_stride: Literal[0, 2, 4, 8, 16] = 0
    """Pixels of the image per pixel of the shallow features, and so of the masks; 0: half of `output_stride`."""
    frozen_stages: int | Literal["all"] = 1
    """Number of encoder stages, from the image on, whose weights do not train; those of vision transformers are their
    blocks. `all`: the whole encoder, which then keeps nothing for the backward pass."""
    lora_rank: NonNegativeInt = 0
    """Rank of trained corrections to the encoder's linear layers (Hu et al. 2022), whose own weights then do not train:
    fine-tuning in the memory of few weights. Stages of `frozen_stages` get none. 0: off."""
    freeze_batch_norm: bool = True
    """Encoder batch norms keep their ImageNet statistics and affine parameters."""
    sync_batch_norm: bool = True
    """Batch norms that train measure the images of all workers, so that their number does not change the training. Off:
    each worker's own (released code, on 2 GPUs). The paper does not say. Within `train.accumulation`, each pass."""
    decoder_dim: PositiveInt = 256
    """Channels of the ASPP output, the fused features and the decoder."""
    skip_dim: PositiveInt = 48
    """Channels of the shallow features after the skip projection."""
    skip_share: FractionBelowOne = 0.0
    """Share of the fused features' variance that the shallow features have at the start, whatever the encoder. 0: fuse
    both as they come (released code), which can leave the shallow ones under 1 %, and masks without detail."""
    aspp_dilations: tuple[PositiveInt, PositiveInt, PositiveInt] = (12, 24, 36)
    """Dilations of the three 3x3 branches of the ASPP, in pixels of the deepest features."""
    dropout: FractionBelowOne = 0.5
    """Dropout probability after the ASPP and in the heads; one fifth of it before the mask classifier."""
    complementary_dropout: Fraction = 0.0
    """Share of the images of which one view keeps those channels of the encoder's features that the next view loses,
    all of them doubled, half each (Yang et al. 2025). 0: off."""
    gate_rate: FractionBelowOne = 0.3
    """Share of shallow features that the stochastic gate mixes in."""
    head_layers: Literal[1, 2] = 2
    """3x3 convolutions of the mask head. The paper does not say; the released L2ID network has 1
    (models/slrnet_lid_wide.py)."""
    head_dropout: FractionBelowOne | None = None
    """Dropout probability after the mask head's first convolution; null: `dropout` (paper: silent). The released L2ID
    network has 0.3 (models/slrnet_lid_wide.py)."""
    lift_skip: bool = False
    """Lift the shallow features to `decoder_dim` channels by a 1x1 convolution before global cue injection (released
    models/slrnet_lid_wide.py). The paper does not say."""
    bias_start: Literal["zero", "default"] = "zero"
    """First biases of the new convolutions: zero, or PyTorch's random default (released models/single_stage.py). The
    paper does not say."""
    auxiliary_views: Literal["all", "first"] = "all"
    """Views that the auxiliary head sees, in its losses and its batch norm: all (paper Alg. 1, codes of all views), or
    view 1 (released models/slrnet.py), which needs `cvlr.form = "released"`."""
    focal_power: NonNegativeFloat = 3.0
    """p of the focal mask penalty (1 - m)^p log(c + m) in the class scores."""
    focal_floor: PositiveFloat = 0.01
    """c of the focal mask penalty."""

    @field_validator("frozen_stages", mode="before")
    @classmethod
    def _count_or_all(cls, value: Any) -> Any:
        """A number, also as text: overrides replace the text `all` by text."""
        value = int(value) if isinstance(value, str) and value.isdecimal() else value
        if value != "all" and (type(value) is not int or value < 0):
            raise ValueError(f"frozen_stages is {value!r}; allowed are whole numbers from 0 on, and all")
        return value


class CalibrationConfig(_Section):
    """From the masks of all views to pseudo labels (paper Sec. 3.2, Eq. 3)."""

    supervision: Literal["mvmc", "cps", "kl"] = "mvmc"
    """Whose pseudo labels each view learns from (Fig. 4, right). `mvmc`: those of all views' average; `cps`: the next
    view's; `kl`: its own, with a Kullback-Leibler divergence between the views' masks."""
    fusion: Literal["logits", "probs"] = "logits"
    """Average the un-warped logits and then apply softmax (Eq. 3), or average probabilities (released code)."""
    view_weights: tuple[NonNegativeFloat, ...] = ()
    """Weight of each of `views.scales` in that average; none: equal ones (Eq. 3)."""
    background_power: PositiveFloat = 1.0
    """Exponent on the background's fused probability before refinement. Paper Eq. 3 has none; the released code of
    setting `sss` cubes it (models/slrnet_semi_wo_cls.py)."""
    refine_image: Literal["crop", "distorted"] = "crop"
    """Image whose colors guide the refinement: the crop (paper Eq. 3, image I), or the crop with its distorted colors
    (released tools/train_voc_wss.py), which needs `views.own_color = false`."""
    refine_iters: NonNegativeInt = 10
    """Iterations of the pixel-adaptive refinement; 0 turns it off."""
    refine_dilations: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8, 12, 24)
    """Dilations of the refinement's 3x3 neighborhoods, in pixels of the refined mask."""
    refine_stride: PositiveInt = 4
    """Pixels of the crop per pixel of the refined mask."""
    refine_side: NonNegativeInt = 0
    """Side of the refined mask for which `refine_dilations` are meant, in pixels: the dilations scale with the mask. 0:
    they stay as they are. VOC's crops of 321 have refined masks of 81."""
    feature_share: Fraction = 0.0
    """Share of a neighbor's weight in the refinement that comes from how similar the encoder's deepest features are,
    instead of colors. 0: colors alone (paper, released code)."""
    feature_source: Literal["tokens", "attention"] = "tokens"
    """What says how similar two places are: the cosine of the encoder's deepest features, or the attention between them
    in a plain vision transformer's last block, as in WeCLIP and ToCo: the mean over heads and both directions."""
    peak_power: Fraction = 0.0
    """Refined masks are divided by the maximum of each class over the image to this power, before the thresholds. 0.5
    lifts faint classes above the floor; 0: masks as they are (paper, released code)."""
    rule: Literal["claims", "normalized"] = "claims"
    """`claims`: a class claims pixels above a share of its maximum and above the floor. `normalized`: masks are divided
    by their maximum; a foreground class claims where it is above `confidence_threshold`, the background where none is
    above `floor` (released models/slrnet_coco_pseudo.py, for COCO and L2ID). The paper has one threshold, gamma."""
    confidence_threshold: Fraction = 0.6
    """gamma: a foreground class claims a pixel only above this share of its maximum over the image."""
    background_threshold: Fraction = 0.7
    """The same share for the background."""
    floor: Fraction = 0.2
    """Probability that a class must exceed to claim a pixel, whatever its maximum."""
    masks: Literal["decoder", "probe"] = "decoder"
    """Masks that become pseudo labels: the decoder's (paper, released code), or those of a linear probe of the
    encoder's deepest features (`slrnet.models.probe`), which is too small to learn the errors of its own labels."""
    source: Literal["training", "evaluation", "ema"] = "training"
    """Network that makes the training's pseudo labels. `training`: the training pass itself (paper, released code);
    `evaluation`: another pass of it without dropout, gates and batch statistics; `ema`: that of its average, which
    needs `train.ema`. The latter two see the same views in the crop's own colors, for another forward pass's time."""


class LossConfig(_Section):
    """Which quantities the consistency terms compare (paper Eq. 4 and 9)."""

    mask_consistency: Literal["logits", "probs"] = "logits"
    """Compute Eq. 4 on the output logits (paper) or on probabilities (released code)."""
    code_consistency: Literal["all", "maximum"] = "all"
    """Compute Eq. 9 on all codes (paper), or set all but each pixel's maximum to 0 first (released code)."""
    class_divisor: Literal["voc", "data"] = "voc"
    """What divides the sums over classes in Eq. 4 and 9. `voc`: VOC's number of classes, so that lambda_reg means the
    same for any data; `data`: the data's own (released code), so that more classes make each of them count less."""
    pseudo_balance: Literal["balanced", "sqrt", "plain"] = "balanced"
    """Weights of the classes in the loss of pseudo labels: `balanced`, (total - own pixels) / (1 + total), which makes
    rare classes spread; `sqrt`, its root; `plain`, 1 for all, with which masks shrink."""
    validity: Literal["whole_image", "present_classes", "soft"] = "whole_image"
    """What counts of a pseudo label that misses a class of its image: nothing (`whole_image`, released code), the
    pixels of foreground classes alone (`present_classes`), or all, by the share of the classes it shows (`soft`)."""
    pixel_balance: bool = False
    """Balance the classes in the loss of true masks too (released code). Off: plain cross-entropy (paper)."""
    positive_weight: PositiveFloat = 1.0
    """Factor on the classification loss of classes that an image shows. Paper Eq. 2 has none; the released COCO
    training has 10, and a factor for each class that is not offered here (models/slrnet_coco_pseudo.py)."""
    pixel_validity: bool = False
    """Ignore an image with a true mask too if its crop misses one of its image labels (released
    models/slrnet_semi.py). Off: true masks always count (paper Sec. 4.4)."""
    mask_background: bool = True
    """Where image labels are unknown, Eq. 4 compares the background too. Off: the foreground alone (released
    models/slrnet_semi_wo_cls.py). With image labels it never does."""


class WeightsConfig(_Section):
    """Weights of the loss parts."""

    segmentation: NonNegativeFloat = 1.0
    """lambda_seg. Pseudo labels count after pretraining, true masks from the beginning."""
    pixel_labels: NonNegativeFloat = 2.0
    """Factor on the segmentation loss of samples with true masks (paper Sec. 4.4), in addition to lambda_seg."""
    pixel_pretraining: NonNegativeFloat | None = None
    """The same factor during pretraining; null: `pixel_labels` (paper). The released training has 1, then 2, because
    these losses also take the place of the classification loss (tools/train_voc_semi.py)."""
    pixel_mean: NonNegativeFloat = 0.0
    """Factor, in addition to lambda_seg, on these losses' mean over the samples with masks instead of the whole batch,
    added to the above. The paper has none; the released training has 1 (tools/train_voc_semi.py), where each GPU takes
    the mean over its own samples; here it is that over the samples of all workers and accumulation steps."""
    classification: NonNegativeFloat = 1.0
    """lambda_cls."""
    consistency: NonNegativeFloat = 4.0
    """lambda_reg, of both Eq. 4 and Eq. 9."""
    mask_consistency: NonNegativeFloat | None = None
    """Of Eq. 4 alone, and of the divergence of `calibration.supervision=kl`; null: `consistency`."""
    code_consistency: NonNegativeFloat | None = None
    """Of Eq. 9 alone; null: `consistency`."""
    auxiliary: NonNegativeFloat = 0.4
    """Weight of the auxiliary head's segmentation and classification losses within the total of each kind."""
    auxiliary_classification: NonNegativeFloat | None = None
    """The same for the classification loss alone; null: `auxiliary`. The released L2ID training has 1
    (models/slrnet_lid_wide.py)."""


class OptimConfig(_Section):
    """SGD with Nesterov momentum or AdamW; the rate warms up if asked to, is constant, then falls as a cosine."""

    name: Literal["sgd", "adamw"] = "sgd"
    """`sgd` (paper): four parameter groups, no decay of biases. `adamw`, as vision transformers want it: no decay of
    norms, biases, positions and tokens."""
    lr: PositiveFloat = 5e-4
    """Learning rate of pretrained weights at a global batch of `reference_batch_size`."""
    reference_batch_size: PositiveInt = 16
    """Global batch that `lr` is meant for; the rate used is lr * train.batch_size / reference_batch_size."""
    new_lr_factor: PositiveFloat = 10.0
    """Learning rate of newly added weights relative to pretrained ones."""
    bias_lr_factor: PositiveFloat = 2.0
    """Learning rate of biases relative to weights."""
    layer_decay: Annotated[float, Field(strict=True, gt=0.0, le=1.0)] = 1.0
    """Factor on the rate for each encoder stage (block of a vision transformer) between the weights and the last one:
    early stages change less. 1: all stages have one rate."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the rate rises linearly to its full value; 0: none."""
    momentum: Annotated[float, Field(strict=True, gt=0.0, lt=1.0)] = 0.9
    """Nesterov momentum; beta_1 of AdamW."""
    beta2: Annotated[float, Field(strict=True, gt=0.0, lt=1.0)] = 0.999
    """Decay of AdamW's mean of squared gradients; SGD has none."""
    weight_decay: NonNegativeFloat = 5e-4
    """Decay of weights; biases have none. SGD adds it to the gradient, AdamW takes rate * decay off the weights."""
    clip_norm: NonNegativeFloat = 0.0
    """Largest norm of the gradient of all weights together; a longer one is scaled down to it. 0: no limit."""


class TrainConfig(_Section):
    """Length, batch, precision and randomness of training."""

    epochs: PositiveInt = 20
    """Passes over the training split."""
    pretrain_epochs: NonNegativeInt = 5
    """Number of first epochs that use no pseudo labels and a constant learning rate; fewer than `epochs`."""
    cosine_epochs: PositiveInt | None = None
    """Epochs from the end of pretraining until the cosine reaches 0; null: all that remain. The paper names no
    schedule; the released training stops one epoch earlier than its cosine (tools/train_voc_wss.py)."""
    batch_size: PositiveInt = 16
    """Global batch: images per optimizer step over all workers and accumulation steps."""
    accumulation: PositiveInt = 1
    """Backward passes per optimizer step; the memory for a batch shrinks by this factor."""
    precision: TrainPrecision = "auto"
    """`auto`: autocast to bfloat16 on GPUs from Ampere on and CPUs with AMX, to float16 on T4 and V100; `fp32`: none;
    `bf16`, `fp16`: always. With float16 the loss is scaled, and a step whose gradients overflow changes nothing.
    `fp64`: weights and arithmetic in float64, slower and in twice the memory, to compare trainings without rounding."""
    tf32: Tf32 = "convolutions"
    """Float32 operators that may round their inputs to TF32 (10 bits of fraction) on GPUs from Ampere on. The paper
    does not say; `convolutions` is PyTorch's default. `off` is float32 in full, at a fraction of the speed."""
    deterministic: bool = False
    """GPUs use only algorithms that give the same bits each time, so that a resumed training equals an undisturbed one
    to the bit there too. Costs speed: resizing goes backward in index operations, and cuDNN has fewer algorithms."""
    compile: bool = False
    """GPUs: `torch.compile` makes fewer and larger kernels of encoder, decoder, heads, colors and refinement; the first
    step then takes minutes. Parts with batch norms over all workers stay as they are. Not measured yet."""
    exchange: Exchange = "fp32"
    """Numbers in which workers exchange gradients. `bf16` halves what goes over the network and rounds each gradient to
    8 bits of fraction; the paper does not say."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Seed of weights, order, crops, colors, dropout and gates."""
    log_every: PositiveInt = 10
    """Optimizer steps between logged losses."""
    ema: FractionBelowOne = 0.0
    """Decay of a moving average of weights and buffers over the optimizer steps; 0: none. Step n takes at most
    (n - 1) / (n + 9) of the old average. Validation, the best checkpoint and all predictions then use the average."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """Minutes after which a checkpoint is written within an epoch, measured on rank 0; 0: none by time."""
    checkpoint_every: NonNegativeInt = 0
    """Optimizer steps between checkpoints within epochs, counted over all of them; 0: none by steps. Each epoch also
    ends with one."""

    init: str = ""
    """Run or checkpoint whose weights the training starts from (`--init`); its classes and its network must be those of
    this run. Empty: the encoder's weights, and new layers."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pretrain_epochs >= self.epochs:
            raise ValueError(
                f"pretrain_epochs is {self.pretrain_epochs} of {self.epochs} epochs; it must be smaller than epochs, "
                "else no epoch has pseudo labels"
            )
        rest = self.epochs - self.pretrain_epochs
        if self.cosine_epochs is not None and self.cosine_epochs < rest:
            raise ValueError(
                f"cosine_epochs is {self.cosine_epochs} and {rest} epochs follow pretraining; a cosine that ends "
                f"earlier would rise again, so use {rest} or more, or null"
            )
        return self


class EvaluationConfig(_Section):
    """What to measure after an epoch, and on how many images."""

    every: PositiveInt = 1
    """Epochs between measurements; the last epoch is always measured."""
    pseudo_mask_images: NonNegativeInt = 200
    """Training images in the fixed, seeded subset on which pseudo masks are measured; 0 turns this off."""
    panel_images: NonNegativeInt = 8
    """Images of that subset to draw side by side (image, raw, refined, pseudo label, truth); 0 draws none."""
    protocol: Protocol = "ss"
    """How to predict masks. `ss`: one scale; `ms`: several scales, each also mirrored; `ms_crf`: `ms` and a dense CRF.
    Training always measures `ss`."""
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0, 1.5, 2.0, 0.5, 0.75)
    """Scales of `ms` and `ms_crf`, as multiples of `scale`."""
    precision: Precision = "fp32"
    """As `train.precision`, for predictions; bf16 is faster where supported and changes the last digit of scores."""
    scale: PositiveFloat = 1.0
    """Scale at which whole images enter the network; 1 is about their own size (see `resizing`). Where training
    crops shrink their images (crop_size below the image's side), use the same scale here."""
    gating: Gating = "none"
    """Classes that may be predicted. `none`: all; `scores`: those with high class scores; `image_labels`: those that
    the image shows (the result says so)."""
    gating_threshold: Fraction = 0.3
    """Smallest sigmoid(class score) that `gating = "scores"` keeps."""
    gating_top: PositiveInt = 6
    """Most classes that `gating = "scores"` keeps."""
    background_power: PositiveFloat = 1.0
    """Exponent on the background's probability before the arg max; the released code uses 3 for WSSS."""
    resizing: Literal["fitted", "released"] = "fitted"
    """How an image enters the network at a scale. `fitted`: bilinear, to the nearest size that fits the output stride
    as the training crop does. `released`: bicubic and rounded to bytes, to round(scale * side); probabilities go to
    that size, then to the image's (tools/infer_voc.py). The paper does not say."""


class CrfConfig(_Section):
    """The dense CRF of the protocol `ms_crf` (Kraehenbuehl and Koltun 2011), with the released code's values."""

    num_iters: PositiveInt = 10
    """Mean-field iterations."""
    smooth_xy: PositiveFloat = 3.0
    """Standard deviation of the smoothness kernel, in pixels."""
    smooth_weight: NonNegativeFloat = 3.0
    """Weight of the smoothness kernel."""
    appearance_xy: PositiveFloat = 80.0
    """Standard deviation of the appearance kernel in space, in pixels."""
    appearance_rgb: PositiveFloat = 13.0
    """Standard deviation of the appearance kernel in color, on the scale 0 to 255."""
    appearance_weight: NonNegativeFloat = 10.0
    """Weight of the appearance kernel."""
    background_power: PositiveFloat | None = None
    """Exponent on the background's probability before the CRF; null: that of `evaluation.background_power`."""


class InferenceConfig(_Section):
    """How predictors handle large images, and which pixels pseudo labeling leaves void."""

    tile_above: PositiveInt = 6_000_000
    """Number of pixels (height x width) above which a predictor cuts an image into overlapping tiles."""
    tile_size: PositiveInt = 768
    """Side of a tile, in pixels. Memory grows with its square, and with its product with the image's width."""
    tile_overlap: NonNegativeInt = 192
    """Pixels that neighboring tiles share and over which one fades into the other; at most half a tile."""
    void_below: Fraction = 0.5
    """Confidence (the chosen class's share of the probabilities) below which a pixel of a pseudo mask is void, 255."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        overlap, size = self.tile_overlap, self.tile_size
        if 2 * overlap > size:
            raise ValueError(f"tile_overlap is {overlap} and tile_size {size}; use an overlap of at most {size // 2}")
        return self


class TrackingConfig(_Section):
    """Where curves and pictures go."""

    uri: str = ""
    """MLflow tracking URI. Empty: MLFLOW_TRACKING_URI, else a SQLite file in the storage folder."""
    experiment: str = "slrnet"
    """Name of the MLflow experiment."""
    gpu_interval: NonNegativeFloat = 1.0
    """Seconds between two readings of each worker's GPU; 0: none. `slrnet/tracking/gpu_monitor.py` has the metrics."""


class Config(_Section):
    """A complete run."""

    recipe: str = "custom"
    """Name of the recipe that the run started from; for the record."""
    setting: Setting = "wsss"
    """Labels that training may use. `wsss`: image labels only. `sss_image_labels`: also the masks of
    `data.pixel_labeled_subset`. `sss`: those masks and no image labels; the heads then predict the background
    themselves, and there are neither class scores nor a classification loss."""
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig()
    cvlr: CvlrConfig = CvlrConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    losses: LossConfig = LossConfig()
    weights: WeightsConfig = WeightsConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    crf: CrfConfig = CrfConfig()
    inference: InferenceConfig = InferenceConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        subset, setting = self.data.pixel_labeled_subset, self.setting
        if setting == "wsss" and subset:
            raise ValueError(
                f"setting 'wsss' sees no masks, but data.pixel_labeled_subset is {subset!r}; "
                "use setting=sss_image_labels or sss, or empty the subset"
            )
        if setting != "wsss" and not subset:
            raise ValueError(
                f"setting {setting!r} trains on masks; name the subset whose masks it may see in "
                "data.pixel_labeled_subset (`slrnet prepare` makes subsets with --subset NAME=LISTFILE)"
            )
        if setting == "sss" and self.evaluation.gating == "scores":
            raise ValueError("evaluation.gating 'scores' needs class scores, and setting 'sss' has none; use none")
        if setting == "sss" and self.data.class_balance:
            raise ValueError(
                f"data.class_balance is {self.data.class_balance} and reads image labels, which setting 'sss' does not "
                "grant; set it to 0"
            )
        if self.calibration.refine_image == "distorted" and self.views.own_color:
            raise ValueError(
                "calibration.refine_image 'distorted' needs one distortion per crop, and views.own_color draws one per "
                "view; set views.own_color=false, or refine_image to 'crop'"
            )
        weights, scales = self.calibration.view_weights, self.views.scales
        if weights and (len(weights) != len(scales) or not sum(weights)):
            raise ValueError(
                f"calibration.view_weights is {weights} and views.scales {scales}; give one weight for each view, not "
                "all of them 0, or none: []"
            )
        if weights and self.calibration.supervision != "mvmc":
            raise ValueError(
                f"calibration.supervision {self.calibration.supervision!r} averages no views in training, so "
                "calibration.view_weights has no effect there; set it to [], or supervision to 'mvmc'"
            )
        if self.calibration.source == "ema" and not self.train.ema:
            raise ValueError(
                "calibration.source 'ema' takes pseudo labels from the weights' average, and train.ema is 0, none; set "
                "train.ema, such as 0.99, or source to 'training' or 'evaluation'"
            )
        if self.views.unwarp == "probs" and "probs" not in (self.calibration.fusion, self.losses.mask_consistency):
            raise ValueError(
                "views.unwarp 'probs' has no effect, because neither calibration.fusion nor losses.mask_consistency is "
                "'probs'; set one of them, or unwarp to 'logits'"
            )
        if self.calibration.feature_source == "attention" and not self.calibration.feature_share:
            raise ValueError(
                "calibration.feature_source 'attention' has no effect with calibration.feature_share 0; set "
                "feature_share above 0, such as 0.5, or feature_source to 'tokens'"
            )
        if self.calibration.masks == "probe" and setting == "wsss" and not self.train.pretrain_epochs:
            raise ValueError(
                "calibration.masks 'probe' learns its first masks in the epochs before pseudo labels, and "
                "train.pretrain_epochs is 0; set it to 1 or more, or masks to 'decoder'"
            )
        if self.calibration.masks == "probe" and self.model.architecture == "deeplabv3plus":
            raise ValueError(
                "calibration.masks 'probe' makes pseudo labels, and model.architecture 'deeplabv3plus' learns from "
                "none; set masks to 'decoder'"
            )
        if self.model.auxiliary_views == "first" and self.cvlr.form != "released":
            raise ValueError(
                f"model.auxiliary_views 'first' gives CVLR no codes of other views, which cvlr.form {self.cvlr.form!r} "
                "needs; set cvlr.form=released, or auxiliary_views to 'all'"
            )
        if self.model.architecture == "deeplabv3plus" and (setting != "sss" or self.cvlr.enabled):
            raise ValueError(
                "model.architecture 'deeplabv3plus' has neither class scores nor CVLR; use setting=sss and "
                "cvlr.enabled=false, as recipe voc_distill does"
            )
        return self

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        model = self.model
        if model.lora_rank and model.frozen_stages == "all":
            raise ValueError(
                "model.frozen_stages 'all' leaves no layer to the corrections of model.lora_rank "
                f"{model.lora_rank}; set frozen_stages=0, as lora_rank freezes the encoder's own weights by itself"
            )
        if model.complementary_dropout and len(self.views.scales) < 2:
            raise ValueError(
                f"model.complementary_dropout {model.complementary_dropout} needs two views, and views.scales has one; "
                "set it to 0, or add a view"
            )
        if model.architecture == "deeplabv3plus" and (self.calibration.feature_share or model.complementary_dropout):
            raise ValueError(
                "model.architecture 'deeplabv3plus' has neither calibration.feature_share nor "
                "model.complementary_dropout; set both to 0"
            )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        """The crop is a multiple of the stride, or one more: then align-corners resizing meets pixel centers.

        Which crops fit a timm encoder, only the encoder knows: `build_network` checks those.
        """
        size, stride = self.data.crop_size, self.model.output_stride
        low = max(1, size // stride) * stride
        if size % stride not in (0, 1) and not self.model.encoder.startswith("timm:"):
            raise ValueError(
                f"data.crop_size {size} does not fit model.output_stride {stride}; "
                f"use {low}, {low + 1}, {low + stride} or {low + stride + 1}"
            )
        if size % stride and self.model.architecture == "deeplabv3plus":
            raise ValueError(
                f"model.architecture 'deeplabv3plus' needs a data.crop_size that is a multiple of model.output_stride "
                f"{stride}, not {size}; use {low} or {low + stride}"
            )
        smallest = min(self.views.scales) * size
        if smallest < 2 * stride:
            raise ValueError(
                f"the smallest view has {smallest:.0f} pixels a side, under two cells of output_stride {stride}; "
                f"enlarge data.crop_size ({size}) or the smallest of views.scales {self.views.scales}"
            )
        batch, accumulation = self.train.batch_size, self.train.accumulation
        if batch < accumulation:
            raise ValueError(
                f"train.batch_size {batch} is smaller than train.accumulation {accumulation}; the batch is the global "
                "one, split over accumulation steps and workers"
            )
        return self

    @property
    def weights_note(self) -> str:
        """Says behind a checkpoint's name that its weights are averages; empty where they are not."""
        return f" (weights averaged over steps, train.ema={self.train.ema:g})" if self.train.ema else ""

    @property
    def predicts_background(self) -> bool:
        """Whether the heads predict the background, instead of giving it a fixed logit."""
        return self.setting == "sss"

    def to_json(self) -> str:
        """The whole configuration as JSON text that `load_config` reads back."""
        return self.model_dump_json(indent=2) + "\n"

    def evaluation_for(self, protocol: Protocol) -> EvaluationConfig:
        """The evaluation's settings for a protocol: with a CRF, `crf.background_power` applies if it is set."""
        power = self.crf.background_power
        if protocol != "ms_crf" or power is None:
            return self.evaluation
        return self.evaluation.model_copy(update={"background_power": power})

    def flat(self) -> dict[str, Any]:
        """All fields as {"section.field": value}, for logging."""
        flat: dict[str, Any] = {}
        for key, value in self.model_dump(mode="json").items():
            flat |= {f"{key}.{name}": of for name, of in value.items()} if isinstance(value, dict) else {key: value}
        return flat


def nearest(name: str, known: Iterable[str]) -> str:
    """For messages about unknown names: "; the nearest one is 'NAME'", or empty text if none of the known is close."""
    known = list(known)
    leaf = name.rsplit(".", 1)[-1]
    same = [other for other in known if leaf and other.rsplit(".", 1)[-1] == leaf]  # `lr` is `optim.lr`, not `cvlr`
    close = difflib.get_close_matches(name, same or known, n=1, cutoff=0.4) or same
    close = close or [other for other in known if leaf and leaf in other.rsplit(".", 1)[-1]]
    return f"; the nearest one is {close[0]!r}" if close else ""


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Builds a `Config` from nested plain values.

    Raises:
        ConfigError: a key is unknown (the message names the nearest one), or a value has the wrong type or range.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


_MOST_BYTES = 2**24
"""Of a configuration file."""


def load_config(path: str | Path) -> Config:
    """Reads a `Config` from a JSON file that `Config.to_json` wrote.

    Raises:
        ConfigError: the file is missing, is no JSON object, or does not hold a valid configuration.
    """
    try:
        if not stat.S_ISREG((status := Path(path).stat()).st_mode) or status.st_size > _MOST_BYTES:
            raise IsADirectoryError
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a folder, pipe or device, or too large; name the file, such as config.json of a run"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}; name a config.json") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}; a run writes its config as config.json") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a config file holds one JSON object")
    if values and not values.keys() & Config.model_fields.keys():
        known = ", ".join(list(values)[:5])
        raise ConfigError(f"{path} is no configuration, its keys are {known}; a run writes its own as config.json")
    return config_from_dict(values)


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Returns `config` with fields replaced by `section.field=value` texts.

    Values are JSON where they parse as JSON (`0.5`, `true`, `[1.0, 0.5]`), else numbers such as `.5`, else plain text;
    `1.0,0.5` is a list too.

    Raises:
        ConfigError: a text has no `=`, a key is unknown, or a value has the wrong type or range.
    """
    values = config.model_dump(mode="json")
    for text in overrides:
        key, equals, raw = (part.strip() for part in text.partition("="))
        if not equals or not key:
            lacks = "'='" if key else "name"
            raise ConfigError(f"--set {text!r} has no {lacks}; write section.field=value, for instance optim.lr=0.001")
        parent, dot, field = key.rpartition(".")
        section = values.get(parent) if dot else values
        if not isinstance(section, dict) or field not in section:
            raise ConfigError(_unknown_key(key))
        if isinstance(section[field], dict):
            fields = ", ".join(f"{key}.{name}" for name in section[field])
            raise ConfigError(f"{key!r} is a section; set one of its fields: {fields}")
        section[field] = _parse_value(raw, section[field])
    return config_from_dict(values)


def _parse_value(raw: str, current: Any) -> Any:
    if isinstance(current, str):
        return raw
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = {"True": True, "False": False}.get(raw, raw)
        with contextlib.suppress(ValueError):
            value = float(raw)  # .5, 5. and +5 are no JSON
    if isinstance(current, list) and isinstance(value, (str, int, float)):
        value = [_parse_value(part.strip(), None) for part in raw.split(",") if part.strip()]
    return value


def _unknown_key(key: str) -> str:
    fields = sorted(Config().flat())
    known = fields if "." in key else [*fields, *Config.model_fields]
    return f"unknown config key {key!r}" + (nearest(key, known) or f"; known are {', '.join(fields)}")


def _explain(error: ValidationError) -> str:
    """All mistakes in one line; unknown keys alone, if there are any."""
    items = error.errors()
    unknown = [".".join(map(str, item["loc"])) for item in items if item["type"] == "extra_forbidden"]
    if unknown:
        return "; ".join(map(_unknown_key, unknown))
    lines = []
    for item in items:
        if item["type"] == "too_short" and any(other["loc"][:-1] == item["loc"] for other in items):
            continue  # pydantic counts the valid entries; the invalid ones have messages of their own
        where = ".".join(map(str, item["loc"]))
        message = "an entry is missing here" if item["type"] == "missing" else item["msg"].removeprefix("Value error, ")
        got = "" if item["type"] == "value_error" else f", got {item['input']!r}"
        lines.append(f"{where or 'config'}: {message}{got}")
    return "; ".join(lines)
