import pytest
import torch

from expertmesh.metrics import POSITION_BINS, RoutingMeter, summarize
from expertmesh.routing import Capacity, TopKRouter, router_preset


def counted(router, x, **arguments):
    meter = RoutingMeter(router.num_experts)
    routing = router(x, **arguments)
    padding, length = arguments.get("padding_mask"), arguments.get("sequence_length")
    meter.count(routing, len(routing.expert_TK), padding, length)
    return meter, routing


def test_statistics_of_a_known_load():
    router = TopKRouter(4, 4, 1, dtype=torch.float64)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(4) * 3)
    x = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 0, 0, 0, 1, 2]]
    meter, _ = counted(router, x)
    summary = summarize(meter.read())
    assert summary.load == [6, 1, 1, 0]
    assert summary.relative_load == [3.0, 0.5, 0.5, 0.0]
    assert summary.imbalance == 3.0
    assert summary.cv == pytest.approx((5.5 / 4) ** 0.5)
    assert summary.dead == 1
    p = torch.tensor([3.0, 0, 0, 0]).softmax(0)
    assert summary.entropy == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)
    assert summary.max_logit == 3.0
    assert summary.dropped == 0.0


def test_drops_by_position_show_who_came_late():
    torch.manual_seed(0)
    router = TopKRouter(4, 2, 1, capacity=Capacity(factor=0.5, scope="sequence"))
    meter, routing = counted(router, torch.randn(64 * 32, 4), sequence_length=32)
    summary = summarize(meter.read())
    assert summary.dropped == pytest.approx(float(routing.num_dropped) / (64 * 32))
    assert len(summary.dropped_by_position) == POSITION_BINS
    assert summary.dropped_by_position[0] == 0.0
    assert summary.dropped_by_position[-1] > 0.8


def test_choices_that_a_rule_skips_asked_for_no_slot():
    torch.manual_seed(0)
    router = router_preset("st_moe", dim=8, num_experts=4, capacity=Capacity(factor=0.3))
    meter, routing = counted(router, 100 * torch.randn(512, 8))
    metrics = meter.read()
    asked = int(metrics["load"].value.sum())
    assert asked < 2 * 512
    assert int(metrics["choices"].value.sum()) == asked
    assert summarize(metrics).dropped == pytest.approx(int(routing.num_dropped) / asked)


def test_counts_on_after_inference_mode():
    router = TopKRouter(4, 3, 2)
    with torch.inference_mode():
        meter, _ = counted(router, torch.randn(8, 4))
    routing = router(torch.randn(5, 4))
    meter.count(routing, 5, None, None)
    with torch.inference_mode():
        meter.count(routing, 5, None, None)
    assert sum(summarize(meter.read()).load) == 2 * (8 + 5 + 5)


def test_counters_follow_the_layer_to_another_device():
    router = TopKRouter(4, 3, 2)
    meter, _ = counted(router, torch.randn(8, 4))
    meter.count(router.to("meta")(torch.randn(8, 4, device="meta")), 8, None, None)
    assert {metric.value.device.type for metric in meter.read().values()} == {"meta"}


def test_padding_is_left_out():
    router = TopKRouter(4, 3, 2)
    x = torch.randn(10, 4)
    mask = torch.arange(10) > 6
    padded = summarize(counted(router, x, padding_mask=mask)[0].read())
    alone = summarize(counted(router, x[:7])[0].read())
    assert padded.load == alone.load
    assert padded.entropy == pytest.approx(alone.entropy)
    assert padded.max_logit == alone.max_logit


def test_nothing_counted_is_all_zero():
    summary = summarize(RoutingMeter(3).read())
    assert (summary.load, summary.imbalance, summary.dead, summary.dropped) == ([0] * 3, 0, 0, 0)
    router = TopKRouter(4, 3, 2)
    assert summarize(counted(router, torch.empty(0, 4))[0].read()).entropy == 0


def test_counters_say_how_they_reduce():
    metrics = counted(TopKRouter(4, 3, 2), torch.randn(5, 4))[0].read()
    assert {name for name, metric in metrics.items() if metric.reduce == "max"} == {"max_logit"}
