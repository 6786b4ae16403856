def test_an_order_differs_by_seed_and_epoch(numbers):
    data = numbers(40)
    orders = [tuple(data.order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(data.order(0, 1)) == orders[1]
