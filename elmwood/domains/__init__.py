"""Domains: embed documents, cluster them, name the clusters, route text to them. Free of torch."""
