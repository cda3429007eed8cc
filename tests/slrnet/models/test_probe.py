"""The linear probe: what it says of each place, that it is linear there, and that features feel nothing of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from slrnet.models.probe import Probe


def probe(*, image_labels: bool = True) -> Probe:
    torch.manual_seed(0)
    made = Probe(5, num_classes=3, image_labels=image_labels)
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    return made


FEATURES = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(1)) * 3 + 1


def test_starts_undecided() -> None:
    said = Probe(5, num_classes=3, image_labels=True)(FEATURES)
    assert said.logits.shape == (2, 3, 3, 4)
    assert said.activations is not None
    assert said.activations.shape == (2, 2, 3, 4)
    assert not said.logits.any()
    assert not said.activations.any()


def test_each_place_by_itself_from_features_of_one_scale() -> None:
    """In training by the mean and deviation of each channel over the batch; in evaluation by those of all batches."""
    made = probe()
    said = made(FEATURES)
    scaled = (FEATURES - FEATURES.mean((0, 2, 3), keepdim=True)) / FEATURES.std((0, 2, 3), correction=0, keepdim=True)
    for layer, maps in ((made.classify, said.logits), (made.activate, said.activations)):
        assert layer is not None
        expected = torch.einsum("kc,nchw->nkhw", layer.weight[:, :, 0, 0], scaled) + layer.bias[:, None, None]  # type: ignore[index]
        assert torch.allclose(maps, expected, atol=1e-4)
    made.eval()
    changed = FEATURES.clone()
    changed[:, :, 0, 0] += 5
    same = made(FEATURES).logits == made(changed).logits
    assert not same[:, :, 0, 0].any()
    assert same[:, :, 1:].all()


def test_no_gradient_flows_to_the_features() -> None:
    made, features = probe(), FEATURES.clone().requires_grad_()
    said = made(features)
    assert said.activations is not None
    (said.logits.square().sum() + said.activations.square().sum()).backward()
    assert features.grad is None
    assert all(weight.grad is not None for weight in made.parameters())


def test_without_image_labels_it_makes_no_activations() -> None:
    made = probe(image_labels=False)
    assert made(FEATURES).activations is None
    assert {name for name, _ in made.named_parameters()} == {"classify.weight", "classify.bias"}


def test_it_keeps_what_places_with_one_label_have_in_common() -> None:
    """A third of the labels is wrong at random; the masks learned from them are not."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (8, 12, 12), generator=generator)
    features = F.one_hot(truth, 5).permute(0, 3, 1, 2) + 0.3 * torch.randn(8, 5, 12, 12, generator=generator)
    wrong = torch.rand(truth.shape, generator=generator) < 1 / 3
    labels = torch.where(wrong, torch.randint(0, 3, truth.shape, generator=generator), truth)
    made = Probe(5, num_classes=3, image_labels=False)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(made(features).logits, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (labels == truth).float().mean() < 0.85
    assert (made(features).logits.argmax(dim=1) == truth).float().mean() > 0.95
