"""The map of a partition as `hub publish` keeps it for the pages: its domains, and some documents of each in the plane."""

from elmwood.records import Frozen, Partition
from elmwood.report.data import Area, MapPoint
from elmwood.store import Store
from elmwood.study.page import map_domains


class Atlas(Frozen):
    """Domains and places. No places where the partition was published without text: then the centroids stand for the domains."""

    areas: tuple[Area, ...]
    places: tuple[MapPoint, ...] = ()


def make(partition: Partition, store: Store) -> Atlas:
    """Embeds some documents and places them: two seconds, and imports scikit-learn, so a hub that serves never calls it."""
    if not any(domain.train for domain in partition.domains):
        return Atlas(areas=tuple(Area(name=domain.name, terms=domain.terms) for domain in partition.domains))
    areas, places = map_domains(partition, store)
    return Atlas(areas=areas, places=places)
