"""Tables from vocabulary ids to experts (Hash Layers, arXiv 2106.04426, 3.2)."""

import heapq

import torch
from torch import Tensor

from expertmesh import random
from expertmesh.errors import UserError

_POINTS, _FIRST = random.label("k-means seeding"), random.label("hash table")


def random_table(num_ids: int, num_experts: int, *, seed: int = 0) -> Tensor:
    """An expert at random for each id: int64 ``(V,)``. Frequent ids may meet in one expert."""
    _check(num_ids, num_experts)
    draw_V = random.uniform(random.fold(seed, _FIRST), torch.arange(num_ids), torch.float64)
    return (draw_V * num_experts).long().clamp_max(num_experts - 1)


def balanced_table(count_V: Tensor, num_experts: int) -> Tensor:
    """Ids by falling frequency, each to the expert with the least so far: int64 ``(V,)``.

    Among experts with as much, the one with fewer ids and then the lower index; among ids as
    frequent, the lower first.

    Args:
        count_V: How often each id occurs in training data, ``(V,)``, integers of at least 0.
        num_experts: E.
    """
    _check(len(count_V), num_experts)
    if count_V.dim() != 1 or count_V.is_floating_point() or bool((count_V < 0).any()):
        raise UserError(
            "count_V must be integers of at least 0, one per vocabulary id; got "
            f"{count_V.dtype} of shape {tuple(count_V.shape)}"
        )
    counts = count_V.tolist()
    heap = [(0, 0, expert) for expert in range(num_experts)]
    table = [0] * len(counts)
    for token in sorted(range(len(counts)), key=lambda token: -counts[token]):
        load, members, expert = heap[0]
        table[token] = expert
        heapq.heapreplace(heap, (load + counts[token], members + 1, expert))
    return torch.tensor(table)


def clustered_table(
    embedding_VD: Tensor, num_experts: int, *, seed: int = 0, iterations: int = 20
) -> Tensor:
    """The k-means cluster of each id's embedding, one cluster per expert: int64 ``(V,)``.

    Args:
        embedding_VD: Embeddings of a trained model, ``(V, D)``; V >= E.
        num_experts: E.
        seed: Of the first centres, drawn as k-means++ does.
        iterations: Of Lloyd's algorithm, at most.
    """
    _check(len(embedding_VD), num_experts)
    if embedding_VD.dim() != 2 or len(embedding_VD) < num_experts:
        raise UserError(
            f"embedding_VD must be (V, D) with at least num_experts={num_experts} rows, got shape "
            f"{tuple(embedding_VD.shape)}"
        )
    point_VD = embedding_VD.detach().to(torch.float64)
    centre_ED = _first_centres(point_VD, num_experts, random.fold(seed, _POINTS))
    table_V = torch.cdist(point_VD, centre_ED).argmin(dim=1)
    for _ in range(iterations):
        member_EV = torch.nn.functional.one_hot(table_V, num_experts).T.to(point_VD.dtype)
        size_E1 = member_EV.sum(dim=1, keepdim=True)
        mean_ED = member_EV @ point_VD / size_E1.clamp_min(1)
        # A cluster that lost its members keeps its place.
        centre_ED = torch.where(size_E1 > 0, mean_ED, centre_ED)
        moved_V = torch.cdist(point_VD, centre_ED).argmin(dim=1)
        if torch.equal(moved_V, table_V):
            break
        table_V = moved_V
    return table_V


def dispersed_table(cluster_V: Tensor, num_experts: int) -> Tensor:
    """Each cluster's ids spread over all experts as evenly as they go: int64 ``(V,)``.

    Similar words then meet different experts. Takes the result of ``clustered_table`` or any other
    clustering; ids are dealt out in turn, cluster by cluster.

    Args:
        cluster_V: The cluster of each id, integers, ``(V,)``.
        num_experts: E.
    """
    _check(len(cluster_V), num_experts)
    place_V = cluster_V.argsort(stable=True).argsort(stable=True)
    return place_V % num_experts


def _first_centres(point_VD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Points drawn one by one, each with chances that grow as its squared distance from the rest.

    k-means++ (Arthur and Vassilvitskii, 2007).
    """
    draw_E = random.uniform(seed, torch.arange(num_experts), torch.float64).tolist()
    chosen = [min(int(draw_E[0] * len(point_VD)), len(point_VD) - 1)]
    distance_V = (point_VD - point_VD[chosen[0]]).square().sum(dim=1)
    for draw in draw_E[1:]:
        total_V = distance_V.cumsum(0)
        place = int(torch.searchsorted(total_V, draw * total_V[-1], right=True))
        chosen.append(min(place, len(point_VD) - 1))
        nearer_V = (point_VD - point_VD[chosen[-1]]).square().sum(dim=1)
        distance_V = torch.minimum(distance_V, nearer_V)
    return point_VD[chosen]


def _check(num_ids: int, num_experts: int) -> None:
    for field, value in (("the number of ids", num_ids), ("num_experts", num_experts)):
        if value < 1:
            raise UserError(f"{field} must be at least 1, got {value}")
