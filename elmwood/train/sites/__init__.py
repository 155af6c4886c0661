"""One seed at several trusted sites: DiLoCo and Streaming DiLoCo over torchft. Never exposed to strangers: see docs/sites.md."""
