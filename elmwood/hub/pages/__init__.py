"""The pages of a hub: what was trained, by whom, how it was judged, and what waits. They read the database and change nothing."""
