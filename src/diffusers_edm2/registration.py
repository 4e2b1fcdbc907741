"""Make our classes known to Diffusers, which has no plugin mechanism. Importing `diffusers_edm2` runs this once.

Afterwards `DiffusionPipeline.from_pretrained` loads our folders with the installed classes and without
`trust_remote_code`, and `save_pretrained` stores the stable name `["diffusers_edm2", "EDM2UNet2DModel"]` instead of a
module path. Nothing changes for folders of others: we only add names.
"""

import diffusers
from diffusers.pipelines import pipeline_loading_utils

from diffusers_edm2.pipeline_edm2 import EDM2Pipeline
from diffusers_edm2.scheduling_edm2_heun import EDM2HeunScheduler
from diffusers_edm2.unet_edm2 import EDM2UNet2DModel


def register() -> None:
    """Add our three classes to the tables in which Diffusers looks for classes by name."""
    for cls in (EDM2UNet2DModel, EDM2HeunScheduler, EDM2Pipeline):
        setattr(diffusers, cls.__name__, cls)
    # By base class, as Diffusers lists its own: any other scheduler or network may then take a component's place.
    # Diffusers looks these names up in `diffusers_edm2` itself.
    methods = ["save_pretrained", "from_pretrained"]
    pipeline_loading_utils.LOADABLE_CLASSES["diffusers_edm2"] = {"ModelMixin": methods, "SchedulerMixin": methods}
