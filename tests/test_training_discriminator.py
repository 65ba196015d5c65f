import pytest
import torch

from dp_lora.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss


@pytest.mark.parametrize(("size", "patches"), [(8, 2), (16, 2), (32, 2), (64, 6)])
def test_there_is_a_logit_for_every_patch_at_any_size(size, patches):
    logits = PatchDiscriminator(3, size)(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, 1, patches, patches)


def test_the_hinge_loss_asks_for_margins_of_one_and_no_more():
    right, beyond = torch.tensor([1.0, 1.0]), torch.tensor([5.0, 9.0])
    assert hinge_loss(right, -right) == hinge_loss(beyond, -beyond) == 0
    assert hinge_loss(torch.zeros(2), torch.zeros(2)) == 1
    assert hinge_loss(-right, right) == 2


def test_the_discriminator_learns_to_tell_two_kinds_of_pictures_apart():
    torch.manual_seed(0)
    network = PatchDiscriminator(1, 8)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(30):
        real, fake = torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8).mean(dim=3, keepdim=True).expand(-1, -1, -1, 8)
        loss = hinge_loss(network(real), network(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


def test_the_adaptive_weight_makes_both_gradients_equally_long():
    last_layer = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, generator = (30 * last_layer).sum(), (0.5 * last_layer).sum()
    weight = adaptive_weight(reconstruction, generator, last_layer)
    assert weight.item() == pytest.approx(60, rel=1e-3)
    assert not weight.requires_grad
