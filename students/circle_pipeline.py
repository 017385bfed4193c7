"""A model of ours as a pipeline of diffusers: a network, a scheduler and the loop over both.

students.pipeline writes these classes into an exported folder, with all of our code that they use,
so that they need diffusers alone there. NETWORK is then the network of that model.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor, nn

from diffusion.circle import TO_X0, add_noise, rotate
from diffusion.condition import KINDS, usual, with_null
from diffusion.denoiser import guide
from diffusion.networks.unet import UNet
from diffusion.samplers import renewing_step

NETWORK: type[nn.Module] = UNet

# By sampler, the step t -> s from x_t, the x0 predicted there and fresh noise z.
STEPS = {
    "ddim": lambda x_t, x0, t, s, z: rotate(x_t, x0, t, s),
    "truncated": lambda x_t, x0, t, s, z: rotate(x_t, x0, t, s),
    "ancestral": renewing_step,
    "consistency": lambda x_t, x0, t, s, z: add_noise(x0, z, s),
}


class CircleNetwork(ModelMixin, ConfigMixin):
    """x0 (B, C, H, W) of x_t = cos(t) x0 + sin(t) noise, t in radians."""

    @register_to_config
    def __init__(
        self,
        shape: dict[str, Any],
        outputs: int,
        kinds: dict[str, dict[str, Any]],
        prediction: str,
        bounds: tuple[float, float] | None = None,
    ):
        super().__init__()
        self.kinds = {}
        for name, kind in kinds.items():
            fields = {key: value for key, value in kind.items() if key != "kind"}
            self.kinds[name] = KINDS[kind["kind"]](**fields)
        self.net = NETWORK(SimpleNamespace(**shape), outputs, self.kinds)

    def forward(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """t: a scalar. condition: rows (B, ...) by name, such as label and guidance."""
        t = t.expand(x_t.shape[0])
        if "guidance" not in condition or "guidance" in self.kinds:
            return self._x0(x_t, t, condition)
        plain = {name: rows for name, rows in condition.items() if name != "guidance"}
        both = with_null(plain, self.kinds)
        x0 = self._x0(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        return guide(*x0.chunk(2), condition["guidance"])

    def _x0(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        output = self.net(x_t.to(self.dtype), t.float(), condition or None)
        prediction = output[:, : x_t.shape[1]].float()
        x0 = TO_X0[self.config["prediction"]](x_t, prediction, t)
        bounds = self.config["bounds"]
        return x0.clamp(*bounds) if bounds else x0


class CircleScheduler(SchedulerMixin, ConfigMixin):
    """Steps from angle to angle, as a model was trained to take them."""

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, sampler: str, angles: list[float]):
        """angles: in radians, ascending from 0."""
        self.set_timesteps()

    def set_timesteps(self, device: torch.device | str = "cpu") -> None:
        """The angles at which the network is called, from noise to image."""
        angles = torch.tensor(self.config["angles"], dtype=torch.float64, device=device)
        self.timesteps, self.ends = angles[1:].flip(0), angles[:-1].flip(0)

    @property
    def stochastic(self) -> bool:
        return self.config["sampler"] in ("ancestral", "consistency")

    def step(
        self,
        x0: Tensor,
        timestep: Tensor,
        sample: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> SchedulerOutput:
        """noise: of this step, where the sampler is stochastic; drawn if left out."""
        s = self.ends[self.timesteps == timestep][0]
        if noise is None:
            drawn = self.stochastic
            noise = torch.randn(sample.shape, generator=generator) if drawn else sample
        step = STEPS[self.config["sampler"]]
        return SchedulerOutput(prev_sample=step(sample, x0, timestep, s, noise.to(sample)))


class CirclePipeline(DiffusionPipeline):
    """Images in the few steps that a model was made for."""

    network: CircleNetwork
    scheduler: CircleScheduler

    def __init__(
        self,
        network: CircleNetwork,
        scheduler: CircleScheduler,
        mean: float = 127.5,
        std: float = 127.5,
        guidance: float | None = None,
    ):
        """mean, std: x0 = (grey level - mean) / std. guidance: the weight it was exported with."""
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)
        self.register_to_config(mean=mean, std=std, guidance=guidance)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        label: list[int] | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """So many images.

        label: a class for each; every class in turn if left out. noise: (steps, batch_size, C, H,
        W), the noise to start from and of each further step; drawn if left out. output_type: pil,
        or np for uint8 N x H x W x C.
        """
        device, net = self._execution_device, self.network.config["shape"]
        numbers = torch.arange(batch_size, device=device)
        given = {} if label is None else {"label": torch.tensor(label)}
        condition = usual(self.network.kinds, numbers, given)
        weight = self.config["guidance"] if guidance_scale is None else guidance_scale
        if condition and weight not in (None, 1):
            condition["guidance"] = torch.full(numbers.shape, float(weight), device=device)
        self.scheduler.set_timesteps(device)
        shape = (batch_size, net["channels"], net["size"], net["size"])
        x = torch.randn(shape, generator=generator) if noise is None else noise[0]
        x = x.to(device) * self.scheduler.init_noise_sigma
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps), 1):
            x0 = self.network(x, t, condition)
            given = noise[i].to(device) if noise is not None and i < len(noise) else None
            x = self.scheduler.step(x0, t, x, given, generator).prev_sample
        levels = (x * self.config["std"] + self.config["mean"]).round().clamp(0, 255)
        images = levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            return ImagePipelineOutput(images=self.numpy_to_pil(images / 255.0))
        return ImagePipelineOutput(images=images)
