"""A study as one page that anyone can open: no network, no scripts.

data    what the page shows, as plain records
page    the page
map     embeddings -> places in the plane
"""

from elmwood.report.data import Ancestor, Area, Curve, Place, Report
from elmwood.report.domains import domain_map
from elmwood.report.map import project
from elmwood.report.page import html

__all__ = ["Ancestor", "Area", "Curve", "Place", "Report", "domain_map", "html", "project"]
