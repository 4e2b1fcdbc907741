"""The table of published settings agrees with the recipes' published scores, which were entered apart from it."""

import re

import pytest

from diffusers_edm2.presets import PRESETS, Score
from diffusers_edm2.published import POSTHOC_ROOT, PUBLISHED, RAW_SNAPSHOTS_ROOT


def file_parts(name: str) -> tuple[str, bool, int, float]:
    """Preset, with classes, thousands of images, EMA length."""
    match = re.fullmatch(r"(edm2-img\d+-\w+?)(-uncond)?-(\d{7})-(0\.\d{3})\.pkl", name)
    assert match, name
    return match[1], match[2] is None, int(match[3]), float(match[4])


def test_there_are_36():
    assert len(PUBLISHED) == 36
    kinds = [re.fullmatch(r"edm2-img(512|64)-\w+(-uncond)?(-guid|-autog)?-(fid|dino)", name) for name in PUBLISHED]
    assert all(kinds)
    assert POSTHOC_ROOT.startswith("https://") and RAW_SNAPSHOTS_ROOT.startswith("https://")
    assert POSTHOC_ROOT != RAW_SNAPSHOTS_ROOT


@pytest.mark.parametrize("name", PUBLISHED)
def test_setting_is_a_published_score(name):
    """Network, EMA lengths, guide, weight and score are those of one of the recipe's scores."""
    setting = PUBLISHED[name]
    preset, conditional, kimg, sigma_rel = file_parts(setting.net)
    assert name.startswith(preset)
    assert kimg == PRESETS[preset].recipe["duration"] // 1000
    found = [score for score in PRESETS[preset].published.scores if matches(score, setting, conditional, sigma_rel)]
    assert len(found) == 1, name
    if setting.guide is None:
        assert found[0].guide is None and setting.guidance_scale == 1
    else:
        assert found[0].guide is not None
        guide_preset, guide_conditional, guide_kimg, guide_sigma_rel = file_parts(setting.guide)
        assert (guide_preset, guide_sigma_rel) == (found[0].guide.preset, found[0].guide.sigma_rel)
        assert guide_conditional == found[0].guide.conditional and guide_kimg == found[0].guide.duration // 1000


def matches(score: Score, setting, conditional: bool, sigma_rel: float) -> bool:
    return (score.metric, score.value, score.guidance_scale, score.sigma_rel, score.conditional) == (
        setting.metric,
        setting.score,
        setting.guidance_scale,
        sigma_rel,
        conditional,
    )
