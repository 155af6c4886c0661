"""The hub: strangers train experts of one seed, and each is leased, verified, credited and removable."""
