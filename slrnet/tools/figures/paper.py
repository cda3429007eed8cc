"""Tables 1 to 6 of the paper as it prints them: what our figures are laid beside."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PAPER_TABLES", "PaperTable"]


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    number: int
    about: str
    head: tuple[str, ...]
    """Names of the columns; figures are mIoU in percent."""
    rows: tuple[tuple[str, ...], ...]
    """The paper's cells, empty where it has none. I, P and S are image labels, pixel labels and saliency maps."""


def _table(number: int, about: str, text: str) -> PaperTable:
    head, *rows = (tuple(cell.strip() for cell in line.split("|")) for line in text.strip().splitlines())
    return PaperTable(number, about, head, tuple(rows))


PAPER_TABLES: tuple[PaperTable, ...] = (
    _table(
        1,
        "Pseudo masks of PASCAL VOC, gated by the true image labels",
        """
        Method                            | CRF | train | val
        CAM (Ahn and Kwak 2018)           |     | 48.0  | 46.8
        SCE (Chang et al. 2020)           |     | 50.9  | 49.6
        SEAM (Wang et al. 2020b)          | yes | 56.8  |
        CAM+RW (Ahn and Kwak 2018)        | yes | 59.7  |
        SCE+RW (Chang et al. 2020)        |     | 63.4  | 61.2
        1-Stage (Araslanov and Roth 2020) |     | 64.7  | 63.4
        1-Stage (Araslanov and Roth 2020) | yes | 66.9  | 65.3
        SLRNet                            |     | 67.1  | 66.2
        SLRNet                            | yes | 70.3  | 69.3
        """,
    ),
    _table(
        2,
        "Weakly supervised segmentation of PASCAL VOC",
        """
        Method                                | Backbone  | Labels | val  | test
        SEC (Kolesnikov and Lampert 2016)     | VGG16     | I, S   | 50.7 | 51.7
        MDC (Wei et al. 2018)                 | VGG16     | I, S   | 60.4 | 60.8
        DSRG (Huang et al. 2018)              | ResNet101 | I, S   | 61.4 | 63.2
        FickleNet (Lee et al. 2019)           | ResNet101 | I, S   | 64.9 | 65.3
        CIAN (Fan et al. 2020)                | ResNet101 | I, S   | 64.3 | 65.3
        MCIS (Sun et al. 2020)                | ResNet101 | I, S   | 66.2 | 66.9
        AffinityNet (Ahn and Kwak 2018)       | ResNet38  | I      | 61.7 | 63.7
        IRN (Ahn et al. 2019)                 | ResNet50  | I      | 63.5 | 64.8
        IAL (Wang et al. 2020a)               | ResNet38  | I      | 64.3 | 65.4
        SSDD (Shimoda and Yanai 2019)         | ResNet38  | I      | 64.9 | 65.5
        SEAM (Wang et al. 2020b)              | ResNet38  | I      | 64.5 | 65.7
        SCE (Chang et al. 2020)               | ResNet101 | I      | 66.1 | 65.9
        CONTA (Dong et al. 2020)              | ResNet38  | I      | 66.1 | 66.7
        EM-Adapt (Papandreou et al. 2015)     | VGG16     | I      | 38.2 | 39.6
        MIL-LSE (Pinheiro and Collobert 2015) | Overfeat  | I      | 42.0 | 40.6
        CRF-RNN (Zheng et al. 2015)           | VGG16     | I      | 52.8 | 53.7
        1-Stage (Araslanov and Roth 2020)     | ResNet38  | I      | 62.7 | 64.3
        SLRNet                                | ResNet38  | I      | 67.2 | 67.6
        SLRNet, distilled into DeepLabV3+     | ResNet38  | I      | 69.3 | 69.4
        """,
    ),
    _table(
        3,
        "Weakly supervised segmentation of COCO",
        """
        Method                            | Backbone | val
        BFBP (Saleh et al. 2016)          | VGG16    | 20.4
        SEC (Kolesnikov and Lampert 2016) | VGG16    | 22.4
        IAL (Wang et al. 2020a)           | ResNet38 | 27.7
        SEAM (Wang et al. 2020b)          | ResNet38 | 31.9
        IRNet (Ahn et al. 2019)           | ResNet50 | 32.6
        SEAM+CONTA (Dong et al. 2020)     | ResNet38 | 32.8
        IRNet+CONTA (Dong et al. 2020)    | ResNet50 | 33.4
        SLRNet                            | ResNet38 | 35.0
        """,
    ),
    _table(
        4,
        "Weakly supervised track of the L2ID challenge",
        """
        Team            | Year | Saliency | val   | test
        LEAP_DEXIN      | 2019 | yes      | 20.67 | 19.55
        MVN             | 2019 | yes      | 40.99 | 40.0
        UCU&SoftServe   | 2020 |          | 39.65 | 37.34
        VL-task1        | 2020 |          | 40.08 | 37.73
        CVL             | 2020 |          | 46.20 | 45.18
        LEAP Group      | 2021 |          | 40.94 | 39.03
        NJUST-JDExplore | 2021 |          | 42.18 | 39.68
        jszx101         | 2021 |          | 50.90 | 49.06
        SLRNet          | 2021 |          | 52.30 | 49.03
        """,
    ),
    _table(
        5,
        "PASCAL VOC with 1.4k pixel-labeled and 9k image-labeled images",
        """
        Method                      | Backbone | Labels  | val  | test
        GAIN (Li et al. 2018)       | VGG16    | I, P, S | 60.5 | 62.1
        DSRG (Huang et al. 2018)    | VGG16    | I, P, S | 64.3 |
        MDC (Wei et al. 2018)       | VGG16    | I, P, S | 65.7 | 67.6
        FickleNet (Lee et al. 2019) | VGG16    | I, P, S | 65.8 |
        GANSeg (Souly et al. 2017)  | VGG16    | I, P    | 65.8 |
        CCT (Ouali et al. 2020)     | ResNet50 | I, P    | 73.2 |
        PseudoSeg (Zou et al. 2021) | ResNet50 | I, P    | 73.8 |
        SLRNet                      | ResNet38 | I, P    | 75.1 | 75.5
        """,
    ),
    _table(
        6,
        "PASCAL VOC with 1.4k pixel-labeled and 9k unlabeled images",
        """
        Method                       | Backbone  | val
        GANSeg (Souly et al. 2017)   | VGG16     | 64.1
        AdvSemSeg (Hung et al. 2018) | ResNet101 | 68.4
        CCT (Ouali et al. 2020)      | ResNet50  | 69.4
        PseudoSeg (Zou et al. 2021)  | ResNet101 | 72.3
        SLRNet                       | ResNet38  | 72.4
        SLRNet                       | ResNet101 | 72.9
        """,
    ),
)
"""Tables 1 to 6."""
