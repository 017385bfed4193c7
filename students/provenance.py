"""What a file of generated images says of how they were made, and who reads it back."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from diffusion.folders import SIGN
from diffusion.plan import Plan

Texts = dict[str, str]
"""By its keyword, a text chunk of a PNG (W3C PNG, section 11.3.3); no keyword exceeds 79 bytes."""


def provenance(sha256: str, method: str, plan: Plan, seed: int, **others: object) -> Texts:
    """What all images of one plan and seed have in common.

    sha256: of the model's weights. others: further facts, by name; those that are None are left
    out.
    """
    facts = {
        "Model": method,
        "Model sha256": sha256,
        "Seed": seed,
        "Sampler": plan.sampler,
        "Steps": plan.num_steps,
        "Guidance": plan.guidance,
    }
    named = {name.replace("_", " ").capitalize(): value for name, value in others.items()}
    known = {name: value for name, value in (facts | named).items() if value is not None}
    return {"Software": software()} | {name: str(value) for name, value in known.items()}


def software() -> str:
    """The suite and its version, by which a file of the suite's is known."""
    number = ""
    with suppress(PackageNotFoundError):  # run from its folder, not installed
        number = " " + version("fewstep")
    return SIGN + number
