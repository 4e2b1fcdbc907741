"""EDM2 diffusion models for Diffusers: importing this package lets `DiffusionPipeline.from_pretrained` load them."""

from diffusers import ModelMixin as ModelMixin
from diffusers import SchedulerMixin as SchedulerMixin

from diffusers_edm2.ema import PowerFunctionEMA
from diffusers_edm2.loss import EDM2Loss
from diffusers_edm2.pipeline_edm2 import EDM2Pipeline
from diffusers_edm2.registration import register
from diffusers_edm2.scheduling_edm2_heun import EDM2HeunScheduler
from diffusers_edm2.snapshots import open_pipeline
from diffusers_edm2.unet_edm2 import EDM2UNet2DModel

__version__ = "0.1.0"
__all__ = ["EDM2HeunScheduler", "EDM2Loss", "EDM2Pipeline", "EDM2UNet2DModel", "PowerFunctionEMA"]

register()
EDM2Pipeline._open_run = staticmethod(open_pipeline)
