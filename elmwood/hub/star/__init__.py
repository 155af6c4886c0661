"""A star: one coordinator and a few named machines that train a seed together over slow links. It needs no hub, and can stand in one."""
