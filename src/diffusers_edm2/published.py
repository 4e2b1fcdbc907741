"""The 36 settings of EDM2 that its authors published with weights: files on their server, guidance, and score.

Papers: EDM2 (arXiv 2312.02696) and autoguidance (arXiv 2406.02507). A file name says the network, the thousands of
training images (of which the last is not rounded up), and the EMA length: `edm2-img512-s-2147483-0.130.pkl`.
"""

from typing import Literal, NamedTuple

# Networks with the EMA lengths of the table below; snapshots with the two tracked lengths, all along the training.
POSTHOC_ROOT = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"
RAW_SNAPSHOTS_ROOT = "https://nvlabs-fi-cdn.nvidia.com/edm2/raw-snapshots"


class PublishedModel(NamedTuple):
    """One published setting.

    Args:
        net: file name of the network.
        guide: file name of the guiding network, or None.
        guidance_scale: weight of the guidance; 1 without a guide.
        metric: what `score` is; lower is better.
        score: over 50 000 images, the lowest of three times.
    """

    net: str
    guide: str | None
    guidance_scale: float
    metric: Literal["FID", "FD-DINOv2"]
    score: float


# name, network, guide, guidance weight, score; names and files without "edm2-" and ".pkl", "-" for none.
_TABLE = """
img512-xs-fid             img512-xs-2147483-0.135        -                               -     3.53
img512-xs-dino            img512-xs-2147483-0.200        -                               -     103.39
img512-s-fid              img512-s-2147483-0.130         -                               -     2.56
img512-s-dino             img512-s-2147483-0.190         -                               -     68.64
img512-m-fid              img512-m-2147483-0.100         -                               -     2.25
img512-m-dino             img512-m-2147483-0.155         -                               -     58.44
img512-l-fid              img512-l-1879048-0.085         -                               -     2.06
img512-l-dino             img512-l-1879048-0.155         -                               -     52.25
img512-xl-fid             img512-xl-1342177-0.085        -                               -     1.96
img512-xl-dino            img512-xl-1342177-0.155        -                               -     45.96
img512-xxl-fid            img512-xxl-0939524-0.070       -                               -     1.91
img512-xxl-dino           img512-xxl-0939524-0.150       -                               -     42.84
img64-s-fid               img64-s-1073741-0.075          -                               -     1.58
img64-m-fid               img64-m-2147483-0.060          -                               -     1.43
img64-l-fid               img64-l-1073741-0.040          -                               -     1.33
img64-xl-fid              img64-xl-0671088-0.040         -                               -     1.33
img512-xs-guid-fid        img512-xs-2147483-0.045        img512-xs-uncond-2147483-0.045  1.4   2.91
img512-xs-guid-dino       img512-xs-2147483-0.150        img512-xs-uncond-2147483-0.150  1.7   79.94
img512-s-guid-fid         img512-s-2147483-0.025         img512-xs-uncond-2147483-0.025  1.4   2.23
img512-s-guid-dino        img512-s-2147483-0.085         img512-xs-uncond-2147483-0.085  1.9   52.32
img512-m-guid-fid         img512-m-2147483-0.030         img512-xs-uncond-2147483-0.030  1.2   2.01
img512-m-guid-dino        img512-m-2147483-0.015         img512-xs-uncond-2147483-0.015  2.0   41.98
img512-l-guid-fid         img512-l-1879048-0.015         img512-xs-uncond-2147483-0.015  1.2   1.88
img512-l-guid-dino        img512-l-1879048-0.035         img512-xs-uncond-2147483-0.035  1.7   38.2
img512-xl-guid-fid        img512-xl-1342177-0.020        img512-xs-uncond-2147483-0.020  1.2   1.85
img512-xl-guid-dino       img512-xl-1342177-0.030        img512-xs-uncond-2147483-0.030  1.7   35.67
img512-xxl-guid-fid       img512-xxl-0939524-0.015       img512-xs-uncond-2147483-0.015  1.2   1.81
img512-xxl-guid-dino      img512-xxl-0939524-0.015       img512-xs-uncond-2147483-0.015  1.7   33.09
img512-s-autog-fid        img512-s-2147483-0.070         img512-xs-0134217-0.125         2.1   1.34
img512-s-autog-dino       img512-s-2147483-0.120         img512-xs-0134217-0.165         2.45  36.67
img512-xxl-autog-fid      img512-xxl-0939524-0.075       img512-m-0268435-0.155          2.05  1.25
img512-xxl-autog-dino     img512-xxl-0939524-0.130       img512-m-0268435-0.205          2.3   24.18
img512-s-uncond-autog-fid img512-s-uncond-2147483-0.070  img512-xs-uncond-0134217-0.110  2.85  3.86
img512-s-uncond-autog-dino img512-s-uncond-2147483-0.090  img512-xs-uncond-0134217-0.125  2.9   90.39
img64-s-autog-fid         img64-s-1073741-0.045          img64-xs-0134217-0.110          1.7   1.01
img64-s-autog-dino        img64-s-1073741-0.105          img64-xs-0134217-0.175          2.2   31.85
"""


def _parse(table: str) -> dict[str, PublishedModel]:
    models = {}
    for line in table.split("\n")[1:-1]:
        name, net, guide, weight, score = line.split()
        models[f"edm2-{name}"] = PublishedModel(
            f"edm2-{net}.pkl",
            None if guide == "-" else f"edm2-{guide}.pkl",
            1.0 if weight == "-" else float(weight),
            "FID" if name.endswith("-fid") else "FD-DINOv2",
            float(score),
        )
    return models


PUBLISHED = _parse(_TABLE)
