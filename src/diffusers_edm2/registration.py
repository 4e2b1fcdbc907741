"""Make our classes known to Diffusers, which has no plugin mechanism. Importing `diffusers_edm2` runs this once.

A folder that we write carries its code, so that Diffusers can load it with `trust_remote_code=True` where this package
is not installed: its index names our classes by the files beside the weights, `["unet_edm2", "EDM2UNet2DModel"]`. After
`register` Diffusers reads exactly these names as the installed classes, and runs no code from the folder. Nothing
changes for folders of others.
"""

from typing import Any

import diffusers
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines import pipeline_loading_utils

from diffusers_edm2.pipeline_edm2 import EDM2Pipeline
from diffusers_edm2.scheduling_edm2_heun import EDM2HeunScheduler
from diffusers_edm2.unet_edm2 import EDM2UNet2DModel

PACKAGE = __name__.partition(".")[0]
# As JSON gives the entries of an index. A pipeline's own entry is a plain name where its class is installed.
INSTALLED: dict[tuple[str, str], str | list[str]] = {
    ("pipeline_edm2", "EDM2Pipeline"): "EDM2Pipeline",
    ("unet_edm2", "EDM2UNet2DModel"): [PACKAGE, "EDM2UNet2DModel"],
    ("scheduling_edm2_heun", "EDM2HeunScheduler"): [PACKAGE, "EDM2HeunScheduler"],
}

_read: Any = vars(ConfigMixin)["_dict_from_json_file"].__func__


def register() -> None:
    """Add our classes to the tables in which Diffusers looks for classes, and their files' names to its reader."""
    for cls in (EDM2UNet2DModel, EDM2HeunScheduler, EDM2Pipeline):
        setattr(diffusers, cls.__name__, cls)
    # By base class, as Diffusers lists its own: any other scheduler or network may then take a component's place.
    # Diffusers looks these names up in `diffusers_edm2` itself.
    methods = ["save_pretrained", "from_pretrained"]
    pipeline_loading_utils.LOADABLE_CLASSES[PACKAGE] = {"ModelMixin": methods, "SchedulerMixin": methods}
    # The two that read an index: for all pipelines, ours among them, and for a component by itself.
    readers: tuple[Any, ...] = (diffusers.DiffusionPipeline, diffusers.AutoModel)
    for reader in readers:
        reader._dict_from_json_file = classmethod(_dict_from_json_file)


def _dict_from_json_file(cls: type[ConfigMixin], json_file: Any, **kwargs: Any) -> dict[str, Any]:
    """Diffusers' own reader (older versions pass it one more argument), with our names translated."""
    content = _read(cls, json_file, **kwargs)
    return {name: INSTALLED.get(_entry(value), value) for name, value in content.items()}


def _entry(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else ()
