"""SLRNet: one network for any number of views (paper Fig. 2, left).

Encoder, ASPP and skip fusion run on each view. CVLR factorizes the features of all views together. The gated decoder
predicts the masks of each view. The network returns outputs; it knows no labels and computes no losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slrnet.config import Config, ModelConfig
from slrnet.models.cvlr import CrossViewLowRank
from slrnet.models.decoder import (
    ASPP,
    GlobalCueInjection,
    MaskHead,
    SkipFusion,
    StochasticGate,
    complementary_dropout,
    conv_norm_relu,
)
from slrnet.models.deeplab import DeepLabV3Plus
from slrnet.models.encoders import Encoder, build_encoder, check_sizes
from slrnet.models.heads import AuxiliaryHead, class_scores
from slrnet.models.low_rank import build_low_rank
from slrnet.models.network import Network, Outputs
from slrnet.models.probe import Probe
from slrnet.ops.maps import class_probs

__all__ = ["SLRNet", "build_network"]


class SLRNet(Network):
    """The paper's network.

    Args:
        encoder: returns deep and shallow features (see `slrnet.models.encoders`).
        config: channels, dilations, dropout, gate and focal penalty of decoder and heads.
        num_classes: K with the background.
        cvlr: the low-rank module; None leaves the features unchanged.
        predict_background: the heads predict the background, and there are no class scores.
        probe: also classify the encoder's features by a linear probe.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: ModelConfig,
        *,
        num_classes: int,
        cvlr: CrossViewLowRank | None,
        predict_background: bool = False,
        probe: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.predict_background = predict_background
        self.focal_power = config.focal_power
        self.focal_floor = config.focal_floor
        self.encoder = encoder
        dim, dropout = config.decoder_dim, config.dropout
        head: dict[str, Any] = {"num_classes": num_classes, "predict_background": predict_background}
        self.aspp = ASPP(encoder.out_channels, dim=dim, dilations=config.aspp_dilations, dropout=dropout)
        self.fusion = SkipFusion(
            dim, skip_channels=encoder.skip_channels, skip_dim=config.skip_dim, skip_share=config.skip_share
        )
        self.auxiliary_head: AuxiliaryHead | None = None
        if cvlr is not None and cvlr.class_codes:
            self.auxiliary_head = AuxiliaryHead(dim, dropout=dropout, **head)
        self.auxiliary_views = config.auxiliary_views
        self.complementary_dropout = config.complementary_dropout
        self.cvlr = cvlr
        shallow = dim if config.lift_skip else encoder.skip_channels
        self.lift = conv_norm_relu(encoder.skip_channels, dim, 1) if config.lift_skip else None
        self.cue_injection = GlobalCueInjection(shallow, dim=dim)
        self.gate = StochasticGate(config.gate_rate)
        head_dropout = dropout if config.head_dropout is None else config.head_dropout
        self.mask_head = MaskHead(dim, dropout=head_dropout, layers=config.head_layers, **head)
        for part in (self.aspp, self.fusion, self.auxiliary_head, self.lift, self.cue_injection, self.mask_head):
            if part is not None:
                _initialize(part, zero_biases=config.bias_start == "zero")
        self.probe: Probe | None = None
        if probe:  # last, so that it changes no other weight's random start
            self.probe = Probe(encoder.out_channels, num_classes=num_classes, image_labels=not predict_background)

    def forward(self, views: Sequence[Tensor]) -> Outputs:
        """Predicts masks and class scores; see `Network.forward`."""
        features, shares = [], []
        encoded = [self.encoder(view) for view in views]
        deep_features, skips = [view.deep for view in encoded], [view.skip for view in encoded]
        dropped = complementary_dropout(deep_features, self.complementary_dropout if self.training else 0.0)
        for deep, skip in zip(dropped, skips, strict=True):
            fused, share = self.fusion(self.aspp(deep), skip)
            features.append(fused)
            shares += [] if share is None else [share]
        auxiliary = [] if self.auxiliary_head is None else [self.auxiliary_head(view) for view in self._seen(features)]
        codes: list[Tensor] = []
        if self.cvlr is not None:
            low_rank = self.cvlr(features, auxiliary)
            features, codes = low_rank.features, low_rank.codes if self.cvlr.class_codes else []
        logits = [self._decode(deep, skip) for deep, skip in zip(features, skips, strict=True)]
        figures = {"skip_share": torch.stack(shares).mean()} if shares else {}
        probed = [] if self.probe is None else [self.probe(deep) for deep in deep_features]
        return Outputs(
            logits,
            self._score(logits),
            auxiliary,
            self._score(auxiliary),
            codes,
            probe_logits=[view.logits for view in probed],
            probe_activations=[view.activations for view in probed if view.activations is not None],
            features=[view.told for view in encoded],
            figures=figures,
        )

    def regions(self) -> list[nn.Module]:
        """Everything but CVLR, which consists of matrix products, and the class scores."""
        parts = (self.encoder.backbone, self.aspp, self.fusion, self.auxiliary_head, self.lift, self.cue_injection)
        return [part for part in (*parts, self.gate, self.mask_head) if part is not None]

    def _seen(self, features: list[Tensor]) -> list[Tensor]:
        """The views that the auxiliary head sees."""
        return features if self.auxiliary_views == "all" else features[:1]

    def _decode(self, features: Tensor, skip: Tensor) -> Tensor:
        skip = skip if self.lift is None else self.lift(skip)
        return self.mask_head(self.gate(features, self.cue_injection(skip, features)))  # type: ignore[no-any-return]

    def _score(self, logits: list[Tensor]) -> list[Tensor]:
        if self.predict_background:
            return []
        return [
            class_scores(view, class_probs(view), focal_power=self.focal_power, focal_floor=self.focal_floor)
            for view in logits
        ]


def build_network(config: Config, *, num_classes: int, weights: bool = True) -> Network:
    """Builds the network of a run.

    Args:
        config: the run's settings.
        num_classes: K with the background.
        weights: load the encoder's weights; False: leave them random, for a network that gets all its weights later.

    Raises:
        ValueError: unknown encoder, images that do not fit it, a weights file that is missing or does not fit, or an
            architecture whose extra is not installed.
    """
    model = config.model
    encoder = build_encoder(model if weights else model.model_copy(update={"encoder_weights": "none"}))
    if config.calibration.feature_source == "attention":
        encoder.keep_attention()
    check_sizes(encoder, config)
    if model.architecture == "deeplabv3plus":
        return DeepLabV3Plus(encoder, model, num_classes=num_classes)
    return SLRNet(
        encoder,
        model,
        num_classes=num_classes,
        cvlr=build_low_rank(config.cvlr, model.decoder_dim) if config.cvlr.enabled else None,
        predict_background=config.predicts_background,
        probe=config.calibration.masks == "probe",
    )


def _initialize(part: nn.Module, *, zero_biases: bool) -> None:
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None and zero_biases:
                nn.init.zeros_(module.bias)
