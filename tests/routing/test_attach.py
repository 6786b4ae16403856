import torch

from expertmesh.routing.attach import attach_loss


def test_attached_loss_trains_beside_the_main_loss():
    a = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    w = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    y = attach_loss(a * 2, 0.5 * w**2)
    assert torch.equal(y, a * 2)
    (y * torch.tensor([1.0, 10.0])).sum().backward()
    assert a.grad.tolist() == [2.0, 20.0]
    assert w.grad == 3.0


def test_output_that_needs_no_gradient_still_trains_the_loss():
    w = torch.tensor(3.0, requires_grad=True)
    attach_loss(torch.ones(2), w * 2).sum().backward()
    assert w.grad == 2.0


def test_scale_is_the_gradient_of_the_loss():
    for dtype in (torch.float32, torch.float64):
        w = torch.tensor(3.0, dtype=dtype, requires_grad=True)
        scale = torch.tensor(0.25, dtype=torch.float64)
        attach_loss(torch.ones(2, dtype=dtype), w * 2, scale).sum().backward()
        assert w.grad == 0.5
        assert w.grad.dtype == dtype


def test_compiled_with_a_scale():
    def run(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return attach_loss(torch.ones(2), w * 2, scale).sum()

    w = torch.tensor(3.0, requires_grad=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for scale in (0.25, 4.0):
        w.grad = None
        compiled(w, torch.tensor(scale, dtype=torch.float64)).backward()
        assert w.grad == 2 * scale
