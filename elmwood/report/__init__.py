"""The report of a study: one HTML page without network access or scripts, and drawings in files of their own."""

from elmwood.report.data import Ancestor, Area, Curve, MapPoint, Report
from elmwood.report.domain_map import domain_map, project
from elmwood.report.page import html

__all__ = ["Ancestor", "Area", "Curve", "MapPoint", "Report", "domain_map", "html", "project"]
