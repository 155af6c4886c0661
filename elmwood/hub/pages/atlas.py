"""The map of a partition as `hub publish` keeps it for the pages: its domains, and some documents of each in the plane."""

import numpy as np
from safetensors.numpy import load_file

from elmwood.records import Frozen, Partition
from elmwood.report.data import Area, MapPoint
from elmwood.store import Store
from elmwood.study.page import map_domains


class Atlas(Frozen):
    """Domains and places. Without text there is one place for each domain, that of its centroid."""

    areas: tuple[Area, ...]
    places: tuple[MapPoint, ...]
    text: bool  # places are documents


def make(partition: Partition, store: Store) -> Atlas:
    """Embeds some documents and places them: it takes two seconds and imports scikit-learn, so a hub that serves never calls it."""
    if any(domain.train for domain in partition.domains):
        areas, places = map_domains(partition, store)
        return Atlas(areas=areas, places=places, text=True)
    plane_K2 = first_components(load_file(store.get(partition.centroids))["centroids"])
    areas = tuple(Area(name=domain.name, terms=domain.terms) for domain in partition.domains)
    places = tuple(MapPoint(x=x, y=y, domain=k, text=areas[k].name) for k, (x, y) in enumerate(plane_K2.tolist()))
    return Atlas(areas=areas, places=places, text=False)


def first_components(x_KD: np.ndarray) -> np.ndarray:
    """Rows -> the plane of their first two principal components, each axis from 0 to 1 [K, 2]."""
    centred_KD = np.asarray(x_KD, np.float64) - np.mean(x_KD, axis=0, dtype=np.float64)
    left_KR, size_R, _ = np.linalg.svd(centred_KD, full_matrices=False)
    plane_K2 = np.zeros((len(x_KD), 2))
    wide = min(2, len(size_R))
    plane_K2[:, :wide] = left_KR[:, :wide] * size_R[:wide]
    low_2, spread_2 = plane_K2.min(0), np.ptp(plane_K2, axis=0)
    return np.where(spread_2 > 1e-12, (plane_K2 - low_2) / np.where(spread_2 > 1e-12, spread_2, 1), 0.5)
