"""Slab by slab: each slice once, blended, and the same as at once where a network does not look across slices."""

import pytest
import torch

from memnet.nets.modl import MoDL
from memnet.nets.packed import PackedMoDL, pack, unpack
from memnet.workflow.slabs import SlabInferer


@pytest.mark.parametrize(("n_slices", "size", "overlap"), [(17, 6, 2), (12, 6, 0), (5, 6, 2), (7, 6, 5)])
def test_slabs_cover_every_slice(n_slices, size, overlap):
    volume = torch.randn(2, 3, n_slices, 4, 5)
    seen = []

    def network(slab):
        seen.append(slab.shape[2])
        return 2 * slab

    torch.testing.assert_close(SlabInferer(size, overlap)(volume, network), 2 * volume)
    assert max(seen) <= size and sum(seen) >= n_slices


def test_the_middle_of_a_slab_counts_more_than_its_edge():
    # each slab answers with the distance to its own edge: what is blended from edges would be smaller
    def network(slab):
        place = torch.arange(slab.shape[2])
        return torch.minimum(place, place.flip(0)).float()[None, None, :, None, None].expand_as(slab)

    result = SlabInferer(8, 4)(torch.zeros(1, 1, 12, 1, 1), network).flatten()
    assert result[4:8].min() > (0 + 3) / 2


def test_bfloat16_is_for_the_network_alone():
    kspace = torch.randn(2, 2, 8, 8, dtype=torch.complex64)
    image = pack(kspace, torch.ones_like(kspace) / 2**0.5, torch.ones(1, 1, 8, 8))[None]
    net = PackedMoDL(n_unrolls=1, channels=4)
    with torch.no_grad():
        exact, rounded = (SlabInferer(amp=amp)(image, net) for amp in (False, True))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).norm() < 0.02 * exact.norm()


def test_packed_input_is_the_networks_three():
    kspace, csm = (torch.randn(3, 2, 6, 5, dtype=torch.complex64) for _ in range(2))
    mask = torch.rand(1, 1, 6, 5) < 0.5
    packed = pack(kspace, csm[:, :1], mask)
    assert packed.shape == (7, 2, 6, 5)
    back = unpack(packed[None])
    for a, b in zip(back, (kspace, csm[:, :1].expand_as(csm), mask.expand(1, 2, 6, 5)), strict=True):
        assert torch.equal(a[0], b.to(a.dtype))
    assert back[0].data_ptr() == packed.data_ptr(), "k-space was copied"
    net = PackedMoDL(n_unrolls=2, channels=4)
    plain = MoDL(n_unrolls=2, channels=4)
    plain.load_state_dict(net.state_dict())
    image = plain(kspace[None] * mask, csm[None, :, :1], mask[None])
    torch.testing.assert_close(torch.complex(*net(packed[None] * 1).unbind(1)), image)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 4, 2, 2, 2, dtype=torch.complex64)])
def test_what_is_not_packed_is_refused(wrong):
    with pytest.raises(ValueError, match="2 coils . 1"):
        unpack(wrong)


def test_an_overlap_as_large_as_a_slab_is_refused():
    with pytest.raises(ValueError, match="less than slab_size 4, got 4"):
        SlabInferer(4, 4)
