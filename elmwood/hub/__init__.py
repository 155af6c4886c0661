"""The hub: strangers train experts of one seed, and each is leased, verified, credited and removable."""

from elmwood.registry import require

require("cryptography", "hub")  # the first of what the extra brings, for servers and for those who work with one
