"""Our samplers are diffusers' schedulers, on the schedule and the steps that both have."""

import pytest

pytest.importorskip("diffusers")

from benchmarks.schedulers import PEERS, PREDICTIONS, difference, random_network
from tests.analytic import BIMODAL

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("told", PREDICTIONS)
def test_a_sampler_makes_its_peers_images_with_one_random_network(peer, told):
    """Both in float64, but for their tables; their Euler starts from sigma for sqrt(sigma^2 + 1)."""
    assert difference(peer, random_network(), 10, told) < 1e-4


@pytest.mark.parametrize("peer", PEERS)
def test_a_sampler_makes_its_peers_images_of_a_mixture_of_gaussians(peer):
    assert difference(peer, BIMODAL, 50) < 1e-4
